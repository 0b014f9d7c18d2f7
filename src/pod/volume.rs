//! A volume as the supervisor knows it.
#![forbid(unsafe_code)]

use cube_guest::VolumeSpec;

use super::api::volume_body::{VolumeState, VolumeStatus};

/// A volume of the pod.
#[derive(Debug)]
pub(crate) struct Volume {
    /// What it is: the name of its kind in the API.
    pub(crate) kind: &'static str,
    pub(crate) state: VolumeState,
    /// What the guest is still to be asked to mount, once the disk is there.
    pub(crate) to_mount: Option<VolumeSpec>,
    /// Its disk: the slot, and the serial by which a container's `devices` name it.
    pub(crate) disk: Option<(u16, String)>,
}

/// The kind of a volume that a container's `devices` name, and nothing mounts.
pub(crate) const BLOCK: &str = "block";

impl Volume {
    /// A volume that the pod began with.
    pub(crate) fn of_the_pod(spec: &VolumeSpec) -> Self {
        use cube_guest::VolumeSource;
        let kind = match spec.source {
            VolumeSource::Memory { .. } => "memory",
            VolumeSource::Disk { .. } => "disk",
            VolumeSource::Files => "files",
            VolumeSource::Nfs { .. } => "nfs",
        };
        Self {
            kind,
            state: VolumeState::Ready,
            to_mount: None,
            disk: None,
        }
    }

    /// As the API shows it.
    pub(crate) fn status(&self, name: &str) -> VolumeStatus {
        VolumeStatus {
            name: name.to_owned(),
            kind: self.kind.to_owned(),
            state: self.state,
            serial: self.disk.as_ref().map(|(_, serial)| serial.clone()),
        }
    }
}
