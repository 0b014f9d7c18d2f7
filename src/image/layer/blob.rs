//! The sink of an import: a data blob of whole blocks, which the guest reads, and the tails of files,
//! which the image's metadata will hold beside the inodes.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

use super::convert::{ContentSink, FileContent, SinkError};
use crate::image::erofs::{BLOCK_SIZE, xattr};
use crate::image::tar::Extent;

/// The longest tail (what a file has past its last whole block) that is kept out of the data blob, in
/// bytes. Half a block: the shorter half of the tails makes three quarters of the padding, and with a
/// limit much below a block the inodes still pack well.
pub const MAX_TAIL: u64 = 2048;
/// A sparse file's map has at most this many chunks: a file of a terabyte with a few pieces must not
/// cost a gigabyte of map.
const MAX_CHUNKS: u64 = 1 << 14;
/// The largest chunks that EROFS can have: `BLOCK_SIZE << 31`.
const MAX_CHUNK_BITS: u8 = 31;
/// Contents are written through a buffer of this size.
const BUFFER: usize = 1 << 20;

/// Where a file's content is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Content {
    /// In one run.
    Flat {
        /// First block in the layer's data blob.
        block: u32,
        /// Offset in the layer's tails of what follows the whole blocks; `None`: the blob has it all,
        /// padded with zeros.
        tail: Option<u64>,
    },
    /// In chunks of `BLOCK_SIZE << bits` bytes: the first block of each, `None` for a hole.
    Chunked {
        /// Size of the chunks, 0 to 31.
        bits: u8,
        /// One for each chunk of the file.
        chunks: Vec<Option<u32>>,
    },
}

/// Writes the two files of a layer. Both are made by the caller, empty.
pub struct BlobSink {
    data: File,
    tails: BufWriter<File>,
    /// Content that `data` has not got yet, for the position `position - buffer.len()`.
    buffer: Vec<u8>,
    /// Where the next content goes in `data`, buffer included.
    position: u64,
    tails_len: u64,
}

impl BlobSink {
    /// A sink into two empty files.
    #[must_use]
    pub fn new(data: File, tails: File) -> Self {
        Self {
            data,
            tails: BufWriter::with_capacity(BUFFER, tails),
            buffer: Vec::with_capacity(BUFFER),
            position: 0,
            tails_len: 0,
        }
    }

    /// Writes what is buffered, makes both files durable and gives their sizes: data, tails.
    ///
    /// # Errors
    /// The files'.
    pub fn finish(mut self) -> io::Result<(u64, u64)> {
        self.flush()?;
        self.data.set_len(self.position)?;
        self.data.sync_all()?;
        let tails = self
            .tails
            .into_inner()
            .map_err(io::IntoInnerError::into_error)?;
        tails.sync_all()?;
        Ok((self.position, self.tails_len))
    }

    fn flush(&mut self) -> io::Result<()> {
        let start = self.position - self.buffer.len() as u64;
        self.data.write_all_at(&self.buffer, start)?;
        self.buffer.clear();
        Ok(())
    }

    /// Appends `length` bytes of `reader`.
    fn copy(&mut self, reader: &mut impl Read, length: u64) -> Result<(), SinkError> {
        let mut left = length;
        while left > 0 {
            if self.buffer.len() == BUFFER {
                self.flush().map_err(SinkError::Write)?;
            }
            let room = (BUFFER - self.buffer.len()) as u64;
            let piece = room.min(left);
            // `read_to_end` on a limited reader fills the buffer's spare room without zeroing it.
            let count = reader
                .by_ref()
                .take(piece)
                .read_to_end(&mut self.buffer)
                .map_err(SinkError::Read)? as u64;
            self.position += count;
            left -= count;
            if count < piece {
                return Err(SinkError::Read(io::ErrorKind::UnexpectedEof.into()));
            }
        }
        Ok(())
    }

    /// Appends zeros up to the next block.
    fn pad(&mut self) {
        let zeros = self.position.next_multiple_of(BLOCK_SIZE) - self.position;
        self.buffer.resize(self.buffer.len() + zeros as usize, 0);
        self.position += zeros;
    }

    /// Leaves a hole up to `position`.
    fn seek(&mut self, position: u64) -> Result<(), SinkError> {
        self.flush().map_err(SinkError::Write)?;
        self.position = position;
        Ok(())
    }

