//! Signals that stop the machine, as a descriptor to poll.
//!
//! Unsafe for `signalfd(2)`, which no crate of ours wraps.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd};

use libc::{SIGHUP, SIGINT, SIGTERM, signalfd_siginfo};
use vmm_sys_util::signal::create_sigset;

/// SIGTERM, SIGINT and SIGHUP, blocked in this thread and those it starts later, and readable here.
pub struct StopSignals(File);

impl StopSignals {
    /// Call it before the first thread is started.
    ///
    /// # Errors
    /// The operating system's answer.
    pub fn new() -> io::Result<Self> {
        let set = create_sigset(&[SIGTERM, SIGINT, SIGHUP])?;
        // SAFETY: `set` is initialized; the old mask is not asked for.
        let result =
            unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
        if result != 0 {
            return Err(io::Error::from_raw_os_error(result));
        }
        // SAFETY: -1 asks for a new descriptor; `set` is initialized.
        let fd =
            unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        Ok(Self(unsafe { File::from_raw_fd(fd) }))
    }

    /// The number of the next signal that came, if one did.
    pub fn next(&self) -> Option<i32> {
        let mut info = [0; size_of::<signalfd_siginfo>()];
        (&self.0).read_exact(&mut info).ok()?;
        // `ssi_signo` is the first field.
        let number = [info[0], info[1], info[2], info[3]];
        i32::try_from(u32::from_ne_bytes(number)).ok()
    }
}

impl AsFd for StopSignals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
