//! Volumes of a running pod, and the files that are pushed into them.
//!
//! ```text
//!            disk attached,            mounted                unmounted,
//!            bound                                            unbound
//! Creating ─────────────────▶ ─────────────────▶ Ready ─────▶ Removing ─────▶ gone
//!    └── refused: unbound, detached ──▶ gone
//! ```
//! A `block` volume has a disk and is not mounted; `memory`, `files` and `nfs` are mounted and have none.
#![forbid(unsafe_code)]

use cube_guest::{HostRequest, VolumeSource, VolumeSpec};
use serde_json::{Value, json};

use super::{Served, check_name, conflict, unknown};
use crate::pod::api::http::Refusal;
use crate::pod::api::server::ConnectionId;
use crate::pod::api::volume_body::{CreateVolume, NewVolume, PutFiles, VolumeState};
use crate::pod::machinery::Machinery;
use crate::pod::pairing::new_token;
use crate::pod::pending::Then;
use crate::pod::supervisor::Supervisor;
use crate::pod::upload::Upload;
use crate::pod::volume::{BLOCK, Volume};
use crate::vmm::spec::DiskSpec;

/// Volumes that a pod has at one time.
const MAX_VOLUMES: usize = 64;

impl Supervisor {
    pub(super) fn list_volumes(&self) -> Value {
        let volumes = self.volumes.iter();
        json!(
            volumes
                .map(|(name, volume)| volume.status(name))
                .collect::<Vec<_>>()
        )
    }

    fn volume(&mut self, name: &str) -> Result<&mut Volume, Refusal> {
        self.volumes.get_mut(name).ok_or_else(|| unknown("volume"))
    }

    pub(super) fn create_volume(
        &mut self,
        connection: ConnectionId,
        body: CreateVolume,
        machine: &dyn Machinery,
    ) -> Served {
        let CreateVolume { name, source } = body;
        check_name("name", &name)?;
        if self.volumes.contains_key(&name) {
            return Err(conflict("the pod has a volume of this name"));
        }
        if self.volumes.len() >= MAX_VOLUMES {
            let sentence = format!("the pod has {MAX_VOLUMES} volumes: remove one");
            return Err(conflict(sentence));
        }
        let (mut volume, disk) = self.planned(&name, source)?;
        let Some(disk) = disk else {
            self.volumes.insert(name.clone(), volume);
            return self.mount(connection, &name);
        };
        let slot = machine.attach(&disk).map_err(conflict)?;
        volume.disk = Some((slot, disk.serial));
        let then = Then::VolumeStep(connection, name.clone());
        let asked = self.ask(vec![HostRequest::BindSlot { slot }], then);
        if asked.is_err() {
            machine.detach(slot);
        } else {
            self.volumes.insert(name, volume);
        }
        asked
    }

    /// The volume, what is to be mounted of it, and the disk that it needs.
    fn planned(
        &mut self,
        name: &str,
        source: NewVolume,
    ) -> Result<(Volume, Option<DiskSpec>), Refusal> {
        let (kind, source, disk) = match source {
            NewVolume::Memory { size_bytes } => {
                ("memory", Some(VolumeSource::Memory { size_bytes }), None)
            }
            NewVolume::Files {} => ("files", Some(VolumeSource::Files), None),
            NewVolume::Nfs {
                server,
                path,
                options,
                read_only,
            } => {
                let nfs = VolumeSource::Nfs {
                    server,
                    path,
                    options,
                    read_only,
                };
                ("nfs", Some(nfs), None)
            }
            NewVolume::Block { file, read_only } => {
                let disk = self.disk("source.block.file", vec![file], read_only)?;
                (BLOCK, None, Some(disk))
            }
            NewVolume::Disk {
                file,
                file_system,
                root_mode,
                read_only,
            } => {
                let disk = self.disk("source.disk.file", vec![file], read_only)?;
                let mounted = VolumeSource::Disk {
                    serial: disk.serial.clone(),
                    file_system,
                    root_mode,
                    read_only,
                };
                ("disk", Some(mounted), Some(disk))
            }
        };
        let name = name.to_owned();
        let volume = Volume {
            kind,
            state: VolumeState::Creating,
            to_mount: source.map(|source| VolumeSpec { name, source }),
            disk: None,
        };
        Ok((volume, disk))
    }

    /// Has the guest mount what there is to mount, or is done.
    pub(super) fn mount(&mut self, connection: ConnectionId, name: &str) -> Served {
        let volume = self.volume(name)?;
        let Some(spec) = volume.to_mount.take() else {
            volume.state = VolumeState::Ready;
            return Ok(Some((201, json!(volume.status(name)))));
        };
        let then = Then::VolumeStep(connection, name.to_owned());
        let asked = self.ask(vec![HostRequest::AddVolume(spec)], then);
        if asked.is_err() {
            self.volumes.remove(name);
        }
        asked
    }

    pub(super) fn remove_volume(&mut self, connection: ConnectionId, name: &str) -> Served {
        let volume = self.volume(name)?;
        if volume.state != VolumeState::Ready {
            return Err(conflict("the volume is being made or removed"));
        }
        volume.state = VolumeState::Removing;
        let asked = if volume.kind == BLOCK {
            self.release_disk(connection, name, None)
        } else {
            let volume = name.to_owned();
            let then = Then::VolumeUnmounted(connection, name.to_owned());
            self.ask(vec![HostRequest::RemoveVolume { volume }], then)
        };
        if asked.is_err() {
            self.volume(name)?.state = VolumeState::Ready;
        }
        asked
    }

    /// Takes a volume's disk away, if it has one. With a sentence: why the volume could not be made.
    pub(super) fn release_disk(
        &mut self,
        connection: ConnectionId,
        name: &str,
        failure: Option<String>,
    ) -> Served {
        let Some((slot, _)) = self.volume(name)?.disk else {
            self.volumes.remove(name);
            self.tell(connection, failure);
            return Ok(None);
        };
        let then = Then::VolumeUnbound(connection, name.to_owned(), failure);
        self.ask(vec![HostRequest::UnbindSlot { slot }], then)
    }

    pub(super) fn put_files(
        &mut self,
        connection: ConnectionId,
        name: &str,
        body: PutFiles,
    ) -> Served {
        let volume = self.volume(name)?;
        if volume.kind != "files" {
            let sentence = format!("files can be pushed into no volume of kind {}", volume.kind);
            return Err(conflict(sentence));
        }
        let token = new_token()
            .map_err(|e| Refusal::new(503, format!("cannot draw a stream's token: {e}")))?;
        let upload = Upload::new(token, body.files)
            .map_err(|_| Refusal::field("files", "their names together are longer than 1 MiB"))?;
        let volume = name.to_owned();
        let write = HostRequest::WriteFiles { volume, token };
        let asked = self.ask(vec![write], Then::Written(connection, token))?;
        self.uploads.push(upload);
        Ok(asked)
    }
}
