//! The I/O port that tells the VMM how far the boot is, and when the pod is done.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use cube_guest::{MARK_PORT, Mark};
use rustix::fs::{CWD, FileType, Mode, OFlags};

/// `/dev/port`: memory device 1, minor 4 (Documentation/admin-guide/devices.txt).
const DEV_PORT: (u32, u32) = (1, 4);

/// The port, open; or nothing on a machine that is not Cube's, where marks go nowhere.
#[derive(Debug)]
pub(crate) struct Port(Option<OwnedFd>);

impl Port {
    /// Opens the port with nothing mounted yet: through a device node made in the initramfs, removed at
    /// once. The descriptor is never one of the three standard ones, which may still be closed.
    pub(crate) fn open() -> Self {
        const NODE: &str = "/.port";
        let device = rustix::fs::makedev(DEV_PORT.0, DEV_PORT.1);
        let open = || {
            rustix::fs::mknodat(
                CWD,
                NODE,
                FileType::CharacterDevice,
                Mode::RUSR | Mode::WUSR,
                device,
            )?;
            let port = rustix::fs::open(NODE, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
            rustix::fs::unlink(NODE)?;
            rustix::io::fcntl_dupfd_cloexec(port?, 3)
        };
        Self(open().ok())
    }

    /// Its descriptor, for a child that marks.
    pub(crate) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.0.as_ref().map(AsFd::as_fd)
    }

    /// Tells the VMM. A machine without the port ignores it.
    pub(crate) fn mark(&self, mark: Mark) {
        if let Some(port) = &self.0 {
            let _ = rustix::io::pwrite(port, &[mark as u8], u64::from(MARK_PORT));
        }
    }
}
