//! `volumes` and `volumeMounts` of a pod as Kubernetes writes it: those that a machine of its own can have. The others
//! are known by name, so that the error says what to use instead.
#![forbid(unsafe_code)]

use std::net::IpAddr;

use cube_guest::{MountSource, MountSpec, VolumeSource, VolumeSpec};
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::pod_spec::{Amount, PodSpecError, bytes, check_name, value};
use crate::image::writable::MIN_SIZE;

/// What everybody may write, as Kubernetes makes an emptyDir.
const EMPTY_DIR_MODE: u32 = 0o777;
/// Disks are whole blocks of this size.
const BLOCK_SIZE: u64 = 4096;

/// A volume.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct Volume {
    name: String,
    empty_dir: Option<EmptyDir>,
    nfs: Option<Nfs>,
    host_path: Option<IgnoredAny>,
    config_map: Option<IgnoredAny>,
    secret: Option<IgnoredAny>,
    projected: Option<IgnoredAny>,
    #[serde(rename = "downwardAPI")]
    downward_api: Option<IgnoredAny>,
    persistent_volume_claim: Option<IgnoredAny>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct EmptyDir {
    #[serde(default)]
    medium: String,
    size_limit: Option<Amount>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Nfs {
    server: String,
    path: String,
    #[serde(default)]
    read_only: bool,
}

/// A place where a container has a volume.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(super) struct VolumeMount {
    name: String,
    mount_path: String,
    #[serde(default)]
    sub_path: String,
    #[serde(default)]
    read_only: bool,
    mount_propagation: Option<String>,
}

/// A volume to make.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// As the guest is told.
    pub(crate) spec: VolumeSpec,
    /// Of its disk, in bytes; absent: it has none.
    pub(crate) disk_size: Option<u64>,
}

/// The volumes; an emptyDir on a disk without a limit has `disk_size` bytes.
pub(super) fn wanted(volumes: &[Volume], disk_size: u64) -> Result<Vec<Wanted>, PodSpecError> {
    let numbered = volumes.iter().enumerate();
    numbered
        .map(|(index, volume)| {
            let field = format!("spec.volumes[{index}]");
            volume.wanted(&field, &format!("volume{index}"), disk_size)
        })
        .collect()
}

/// Refuses what a pod without a network cannot have.
pub(super) fn check_without_network(volumes: &[Volume]) -> Result<(), PodSpecError> {
    match volumes.iter().position(|volume| volume.nfs.is_some()) {
        None => Ok(()),
        Some(index) => {
            let sentence = "the pod has no network to reach its server by: see --net";
            Err(value(format!("spec.volumes[{index}].nfs"), sentence))
        }
    }
}

/// Checks that names and paths fit together: `mounts` are a container's, which `field` names.
pub(super) fn check(
    volumes: &[Volume],
    mounts: &[VolumeMount],
    field: &str,
) -> Result<(), PodSpecError> {
    for (index, mount) in mounts.iter().enumerate() {
        let field = format!("{field}.volumeMounts[{index}]");
        mount.check(&field)?;
        if !volumes.iter().any(|volume| volume.name == mount.name) {
            let sentence = "`spec.volumes` has no volume of this name";
            return Err(value(format!("{field}.name"), sentence));
        }
        let same = |other: &&VolumeMount| other.mount_path == mount.mount_path;
        if mounts.iter().filter(same).count() > 1 {
            let sentence = "two volumes are mounted at this path";
            return Err(value(format!("{field}.mountPath"), sentence));
        }
    }
    Ok(())
}

/// Checks names and sources.
pub(super) fn check_volumes(volumes: &[Volume]) -> Result<(), PodSpecError> {
    for (index, volume) in volumes.iter().enumerate() {
        let field = format!("spec.volumes[{index}]");
        check_name(&format!("{field}.name"), &volume.name)?;
        let same = |other: &&Volume| other.name == volume.name;
        if volumes.iter().filter(same).count() > 1 {
            let sentence = "two volumes have this name";
            return Err(value(format!("{field}.name"), sentence));
        }
        volume.wanted(&field, "", MIN_SIZE)?;
    }
    Ok(())
}

impl Volume {
    fn wanted(&self, field: &str, serial: &str, disk_size: u64) -> Result<Wanted, PodSpecError> {
        self.refuse_others(field)?;
        let (source, disk_size) = match (&self.empty_dir, &self.nfs) {
            (Some(empty), None) => empty.wanted(field, serial, disk_size)?,
            (None, Some(nfs)) => (nfs.wanted(field)?, None),
            (None, None) => return Err(value(field, "it has no source: say emptyDir or nfs")),
            (Some(_), Some(_)) => return Err(value(field, "a volume has one source")),
        };
        let name = self.name.clone();
        Ok(Wanted {
            spec: VolumeSpec { name, source },
            disk_size,
        })
    }