    fn flat<R: Read>(&mut self, mut file: FileContent<'_, R>) -> Result<Content, SinkError> {
        let tail = file.size % BLOCK_SIZE;
        let inlined = tail > 0 && tail <= MAX_TAIL && leaves_room(&file);
        let block = block_number(self.position)?;
        self.copy(&mut file.reader, file.size - if inlined { tail } else { 0 })?;
        if !inlined {
            self.pad();
            return Ok(Content::Flat { block, tail: None });
        }
        let mut bytes = vec![0; tail as usize];
        file.reader
            .read_exact(&mut bytes)
            .map_err(SinkError::Read)?;
        self.tails.write_all(&bytes).map_err(SinkError::Write)?;
        let offset = self.tails_len;
        self.tails_len += tail;
        Ok(Content::Flat {
            block,
            tail: Some(offset),
        })
    }

    fn chunked<R: Read>(
        &mut self,
        mut file: FileContent<'_, R>,
        extents: &[Extent],
    ) -> Result<Content, SinkError> {
        let bits = match extents {
            [] => MAX_CHUNK_BITS,
            _ => chunk_bits(file.size).ok_or_else(too_large)?,
        };
        let chunk = BLOCK_SIZE << bits;
        if file.size.div_ceil(chunk) > MAX_CHUNKS {
            return Err(too_large());
        }
        let mut chunks = vec![None; file.size.div_ceil(chunk) as usize];
        // Each chunk with something in it gets its place, one after the other; a chunk's own holes are
        // holes of the blob.
        let base = self.position;
        let mut used = 0_u64;
        for extent in extents {
            for index in extent.offset / chunk..=(extent.end() - 1) / chunk {
                if chunks[index as usize].is_none() {
                    let place = used.checked_mul(chunk).and_then(|o| o.checked_add(base));
                    chunks[index as usize] = Some(block_number(place.ok_or_else(too_large)?)?);
                    used += 1;
                }
            }
        }
        for extent in extents {
            let mut offset = extent.offset;
            while offset < extent.end() {
                let index = offset / chunk;
                let end = extent.end().min((index + 1) * chunk);
                let place = u64::from(chunks[index as usize].unwrap_or_default()) * BLOCK_SIZE;
                self.seek(place + offset % chunk)?;
                self.copy(&mut file.reader, end - offset)?;
                offset = end;
            }
        }
        // The last chunk of the file may be short of its size.
        let short = match chunks.last() {
            Some(Some(_)) => chunks.len() as u64 * chunk - file.size.next_multiple_of(BLOCK_SIZE),
            _ => 0,
        };
        let end = used
            .checked_mul(chunk)
            .and_then(|o| o.checked_add(base))
            .ok_or_else(too_large)?;
        self.seek(end - short)?;
        block_number(self.position)?;
        Ok(Content::Chunked { bits, chunks })
    }
}

impl ContentSink for BlobSink {
    type Content = Content;

    fn store<R: Read>(&mut self, file: FileContent<'_, R>) -> Result<Content, SinkError> {
        let content = match file.extents {
            Some([whole]) if whole.offset == 0 && whole.length == file.size => self.flat(file)?,
            Some(extents) if file.size > 0 => self.chunked(file, extents)?,
            _ => self.flat(file)?,
        };
        // A layer's blob must be addressable by 32-bit block numbers.
        block_number(self.position)?;
        Ok(content)
    }
}

/// Whether inode, attributes and tail fit into half a block or little more, whatever the attributes.
fn leaves_room<R>(file: &FileContent<'_, R>) -> bool {
    xattr::body_size(file.xattrs).is_some_and(|size| size <= 1024)
}

fn block_number(position: u64) -> Result<u32, SinkError> {
    // The last block number is EROFS' mark of a hole.
    match u32::try_from(position / BLOCK_SIZE) {
        Ok(block) if block < u32::MAX => Ok(block),
        _ => Err(too_large()),
    }
}

fn too_large() -> SinkError {
    SinkError::Write(io::Error::new(
        io::ErrorKind::FileTooLarge,
        "a file, or all files of the layer, do not fit into the 16 TiB that an image can have",
    ))
}

/// The smallest chunks that keep the map within [`MAX_CHUNKS`].
fn chunk_bits(size: u64) -> Option<u8> {
    (0..=MAX_CHUNK_BITS).find(|bits| size.div_ceil(BLOCK_SIZE << bits) <= MAX_CHUNKS)
}
