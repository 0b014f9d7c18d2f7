//! A tap interface, by the descriptors of its queues, which somebody privileged opened: with `IFF_TAP`,
//! `IFF_NO_PI`, `IFF_VNET_HDR` and a header of 12 bytes. No capability is needed for what is done here.
//!
//! Unsafe for the ioctls.
#![allow(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::arithmetic_side_effects
    )
)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::ioctl::{IntegerSetter, Setter, Updater, ioctl};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
};

use super::header::HEADER_LEN;

/// `TUNSETOFFLOAD`: takes the flags themselves.
const SET_OFFLOAD: u32 = libc::TUNSETOFFLOAD as u32;
/// `TUNSETQUEUE`: attaches or detaches the queue behind a descriptor.
const SET_QUEUE: u32 = libc::TUNSETQUEUE as u32;
/// `TUNGETIFF`: the interface's name and flags.
const GET_INTERFACE: u32 = libc::TUNGETIFF as u32;
/// `TUNGETVNETHDRSZ`: bytes of the header in front of each frame.
const GET_HEADER_SIZE: u32 = libc::TUNGETVNETHDRSZ as u32;

/// What the host may leave undone in frames for the guest (`TUN_F_*` of linux/if_tun.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offloads(u32);

/// Virtio's feature bit for each of the kernel's flags; in an order in which each needs only those before.
const OFFLOADS: [(u32, u32); 7] = [
    (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
    (VIRTIO_NET_F_GUEST_UFO, libc::TUN_F_UFO),
    (VIRTIO_NET_F_GUEST_USO4, libc::TUN_F_USO4),
    (VIRTIO_NET_F_GUEST_USO6, libc::TUN_F_USO6),
];

impl Offloads {
    /// Nothing: every frame is complete and no longer than the MTU.
    pub const NONE: Self = Self(0);
    /// Everything that this device knows.
    pub const ALL: Self = Self(0x7f);

    /// Those that the driver agreed to.
    pub fn of_features(features: u64) -> Self {
        let agreed = OFFLOADS
            .iter()
            .filter(|(bit, _)| features & (1 << bit) != 0);
        let flags = agreed.fold(0, |flags, (_, flag)| flags | flag);
        // The kernel takes both halves of USO or none.
        if flags & USO == USO {
            Self(flags)
        } else {
            Self(flags & !USO)
        }
    }

    /// Virtio's bits for them.
    pub fn features(self) -> u64 {
        let here = OFFLOADS.iter().filter(|(_, flag)| self.0 & flag != 0);
        here.fold(0, |features, (bit, _)| features | 1 << bit)
    }

    /// Whether a frame may be longer than the MTU, for the guest to segment.
    pub fn can_segment(self) -> bool {
        self.0 & !(libc::TUN_F_CSUM | libc::TUN_F_TSO_ECN) != 0
    }

    /// Whether UDP is segmented.
    pub fn has_uso(self) -> bool {
        self.0 & USO != 0
    }
}

const USO: u32 = libc::TUN_F_USO4 | libc::TUN_F_USO6;

/// Where frames go to and come from: a tap, or what stands for one in a test. Each queue is a descriptor from
/// which one read takes a frame, and to which one write gives one, with a virtio header in front;
/// non-blocking.
pub trait Link: Send + 'static {
    /// The queues.
    fn queues(&self) -> &[OwnedFd];

    /// What it can leave undone.
    fn offloads(&self) -> Offloads;

    /// Chooses what it leaves undone.
    ///
    /// # Errors
    /// The operating system's.
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()>;

    /// Uses the first `count` queues only.
    ///
    /// # Errors
    /// The operating system's.
    fn use_queues(&mut self, count: usize) -> io::Result<()>;
}

/// The queues of a tap interface.
#[derive(Debug)]
pub struct Tap {
    queues: Vec<OwnedFd>,
    used: usize,
    offloads: Offloads,
}

/// A descriptor is not a queue of a tap as this device needs it.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// It is something else.
    #[error("it is not a tap interface's queue: {0}")]
    NotTap(#[source] io::Error),
    /// The frames would not be what the device expects.
    #[error(
        "the tap `{name}` was opened without {missing}; open it with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR, \
         and set its virtio header to 12 bytes"
    )]
    Flags {
        /// The interface.
        name: String,
        /// What it lacks.
        missing: &'static str,
    },
    /// The operating system refused.
    #[error("cannot set up the tap's queue: {0}")]
    Io(#[from] io::Error),
}

