//! A streaming reader of tar archives: ustar, PAX, GNU and old v7, as container tools write them.
//!
//! What the `tar` crate does not give and an image may hold: every sparse format (GNU and PAX 0.0, 0.1
//! and 1.0), extended attributes as bytes, and limits on what a hostile header can make the reader
//! allocate. The bytes are never trusted: every number is checked, nothing panics.
//!
//! ```text
//! next_entry ──▶ header block ──▶ extension (x g L K)? read it, next block
//!      ▲                      └─▶ entry ──▶ read (stored bytes) ──┐
//!      └───────────────── rest of the content is skipped ◀────────┘
//! ```
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

mod header;
mod pax;
mod sparse;
#[cfg(test)]
mod tests;

use std::io::{self, Read};

use header::{BLOCK, Header};
use pax::Extensions;
pub use sparse::Extent;

/// The longest PAX header accepted, in bytes: an inode's extended attributes and a sparse map fit.
const MAX_PAX: u64 = 4 << 20;
/// The longest GNU long name accepted, in bytes.
const MAX_LONG_NAME: u64 = 64 << 10;

/// Why an archive cannot be read. The texts continue a sentence that names the archive.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    /// The input failed.
    #[error("cannot be read: {0}")]
    Io(io::Error),
    /// The input ends inside a header or an entry's content.
    #[error("is truncated: it ends inside {}", within(.entry))]
    Truncated {
        /// The entry, if its name is known.
        entry: Option<String>,
    },
    /// The bytes break a rule of the format.
    #[error("is malformed at byte {offset}, {}: {fault}", within(.entry))]
    Malformed {
        /// Where the header of the entry starts.
        offset: u64,
        /// The entry, if its name is known.
        entry: Option<String>,
        /// What is wrong.
        fault: &'static str,
    },
}

fn within(entry: &Option<String>) -> String {
    match entry {
        Some(name) => format!("entry `{name}`"),
        None => "a header".to_owned(),
    }
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file; its content follows.
    Regular,
    /// Another name, [`TarEntry::link`], of a file.
    HardLink,
    /// A symbolic link to [`TarEntry::link`].
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A directory.
    Directory,
    /// A FIFO.
    Fifo,
}

/// One entry, with its extensions (PAX, GNU) applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TarEntry {
    /// The path as written, not checked for `..` and the like.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: EntryKind,
    /// Permission bits, set-uid, set-gid and sticky: at most 0o7777.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since the epoch.
    pub mtime: i64,
    /// Nanoseconds past `mtime`, below 1,000,000,000.
    pub mtime_nsec: u32,
    /// Size of the file, holes included. 0 for what has no content.
    pub size: u64,
    /// Target of a link.
    pub link: Vec<u8>,
    /// Major number of a device.
    pub major: u32,
    /// Minor number of a device.
    pub minor: u32,
    /// Extended attributes: name, value. Names are not checked.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// The pieces that are stored, in order, without overlap; `None`: all of it.
    pub sparse: Option<Vec<Extent>>,
}

/// What an archive is read from.
pub trait TarInput: Read {
    /// Passes over `count` bytes.
    ///
    /// # Errors
    /// The input's, or `UnexpectedEof` if it ends before.
    fn skip(&mut self, count: u64) -> io::Result<()>;
}

/// A stream: skipping is reading.
pub struct Stream<R>(pub R);

