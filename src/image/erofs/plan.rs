//! Where everything goes: sizes and places of all inodes, before a byte is written.
//!
//! What belongs to an inode (attributes, inline tail) stays with it in one block, so that the tail
//! never crosses a block, which the format forbids, and so that one read gets all. Only what is larger
//! than a block spans several. The gaps that this leaves are filled by later inodes, best fit first,
//! among the last few blocks: inodes of one directory stay close together.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};

use super::format::{self, COMPACT, EXTENDED, Layout, RawInode, SLOT};
use super::{BLOCK_SIZE, xattr};
use crate::image::layer::{Content, Node};
use crate::image::tree::{Inode, InodeId, Tree};

/// Blocks with gaps that are still filled.
const OPEN_BLOCKS: usize = 64;

/// The place of an inode.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// Which inode.
    pub id: InodeId,
    /// Its number of names.
    pub links: u32,
    /// Offset of the inode in the blob.
    pub offset: u64,
    /// Whether it is of the small kind.
    pub compact: bool,
    /// Where its data is.
    pub layout: Layout,
    /// Size in bytes.
    pub size: u64,
    /// Bytes of data behind the inode.
    pub inline: u64,
    /// First block of directories and link targets that are not inline.
    pub block: u64,
    /// Number of those blocks.
    pub blocks: u64,
}

/// The places of all inodes.
#[derive(Debug)]
pub struct Plan {
    /// In the tree's order.
    pub places: Vec<Place>,
    /// Time of the compact inodes.
    pub time: (i64, u32),
    /// Size of the blob in blocks.
    pub blocks: u64,
    /// By [`InodeId::index`].
    nids: Vec<u64>,
}

impl Plan {
    /// Gives every inode with a name its place; block 0 is the superblock's, the root comes first.
    #[must_use]
    pub fn new(tree: &Tree<Content>) -> Self {
        let order = tree.reachable();
        let time = commonest_time(tree, &order);
        let mut space = Space {
            blocks: 1,
            open: BTreeSet::new(),
        };
        let mut nids = vec![0; tree.capacity()];
        let mut places = Vec::with_capacity(order.len());
        for (id, links) in order {
            let Some(inode) = tree.inode(id) else {
                continue;
            };
            let (mut place, length) = measure(id, inode, links, time);
            place.offset = space.take(length);
            nids[id.index()] = place.offset / SLOT;
            places.push(place);
        }
        for place in &mut places {
            place.block = space.blocks;
            space.blocks += place.blocks;
        }
        Self {
            places,
            time,
            blocks: space.blocks,
            nids,
        }
    }

    /// The number of an inode.
    #[must_use]
    pub fn nid(&self, id: InodeId) -> u64 {
        self.nids[id.index()]
    }
}

/// The names of a directory in EROFS' order, `.` and `..` among them.
#[must_use]
pub fn names(id: InodeId, inode: &Inode<Content>) -> Vec<(&[u8], InodeId)> {
    let mut names: Vec<(&[u8], InodeId)> = vec![(b".", id), (b"..", inode.parent)];
    names.extend(
        inode
            .children
            .iter()
            .map(|(name, &child)| (name.as_slice(), child)),
    );
    names.sort_unstable();
    names
}

/// The raw form of an inode, with `union` left 0.
#[must_use]
pub fn raw(inode: &Inode<Content>, place: &Place, number: u32) -> RawInode {
    let metadata = &inode.metadata;
    let kind = match inode.node {
        Node::Directory => 0o040_000,
        Node::File { .. } => 0o100_000,
        Node::Symlink(_) => 0o120_000,
        Node::CharDevice(..) => 0o020_000,
        Node::BlockDevice(..) => 0o060_000,
        Node::Fifo => 0o010_000,
    };
    let xattrs = xattr::body_size(&metadata.xattrs).unwrap_or_default();
    RawInode {
        layout: place.layout,
        // `body_size` gives nothing that does not fit.
        xattr_units: xattr::unit_count(xattrs) as u16,
        mode: kind | metadata.mode,
        size: place.size,
        union: 0,
        ino: number,
        uid: metadata.uid,
        gid: metadata.gid,
        mtime: (metadata.mtime, metadata.mtime_nsec),
        links: place.links,
    }
}

