//! Generated odd trees: layers of random operations, and a model of what they make that knows nothing of Cube.

use std::collections::{BTreeMap, BTreeSet};

use cube::image::Digest;
use cube::image::layer::{Metadata, Node, Xattr};
use cube::image::tree_digest::Listing;
use proptest::prelude::*;

use super::tar::{Entry, SparseFormat, tar};

pub(crate) type Path = Vec<Vec<u8>>;

/// What a layer may do at a path.
#[derive(Debug, Clone)]
pub(crate) enum Operation {
    Whiteout,
    Opaque,
    Directory,
    File(u64, u8),
    Sparse(Vec<(u64, u64)>, u64, SparseFormat),
    Symlink(Vec<u8>),
    Device(u8, u32, u32),
    Fifo,
    /// A link to the n-th file that is there.
    HardLink(prop::sample::Index),
}

#[derive(Debug, Clone)]
pub(crate) struct Step {
    pub(crate) path: Path,
    pub(crate) operation: Operation,
    pub(crate) metadata: Metadata,
    /// How the path is written: with `./` in front, with a slash at the end.
    pub(crate) spelling: (bool, bool),
}

/// Few names, so that layers meet; some odd: before and after `.`, not UTF-8, as long as can be.
fn name() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        6 => "[abc]".prop_map(String::into_bytes),
        1 => Just(b"!first".to_vec()),
        1 => Just(b"-".to_vec()),
        1 => Just(b"a.b".to_vec()),
        1 => Just(b"...".to_vec()),
        1 => Just(vec![0xff, 0xfe, b'\n', 0x80]),
        1 => Just(vec![b'L'; 255]),
        2 => "n[0-9]{3}".prop_map(String::into_bytes),
    ]
}

fn xattrs() -> impl Strategy<Value = Vec<Xattr>> {
    let name = prop_oneof![
        Just("user.a"),
        Just("user.longer.name"),
        Just("trusted.t"),
        Just("security.capability"),
        Just("system.posix_acl_access"),
    ];
    let value = prop_oneof![
        4 => prop::collection::vec(any::<u8>(), 0..20),
        1 => (100_usize..9000).prop_map(|size| vec![b'v'; size]),
        1 => Just(vec![b'm'; 65_535]),
    ];
    let some = prop::collection::btree_map(name, value, 1..4).prop_map(|map| {
        let xattrs = map.into_iter().map(|(name, value)| Xattr {
            name: name.into(),
            value,
        });
        xattrs.collect()
    });
    prop_oneof![5 => Just(Vec::new()), 1 => some]
}

fn metadata() -> impl Strategy<Value = Metadata> {
    let id = || prop_oneof![4 => Just(0_u32), 1 => 0_u32..70_000, 1 => Just(u32::MAX - 1)];
    let mtime = prop_oneof![
        4 => Just((1_700_000_000_i64, 0_u32)),
        1 => (0_i64..1 << 34, 0_u32..1_000_000_000),
        1 => (-1_000_000_i64..0, 0_u32..1_000_000_000),
    ];
    (0_u16..0o10_000, id(), id(), mtime, xattrs()).prop_map(
        |(mode, uid, gid, (mtime, mtime_nsec), xattrs)| Metadata {
            mode,
            uid,
            gid,
            mtime,
            mtime_nsec,
            xattrs,
        },
    )
}

fn size() -> impl Strategy<Value = u64> {
    prop_oneof![
        2 => 0_u64..100,
        3 => prop::sample::select(vec![2047, 2048, 2049, 4095, 4096, 4097, 6144, 6145, 8191, 8192, 8193]),
        1 => 0_u64..40_000,
    ]
}

fn sparse() -> impl Strategy<Value = Operation> {
    let formats = [
        SparseFormat::Gnu,
        SparseFormat::Pax00,
        SparseFormat::Pax01,
        SparseFormat::Pax10,
    ];
    let pieces = prop::collection::vec((0_u64..30_000, 1_u64..9000), 0..30);
    (
        pieces,
        0_u64..50_000,
        prop::sample::select(formats.to_vec()),
    )
        .prop_map(|(steps, rest, format)| {
            let mut end = 0;
            let pieces: Vec<_> = steps
                .into_iter()
                .map(|(gap, length)| {
                    let offset = end + gap;
                    end = offset + length;
                    (offset, length)
                })
                .collect();
            Operation::Sparse(pieces, end + rest, format)
        })
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        2 => Just(Operation::Whiteout),
        1 => Just(Operation::Opaque),
        4 => Just(Operation::Directory),
        6 => (size(), any::<u8>()).prop_map(|(size, seed)| Operation::File(size, seed)),
        1 => sparse(),
        2 => prop_oneof![1_usize..60, Just(4095), 3900_usize..4095]
            .prop_map(|length| Operation::Symlink(vec![b's'; length])),
        1 => (prop::sample::select(vec![b'3', b'4']), 0_u32..4096, 0_u32..1 << 20)
            .prop_map(|(kind, major, minor)| Operation::Device(kind, major, minor)),
        1 => Just(Operation::Fifo),
        3 => any::<prop::sample::Index>().prop_map(Operation::HardLink),
    ]
}

