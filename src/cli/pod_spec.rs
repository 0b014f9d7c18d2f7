//! A pod as Kubernetes writes it (core/v1 `Pod`): the fields that Cube obeys; any other is refused by name.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use cube_guest::{MountSpec, Resources};
use serde::Deserialize;

use super::pod_volumes::{self, Volume, VolumeMount, Wanted};
use super::process::ProcessOptions;

/// The document.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Pod {
    #[serde(rename = "apiVersion")]
    api_version: String,
    kind: String,
    /// Its name.
    pub(crate) metadata: Metadata,
    /// What it runs.
    pub(crate) spec: Spec,
}

/// `metadata`; labels and annotations mean nothing here.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Metadata {
    pub(crate) name: String,
    #[serde(default, rename = "labels")]
    _labels: BTreeMap<String, String>,
    #[serde(default, rename = "annotations")]
    _annotations: BTreeMap<String, String>,
}

/// `spec`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(crate) struct Spec {
    #[serde(default)]
    pub(crate) hostname: Option<String>,
    pub(crate) containers: Vec<Container>,
    #[serde(default)]
    volumes: Vec<Volume>,
    #[serde(default)]
    restart_policy: Option<String>,
    #[serde(default)]
    pub(crate) share_process_namespace: bool,
}

/// A container.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(crate) struct Container {
    pub(crate) name: String,
    pub(crate) image: String,
    #[serde(default)]
    command: Vec<String>,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    env: Vec<Variable>,
    #[serde(default)]
    working_dir: Option<String>,
    /// Whether it has a standard input, and whether that ends with its first client.
    #[serde(default)]
    pub(crate) stdin: bool,
    #[serde(default)]
    pub(crate) stdin_once: bool,
    /// Whether it has a terminal.
    #[serde(default)]
    pub(crate) tty: bool,
    #[serde(default)]
    resources: ResourceRequirements,
    #[serde(default)]
    volume_mounts: Vec<VolumeMount>,
    #[serde(default)]
    pub(crate) security_context: SecurityContext,
}

/// `env` may hold secrets: `Debug` shows none of it.
impl std::fmt::Debug for Container {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Container")
            .field("name", &self.name)
            .field("image", &self.image)
            .finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Variable {
    name: String,
    #[serde(default)]
    value: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct ResourceRequirements {
    #[serde(default)]
    limits: Amounts,
    /// What a scheduler reads.
    #[serde(default, rename = "requests")]
    _requests: Amounts,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Amounts {
    #[serde(default)]
    cpu: Option<Amount>,
    #[serde(default)]
    memory: Option<Amount>,
}

/// A quantity: YAML reads `1` as a number and `500m` as text.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Amount {
    Number(u64),
    Text(String),
}

/// `securityContext`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub(crate) struct SecurityContext {
    #[serde(default)]
    run_as_user: Option<u32>,
    #[serde(default)]
    run_as_group: Option<u32>,
    #[serde(default)]
    pub(crate) privileged: bool,
    #[serde(default)]
    pub(crate) read_only_root_filesystem: bool,
    #[serde(default)]
    pub(crate) allow_privilege_escalation: Option<bool>,
}

/// A document that is no pod for Cube.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PodSpecError {
    /// Not YAML, or not such a document.
    #[error("{0}")]
    Document(String),
    /// A value that Cube cannot obey.
    #[error("{field}: {sentence}")]
    Value { field: String, sentence: String },
}

pub(super) fn value(field: impl Into<String>, sentence: impl Into<String>) -> PodSpecError {
    PodSpecError::Value {
        field: field.into(),
        sentence: sentence.into(),
    }
}

/// Reads a document.
pub(crate) fn parse(text: &str) -> Result<Pod, PodSpecError> {
    let options = serde_saphyr::options! { with_snippet: false };
    let pod: Pod = serde_saphyr::from_str_with_options(text, options)
        .map_err(|error| PodSpecError::Document(error.to_string()))?;
    if (pod.api_version.as_str(), pod.kind.as_str()) != ("v1", "Pod") {
        return Err(value("kind", "it must be a Pod of apiVersion v1"));
    }
    match pod.spec.restart_policy.as_deref() {
        None | Some("Never") => {}
        Some(_) => {
            let sentence = "containers are not restarted yet: leave it out or say Never";
            return Err(value("spec.restartPolicy", sentence));
        }
    }
    if pod.spec.containers.is_empty() {
        return Err(value("spec.containers", "a pod needs a container"));
    }
    check_name("metadata.name", &pod.metadata.name)?;
    pod_volumes::check_volumes(&pod.spec.volumes)?;
    for (index, container) in pod.spec.containers.iter().enumerate() {
        let field = format!("spec.containers[{index}]");
        check_name(&format!("{field}.name"), &container.name)?;
        let same = |other: &&Container| other.name == container.name;
        if pod.spec.containers.iter().filter(same).count() > 1 {
            let sentence = "two containers have this name";
            return Err(value(format!("{field}.name"), sentence));
        }
        pod_volumes::check(&pod.spec.volumes, &container.volume_mounts, &field)?;
    }
    Ok(pod)
}

/// A DNS label (RFC 1123), as Kubernetes wants names to be.
pub(super) fn check_name(field: &str, name: &str) -> Result<(), PodSpecError> {
    let is_inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let good = (1..=63).contains(&name.len())
        && name.bytes().all(is_inner)
        && !name.starts_with('-')
        && !name.ends_with('-');
    let sentence = "a name has 1 to 63 lower-case letters, digits and inner hyphens";
    good.then_some(()).ok_or_else(|| value(field, sentence))
}