/// An inode's place but for its offset and block, and the bytes that it takes.
fn measure(id: InodeId, inode: &Inode<Content>, links: u32, time: (i64, u32)) -> (Place, u64) {
    let mut place = Place {
        id,
        links,
        offset: 0,
        compact: false,
        layout: Layout::Plain,
        size: data_size(id, inode),
        inline: 0,
        block: 0,
        blocks: 0,
    };
    place.compact = raw(inode, &place, 0).fits_compact(time);
    let header = if place.compact { COMPACT } else { EXTENDED };
    let attributes = xattr::body_size(&inode.metadata.xattrs).unwrap_or_default() as u64;
    let own = header + attributes;
    let tail = place.size % BLOCK_SIZE;
    let mut map = 0;
    match &inode.node {
        Node::File {
            content: Content::Chunked { chunks, .. },
            ..
        } => {
            place.layout = Layout::Chunked;
            map = 4 * chunks.len() as u64;
        }
        Node::File {
            content: Content::Flat { tail: Some(_), .. },
            ..
        } => {
            place.layout = Layout::Inline;
            place.inline = tail;
        }
        Node::Directory | Node::Symlink(_) => {
            if tail > 0 && own + tail <= BLOCK_SIZE {
                place.layout = Layout::Inline;
                place.inline = tail;
            }
            place.blocks = (place.size - place.inline).div_ceil(BLOCK_SIZE);
        }
        _ => {}
    }
    (place, own + place.inline + map)
}

fn data_size(id: InodeId, inode: &Inode<Content>) -> u64 {
    match &inode.node {
        Node::File { size, .. } => *size,
        Node::Symlink(target) => target.len() as u64,
        Node::Directory => {
            format::directory_size(names(id, inode).into_iter().map(|(name, _)| name.len()))
        }
        Node::CharDevice(..) | Node::BlockDevice(..) | Node::Fifo => 0,
    }
}

/// The time that most inodes have; of several, the earliest.
fn commonest_time(tree: &Tree<Content>, order: &[(InodeId, u32)]) -> (i64, u32) {
    let mut counts: BTreeMap<(i64, u32), u32> = BTreeMap::new();
    for (id, _) in order {
        if let Some(inode) = tree.inode(*id) {
            *counts
                .entry((inode.metadata.mtime, inode.metadata.mtime_nsec))
                .or_default() += 1;
        }
    }
    let commonest = counts
        .into_iter()
        .reduce(|best, next| if next.1 > best.1 { next } else { best });
    commonest.map_or((0, 0), |(time, _)| time)
}

/// Hands out space for inodes.
struct Space {
    /// Blocks handed out so far.
    blocks: u64,
    /// Free bytes at the end of a block, and the block.
    open: BTreeSet<(u64, u64)>,
}

impl Space {
    /// An offset for `length` bytes.
    fn take(&mut self, length: u64) -> u64 {
        let length = length.next_multiple_of(SLOT);
        let fitting = self.open.range((length, 0)..).next().copied();
        let (free, block) = match fitting {
            Some(gap) if length <= BLOCK_SIZE => {
                self.open.remove(&gap);
                gap
            }
            _ => {
                let block = self.blocks;
                self.blocks += length.div_ceil(BLOCK_SIZE);
                (BLOCK_SIZE, block)
            }
        };
        let offset = (block + 1) * BLOCK_SIZE - free;
        let end = offset + length;
        let rest = end.next_multiple_of(BLOCK_SIZE) - end;
        if rest > 0 {
            self.open.insert((rest, end / BLOCK_SIZE));
        }
        if self.open.len() > OPEN_BLOCKS {
            self.open.pop_first();
        }
        offset
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn spaces_do_not_overlap_and_small_ones_cross_no_block(
            lengths in prop::collection::vec(prop_oneof![1_u64..200, 1_u64..4097, 1_u64..20_000], 1..300)
        ) {
            let mut space = Space { blocks: 1, open: BTreeSet::new() };
            let mut taken: Vec<(u64, u64)> = Vec::new();
            for length in lengths {
                let offset = space.take(length);
                prop_assert_eq!(offset % SLOT, 0);
                if length <= BLOCK_SIZE {
                    prop_assert_eq!(offset / BLOCK_SIZE, (offset + length - 1) / BLOCK_SIZE);
                }
                taken.push((offset, offset + length));
            }
            taken.sort_unstable();
            prop_assert!(taken[0].0 >= BLOCK_SIZE);
            prop_assert!(taken.windows(2).all(|pair| pair[0].1 <= pair[1].0));
            prop_assert!(taken[taken.len() - 1].1 <= space.blocks * BLOCK_SIZE);
        }
    }
}
