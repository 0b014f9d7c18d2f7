//! A volume as the supervisor knows it.
#![forbid(unsafe_code)]

use cube_guest::{VolumeSource, VolumeSpec};

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
    /// A volume that the pod began with, with the slot of its disk.
    pub(crate) fn of_the_pod(spec: &VolumeSpec, slot: Option<u16>) -> Self {
        let (kind, disk) = match &spec.source {
            VolumeSource::Memory { .. } => ("memory", None),
            VolumeSource::Disk { serial, .. } => ("disk", slot.zip(Some(serial.clone()))),
            VolumeSource::Files => ("files", None),
            VolumeSource::Nfs { .. } => ("nfs", None),
        };
        Self {
            kind,
            state: VolumeState::Ready,
            to_mount: None,
            disk,
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
