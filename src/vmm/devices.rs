//! The devices that a spec asks for, made before anything costly happens, in the order of their slots:
//! disks, networks, vsock, rng.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;

use cube_guest::network::MacAddress;

use crate::vmm::files::{self, FileError, Opened};
use crate::vmm::spec::{DiskSpec, NetSpec, ValidSpec};
use crate::vmm::virtio::VirtioDevice;
use crate::vmm::virtio::blk::{Blk, Disk, DiskError, PartFile};
use crate::vmm::virtio::net::tap::{Tap, TapError};
use crate::vmm::virtio::net::vhost::VhostNet;
use crate::vmm::virtio::net::{Identity, Net, NetControl};
use crate::vmm::virtio::rng::Rng;
use crate::vmm::virtio::vhost_user::VhostUserError;
use crate::vmm::virtio::vsock::{Vsock, VsockError};

/// A device cannot be made or attached.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A disk's file cannot be opened.
    #[error(transparent)]
    File(#[from] FileError),
    /// A disk's files do not make a disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The vsock device's socket cannot be made.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// A network's tap cannot be used.
    #[error("network {name}: {source}")]
    Tap {
        /// The network.
        name: String,
        /// Why.
        source: TapError,
    },
    /// A running machine's memory cannot become shared.
    #[error(
        "network {name}: the guest's memory is private; only a machine that began with a vhost-user network \
         can have another"
    )]
    PrivateMemory {
        /// The network.
        name: String,
    },
    /// A network's switch cannot be used.
    #[error("network {name}: {source}")]
    VhostUser {
        /// The network.
        name: String,
        /// Why.
        source: VhostUserError,
    },
    /// Every slot has a device.
    #[error("no virtio slot is free for {name}; raise `spare_slots`")]
    NoSlot {
        /// The device.
        name: String,
    },
    /// KVM refused the ioeventfd.
    #[error("KVM cannot watch the notifications of {name}: {source}")]
    Notify {
        /// The device.
        name: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// The devices of a machine, and what is controlled while they run.
pub struct Devices {
    /// In the order of their slots.
    pub devices: Vec<Box<dyn VirtioDevice>>,
    /// Which of them are networks.
    pub nets: Vec<NetDevice>,
}

/// A network among the devices.
pub struct NetDevice {
    /// Its name.
    pub name: String,
    /// The guest's address on it.
    pub mac: MacAddress,
    /// Its index among the devices.
    pub index: usize,
    /// What controls it, if its frames pass through this process.
    pub control: Option<NetControl>,
}

/// Makes the spec's devices.
///
/// # Errors
/// The device whose file or socket is not to be had.
pub fn open(spec: &ValidSpec) -> Result<Devices, DeviceError> {
    let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
    for disk in &spec.disks {
        devices.push(Box::new(Blk::new(open_disk(disk)?)));
    }
    let mut nets = Vec::new();
    for net in &spec.nets {
        let queues = net.tap_fds.iter().map(|fd| files::inherited(*fd));
        let queues = queues.collect::<io::Result<Vec<_>>>();
        let queues = queues.map_err(|error| tap_error(net, error.into()))?;
        let (device, control) = make_net(net, queues, spec.cpus)?;
        nets.push(NetDevice {
            name: net.name.clone(),
            mac: net.mac,
            index: devices.len(),
            control,
        });
        devices.push(device);
    }
    if let Some(vsock) = &spec.vsock {
        devices.push(Box::new(Vsock::new(vsock.cid, &vsock.path)?));
    }
    if spec.rng {
        devices.push(Box::new(Rng));
    }
    Ok(Devices { devices, nets })
}

/// Makes the device of a network: on these `queues` of a tap, or on its switch, there with a queue pair for each
/// of `cpus`, as far as there are so many. Returns also what controls it, if its frames pass through this process.
///
/// # Errors
/// The tap or the switch that cannot be used.
pub fn make_net(
    spec: &NetSpec,
    queues: Vec<OwnedFd>,
    cpus: u8,
) -> Result<(Box<dyn VirtioDevice>, Option<NetControl>), DeviceError> {
    let identity = Identity {
        name: spec.name.clone(),
        mac: spec.mac,
        mtu: spec.mtu,
        check_source: spec.check_source,
    };
    let Some(socket) = &spec.socket else {
        let tap = Tap::new(queues).map_err(|error| tap_error(spec, error))?;
        let limits = (spec.receive_limit, spec.transmit_limit);
        let device = Net::new(identity, tap, limits);
        let device = device.map_err(|error| tap_error(spec, error.into()))?;
        let control = device.control();
        return Ok((Box::new(device), Some(control)));
    };
    match VhostNet::connect(identity, socket, cpus.into()) {
        Ok(device) => Ok((Box::new(device), None)),
        Err(source) => Err(DeviceError::VhostUser {
            name: spec.name.clone(),
            source,
        }),
    }
}

fn tap_error(spec: &NetSpec, source: TapError) -> DeviceError {
    DeviceError::Tap {
        name: spec.name.clone(),
        source,
    }
}

/// Opens the files of one disk.
///
/// # Errors
/// The file that is not to be had, or what keeps the files from being a disk.
pub fn open_disk(spec: &DiskSpec) -> Result<Disk, DeviceError> {
    let role = format!("file of disk {}", spec.serial);
    let mut files = Vec::new();
    for part in &spec.parts {
        let Opened { file, path } = match spec.read_only {
            true => Opened::for_reading(&part.file, &role)?,
            false => Opened::for_writing(&part.file, &role)?,
        };
        files.push(PartFile {
            file,
            path,
            size: part.size,
        });
    }
    Ok(Disk::new(&spec.serial, files, spec.read_only)?)
}
