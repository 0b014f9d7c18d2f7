//! A disk made of local files: one that may be written, or several read-only ones laid end to end.
//!
//! Every operation is synchronous on the worker (`preadv`, `pwritev`, `fallocate`, `fdatasync`); the bytes go
//! between the page cache and guest memory without a copy in between.
#![forbid(unsafe_code)]
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

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, OFlags, fallocate, fcntl_getfl, fdatasync};
use rustix::io::Errno;

use super::{Backend, Data, Extent, Op, SECTOR, SERIAL, Tag};
use crate::vmm::files::{FileError, Opened};
use crate::vmm::spec::{DiskSpec, FileSource};
use crate::vmm::virtio::iovec::IoVecs;

/// What every part's length but the last one's is a multiple of: a page, so that no page of the guest's
/// cache has two files in it.
const PART_ALIGNMENT: u64 = 4096;

/// Zeroes are written this many bytes at a time where a file system has no better way.
const ZEROES: usize = 64 << 10;

/// Why a disk cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The serial is not one.
    #[error("the disk serial {0:?} is not 1 to 20 printable ASCII bytes; choose another")]
    Serial(String),
    /// A file cannot be opened.
    #[error(transparent)]
    Open(#[from] FileError),
    /// There is no file.
    #[error("disk {0} has no parts; name at least one file")]
    NoParts(String),
    /// Several files, and writable.
    #[error("disk {0} has several parts and is writable; make it read-only, or give it one file")]
    WritableParts(String),
    /// The file system's answer to a question about the file.
    #[error("cannot inspect the disk file {path}: {source}")]
    Inspect {
        /// The file.
        path: PathBuf,
        /// The operating system's answer.
        #[source]
        source: io::Error,
    },
    /// A directory, a socket and the like.
    #[error("the disk file {0} is neither a regular file nor a block device")]
    NotADisk(PathBuf),
    /// There is nothing in it.
    #[error("the disk file {0} is empty")]
    Empty(PathBuf),
    /// Shorter than the spec says.
    #[error("the disk file {path} has {actual} bytes, fewer than the {said} it is said to have")]
    TooSmall {
        /// The file.
        path: PathBuf,
        /// Its length.
        actual: u64,
        /// What the spec says.
        said: u64,
    },
    /// Not whole sectors, or not whole pages and something follows.
    #[error("the disk file {path} provides {len} bytes, not a multiple of {multiple}; pad it")]
    Misaligned {
        /// The file.
        path: PathBuf,
        /// The bytes it provides.
        len: u64,
        /// What they must be a multiple of.
        multiple: u64,
    },
    /// A writable disk on a descriptor that is not.
    #[error("the disk file {0} is open for reading only, and the disk is writable")]
    ReadOnlyFile(PathBuf),
    /// The parts together exceed what a file can have.
    #[error("disk {0} is larger than 2^63 - 1 bytes")]
    TooLarge(String),
}

/// One open file of a disk.
#[derive(Debug)]
pub struct PartFile {
    /// The file, open for reading, and for writing when the disk is writable.
    pub file: File,
    /// What to call it in messages.
    pub path: PathBuf,
    /// How many of its bytes are the disk's; absent: all of them.
    pub size: Option<u64>,
}

/// A disk of local files.
#[derive(Debug)]
pub struct Disk {
    serial: String,
    read_only: bool,
    /// In order; not empty.
    parts: Vec<Part>,
    len: u64,
}

/// A file with its place on the disk.
#[derive(Debug)]
struct Part {
    file: File,
    start: u64,
    len: u64,
}

impl Disk {
    /// Opens the files of a spec.
    ///
    /// # Errors
    /// What is wrong with them, as a sentence that names the file.
    pub fn open(spec: &DiskSpec) -> Result<Self, DiskError> {
        let mut files = Vec::new();
        for part in &spec.parts {
            if let FileSource::Path(path) = &part.file {
                refuse_to_wait(path)?;
            }
            let opened = if spec.read_only {
                Opened::for_reading(&part.file, "disk file")?
            } else {
                Opened::for_writing(&part.file, "disk file")?
            };
            files.push(PartFile {
                file: opened.file,
                path: opened.path,
                size: part.size,
            });
        }
        Self::new(&spec.serial, files, spec.read_only)
    }

    /// A disk of open files.
    ///
    /// # Errors
    /// What is wrong with them, as a sentence that names the file.
    pub fn new(serial: &str, files: Vec<PartFile>, read_only: bool) -> Result<Self, DiskError> {
        if serial.is_empty()
            || serial.len() > SERIAL
            || !serial.bytes().all(|b| b.is_ascii_graphic())
        {
            return Err(DiskError::Serial(serial.to_owned()));
        }
        if files.len() > 1 && !read_only {
            return Err(DiskError::WritableParts(serial.to_owned()));
        }
        let last = files.len().saturating_sub(1);
        let mut parts = Vec::new();
        let mut end = 0u64;
        for (index, part) in files.into_iter().enumerate() {
            let alignment = if index < last { PART_ALIGNMENT } else { SECTOR };
            let len = usable_len(&part, alignment, read_only)?;
            let start = end;
            end = end
                .checked_add(len)
                .filter(|end| i64::try_from(*end).is_ok())
                .ok_or_else(|| DiskError::TooLarge(serial.to_owned()))?;
            parts.push(Part {
                file: part.file,
                start,
                len,
            });
        }
        if parts.is_empty() {
            return Err(DiskError::NoParts(serial.to_owned()));
        }
        Ok(Self {
            serial: serial.to_owned(),
            read_only,
            parts,
            len: end,
        })
    }

    /// The disk's name in the guest.
    pub fn serial(&self) -> &str {
        &self.serial
    }

