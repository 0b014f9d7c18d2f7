//! The on-disk structures (kernel documentation, filesystems/erofs; field names are the kernel's).
#![forbid(unsafe_code)]

use super::BLOCK_SIZE;

/// Inodes start at multiples of this, and their numbers count in it.
pub const SLOT: u64 = 32;
/// Size of an inode without a time of its own.
pub const COMPACT: u64 = 32;
/// Size of an inode with everything.
pub const EXTENDED: u64 = 64;
/// Block number that marks a hole in a chunk map.
pub const HOLE: u32 = u32::MAX;

/// Offset of the superblock in block 0.
const SUPER_OFFSET: usize = 1024;
const SUPER_MAGIC: u32 = 0xe0f5_e1e2;
/// The superblock's checksum is valid.
const COMPAT_SB_CHKSUM: u32 = 1;
/// Inode times are modification times.
const COMPAT_MTIME: u32 = 2;
/// There are files with chunk maps.
const INCOMPAT_CHUNKED_FILE: u32 = 4;

/// How an inode's data lies (`EROFS_INODE_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Layout {
    /// In consecutive blocks.
    Plain = 0,
    /// Likewise, the last part behind the inode.
    Inline = 2,
    /// In chunks, with a map behind the inode.
    Chunked = 4,
}

/// What goes into the superblock.
#[derive(Debug, Clone, Copy)]
pub struct Superblock {
    /// Number of the root's inode.
    pub root_nid: u16,
    /// Number of inodes.
    pub inodes: u64,
    /// Time of the compact inodes.
    pub time: (i64, u32),
    /// Number of blocks of the whole disk.
    pub blocks: u32,
    /// Identifies the file system.
    pub uuid: [u8; 16],
    /// Whether any file has a chunk map.
    pub chunked: bool,
}

impl Superblock {
    /// Block 0 with the superblock in it.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut sb = Vec::with_capacity(128);
        sb.extend_from_slice(&SUPER_MAGIC.to_le_bytes());
        sb.extend_from_slice(&0_u32.to_le_bytes()); // checksum
        sb.extend_from_slice(&(COMPAT_SB_CHKSUM | COMPAT_MTIME).to_le_bytes());
        sb.push(BLOCK_SIZE.trailing_zeros() as u8); // blkszbits
        sb.push(0); // sb_extslots
        sb.extend_from_slice(&self.root_nid.to_le_bytes());
        sb.extend_from_slice(&self.inodes.to_le_bytes());
        sb.extend_from_slice(&self.time.0.to_le_bytes()); // build_time
        sb.extend_from_slice(&self.time.1.to_le_bytes()); // build_time_nsec
        sb.extend_from_slice(&self.blocks.to_le_bytes());
        sb.extend_from_slice(&0_u32.to_le_bytes()); // meta_blkaddr
        sb.extend_from_slice(&0_u32.to_le_bytes()); // xattr_blkaddr
        sb.extend_from_slice(&self.uuid);
        sb.extend_from_slice(&[0; 16]); // volume_name
        let incompat = if self.chunked {
            INCOMPAT_CHUNKED_FILE
        } else {
            0
        };
        sb.extend_from_slice(&incompat.to_le_bytes());
        let mut block = vec![0; BLOCK_SIZE as usize];
        block[SUPER_OFFSET..SUPER_OFFSET + sb.len()].copy_from_slice(&sb);
        let checksum = crc32c(&block[SUPER_OFFSET..]);
        block[SUPER_OFFSET + 4..SUPER_OFFSET + 8].copy_from_slice(&checksum.to_le_bytes());
        block
    }
}

/// CRC-32C as the kernel's `crc32c(~0, …)`: no final inversion. One block per image, so bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    bytes.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (POLYNOMIAL & (crc & 1).wrapping_neg())
        })
    })
}

/// What goes into an inode.
#[derive(Debug, Clone, Copy)]
pub struct RawInode {
    /// Where the data is.
    pub layout: Layout,
    /// `i_xattr_icount`.
    pub xattr_units: u16,
    /// Type and permissions.
    pub mode: u16,
    /// In bytes.
    pub size: u64,
    /// `i_u`: first block, device number or chunk format.
    pub union: u32,
    /// Number for 32-bit programs.
    pub ino: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds and nanoseconds.
    pub mtime: (i64, u32),
    /// Number of names.
    pub links: u32,
}

impl RawInode {
    /// Whether 32 bytes hold it, given the time that all compact inodes have.
    #[must_use]
    pub fn fits_compact(&self, time: (i64, u32)) -> bool {
        let small = |value: u32| value <= u32::from(u16::MAX);
        self.mtime == time
            && small(self.uid)
            && small(self.gid)
            && small(self.links)
            && self.size <= u64::from(u32::MAX)
    }