impl Spec {
    /// The volumes; an emptyDir on a disk without a limit has `disk_size` bytes.
    pub(crate) fn volumes(&self, disk_size: u64) -> Result<Vec<Wanted>, PodSpecError> {
        pod_volumes::wanted(&self.volumes, disk_size)
    }

    /// Refuses what a pod without a network cannot have.
    pub(crate) fn check_without_network(&self) -> Result<(), PodSpecError> {
        pod_volumes::check_without_network(&self.volumes)
    }
}

impl Container {
    /// Where it has volumes, in the order in which they are mounted: what is below another after it.
    pub(crate) fn mounts(&self) -> Vec<MountSpec> {
        let mut mounts: Vec<_> = self.volume_mounts.iter().map(VolumeMount::spec).collect();
        mounts.sort_by_key(|mount| {
            mount
                .path
                .split('/')
                .filter(|part| !part.is_empty())
                .count()
        });
        mounts
    }

    /// What runs, over what the image says: `command` replaces the entrypoint, `args` its command.
    pub(crate) fn options(&self) -> (Vec<String>, ProcessOptions) {
        let context = &self.security_context;
        let user = context.run_as_user.map(|user| match context.run_as_group {
            Some(group) => format!("{user}:{group}"),
            None => user.to_string(),
        });
        let env = self.env.iter();
        let options = ProcessOptions {
            entrypoint: None,
            arguments: self.args.clone(),
            env: env.map(|v| format!("{}={}", v.name, v.value)).collect(),
            workdir: self.working_dir.clone(),
            user,
        };
        (self.command.clone(), options)
    }

    /// Its limits as the guest's kernel takes them.
    pub(crate) fn resources(&self) -> Result<Resources, PodSpecError> {
        let limits = &self.resources.limits;
        let field = |name: &str| format!("container {}: resources.limits.{name}", self.name);
        let memory_max = limits.memory.as_ref().map(|amount| {
            let sentence = "a number of bytes, with Ki, Mi, Gi, K, M or G";
            bytes(amount).ok_or_else(|| value(field("memory"), sentence))
        });
        let cpu_quota_us = limits.cpu.as_ref().map(|amount| {
            let sentence = "a number of CPUs, or thousandths of one as in 500m";
            // Of the usual period of 100 ms.
            let millis = millis(amount).filter(|millis| *millis >= 10);
            millis
                .and_then(|millis| millis.checked_mul(100))
                .ok_or_else(|| value(field("cpu"), sentence))
        });
        Ok(Resources {
            memory_max: memory_max.transpose()?,
            cpu_quota_us: cpu_quota_us.transpose()?,
            ..Resources::default()
        })
    }
}

pub(super) fn bytes(amount: &Amount) -> Option<u64> {
    let text = match amount {
        Amount::Number(number) => return Some(*number),
        Amount::Text(text) => text,
    };
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let factor: u64 = match unit {
        "" => 1,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "k" | "K" => 1000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

fn millis(amount: &Amount) -> Option<u64> {
    match amount {
        Amount::Number(number) => number.checked_mul(1000),
        Amount::Text(text) => match text.strip_suffix('m') {
            Some(millis) => millis.parse().ok(),
            None => {
                let cpus: f64 = text.parse().ok()?;
                let millis = (cpus * 1000.0).round();
                (0.0..1e9).contains(&millis).then_some(millis as u64)
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str = "
apiVersion: v1
kind: Pod
metadata: { name: web, labels: { app: web } }
spec:
  containers:
  - name: main
    image: busybox
    command: [sh, -c]
    args: ['echo $WORD']
    env: [{ name: WORD, value: hunter2 }]
    stdin: true
    stdinOnce: true
    resources: { limits: { cpu: 500m, memory: 64Mi } }
    securityContext: { runAsUser: 7, runAsGroup: 8, readOnlyRootFilesystem: true }
";

    #[test]
    fn a_pod_is_read_as_kubernetes_means_it() {
        let pod = parse(POD).unwrap();
        let container = &pod.spec.containers[0];
        let (command, options) = container.options();
        assert_eq!(command, ["sh", "-c"]);
        assert_eq!(options.env, ["WORD=hunter2"]);
        assert!(container.stdin && container.stdin_once && !container.tty);
        assert_eq!(options.user.as_deref(), Some("7:8"));
        let resources = container.resources().unwrap();
        assert_eq!(resources.memory_max, Some(64 << 20));
        assert_eq!(resources.cpu_quota_us, Some(50_000));
        assert!(!format!("{pod:?}").contains("hunter2"));
    }

    #[test]
    fn what_cube_does_not_obey_is_refused_by_name() {
        let cases = [
            (POD.replace("kind: Pod", "kind: Job"), "must be a Pod"),
            (POD.replace("name: web,", "name: Web,"), "metadata.name"),
            (POD.replace("args:", "arrgs:"), "arrgs"),
            (POD.replace("64Mi", "64Xi"), "resources.limits.memory"),
            (
                POD.replace("spec:", "spec:\n  restartPolicy: Always"),
                "restartPolicy",
            ),
            (
                POD.replace("spec:", "spec:\n  hostNetwork: true"),
                "hostNetwork",
            ),
        ];
        for (text, expected) in cases {
            let resources = |pod: Pod| pod.spec.containers[0].resources();
            let sentence = parse(&text).and_then(resources).unwrap_err().to_string();
            assert!(sentence.contains(expected), "{expected}: {sentence}");
            assert!(!sentence.contains("hunter2"), "{sentence}");
        }
    }
}
