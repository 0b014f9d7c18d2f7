//! The 512-byte header block (POSIX.1-1988 ustar, GNU variants) and its numbers.
#![forbid(unsafe_code)]

use std::ops::Range;

use super::EntryKind;
use super::sparse::Map;

/// Size of a tar block in bytes.
pub(super) const BLOCK: usize = 512;

// Fields of the header (POSIX "ustar Interchange Format").
const NAME: Range<usize> = 0..100;
const MODE: Range<usize> = 100..108;
const UID: Range<usize> = 108..116;
const GID: Range<usize> = 116..124;
const SIZE: Range<usize> = 124..136;
const MTIME: Range<usize> = 136..148;
const CHECKSUM: Range<usize> = 148..156;
const TYPE_FLAG: usize = 156;
const LINK: Range<usize> = 157..257;
const MAGIC: Range<usize> = 257..263;
const MAJOR: Range<usize> = 329..337;
const MINOR: Range<usize> = 337..345;
const PREFIX: Range<usize> = 345..500;
// Fields of the old GNU sparse header (GNU tar manual, "Old GNU Format").
const SPARSE: Range<usize> = 386..482;
const IS_EXTENDED: usize = 482;
const REAL_SIZE: Range<usize> = 483..495;
// The same in the blocks that continue it.
const MORE_SPARSE: Range<usize> = 0..504;
const MORE_EXTENDED: usize = 504;
/// Size of an extent in an old GNU sparse map: two numbers of 12 bytes.
const SPARSE_ENTRY: usize = 24;

type Fault = &'static str;

/// A header block whose checksum is right.
pub(super) struct Header {
    block: [u8; BLOCK],
}

impl Header {
    /// Checks the checksum: the sum of the bytes, signed or unsigned, with the field itself as spaces.
    pub(super) fn new(block: [u8; BLOCK]) -> Result<Self, Fault> {
        let (mut unsigned, mut signed) = (0_i64, 0_i64);
        for (index, &byte) in block.iter().enumerate() {
            let byte = if CHECKSUM.contains(&index) {
                b' '
            } else {
                byte
            };
            unsigned = unsigned.saturating_add(i64::from(byte));
            signed = signed.saturating_add(i64::from(byte.cast_signed()));
        }
        let header = Self { block };
        match number(header.field(CHECKSUM)) {
            Ok(stored) if stored == unsigned || stored == signed => Ok(header),
            _ => Err("the header's checksum is wrong; is this a tar archive?"),
        }
    }

    fn field(&self, range: Range<usize>) -> &[u8] {
        self.block.get(range).unwrap_or_default()
    }

    fn byte(&self, index: usize) -> u8 {
        self.block.get(index).copied().unwrap_or_default()
    }

    pub(super) fn type_flag(&self) -> u8 {
        self.byte(TYPE_FLAG)
    }

    /// The path; POSIX archives split a long one into prefix and name.
    pub(super) fn path(&self) -> Vec<u8> {
        let name = text(self.field(NAME));
        let prefix = match self.field(MAGIC) {
            b"ustar\0" => text(self.field(PREFIX)),
            _ => &[],
        };
        match prefix {
            [] => name.to_vec(),
            _ => [prefix, b"/", name].concat(),
        }
    }

    pub(super) fn link(&self) -> Vec<u8> {
        text(self.field(LINK)).to_vec()
    }

    /// The kind of entry. v7 archives mark directories by a slash at the end of `path`.
    pub(super) fn kind(&self, path: &[u8]) -> Result<EntryKind, Fault> {
        match self.type_flag() {
            b'0' | 0 | b'7' | b'S' if path.ends_with(b"/") => Ok(EntryKind::Directory),
            b'0' | 0 | b'7' | b'S' => Ok(EntryKind::Regular),
            b'1' => Ok(EntryKind::HardLink),
            b'2' => Ok(EntryKind::Symlink),
            b'3' => Ok(EntryKind::CharDevice),
            b'4' => Ok(EntryKind::BlockDevice),
            b'5' => Ok(EntryKind::Directory),
            b'6' => Ok(EntryKind::Fifo),
            _ => Err("an entry of a type that is not supported"),
        }
    }

    pub(super) fn size(&self) -> Result<u64, Fault> {
        number(self.field(SIZE))?
            .try_into()
            .map_err(|_| "a negative size")
    }

    /// Size of an old GNU sparse file with its holes.
    pub(super) fn real_size(&self) -> Result<u64, Fault> {
        number(self.field(REAL_SIZE))?
            .try_into()
            .map_err(|_| "a negative size")
    }