    /// Calls `transfer` for each piece of `data` that lies in one file, with the file, the place in it,
    /// and the piece.
    fn each_piece(
        &self,
        mut at: u64,
        data: Data<'_>,
        transfer: impl Fn(&File, u64, &mut IoVecs<'_>) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut offset = data.offset;
        let mut left = data.len;
        while left > 0 {
            let (part, within) = self.locate(at).ok_or(io::ErrorKind::UnexpectedEof)?;
            let room = part.len.saturating_sub(within);
            let now = u32::try_from(room).unwrap_or(u32::MAX).min(left);
            let mut piece =
                IoVecs::new(data.memory, data.segments, offset, now).map_err(io::Error::other)?;
            transfer(&part.file, within, &mut piece)?;
            at = at.saturating_add(now.into());
            offset = offset.saturating_add(now);
            left = left.saturating_sub(now);
        }
        Ok(())
    }

    /// The part that has byte `at`, and the byte's place in it.
    fn locate(&self, at: u64) -> Option<(&Part, u64)> {
        let after = self.parts.partition_point(|part| part.start <= at);
        let part = self.parts.get(after.checked_sub(1)?)?;
        let within = at.checked_sub(part.start)?;
        (within < part.len).then_some((part, within))
    }

    /// The file of a writable disk, which is one.
    fn only_file(&self) -> io::Result<&File> {
        let part = self.parts.first().ok_or(io::ErrorKind::NotFound)?;
        Ok(&part.file)
    }

    fn carry_out(&self, op: Op<'_>) -> io::Result<()> {
        match op {
            Op::Read { at, data } => self.each_piece(at, data, |file, at, piece| {
                piece.read_all_at(file.as_fd(), at)
            }),
            Op::Write { at, data, durable } => {
                self.each_piece(at, data, |file, at, piece| {
                    piece.write_all_at(file.as_fd(), at)
                })?;
                if durable { self.flush() } else { Ok(()) }
            }
            Op::Flush => self.flush(),
            Op::Discard(extents) => {
                let file = self.only_file()?;
                extents.iter().try_for_each(|extent| punch(file, *extent))
            }
            Op::WriteZeroes { extent, unmap } => write_zeroes(self.only_file()?, extent, unmap),
        }
    }

    fn flush(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        Ok(fdatasync(self.only_file()?)?)
    }
}

impl Backend for Disk {
    fn len(&self) -> u64 {
        self.len
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn submit(&mut self, _tag: Tag, op: Op<'_>) -> Option<io::Result<()>> {
        Some(self.carry_out(op))
    }
}

/// How many bytes a file gives to the disk, after all that can be wrong with it.
fn usable_len(part: &PartFile, alignment: u64, read_only: bool) -> Result<u64, DiskError> {
    let path = &part.path;
    let inspect = |source| DiskError::Inspect {
        path: path.clone(),
        source,
    };
    let actual = file_len(&part.file, path)?;
    let mode = fcntl_getfl(&part.file).map_err(|errno| inspect(errno.into()))?;
    if !read_only && mode & OFlags::RWMODE != OFlags::RDWR {
        return Err(DiskError::ReadOnlyFile(path.clone()));
    }
    let len = part.size.unwrap_or(actual);
    if len > actual {
        return Err(DiskError::TooSmall {
            path: path.clone(),
            actual,
            said: len,
        });
    }
    if len == 0 {
        return Err(DiskError::Empty(path.clone()));
    }
    if !len.is_multiple_of(alignment) {
        return Err(DiskError::Misaligned {
            path: path.clone(),
            len,
            multiple: alignment,
        });
    }
    Ok(len)
}

/// Opening a named pipe would wait for somebody at its other end, so what is no disk is refused before. A
/// file that is not there is left to the opening, whose error says so.
fn refuse_to_wait(path: &Path) -> Result<(), DiskError> {
    match std::fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() && !metadata.file_type().is_block_device() => {
            Err(DiskError::NotADisk(path.to_owned()))
        }
        _ => Ok(()),
    }
}

fn file_len(file: &File, path: &Path) -> Result<u64, DiskError> {
    let inspect = |source| DiskError::Inspect {
        path: path.to_owned(),
        source,
    };
    let metadata = file.metadata().map_err(inspect)?;
    if metadata.file_type().is_block_device() {
        // The length of a device is where its end is.
        let mut file = file;
        return file.seek(SeekFrom::End(0)).map_err(inspect);
    }
    if !metadata.is_file() {
        return Err(DiskError::NotADisk(path.to_owned()));
    }
    Ok(metadata.len())
}

/// Gives the space of a range back; it reads as zeroes.
fn punch(file: &File, extent: Extent) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    change_range(file, flags, extent)
}

/// Makes a range read as zeroes: by the file system's means, or by writing them.
fn write_zeroes(file: &File, extent: Extent, unmap: bool) -> io::Result<()> {
    if unmap {
        match punch(file, extent) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
            result => return result,
        }
    }
    let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
    match change_range(file, flags, extent) {
        Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
        result => return result,
    }
    let zeroes = [0; ZEROES];
    let mut at = extent.at;
    let end = at.saturating_add(extent.len);
    while at < end {
        let left = usize::try_from(end.saturating_sub(at)).unwrap_or(usize::MAX);
        let now = zeroes.get(..left).unwrap_or(&zeroes);
        file.write_all_at(now, at)?;
        at = at.saturating_add(now.len() as u64);
    }
    Ok(())
}

/// `fallocate` on a range that may be empty, until no signal interrupts it.
fn change_range(file: &File, flags: FallocateFlags, extent: Extent) -> io::Result<()> {
    if extent.len == 0 {
        return Ok(());
    }
    loop {
        match fallocate(file, flags, extent.at, extent.len) {
            Err(Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}