pub(crate) fn step() -> impl Strategy<Value = Step> {
    (
        prop::collection::vec(name(), 1..5),
        operation(),
        metadata(),
        any::<(bool, bool)>(),
    )
        .prop_map(|(path, operation, metadata, spelling)| Step {
            path,
            operation,
            metadata,
            spelling,
        })
}

/// One to three layers.
pub(crate) fn layers() -> impl Strategy<Value = Vec<Vec<Step>>> {
    prop::collection::vec(prop::collection::vec(step(), 0..40), 1..4)
}

impl Step {
    /// The same below `directory`, and without attributes that a guest's kernel does not show to a container.
    pub(crate) fn for_a_container(mut self, directory: &str) -> Self {
        self.path.insert(0, directory.into());
        let has_user_attributes = matches!(
            self.operation,
            Operation::Directory | Operation::File(..) | Operation::Sparse(..)
        );
        self.metadata
            .xattrs
            .retain(|xattr| has_user_attributes && xattr.name.starts_with(b"user."));
        self
    }
}

#[derive(Debug, Clone)]
struct Item {
    identity: u64,
    metadata: Metadata,
    node: Node<Digest>,
}

/// The tree as a map from paths.
#[derive(Debug, Clone, Default)]
pub(crate) struct Model {
    items: BTreeMap<Path, Item>,
    next: u64,
}

impl Model {
    fn is_directory(&self, path: &[Vec<u8>]) -> bool {
        path.is_empty()
            || self
                .items
                .get(path)
                .is_some_and(|item| item.node == Node::Directory)
    }

    fn remove_below(&mut self, path: &[Vec<u8>]) {
        self.items
            .retain(|other, _| other.len() <= path.len() || !other.starts_with(path));
    }

    fn remove(&mut self, path: &[Vec<u8>]) {
        self.items.remove(path);
        self.remove_below(path);
    }

    /// Whether an entry can be put there without going through something that is no directory.
    fn can_hold(&self, path: &[Vec<u8>]) -> bool {
        (1..path.len()).all(|length| {
            let parent = &path[..length];
            !self.items.contains_key(parent) || self.is_directory(parent)
        })
    }

    fn insert(&mut self, path: &[Vec<u8>], item: Item) {
        for length in 1..path.len() {
            let parent = path[..length].to_vec();
            if !self.items.contains_key(&parent) {
                let metadata = Metadata {
                    mode: 0o755,
                    ..Metadata::default()
                };
                let implied = Item {
                    identity: self.identity(),
                    metadata,
                    node: Node::Directory,
                };
                self.items.insert(parent, implied);
            }
        }
        if !(self.is_directory(path) && item.node == Node::Directory) {
            self.remove(path);
        }
        self.items.insert(path.to_vec(), item);
    }