    fn refuse_others(&self, field: &str) -> Result<(), PodSpecError> {
        let no_cluster = "there is no cluster here to read it from: use `env`, or push its files through the pod's API \
                          (PUT /v1/volumes/NAME/files) and create the container that has them there";
        let others = [
            (
                "hostPath",
                &self.host_path,
                "nothing of the host's is mounted: use emptyDir or nfs",
            ),
            ("configMap", &self.config_map, no_cluster),
            ("secret", &self.secret, no_cluster),
            ("projected", &self.projected, no_cluster),
            ("downwardAPI", &self.downward_api, no_cluster),
            (
                "persistentVolumeClaim",
                &self.persistent_volume_claim,
                "there is no cluster here to claim it from: use nfs, or attach a disk through the pod's API \
                 (POST /v1/volumes)",
            ),
        ];
        match others.into_iter().find(|(_, given, _)| given.is_some()) {
            Some((name, _, sentence)) => Err(value(format!("{field}.{name}"), sentence)),
            None => Ok(()),
        }
    }
}

impl EmptyDir {
    fn wanted(
        &self,
        field: &str,
        serial: &str,
        disk_size: u64,
    ) -> Result<(VolumeSource, Option<u64>), PodSpecError> {
        let limit = self.size_limit.as_ref().map(|amount| {
            let sentence = "a number of bytes above 0, with Ki, Mi, Gi, K, M or G";
            bytes(amount)
                .filter(|bytes| *bytes > 0)
                .ok_or_else(|| value(format!("{field}.emptyDir.sizeLimit"), sentence))
        });
        let size_bytes = limit.transpose()?;
        match &*self.medium {
            "Memory" => Ok((VolumeSource::Memory { size_bytes }, None)),
            "" => {
                let disk = VolumeSource::Disk {
                    serial: serial.to_owned(),
                    file_system: "ext4".to_owned(),
                    root_mode: Some(EMPTY_DIR_MODE),
                    read_only: false,
                };
                Ok((disk, Some(disk_of(size_bytes.unwrap_or(disk_size)))))
            }
            _ => {
                let sentence = "leave it out for a disk, or say Memory";
                Err(value(format!("{field}.emptyDir.medium"), sentence))
            }
        }
    }
}

/// The size of a disk for a limit: an ext4 is whole blocks, and has a least size.
fn disk_of(limit: u64) -> u64 {
    let whole = limit.checked_next_multiple_of(BLOCK_SIZE);
    whole.unwrap_or(limit).max(MIN_SIZE)
}

impl Nfs {
    fn wanted(&self, field: &str) -> Result<VolumeSource, PodSpecError> {
        let server = self.server.trim_start_matches('[').trim_end_matches(']');
        if server.parse::<IpAddr>().is_err() {
            let sentence = "an IPv4 or IPv6 address: the guest resolves no names";
            return Err(value(format!("{field}.nfs.server"), sentence));
        }
        if !self.path.starts_with('/') {
            let sentence = "an absolute path on the server";
            return Err(value(format!("{field}.nfs.path"), sentence));
        }
        Ok(VolumeSource::Nfs {
            server: server.to_owned(),
            path: self.path.clone(),
            options: String::new(),
            read_only: self.read_only,
        })
    }
}

impl VolumeMount {
    fn check(&self, field: &str) -> Result<(), PodSpecError> {
        let climbs = |path: &str| path.split('/').any(|part| part == "..");
        if !self.mount_path.starts_with('/') || climbs(&self.mount_path) {
            let sentence = "an absolute path without `..` in the container";
            return Err(value(format!("{field}.mountPath"), sentence));
        }
        if self.sub_path.starts_with('/') || climbs(&self.sub_path) {
            let sentence = "a relative path without `..` in the volume";
            return Err(value(format!("{field}.subPath"), sentence));
        }
        match self.mount_propagation.as_deref() {
            None | Some("None") => Ok(()),
            Some(_) => {
                let sentence = "mounts stay in their container: leave it out or say None";
                Err(value(format!("{field}.mountPropagation"), sentence))
            }
        }
    }