impl<R: Read> Read for Stream<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl<R: Read> TarInput for Stream<R> {
    fn skip(&mut self, count: u64) -> io::Result<()> {
        match io::copy(&mut (&mut self.0).take(count), &mut io::sink())? {
            copied if copied == count => Ok(()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

/// Reads an archive entry by entry. As [`Read`] it gives the stored bytes of the current entry.
pub struct TarReader<R> {
    input: R,
    /// Offset of the next byte of `input`.
    offset: u64,
    /// Offset of the header being parsed.
    header_at: u64,
    /// Stored bytes of the current entry not yet read.
    remaining: u64,
    /// Zeros after them up to the next block.
    padding: u64,
    /// Name of the current entry, for errors.
    current: Option<String>,
    global: Extensions,
    ended: bool,
}

impl<R: TarInput> TarReader<R> {
    /// Starts at the first header of an archive.
    pub fn new(input: R) -> Self {
        Self {
            input,
            offset: 0,
            header_at: 0,
            remaining: 0,
            padding: 0,
            current: None,
            global: Extensions::default(),
            ended: false,
        }
    }

    /// Offset in the archive of the current entry's first stored byte that was not read.
    pub fn position(&self) -> u64 {
        self.offset
    }

    /// Number of the current entry's stored bytes that were not read.
    pub fn remaining(&self) -> u64 {
        self.remaining
    }

    /// The input, after the last entry was seen.
    pub fn into_input(self) -> R {
        self.input
    }

    /// Passes over the rest of the current entry and parses the next; `None` at the end.
    ///
    /// # Errors
    /// [`TarError`]; the archive cannot be read further.
    pub fn next_entry(&mut self) -> Result<Option<TarEntry>, TarError> {
        let rest = std::mem::take(&mut self.remaining);
        self.skip(rest)?;
        self.skip_padding()?;
        self.current = None;
        let mut extensions: Option<Extensions> = None;
        loop {
            let Some(header) = self.next_header()? else {
                return match extensions {
                    None => Ok(None),
                    Some(_) => Err(TarError::Truncated { entry: None }),
                };
            };
            match header.type_flag() {
                b'x' | b'X' => {
                    let bytes = self.extension(&header, MAX_PAX)?;
                    let target = extensions.get_or_insert_with(|| self.global.clone());
                    target.parse(&bytes).map_err(|f| self.malformed(f))?;
                }
                b'g' => {
                    let bytes = self.extension(&header, MAX_PAX)?;
                    let mut global = std::mem::take(&mut self.global);
                    global.parse(&bytes).map_err(|f| self.malformed(f))?;
                    self.global = global;
                }
                flag @ (b'L' | b'K') => {
                    let mut name = self.extension(&header, MAX_LONG_NAME)?;
                    name.truncate(name.iter().position(|&b| b == 0).unwrap_or(name.len()));
                    let target = extensions.get_or_insert_with(|| self.global.clone());
                    match flag {
                        b'L' => target.path = Some(name),
                        _ => target.link = Some(name),
                    }
                }
                // A volume label: of no use here.
                b'V' => drop(self.extension(&header, MAX_LONG_NAME)?),
                _ => {
                    let extensions = extensions.unwrap_or_else(|| self.global.clone());
                    return self.entry(&header, extensions).map(Some);
                }
            }
        }
    }

    /// The next header block; `None` at the end of the archive (a zero block or a clean end of file).
    fn next_header(&mut self) -> Result<Option<Header>, TarError> {
        if self.ended {
            return Ok(None);
        }
        self.header_at = self.offset;
        let mut block = [0; BLOCK];
        if !self.read_block(&mut block)? || block.iter().all(|&b| b == 0) {
            self.ended = true;
            return Ok(None);
        }
        let header = Header::new(block).map_err(|f| self.malformed(f))?;
        Ok(Some(header))
    }

    fn entry(&mut self, header: &Header, ext: Extensions) -> Result<TarEntry, TarError> {
        let path = match (&ext.sparse.name, &ext.path) {
            (Some(name), _) | (None, Some(name)) => name.clone(),
            (None, None) => header.path(),
        };
        self.current = Some(display(&path));
        let kind = header.kind(&path).map_err(|f| self.malformed(f))?;
        let stored = match ext.size {
            Some(size) => size,
            None => header.size().map_err(|f| self.malformed(f))?,
        };
        // Only files have content: writers put all kinds of sizes in the headers of the others.
        let stored = match kind {
            EntryKind::Regular => stored,
            _ => 0,
        };
        self.remaining = stored;
        self.padding = padding(stored);
        let (size, sparse) = match kind {
            EntryKind::Regular => self.sparse_map(header, &ext, stored)?,
            _ => (0, None),
        };
        let (mtime, mtime_nsec) = match ext.mtime {
            Some(time) => time,
            None => (header.mtime().map_err(|f| self.malformed(f))?, 0),
        };
        let (major, minor) = match kind {
            EntryKind::CharDevice | EntryKind::BlockDevice => {
                header.device().map_err(|f| self.malformed(f))?
            }
            _ => (0, 0),
        };
        let parsed = |f| self.malformed(f);
        Ok(TarEntry {
            kind,
            mode: header.mode().map_err(parsed)?,
            uid: header::owner(ext.uid, header.uid()).map_err(parsed)?,
            gid: header::owner(ext.gid, header.gid()).map_err(parsed)?,
            link: ext.link.unwrap_or_else(|| header.link()),
            xattrs: ext.xattrs.into_iter().collect(),
            path,
            mtime,
            mtime_nsec,
            size,
            major,
            minor,
            sparse,
        })
    }

    /// The real size and the stored pieces of a file that may be sparse.
    fn sparse_map(
        &mut self,
        header: &Header,
        ext: &Extensions,
        stored: u64,
    ) -> Result<(u64, Option<Vec<Extent>>), TarError> {
        let mut map = sparse::Map::default();
        let size = if header.type_flag() == b'S' {
            let mut more = header
                .sparse_extents(&mut map)
                .map_err(|f| self.malformed(f))?;
            while more {
                // These blocks lie between the header and the content and are not part of its size.
                let mut block = [0; BLOCK];
                if !self.read_block(&mut block)? {
                    return Err(self.truncated());
                }
                more = header::more_extents(&block, &mut map).map_err(|f| self.malformed(f))?;
            }
            header.real_size().map_err(|f| self.malformed(f))?
        } else if ext.sparse.is_version_1() {
            sparse::read_version_1(self, &mut map)
                .map_err(|error| self.read_failed(error))?
                .map_err(|f| self.malformed(f))?;
            ext.sparse
                .size
                .ok_or_else(|| self.malformed("a sparse file without its real size"))?
        } else if let Some(size) = ext.sparse.size {
            ext.sparse.fill(&mut map).map_err(|f| self.malformed(f))?;
            size
        } else {
            return Ok((stored, None));
        };
        let extents = map
            .finish(size, self.remaining)
            .map_err(|f| self.malformed(f))?;
        Ok((size, Some(extents)))
    }

    /// Reads the whole content of an extension header.
    fn extension(&mut self, header: &Header, limit: u64) -> Result<Vec<u8>, TarError> {
        let size = header.size().map_err(|f| self.malformed(f))?;
        if size > limit {
            return Err(self.malformed("an extension header larger than is accepted"));
        }
        (self.remaining, self.padding) = (size, padding(size));
        let mut bytes = Vec::new();
        (&mut *self)
            .take(size)
            .read_to_end(&mut bytes)
            .map_err(|e| self.read_failed(e))?;
        let rest = self.padding;
        self.skip(rest)?;
        self.padding = 0;
        Ok(bytes)
    }

    fn skip(&mut self, count: u64) -> Result<(), TarError> {
        if count > 0 {
            self.input.skip(count).map_err(|e| self.read_failed(e))?;
            self.offset = self.offset.saturating_add(count);
        }
        Ok(())
    }

    /// Passes over the zeros behind an entry's content. At the archive's end they may be missing, as the
    /// end marker may: umoci writes such layers, and containerd takes them. The content is whole then.
    fn skip_padding(&mut self) -> Result<(), TarError> {
        let padding = std::mem::take(&mut self.padding);
        match self.skip(padding) {
            Err(TarError::Truncated { .. }) => {
                self.ended = true;
                Ok(())
            }
            skipped => skipped,
        }
    }

    /// Reads a block; false at a clean end of the input.
    fn read_block(&mut self, block: &mut [u8; BLOCK]) -> Result<bool, TarError> {
        let mut filled = 0_usize;
        while let Some(rest) = block.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match self.input.read(rest) {
                Ok(0) if filled == 0 => return Ok(false),
                Ok(0) => return Err(self.truncated()),
                Ok(count) => filled = filled.saturating_add(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(TarError::Io(error)),
            }
        }
        self.offset = self.offset.saturating_add(BLOCK as u64);
        Ok(true)
    }

    fn malformed(&self, fault: &'static str) -> TarError {
        TarError::Malformed {
            offset: self.header_at,
            entry: self.current.clone(),
            fault,
        }
    }

    fn truncated(&self) -> TarError {
        TarError::Truncated {
            entry: self.current.clone(),
        }
    }

    /// The error for a failed read of the current entry's content.
    pub fn read_failed(&self, error: io::Error) -> TarError {
        match error.kind() {
            io::ErrorKind::UnexpectedEof if error.get_ref().is_none() => self.truncated(),
            _ => TarError::Io(error),
        }
    }
}

impl<R: TarInput> Read for TarReader<R> {
    /// Gives the stored bytes of the current entry. An input that ends before them is `UnexpectedEof`
    /// without a message of its own.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let limit = usize::try_from(self.remaining)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let Some(window) = buffer.get_mut(..limit).filter(|window| !window.is_empty()) else {
            return Ok(0);
        };
        let count = self.input.read(window)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.remaining = self.remaining.saturating_sub(count as u64);
        self.offset = self.offset.saturating_add(count as u64);
        Ok(count)
    }
}

/// Zeros between content of `size` bytes and the next header.
fn padding(size: u64) -> u64 {
    const MASK: u64 = BLOCK as u64 - 1;
    size.wrapping_neg() & MASK
}

/// A name for an error message: what is not printable is escaped, and it is not longer than a line.
pub(crate) fn display(name: &[u8]) -> String {
    let text = String::from_utf8_lossy(name);
    let mut shown = String::new();
    for character in text.chars() {
        if shown.len() >= 300 {
            shown.push('…');
            break;
        }
        match character {
            c if c.is_control() => shown.extend(c.escape_default()),
            c => shown.push(c),
        }
    }
    shown
}
