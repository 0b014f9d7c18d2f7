//! Opens tap interfaces, as a virtio-net device wants them: with a virtio header of 12 bytes in front of each
//! frame.
//!
//! Unsafe for the ioctls.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::ioctl::{Setter, ioctl};

use super::rtnetlink::Rtnetlink;
use super::{AboutInterface, NetError};

/// The device that makes taps.
const TUN: &str = "/dev/net/tun";
/// `TUNSETIFF`: attaches a descriptor to an interface, made if it is not there.
const SET_INTERFACE: u32 = libc::TUNSETIFF as u32;
/// `TUNSETVNETHDRSZ`: bytes of the header.
const SET_HEADER_SIZE: u32 = libc::TUNSETVNETHDRSZ as u32;
/// `struct virtio_net_hdr_mrg_rxbuf` (virtio 1.2, section 5.1.6).
const HEADER_SIZE: libc::c_int = 12;
/// Longest name, in bytes (`IFNAMSIZ` less the NUL).
const MAX_NAME: usize = 15;

/// Whether taps can be made here.
pub fn is_available() -> bool {
    OpenOptions::new().read(true).write(true).open(TUN).is_ok()
}

/// Makes the tap `name` in the calling thread's network namespace and opens that many queues of it. It is gone
/// when the last of them is closed.
///
/// # Errors
/// The kernel's, such as a name that is taken.
pub fn create(name: &str, queues: usize) -> Result<Vec<OwnedFd>, NetError> {
    let flags = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    (0..queues)
        .map(|_| open(name, flags))
        .collect::<io::Result<_>>()
        .about_interface("make the tap", name)
}

/// Opens queues of the tap `name`, which somebody has made in this network namespace: up to `queues` if it has
/// several. Returns its MTU too.
///
/// # Errors
/// There is no such interface, or it is no tap, or in use.
pub fn open_existing(name: &str, queues: usize) -> Result<(Vec<OwnedFd>, u32), NetError> {
    let netlink = Rtnetlink::open().about_interface("look at", name)?;
    // The kernel would make one that is not there.
    let link = netlink
        .link(name)
        .map_err(|_| NetError::NoTap(name.to_owned()))?;
    // It must be opened as it was made, which only trying tells.
    let several = (0..queues).map(|_| open(name, libc::IFF_MULTI_QUEUE));
    let opened = match several.collect::<io::Result<Vec<_>>>() {
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
            open(name, 0).map(|queue| vec![queue])
        }
        opened => opened,
    };
    Ok((opened.about_interface("open the tap", name)?, link.mtu))
}

fn open(name: &str, more_flags: libc::c_int) -> io::Result<OwnedFd> {
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(TUN);
    let tun = tun.map_err(|error| io::Error::new(error.kind(), format!("{TUN}: {error}")))?;
    // SAFETY: ifreq is plain data for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() > MAX_NAME {
        return Err(io::ErrorKind::InvalidFilename.into());
    }
    for (to, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = byte as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | more_flags;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads one ifreq (and writes its name, to the copy that the setter owns).
    unsafe { ioctl(&tun, Setter::<SET_INTERFACE, _>::new(request)) }?;
    set_header_size(tun.as_fd())?;
    Ok(File::into(tun))
}

fn set_header_size(tap: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: TUNSETVNETHDRSZ reads one int.
    unsafe { ioctl(tap, Setter::<SET_HEADER_SIZE, _>::new(HEADER_SIZE)) }?;
    Ok(())
}