    fn identity(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    pub(crate) fn listing(&self) -> Listing {
        let mut listing = Listing::default();
        let root = Metadata {
            mode: 0o755,
            ..Metadata::default()
        };
        listing.add(b"", 0, &root, &Node::Directory);
        for (path, item) in &self.items {
            listing.add(&path.join(&b'/'), item.identity, &item.metadata, &item.node);
        }
        listing
    }

    /// Applies layers, each but the steps that make no sense, and gives their tars.
    pub(crate) fn tars(&mut self, layers: &[Vec<Step>]) -> Vec<Vec<u8>> {
        let layers = layers.iter().map(|steps| {
            let steps: Vec<_> = steps
                .iter()
                .filter(|step| possible(step))
                .cloned()
                .collect();
            tar(&self.layer(&steps))
        });
        layers.collect()
    }

    /// Applies the steps that make sense and gives the layer's entries.
    fn layer(&mut self, steps: &[Step]) -> Vec<Entry> {
        let lower = self.clone();
        let mut kept = BTreeSet::new();
        for (index, step) in steps.iter().enumerate() {
            let sensible = match step.operation {
                Operation::Whiteout => lower.items.contains_key(&step.path),
                Operation::Opaque => {
                    lower.is_directory(&step.path) || !lower.items.contains_key(&step.path)
                }
                _ => false,
            };
            if sensible && lower.can_hold(&step.path) {
                kept.insert(index);
                match step.operation {
                    Operation::Whiteout => self.remove(&step.path),
                    _ => self.remove_below(&step.path),
                }
            }
        }
        let mut entries = Vec::new();
        for (index, step) in steps.iter().enumerate() {
            match step.operation {
                Operation::Whiteout | Operation::Opaque if kept.contains(&index) => {
                    entries.push(special(step));
                }
                Operation::Whiteout | Operation::Opaque => {}
                _ if self.can_hold(&step.path) => entries.extend(self.create(step)),
                _ => {}
            }
        }
        entries
    }

    pub(crate) fn create(&mut self, step: &Step) -> Option<Entry> {
        let mut entry = Entry::new(step.path.join(&b'/'), b'0');
        let metadata = step.metadata.clone();
        entry.mode = metadata.mode;
        (entry.uid, entry.gid) = (metadata.uid, metadata.gid);
        entry.mtime = (metadata.mtime, metadata.mtime_nsec);
        entry.xattrs = metadata
            .xattrs
            .iter()
            .map(|x| (x.name.clone(), x.value.clone()))
            .collect();
        let node = match &step.operation {
            Operation::Directory => {
                entry.flag = b'5';
                if step.spelling.1 {
                    entry.path.push(b'/');
                }
                Node::Directory
            }
            Operation::File(size, seed) => {
                entry.content = content(*size, *seed);
                Node::File {
                    size: *size,
                    content: Digest::of(&entry.content),
                }
            }
            Operation::Sparse(pieces, size, format) => {
                let mut whole = vec![0; usize::try_from(*size).unwrap()];
                for (offset, length) in pieces {
                    let piece = content(*length, 7);
                    let start = usize::try_from(*offset).unwrap();
                    whole[start..start + piece.len()].copy_from_slice(&piece);
                    entry.content.extend_from_slice(&piece);
                }
                entry.sparse = Some((*size, pieces.clone(), *format));
                Node::File {
                    size: *size,
                    content: Digest::of(&whole),
                }
            }
            Operation::Symlink(target) => {
                entry.flag = b'2';
                entry.link = target.clone();
                Node::Symlink(target.clone())
            }
            Operation::Device(kind, major, minor) => {
                entry.flag = *kind;
                entry.device = (*major, *minor);
                match kind {
                    b'3' => Node::CharDevice(*major, *minor),
                    _ => Node::BlockDevice(*major, *minor),
                }
            }
            Operation::Fifo => {
                entry.flag = b'6';
                Node::Fifo
            }
            Operation::HardLink(index) => return self.hard_link(step, *index),
            Operation::Whiteout | Operation::Opaque => return None,
        };
        if step.spelling.0 {
            entry.path = [b"./", entry.path.as_slice()].concat();
        }
        let identity = self.identity();
        self.insert(
            &step.path,
            Item {
                identity,
                metadata,
                node,
            },
        );
        Some(entry)
    }

    fn hard_link(&mut self, step: &Step, index: prop::sample::Index) -> Option<Entry> {
        let files: Vec<_> = self
            .items
            .iter()
            .filter(|(_, item)| item.node != Node::Directory)
            .collect();
        let (target, item) = (!files.is_empty()).then(|| *index.get(&files))?;
        let (target, item) = (target.clone(), item.clone());
        self.insert(&step.path, item);
        Some(Entry::link(step.path.join(&b'/'), b'1', target.join(&b'/')))
    }
}

/// The entry of a whiteout or an opaque directory.
fn special(step: &Step) -> Entry {
    let mut path = step.path.clone();
    match step.operation {
        Operation::Opaque => path.push(b".wh..wh..opq".to_vec()),
        _ => {
            let name = path.pop().unwrap();
            path.push([b".wh.", name.as_slice()].concat());
        }
    }
    Entry::file(path.join(&b'/'), b"")
}

fn content(size: u64, seed: u8) -> Vec<u8> {
    (0..size)
        .map(|i| (i as u8).wrapping_mul(31).wrapping_add((i >> 8) as u8) ^ seed)
        .collect()
}

/// A whiteout's name has four bytes more than the name that it hides, so 255 of them cannot be hidden.
fn possible(step: &Step) -> bool {
    let long = step.path.last().is_some_and(|name| name.len() > 251);
    !(long && matches!(step.operation, Operation::Whiteout))
}