impl Tap {
    /// Takes over the queues of one tap.
    ///
    /// # Errors
    /// One of them is not what it should be.
    pub fn new(queues: Vec<OwnedFd>) -> Result<Self, TapError> {
        for queue in &queues {
            check(queue.as_fd())?;
            rustix::io::ioctl_fionbio(queue, true).map_err(io::Error::from)?;
        }
        let offloads = match queues.first() {
            Some(first) => supported(first.as_fd())?,
            None => Offloads::NONE,
        };
        Ok(Self {
            used: queues.len(),
            queues,
            offloads,
        })
    }
}

impl Link for Tap {
    fn queues(&self) -> &[OwnedFd] {
        &self.queues
    }

    fn offloads(&self) -> Offloads {
        self.offloads
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        match self.queues.first() {
            Some(first) => set_offload(first.as_fd(), offloads),
            None => Ok(()),
        }
    }

    /// A queue that is not used is detached, so that the kernel spreads the flows over the others.
    fn use_queues(&mut self, count: usize) -> io::Result<()> {
        for (at, queue) in self.queues.iter().enumerate() {
            match (at < self.used, at < count) {
                (true, false) => set_queue(queue.as_fd(), libc::IFF_DETACH_QUEUE)?,
                (false, true) => set_queue(queue.as_fd(), libc::IFF_ATTACH_QUEUE)?,
                _ => continue,
            }
        }
        self.used = count.min(self.queues.len());
        Ok(())
    }
}

/// Name and flags of a tap that nothing says anything about: all zero.
fn empty_request() -> libc::ifreq {
    // SAFETY: ifreq is plain data for which all zeroes is a valid value.
    unsafe { std::mem::zeroed() }
}

fn check(queue: BorrowedFd<'_>) -> Result<(), TapError> {
    let mut request = empty_request();
    // SAFETY: TUNGETIFF writes one ifreq.
    let asked = unsafe { ioctl(queue, Updater::<GET_INTERFACE, _>::new(&mut request)) };
    asked.map_err(|error| TapError::NotTap(error.into()))?;
    let name = request.ifr_name.iter().map(|byte| byte.to_le_bytes()[0]);
    let name: Vec<u8> = name.take_while(|byte| *byte != 0).collect();
    // SAFETY: TUNGETIFF filled the flags in, and any bits are a value.
    let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
    let mut header_size: libc::c_int = 0;
    // SAFETY: TUNGETVNETHDRSZ writes one int.
    let asked = unsafe { ioctl(queue, Updater::<GET_HEADER_SIZE, _>::new(&mut header_size)) };
    asked.map_err(|error| TapError::NotTap(error.into()))?;
    let missing = if flags & libc::IFF_TAP == 0 {
        "IFF_TAP"
    } else if flags & libc::IFF_NO_PI == 0 {
        "IFF_NO_PI"
    } else if flags & libc::IFF_VNET_HDR == 0 {
        "IFF_VNET_HDR"
    } else if usize::try_from(header_size) != Ok(HEADER_LEN) {
        "a virtio header of 12 bytes"
    } else {
        return Ok(());
    };
    Err(TapError::Flags {
        name: String::from_utf8_lossy(&name).into_owned(),
        missing,
    })
}

/// What the kernel takes: found by asking for it, since nothing else says.
fn supported(queue: BorrowedFd<'_>) -> io::Result<Offloads> {
    for offloads in [Offloads::ALL, Offloads(Offloads::ALL.0 & !USO)] {
        match set_offload(queue, offloads) {
            Ok(()) => {
                set_offload(queue, Offloads::NONE)?;
                return Ok(offloads);
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Offloads::NONE)
}

fn set_offload(queue: BorrowedFd<'_>, offloads: Offloads) -> io::Result<()> {
    let flags = usize::try_from(offloads.0).unwrap_or_default();
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    unsafe { ioctl(queue, IntegerSetter::<SET_OFFLOAD>::new_usize(flags)) }?;
    Ok(())
}

fn set_queue(queue: BorrowedFd<'_>, flag: libc::c_int) -> io::Result<()> {
    let mut request = empty_request();
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flag).unwrap_or_default();
    // SAFETY: TUNSETQUEUE reads one ifreq.
    unsafe { ioctl(queue, Setter::<SET_QUEUE, _>::new(request)) }?;
    Ok(())
}
