//! Opens what a spec names: a path, or a descriptor that this process inherited.
//!
//! The one place where a number becomes an owned descriptor.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;

use rustix::io::{FdFlags, fcntl_setfd};
use vmm_sys_util::eventfd::EventFd;

use crate::vmm::spec::FileSource;

/// A file that a spec names cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("cannot open the {role} {path}: {source}")]
pub struct FileError {
    /// What the file is for, such as `kernel`.
    pub role: String,
    /// The file.
    pub path: PathBuf,
    /// The operating system's answer.
    pub source: io::Error,
}

/// An open file and the name to call it by in messages.
#[derive(Debug)]
pub struct Opened {
    /// The file.
    pub file: File,
    /// Its path, or `/proc/self/fd/N` for an inherited descriptor.
    pub path: PathBuf,
}

impl Opened {
    /// Opens `source` for reading; `role` says in messages what it is.
    ///
    /// # Errors
    /// The file cannot be opened, or the descriptor is not open.
    pub fn for_reading(source: &FileSource, role: &str) -> Result<Self, FileError> {
        Self::open(source, role, OpenOptions::new().read(true))
    }

    /// Opens `source` for reading and writing.
    ///
    /// # Errors
    /// The file cannot be opened, or the descriptor is not open.
    pub fn for_writing(source: &FileSource, role: &str) -> Result<Self, FileError> {
        Self::open(source, role, OpenOptions::new().read(true).write(true))
    }

    fn open(source: &FileSource, role: &str, options: &OpenOptions) -> Result<Self, FileError> {
        let (opened, path) = match source {
            FileSource::Path(path) => (options.open(path), path.clone()),
            FileSource::Fd(fd) => {
                let path = PathBuf::from(format!("/proc/self/fd/{fd}"));
                (inherited(*fd).map(File::from), path)
            }
        };
        match opened {
            Ok(file) => Ok(Self { file, path }),
            Err(source) => Err(FileError {
                role: role.into(),
                path,
                source,
            }),
        }
    }
}

/// Whether nobody holds the other end of a pipe or socket any more, which a poll found readable. What was written to
/// it is thrown away.
pub fn is_closed(fd: &OwnedFd) -> bool {
    !matches!(
        rustix::io::read(fd, &mut [0; 64]),
        Ok(1..) | Err(rustix::io::Errno::INTR)
    )
}

/// Takes over a descriptor that was open when this process started, and marks it close-on-exec.
///
/// # Errors
/// `EBADF` if it is not open.
pub fn inherited(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 3 {
        return Err(io::Error::from(rustix::io::Errno::BADF));
    }
    // SAFETY: borrowed for this one call, which fails without effect if nothing is open there.
    fcntl_setfd(unsafe { BorrowedFd::borrow_raw(fd) }, FdFlags::CLOEXEC)?;
    // SAFETY: it is open, and nobody else owns it: a spec and the arguments name each inherited
    // descriptor once (`MachineSpec::validate`, `cube-vmm`'s argument parser), and this process takes
    // them over before it opens files of its own under numbers that callers could guess.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The descriptor of an eventfd, for another process.
pub fn eventfd(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is the eventfd's own, which is open for as long as the eventfd is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
