//! What a driver asks of a disk: parsed once, by copy, and checked against the disk.
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

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::{Extent, MAX_DISCARD, MAX_DISCARD_RANGES, MAX_WRITE_ZEROES, SECTOR};
use crate::vmm::memory::GuestMemory;
use crate::vmm::virtio::GuestFault;
use crate::vmm::virtio::chain::Chain;

/// Bytes of the header: type, reserved, sector (virtio 1.2, section 5.2.6).
const HEADER: u32 = 16;

/// Bytes of a DISCARD or WRITE_ZEROES range: sector, number of sectors, flags.
const RANGE: u32 = 16;

/// A request that can be carried out.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// Fill the first `len` writable bytes from byte `at` of the disk on.
    Read { at: u64, len: u32 },
    /// Write the `len` readable bytes behind the header to byte `at` of the disk on.
    Write { at: u64, len: u32 },
    /// Everything written so far goes to stable storage.
    Flush,
    /// Write the serial into the first `len` writable bytes.
    GetId { len: u32 },
    /// The ranges are not needed any more.
    Discard(Vec<Extent>),
    /// The range becomes zeroes.
    WriteZeroes { extent: Extent, unmap: bool },
}

/// A request that is answered with a status byte alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// VIRTIO_BLK_S_IOERR: malformed, out of bounds, or a change of a read-only disk.
    Invalid,
    /// VIRTIO_BLK_S_UNSUPP: a type or a flag that the device does not know.
    Unsupported,
}

impl From<GuestFault> for Refusal {
    fn from(_: GuestFault) -> Self {
        Self::Invalid
    }
}

/// The disk that requests are checked against.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Size in bytes.
    pub(super) len: u64,
    pub(super) read_only: bool,
}

impl Request {
    /// The byte of the readable side at which a write's data begins.
    pub(super) const WRITE_DATA: u32 = HEADER;

    /// Parses the chain. The last writable byte, which the caller has made sure of, is the status.
    pub(super) fn parse(
        memory: &GuestMemory,
        chain: &Chain,
        limits: Limits,
    ) -> Result<Self, Refusal> {
        let (kind, sector) = read_header(memory, chain)?;
        let told = chain.readable.len().saturating_sub(HEADER);
        let asked = chain.writable.len().saturating_sub(1);
        let changes = matches!(
            kind,
            VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES
        );
        // Data in the direction that the type does not have, or a change of what must not change.
        if (changes && (asked > 0 || limits.read_only)) || (!changes && told > 0) {
            return Err(Refusal::Invalid);
        }
        match kind {
            VIRTIO_BLK_T_IN => {
                let at = limits.transfer(sector, asked)?;
                Ok(Self::Read { at, len: asked })
            }
            VIRTIO_BLK_T_OUT => {
                let at = limits.transfer(sector, told)?;
                Ok(Self::Write { at, len: told })
            }
            VIRTIO_BLK_T_FLUSH if asked == 0 => Ok(Self::Flush),
            VIRTIO_BLK_T_FLUSH => Err(Refusal::Invalid),
            VIRTIO_BLK_T_GET_ID => Ok(Self::GetId { len: asked }),
            VIRTIO_BLK_T_DISCARD => discard(memory, chain, told, limits),
            VIRTIO_BLK_T_WRITE_ZEROES => write_zeroes(memory, chain, told, limits),
            _ => Err(Refusal::Unsupported),
        }
    }
}

impl Limits {
    /// The first byte of a transfer of `len` bytes from `sector` on.
    fn transfer(self, sector: u64, len: u32) -> Result<u64, Refusal> {
        if !u64::from(len).is_multiple_of(SECTOR) {
            return Err(Refusal::Invalid);
        }
        Ok(self.extent(sector, u64::from(len))?.at)
    }

    /// The `len` bytes from `sector` on, if the disk has them.
    fn extent(self, sector: u64, len: u64) -> Result<Extent, Refusal> {
        let at = sector.checked_mul(SECTOR).ok_or(Refusal::Invalid)?;
        let end = at.checked_add(len).ok_or(Refusal::Invalid)?;
        if end > self.len {
            return Err(Refusal::Invalid);
        }
        Ok(Extent { at, len })
    }
}

/// A request's type and first sector.
fn read_header(memory: &GuestMemory, chain: &Chain) -> Result<(u32, u64), Refusal> {
    let mut kind = [0; 4];
    let mut sector = [0; 8];
    chain.readable.read(memory, 0, &mut kind)?;
    chain.readable.read(memory, 8, &mut sector)?;
    Ok((u32::from_le_bytes(kind), u64::from_le_bytes(sector)))
}

fn discard(
    memory: &GuestMemory,
    chain: &Chain,
    told: u32,
    limits: Limits,
) -> Result<Request, Refusal> {
    let count = told / RANGE;
    if !told.is_multiple_of(RANGE) || count == 0 || count > MAX_DISCARD_RANGES {
        return Err(Refusal::Invalid);
    }
    let mut extents = Vec::new();
    for index in 0..count {
        let (extent, flags) = read_range(memory, chain, index, MAX_DISCARD, limits)?;
        if flags != 0 {
            return Err(Refusal::Unsupported);
        }
        extents.push(extent);
    }
    Ok(Request::Discard(extents))
}

fn write_zeroes(
    memory: &GuestMemory,
    chain: &Chain,
    told: u32,
    limits: Limits,
) -> Result<Request, Refusal> {
    if told != RANGE {
        return Err(Refusal::Invalid);
    }
    let (extent, flags) = read_range(memory, chain, 0, MAX_WRITE_ZEROES, limits)?;
    if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 {
        return Err(Refusal::Unsupported);
    }
    let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
    Ok(Request::WriteZeroes { extent, unmap })
}

/// Range `index` behind the header, checked, and its flags.
fn read_range(
    memory: &GuestMemory,
    chain: &Chain,
    index: u32,
    max_sectors: u32,
    limits: Limits,
) -> Result<(Extent, u32), Refusal> {
    let offset = index.saturating_mul(RANGE).saturating_add(HEADER);
    let mut raw = [0; RANGE as usize];
    chain.readable.read(memory, offset, &mut raw)?;
    let raw = u128::from_le_bytes(raw);
    // Little-endian fields one after the other: sector (64 bits), number of sectors (32), flags (32).
    let sector = (raw & u128::from(u64::MAX)) as u64;
    let sectors = (raw >> 64) as u32;
    let flags = (raw >> 96) as u32;
    if sectors > max_sectors {
        return Err(Refusal::Invalid);
    }
    let extent = limits.extent(sector, u64::from(sectors).saturating_mul(SECTOR))?;
    Ok((extent, flags))
}