    /// Appends 32 or 64 bytes.
    pub fn encode(&self, compact: bool, output: &mut Vec<u8>) {
        let low = |value: u32| ((value & 0xffff) as u16).to_le_bytes();
        let format = u16::from(!compact) | (self.layout as u16) << 1;
        output.extend_from_slice(&format.to_le_bytes());
        output.extend_from_slice(&self.xattr_units.to_le_bytes());
        output.extend_from_slice(&self.mode.to_le_bytes());
        if compact {
            output.extend_from_slice(&low(self.links));
            output.extend_from_slice(&(self.size as u32).to_le_bytes());
            output.extend_from_slice(&[0; 4]);
            output.extend_from_slice(&self.union.to_le_bytes());
            output.extend_from_slice(&self.ino.to_le_bytes());
            output.extend_from_slice(&low(self.uid));
            output.extend_from_slice(&low(self.gid));
            output.extend_from_slice(&[0; 4]);
        } else {
            output.extend_from_slice(&[0; 2]);
            output.extend_from_slice(&self.size.to_le_bytes());
            output.extend_from_slice(&self.union.to_le_bytes());
            output.extend_from_slice(&self.ino.to_le_bytes());
            output.extend_from_slice(&self.uid.to_le_bytes());
            output.extend_from_slice(&self.gid.to_le_bytes());
            output.extend_from_slice(&self.mtime.0.to_le_bytes());
            output.extend_from_slice(&self.mtime.1.to_le_bytes());
            output.extend_from_slice(&self.links.to_le_bytes());
            output.extend_from_slice(&[0; 16]);
        }
    }
}

/// A device number as `i_u` has it (the kernel's `new_encode_dev`).
#[must_use]
pub fn device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// One name in a directory.
#[derive(Debug, Clone, Copy)]
pub struct Dirent<'a> {
    /// The name.
    pub name: &'a [u8],
    /// Number of the inode.
    pub nid: u64,
    /// `EROFS_FT_*`.
    pub file_type: u8,
}

/// Size of an entry without its name.
const DIRENT: usize = 12;

/// Size of a directory with names of these lengths, sorted by name, `.` and `..` among them: whole
/// blocks, then what the last one uses.
#[must_use]
pub fn directory_size(lengths: impl Iterator<Item = usize>) -> u64 {
    let (mut blocks, mut used) = (0_u64, 0_usize);
    for length in lengths {
        let size = DIRENT + length;
        if used + size > BLOCK_SIZE as usize {
            blocks += 1;
            used = 0;
        }
        used += size;
    }
    blocks * BLOCK_SIZE + used as u64
}

/// Appends a directory, [`directory_size`] bytes, in blocks: entries, then their names, zeros to the
/// end of all blocks but the last.
pub fn encode_directory(entries: &[Dirent<'_>], output: &mut Vec<u8>) {
    let mut rest = entries;
    while !rest.is_empty() {
        let mut used = 0;
        let fitting = rest.iter().take_while(|entry| {
            used += DIRENT + entry.name.len();
            used <= BLOCK_SIZE as usize
        });
        let (block, after) = rest.split_at(fitting.count().max(1));
        let start = output.len();
        let mut name_offset = block.len() * DIRENT;
        for entry in block {
            output.extend_from_slice(&entry.nid.to_le_bytes());
            output.extend_from_slice(&(name_offset as u16).to_le_bytes());
            output.extend_from_slice(&[entry.file_type, 0]);
            name_offset += entry.name.len();
        }
        for entry in block {
            output.extend_from_slice(entry.name);
        }
        if !after.is_empty() {
            output.resize(start + BLOCK_SIZE as usize, 0);
        }
        rest = after;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_has_its_check_value() {
        // The published check value, inverted: the kernel's function leaves the inversion out.
        assert_eq!(!crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn inodes_have_their_sizes() {
        let inode = RawInode {
            layout: Layout::Plain,
            xattr_units: 0,
            mode: 0o100_644,
            size: 1,
            union: 2,
            ino: 3,
            uid: 4,
            gid: 5,
            mtime: (6, 7),
            links: 1,
        };
        for (compact, size) in [(true, COMPACT), (false, EXTENDED)] {
            let mut bytes = Vec::new();
            inode.encode(compact, &mut bytes);
            assert_eq!(bytes.len() as u64, size);
        }
        assert!(inode.fits_compact((6, 7)));
        assert!(!inode.fits_compact((6, 8)));
        assert!(
            !RawInode {
                uid: 65_536,
                ..inode
            }
            .fits_compact((6, 7))
        );
    }

    #[test]
    fn the_size_announced_for_a_directory_is_the_size_encoded() {
        for count in [2, 15, 16, 300, 1000] {
            let names: Vec<_> = (0..count).map(|i| format!("{i:0200}")).collect();
            let entries: Vec<_> = names
                .iter()
                .map(|name| Dirent {
                    name: name.as_bytes(),
                    nid: 1,
                    file_type: 1,
                })
                .collect();
            let mut bytes = Vec::new();
            encode_directory(&entries, &mut bytes);
            assert_eq!(
                bytes.len() as u64,
                directory_size(names.iter().map(String::len))
            );
        }
    }

    #[test]
    fn device_numbers_are_split() {
        assert_eq!(device(8, 1), 0x801);
        assert_eq!(device(0xfff, 0xf_ffff), u32::MAX);
    }
}