    pub(super) fn mode(&self) -> Result<u16, Fault> {
        // Some writers leave the file type in: only the permissions are of use.
        Ok(u16::try_from(number(self.field(MODE))? & 0o7777).unwrap_or_default())
    }

    pub(super) fn uid(&self) -> Result<i64, Fault> {
        number(self.field(UID))
    }

    pub(super) fn gid(&self) -> Result<i64, Fault> {
        number(self.field(GID))
    }

    pub(super) fn mtime(&self) -> Result<i64, Fault> {
        number(self.field(MTIME))
    }

    /// Major and minor, within what Linux can represent: 12 and 20 bits.
    pub(super) fn device(&self) -> Result<(u32, u32), Fault> {
        let part = |range, limit| match number(self.field(range))?.try_into() {
            Ok(value) if value <= limit => Ok(value),
            _ => Err("a device number out of range"),
        };
        Ok((part(MAJOR, 0xfff)?, part(MINOR, 0xf_ffff)?))
    }

    /// Adds the header's own extents of an old GNU sparse file; true if a further block continues them.
    pub(super) fn sparse_extents(&self, map: &mut Map) -> Result<bool, Fault> {
        extents(self.field(SPARSE), map)?;
        Ok(self.byte(IS_EXTENDED) != 0)
    }
}

/// Adds the extents of a block that continues an old GNU sparse map; true if there is one more.
pub(super) fn more_extents(block: &[u8; BLOCK], map: &mut Map) -> Result<bool, Fault> {
    extents(block.get(MORE_SPARSE).unwrap_or_default(), map)?;
    Ok(block.get(MORE_EXTENDED).is_some_and(|&byte| byte != 0))
}

fn extents(field: &[u8], map: &mut Map) -> Result<(), Fault> {
    for entry in field.chunks_exact(SPARSE_ENTRY) {
        let (offset, length) = entry.split_at_checked(12).unwrap_or_default();
        if offset.first().is_none_or(|&byte| byte == 0) {
            break;
        }
        let parse = |bytes| {
            number(bytes)?
                .try_into()
                .map_err(|_| "a negative number in a sparse map")
        };
        map.push(parse(offset)?, parse(length)?)?;
    }
    Ok(())
}

/// An owner from the PAX record if there is one, else from the header.
pub(super) fn owner(pax: Option<u64>, header: Result<i64, Fault>) -> Result<u32, Fault> {
    const FAULT: Fault = "a user or group id out of range";
    match pax {
        Some(id) => id.try_into().map_err(|_| FAULT),
        None => header?.try_into().map_err(|_| FAULT),
    }
}

/// A string that ends at the first NUL or fills its field.
fn text(field: &[u8]) -> &[u8] {
    let end = field.iter().position(|&b| b == 0).unwrap_or(field.len());
    field.get(..end).unwrap_or_default()
}

/// A number: octal digits between optional spaces and NULs, or, if the top bit of the field is set,
/// GNU's base 256 in two's complement.
pub(super) fn number(field: &[u8]) -> Result<i64, Fault> {
    match field.first() {
        Some(&first) if first & 0x80 != 0 => base_256(field, first),
        _ => octal(field),
    }
}

fn base_256(field: &[u8], first: u8) -> Result<i64, Fault> {
    // Bit 6 of the first byte is the sign; bit 7 is the mark.
    let negative = first & 0x40 != 0;
    let mut value: i128 = if negative { -1 } else { 0 };
    for (index, &byte) in field.iter().enumerate() {
        let byte = match (index, negative) {
            (0, false) => byte & 0x3f,
            (0, true) => byte | 0xc0,
            _ => byte,
        };
        // 12 bytes of 8 bits fit an i128.
        value = (value << 8) | i128::from(byte);
    }
    value.try_into().map_err(|_| "a number out of range")
}

fn octal(field: &[u8]) -> Result<i64, Fault> {
    let mut value = 0_i64;
    let mut seen = false;
    for &byte in field {
        match byte {
            b'0'..=b'7' => {
                seen = true;
                value = value
                    .checked_mul(8)
                    .and_then(|v| v.checked_add(i64::from(byte & 7)))
                    .ok_or("a number out of range")?;
            }
            b' ' | 0 if !seen => {}
            b' ' | 0 => break,
            _ => return Err("a number that is not octal"),
        }
    }
    Ok(value)
}