    /// As the guest is told.
    pub(super) fn spec(&self) -> MountSpec {
        MountSpec {
            path: self.mount_path.clone(),
            source: MountSource::Volume {
                volume: self.name.clone(),
                sub_path: self.sub_path.clone(),
            },
            read_only: self.read_only,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::pod_spec::{Pod, parse};
    use super::*;

    const POD: &str = "
apiVersion: v1
kind: Pod
metadata: { name: web }
spec:
  volumes:
  - { name: work, emptyDir: { sizeLimit: 5000000 } }
  - { name: fast, emptyDir: { medium: Memory, sizeLimit: 1Mi } }
  - { name: files, nfs: { server: 10.0.0.1, path: /data, readOnly: true } }
  - { name: any, emptyDir: {} }
  containers:
  - name: main
    image: busybox
    volumeMounts:
    - { name: work, mountPath: /work, subPath: a/b, readOnly: true, mountPropagation: None }
    - { name: fast, mountPath: /fast }
";

    fn volumes(pod: &Pod) -> Vec<Wanted> {
        pod.spec.volumes(1 << 30).unwrap()
    }

    #[test]
    fn volumes_and_mounts_are_read_as_kubernetes_means_them() {
        let pod = parse(POD).unwrap();
        let volumes = volumes(&pod);
        let sizes: Vec<_> = volumes.iter().map(|volume| volume.disk_size).collect();
        assert_eq!(sizes, [Some(5_001_216), None, None, Some(1 << 30)]);
        assert!(matches!(&volumes[0].spec.source,
            VolumeSource::Disk { serial, root_mode: Some(0o777), .. } if serial == "volume0"));
        let size_bytes = Some(1 << 20);
        assert_eq!(volumes[1].spec.source, VolumeSource::Memory { size_bytes });
        assert!(matches!(&volumes[2].spec.source,
            VolumeSource::Nfs { server, path, read_only: true, .. } if server == "10.0.0.1" && path == "/data"));
        let mounts = pod.spec.containers[0].mounts();
        let source = MountSource::Volume {
            volume: "work".to_owned(),
            sub_path: "a/b".to_owned(),
        };
        assert_eq!((&*mounts[0].path, &mounts[0].source), ("/work", &source));
        assert_eq!((mounts[0].read_only, mounts[1].read_only), (true, false));
    }

    #[test]
    fn a_limit_below_the_least_disk_is_that_disk() {
        assert_eq!(disk_of(1), MIN_SIZE);
        assert_eq!(disk_of(MIN_SIZE + 1), MIN_SIZE + BLOCK_SIZE);
        assert_eq!(disk_of(u64::MAX), u64::MAX, "refused when it is made");
    }

    fn assert_refused(cases: &[(&str, &str, &str)]) {
        for (old, new, expected) in cases {
            assert!(POD.contains(old), "{old}");
            let sentence = parse(&POD.replace(old, new)).unwrap_err().to_string();
            assert!(sentence.contains(expected), "{expected}: {sentence}");
        }
    }

    #[test]
    fn a_volume_that_cannot_be_had_is_refused_by_name() {
        let work = "emptyDir: { sizeLimit: 5000000 }";
        let (host, claim) = (
            "hostPath: { path: /etc }",
            "persistentVolumeClaim: { claimName: c }",
        );
        assert_refused(&[
            (
                work,
                host,
                "spec.volumes[0].hostPath: nothing of the host's",
            ),
            (
                work,
                claim,
                "spec.volumes[0].persistentVolumeClaim: there is no cluster",
            ),
            (
                work,
                "configMap: {}",
                "spec.volumes[0].configMap: there is no cluster",
            ),
            (
                work,
                "secret: {}",
                "spec.volumes[0].secret: there is no cluster",
            ),
            (work, "iscsi: {}", "iscsi"),
            (work, "emptyDir: { sizeLimt: 1 }", "sizeLimt"),
            (
                work,
                "emptyDir: { sizeLimit: 0 }",
                "spec.volumes[0].emptyDir.sizeLimit: ",
            ),
            (
                work,
                "emptyDir: { medium: Huge }",
                "spec.volumes[0].emptyDir.medium: ",
            ),
            (
                ", emptyDir: {} }",
                " }",
                "spec.volumes[3]: it has no source",
            ),
            (
                "any, ",
                "any, nfs: { server: '::1', path: / }, ",
                "spec.volumes[3]: a volume has one",
            ),
            ("10.0.0.1", "files.example", "spec.volumes[2].nfs.server: "),
            ("path: /data", "path: data", "spec.volumes[2].nfs.path: "),
            (
                "name: any",
                "name: work",
                "spec.volumes[0].name: two volumes",
            ),
            ("name: any", "name: An_y", "spec.volumes[3].name: "),
        ]);
    }

    #[test]
    fn a_mount_that_cannot_be_had_is_refused_by_name() {
        let path = "mountPath: /fast";
        let mount =
            |number: u8, field: &str| format!("containers[0].volumeMounts[{number}].{field}");
        assert_refused(&[
            (path, "mountPath: fast", &mount(1, "mountPath: an absolute")),
            (
                path,
                "mountPath: /a/../b",
                &mount(1, "mountPath: an absolute"),
            ),
            (
                path,
                "mountPath: /work",
                &mount(0, "mountPath: two volumes"),
            ),
            (path, "mountPath: /f, subPathExpr: a", "subPathExpr"),
            ("a/b", "a/../../b", &mount(0, "subPath: ")),
            ("a/b", "/a", &mount(0, "subPath: ")),
            (
                "n: None",
                "n: HostToContainer",
                &mount(0, "mountPropagation: "),
            ),
            ("fast, m", "fats, m", &mount(1, "name: `spec.volumes`")),
        ]);
    }

    #[test]
    fn nfs_needs_a_network() {
        let pod = parse(POD).unwrap();
        let sentence = pod.spec.check_without_network().unwrap_err().to_string();
        assert!(sentence.starts_with("spec.volumes[2].nfs: "), "{sentence}");
    }
}
