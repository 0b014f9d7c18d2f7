//! Reads an EROFS image in the plainest way, by the format's documentation, and checks on the way what
//! the kernel relies on: checksum, order of names, `.` and `..`, link counts, tails within a block.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use cube::image::Digest;
use cube::image::layer::{Metadata, Node, Xattr};
use cube::image::tree_digest::Listing;
use sha2::Digest as _;

const BLOCK: u64 = 4096;

/// An open image.
pub(crate) struct Image {
    file: File,
    root: u64,
    blocks: u64,
    time: (i64, u32),
    inodes: u64,
    meta_block: u64,
}

/// An inode, parsed.
#[derive(Debug, Clone)]
pub(crate) struct Inode {
    pub(crate) nid: u64,
    pub(crate) layout: u16,
    pub(crate) compact: bool,
    pub(crate) mode: u16,
    pub(crate) size: u64,
    pub(crate) union: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: (i64, u32),
    pub(crate) links: u32,
    /// Offsets of the attributes and of what follows them.
    xattrs: u64,
    body: u64,
}

fn le<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().unwrap()
}
fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(le(bytes, at))
}
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(le(bytes, at))
}
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(le(bytes, at))
}

impl Image {
    pub(crate) fn open(path: &Path) -> Self {
        let file = File::open(path).unwrap();
        let mut block = vec![0; 4096];
        file.read_exact_at(&mut block, 0).unwrap();
        let sb = &mut block[1024..];
        assert_eq!(u32_at(sb, 0), 0xe0f5_e1e2);
        assert_eq!(sb[12], 12, "block size");
        assert_eq!(u32_at(sb, 80) & !4, 0, "incompatible features");
        let checksum = u32_at(sb, 4);
        sb[4..8].fill(0);
        let mut crc = u32::MAX;
        for byte in sb.iter() {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = if crc & 1 == 1 {
                    (crc >> 1) ^ 0x82f6_3b78
                } else {
                    crc >> 1
                };
            }
        }
        assert_eq!(crc, checksum);
        let image = Self {
            root: u16_at(sb, 14).into(),
            inodes: u64_at(sb, 16),
            time: (u64_at(sb, 24).cast_signed(), u32_at(sb, 32)),
            blocks: u32_at(sb, 36).into(),
            meta_block: u32_at(sb, 40).into(),
            file,
        };
        assert_eq!(image.blocks * BLOCK, image.file.metadata().unwrap().len());
        image
    }

    fn read(&self, at: u64, length: u64) -> Vec<u8> {
        assert!(at + length <= self.blocks * BLOCK, "{length} bytes at {at}");
        let mut bytes = vec![0; usize::try_from(length).unwrap()];
        self.file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    pub(crate) fn inode(&self, nid: u64) -> Inode {
        let at = self.meta_block * BLOCK + nid * 32;
        let raw = self.read(at, 32);
        let format = u16_at(&raw, 0);
        let compact = format & 1 == 0;
        let (xattr_units, mode) = (u64::from(u16_at(&raw, 2)), u16_at(&raw, 4));
        let xattr_size = if xattr_units == 0 {
            0
        } else {
            12 + (xattr_units - 1) * 4
        };
        let header = if compact { 32 } else { 64 };
        let raw = self.read(at, header);
        let (xattrs, body) = (at + header, at + header + xattr_size);
        let layout = format >> 1;
        let common = (nid, layout, compact, mode, u32_at(&raw, 16));
        let (nid, layout, compact, mode, union) = common;
        match compact {
            true => Inode {
                size: u32_at(&raw, 8).into(),
                links: u16_at(&raw, 6).into(),
                uid: u16_at(&raw, 24).into(),
                gid: u16_at(&raw, 26).into(),
                mtime: self.time,
                nid,
                layout,
                compact,
                mode,
                union,
                xattrs,
                body,
            },
            false => Inode {
                size: u64_at(&raw, 8),
                uid: u32_at(&raw, 24),
                gid: u32_at(&raw, 28),
                mtime: (u64_at(&raw, 32).cast_signed(), u32_at(&raw, 40)),
                links: u32_at(&raw, 44),
                nid,
                layout,
                compact,
                mode,
                union,
                xattrs,
                body,
            },
        }
    }

    /// Calls `sink` with all data of an inode, holes as zeros.
    fn data(&self, inode: &Inode, mut sink: impl FnMut(&[u8])) {
        let mut at = 0;
        while at < inode.size {
            let (place, length) = self.map(inode, at);
            match place {
                Some(place) => {
                    let length = length.min(1 << 20);
                    sink(&self.read(place, length));
                    at += length;
                }
                None => {
                    // Terabytes of zeros are not worth hashing: the tests' sparse giants have a marker.
                    let length = length.min(1 << 20);
                    sink(&vec![0; length as usize]);
                    at += length;
                }
            }
        }
    }

    /// Where the data at an offset is, and how much of it is together.
    pub(crate) fn map(&self, inode: &Inode, at: u64) -> (Option<u64>, u64) {
        let rest = inode.size - at;
        match inode.layout {
            0 => (Some(u64::from(inode.union) * BLOCK + at), rest),
            2 => {
                let blocks = (inode.size - 1) / BLOCK * BLOCK;
                if at < blocks {
                    return (Some(u64::from(inode.union) * BLOCK + at), blocks - at);
                }
                let place = inode.body + at - blocks;
                assert_eq!(
                    place / BLOCK,
                    (place + rest - 1) / BLOCK,
                    "a tail crosses a block"
                );
                assert_eq!(
                    inode.nid * 32 / BLOCK,
                    place / BLOCK,
                    "a tail is not with its inode"
                );
                (Some(place), rest)
            }
            4 => {
                let chunk = BLOCK << (inode.union & 31);
                let entry = self.read(inode.body.next_multiple_of(4) + at / chunk * 4, 4);
                let length = (chunk - at % chunk).min(rest);
                match u32_at(&entry, 0) {
                    u32::MAX => (None, length),
                    block => (Some(u64::from(block) * BLOCK + at % chunk), length),
                }
            }
            other => panic!("layout {other}"),
        }
    }

    fn bytes(&self, inode: &Inode) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.data(inode, |piece| bytes.extend_from_slice(piece));
        bytes
    }

    fn xattrs(&self, inode: &Inode) -> Vec<Xattr> {
        let mut xattrs = Vec::new();
        if inode.body == inode.xattrs {
            return xattrs;
        }
        assert_eq!(self.read(inode.xattrs, 12), [0; 12]);
        let mut at = inode.xattrs + 12;
        while at < inode.body {
            let header = self.read(at, 4);
            let prefix = match header[1] {
                1 => "user.",
                2 => "system.posix_acl_access",
                3 => "system.posix_acl_default",
                4 => "trusted.",
                6 => "security.",
                other => panic!("namespace {other}"),
            };
            let (name, value) = (u64::from(header[0]), u64::from(u16_at(&header, 2)));
            let name_bytes = self.read(at + 4, name);
            let value_bytes = self.read(at + 4 + name, value);
            xattrs.push(Xattr {
                name: [prefix.as_bytes(), &name_bytes].concat(),
                value: value_bytes,
            });
            at += (4 + name + value).next_multiple_of(4);
        }
        assert_eq!(at, inode.body);
        xattrs.sort();
        xattrs
    }

    /// Names, inodes and types of a directory.
    pub(crate) fn entries(&self, inode: &Inode) -> Vec<(Vec<u8>, u64, u8)> {
        let bytes = self.bytes(inode);
        let mut entries: Vec<(Vec<u8>, u64, u8)> = Vec::new();
        for block in bytes.chunks(4096) {
            let count = usize::from(u16_at(block, 8)) / 12;
            for index in 0..count {
                let start = usize::from(u16_at(block, index * 12 + 8));
                let end = match index + 1 < count {
                    true => usize::from(u16_at(block, index * 12 + 20)),
                    false => {
                        start
                            + block[start..]
                                .iter()
                                .position(|&b| b == 0)
                                .unwrap_or(block.len() - start)
                    }
                };
                let name = block[start..end].to_vec();
                assert!(
                    entries.last().is_none_or(|(last, ..)| *last < name),
                    "names out of order"
                );
                entries.push((name, u64_at(block, index * 12), block[index * 12 + 10]));
            }
        }
        entries
    }

    /// The inode at a path.
    pub(crate) fn find(&self, path: &str) -> Option<Inode> {
        let mut inode = self.inode(self.root);
        for name in path.split('/').filter(|name| !name.is_empty()) {
            let entries = self.entries(&inode);
            let (_, nid, _) = entries
                .iter()
                .find(|(entry, ..)| entry == name.as_bytes())?;
            inode = self.inode(*nid);
        }
        Some(inode)
    }

    /// Content of the file at a path.
    pub(crate) fn content(&self, path: &str) -> Vec<u8> {
        self.bytes(
            &self
                .find(path)
                .unwrap_or_else(|| panic!("{path} is not there")),
        )
    }

    pub(crate) fn exists(&self, path: &str) -> bool {
        self.find(path).is_some()
    }

    /// Lists the whole tree.
    pub(crate) fn listing(&self) -> Listing {
        let mut listing = Listing::default();
        let mut links: HashMap<u64, (u32, u32)> = HashMap::new();
        let mut pending = vec![(Vec::new(), self.root, self.root)];
        while let Some((path, nid, parent)) = pending.pop() {
            let inode = self.inode(nid);
            let node = self.node(&inode);
            let metadata = Metadata {
                mode: inode.mode & 0o7777,
                uid: inode.uid,
                gid: inode.gid,
                mtime: inode.mtime.0,
                mtime_nsec: inode.mtime.1,
                xattrs: self.xattrs(&inode),
            };
            listing.add(&path, nid, &metadata, &node);
            if node != Node::Directory {
                links.entry(nid).or_insert((0, inode.links)).0 += 1;
                continue;
            }
            let mut count = 2;
            for (name, child, file_type) in self.entries(&inode) {
                match &name[..] {
                    b"." => assert_eq!(child, nid),
                    b".." => assert_eq!(child, parent),
                    _ => {
                        count += u32::from(file_type == 2);
                        assert_eq!(file_type, type_of(self.inode(child).mode));
                        let child_path = if path.is_empty() {
                            name
                        } else {
                            [&path, &b"/"[..], &name].concat()
                        };
                        pending.push((child_path, child, nid));
                    }
                }
            }
            assert!(
                links.insert(nid, (count, inode.links)).is_none(),
                "a directory with two names"
            );
        }
        assert_eq!(links.len() as u64, self.inodes);
        for (nid, (counted, stored)) in links {
            assert_eq!(counted, stored, "links of inode {nid}");
        }
        listing
    }

    fn node(&self, inode: &Inode) -> Node<Digest> {
        let minor = (inode.union & 0xff) | ((inode.union >> 12) & 0xf_ff00);
        let major = (inode.union >> 8) & 0xfff;
        match inode.mode >> 12 {
            4 => Node::Directory,
            8 => {
                let mut hash = sha2::Sha256::new();
                self.data(inode, |piece| hash.update(piece));
                Node::File {
                    size: inode.size,
                    content: Digest::from_bytes(hash.finalize().into()),
                }
            }
            10 => Node::Symlink(self.bytes(inode)),
            2 => Node::CharDevice(major, minor),
            6 => Node::BlockDevice(major, minor),
            1 => Node::Fifo,
            other => panic!("type {other}"),
        }
    }
}

/// `EROFS_FT_*` for a mode.
fn type_of(mode: u16) -> u8 {
    match mode >> 12 {
        8 => 1,
        4 => 2,
        2 => 3,
        6 => 4,
        1 => 5,
        10 => 7,
        other => panic!("type {other}"),
    }
}
