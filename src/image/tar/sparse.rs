//! Maps of sparse files: which pieces are stored.
#![forbid(unsafe_code)]

use std::io::{self, Read};

use super::header::BLOCK;
use super::pax::decimal;

type Fault = &'static str;

/// The most pieces of a file that are accepted.
const MAX_EXTENTS: usize = 1 << 20;

/// A stored piece of a sparse file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Where it belongs in the file.
    pub offset: u64,
    /// Its length in bytes; not zero.
    pub length: u64,
}

impl Extent {
    /// The offset past its end.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.length)
    }
}

/// A map being collected.
#[derive(Debug, Default)]
pub(super) struct Map {
    extents: Vec<Extent>,
    /// Past the end of the last piece.
    end: u64,
    /// Sum of the lengths.
    stored: u64,
}

impl Map {
    /// Adds a piece: it must lie past those before. Empty pieces only mark the size and are dropped.
    pub(super) fn push(&mut self, offset: u64, length: u64) -> Result<(), Fault> {
        let end = offset
            .checked_add(length)
            .ok_or("a sparse map out of range")?;
        if offset < self.end {
            return Err("a sparse map whose pieces overlap or are out of order");
        }
        if self.extents.len() >= MAX_EXTENTS {
            return Err("a sparse map with more pieces than are accepted");
        }
        self.end = end;
        self.stored = self
            .stored
            .checked_add(length)
            .ok_or("a sparse map out of range")?;
        if length > 0 {
            self.extents.push(Extent { offset, length });
        }
        Ok(())
    }

    /// Checks the map against the file's size and the number of bytes stored.
    pub(super) fn finish(self, size: u64, stored: u64) -> Result<Vec<Extent>, Fault> {
        if self.end > size {
            return Err("a sparse map that reaches past the file's end");
        }
        if self.stored != stored {
            return Err("a sparse map that does not add up to the bytes stored");
        }
        Ok(self.extents)
    }
}

/// Reads the map of PAX format 1.0, which is in front of the content: decimal lines (the number of
/// pieces, then offset and length of each), padded with NULs to a block.
pub(super) fn read_version_1(
    input: &mut impl Read,
    map: &mut Map,
) -> io::Result<Result<(), Fault>> {
    let mut lines = Lines {
        input,
        block: [0; BLOCK],
        used: BLOCK,
    };
    let count = match lines.number()? {
        Ok(count) => count,
        Err(fault) => return Ok(Err(fault)),
    };
    for _ in 0..count {
        let (offset, length) = match (lines.number()?, lines.number()?) {
            (Ok(offset), Ok(length)) => (offset, length),
            (Err(fault), _) | (_, Err(fault)) => return Ok(Err(fault)),
        };
        if let Err(fault) = map.push(offset, length) {
            return Ok(Err(fault));
        }
    }
    Ok(Ok(()))
}

/// Decimal lines read block by block.
struct Lines<'a, R> {
    input: &'a mut R,
    block: [u8; BLOCK],
    used: usize,
}

impl<R: Read> Lines<'_, R> {
    fn number(&mut self) -> io::Result<Result<u64, Fault>> {
        let mut digits = Vec::new();
        loop {
            let byte = self.byte()?;
            match byte {
                b'\n' => return Ok(decimal(&digits)),
                // The longest u64 has 20 digits.
                _ if digits.len() >= 20 => return Ok(Err("a number out of range")),
                _ => digits.push(byte),
            }
        }
    }

    fn byte(&mut self) -> io::Result<u8> {
        if self.used >= BLOCK {
            // `read_exact` would put a message in the error; the plain kind means truncation here.
            self.input
                .read_exact(&mut self.block)
                .map_err(|error| io::Error::from(error.kind()))?;
            self.used = 0;
        }
        let byte = self.block.get(self.used).copied().unwrap_or_default();
        self.used = self.used.saturating_add(1);
        Ok(byte)
    }
}
