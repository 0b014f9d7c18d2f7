//! A canonical digest of a file tree: equal for an image's layers and for the tree that a guest sees
//! if the whole path between them is right.
//!
//! The digest is the SHA-256 of one record per path, sorted by path: type and mode, owner, group,
//! modification time in seconds, then by type size and SHA-256 of the content, link target or device
//! number, then the extended attributes, then the first path of the same file if that is another one.
//! Directory sizes and link counts are not part of it: file systems differ in them.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::AtomicU64;

use sha2::{Digest as _, Sha256};

use super::digest::Digest;
use super::erofs::xattr;
use super::layer::convert::{ContentSink, FileContent, SinkError, convert};
use super::layer::stream::read_layer;
use super::layer::{Metadata, Node, Xattr};
use super::source::Source;
use super::store::StoreError;
use super::tree::{InodeId, Tree};

/// The records of a tree.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listing {
    /// By path; the second is the inode's identity within this listing.
    records: BTreeMap<Vec<u8>, (Vec<u8>, u64)>,
}

impl Listing {
    /// Adds a path (without a leading slash; the root is empty). Paths with the same `identity` are
    /// hard links of one another.
    pub fn add(&mut self, path: &[u8], identity: u64, metadata: &Metadata, node: &Node<Digest>) {
        let mut record = Vec::new();
        let mut field = |bytes: &[u8]| {
            record.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
            record.extend_from_slice(bytes);
        };
        let numbers = [
            metadata.mode.into(),
            metadata.uid.into(),
            metadata.gid.into(),
            metadata.mtime,
        ];
        for number in numbers {
            field(&i64::to_le_bytes(number));
        }
        match node {
            Node::Directory => field(b"directory"),
            Node::File { size, content } => {
                field(b"file");
                field(&size.to_le_bytes());
                field(content.as_bytes());
            }
            Node::Symlink(target) => {
                field(b"symlink");
                field(target);
            }
            Node::CharDevice(major, minor) => field(format!("char {major} {minor}").as_bytes()),
            Node::BlockDevice(major, minor) => field(format!("block {major} {minor}").as_bytes()),
            Node::Fifo => field(b"fifo"),
        }
        for Xattr { name, value } in &metadata.xattrs {
            field(name);
            field(value);
        }
        self.records.insert(path.to_vec(), (record, identity));
    }

    /// The listing with the `paths` left out and all that is below them.
    #[must_use]
    pub fn without(mut self, paths: &[Vec<u8>]) -> Self {
        let is_below = |path: &[u8], other: &[u8]| {
            path.strip_prefix(other)
                .is_some_and(|rest| rest.first().is_none_or(|byte| *byte == b'/'))
        };
        self.records
            .retain(|path, _| !paths.iter().any(|other| is_below(path, other)));
        self
    }

    /// The digest.
    #[must_use]
    pub fn digest(&self) -> Digest {
        let mut first: HashMap<u64, &[u8]> = HashMap::new();
        let mut hash = Sha256::new();
        for (path, (record, identity)) in &self.records {
            let origin = *first.entry(*identity).or_insert(path);
            for part in [path, record.as_slice(), origin] {
                hash.update((part.len() as u64).to_le_bytes());
                hash.update(part);
            }
        }
        Digest::from_bytes(hash.finalize().into())
    }

    /// The paths at which two listings differ, sorted: for messages.
    #[must_use]
    pub fn differences(&self, other: &Self) -> Vec<Vec<u8>> {
        let paths = self.records.keys().chain(other.records.keys());
        let mut different: Vec<_> = paths
            .filter(|path| {
                let record = |listing: &Self| listing.records.get(*path).map(|(r, _)| r.clone());
                record(self) != record(other)
            })
            .cloned()
            .collect();
        different.sort_unstable();
        different.dedup();
        different
    }

    /// Number of paths.
    #[must_use]
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether there is no path, not even the root.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }
}

/// Lists the merged tree of an image from its layers: every byte of them is read and verified, and
/// nothing is stored.
///
/// # Errors
/// As for an import.
pub fn of_layers(path: &Path) -> Result<Listing, StoreError> {
    let source = Source::open(path)?;
    let mut tree = Tree::<Digest>::default();
    for (index, layer) in source.layers.iter().enumerate() {
        let (blob, _) = source.open_layer(layer)?;
        let (number, digest) = (index + 1, layer.expected.diff_id);
        let image = source.path().to_owned();
        let count = AtomicU64::new(0);
        let changes = read_layer(blob, &layer.expected, &count, |tar| {
            convert(tar, &mut HashSink)
        });
        let changes = match changes {
            Ok(changes) => changes,
            Err(error) => {
                let error = Box::new(error);
                return Err(StoreError::Layer {
                    number,
                    digest,
                    image,
                    error,
                });
            }
        };
        tree.apply(index, changes).map_err(|error| {
            let error = Box::new(error);
            StoreError::Tree {
                number,
                digest,
                image,
                error,
            }
        })?;
    }
    Ok(of_tree(&tree))
}

/// Lists a merged tree.
#[must_use]
pub fn of_tree(tree: &Tree<Digest>) -> Listing {
    let mut listing = Listing::default();
    let mut pending = vec![(Vec::new(), InodeId::ROOT)];
    while let Some((path, id)) = pending.pop() {
        let Some(inode) = tree.inode(id) else {
            continue;
        };
        listing.add(&path, id.index() as u64, &inode.metadata, &inode.node);
        let children = inode.children.iter();
        pending.extend(children.map(|(name, &child)| (join(&path, name), child)));
    }
    listing
}

/// Lists a directory tree of this machine, without following links or entering other file systems.
/// `skip` has paths relative to `root` that are left out with all below.
///
/// # Errors
/// That of the first file that cannot be read, which it names.
pub fn of_directory(root: &Path, skip: &[Vec<u8>]) -> io::Result<Listing> {
    let mut listing = Listing::default();
    let device = fs::symlink_metadata(root)?.dev();
    let mut pending = vec![Vec::new()];
    while let Some(path) = pending.pop() {
        let full = root.join(std::ffi::OsStr::from_bytes(&path));
        let entry = describe(&full);
        let (identity, on, metadata, node) = entry.map_err(|error| {
            io::Error::new(error.kind(), format!("{}: {error}", full.display()))
        })?;
        listing.add(&path, identity, &metadata, &node);
        if node != Node::Directory || on != device {
            continue;
        }
        for entry in fs::read_dir(&full)? {
            let child = join(&path, &entry?.file_name().into_vec());
            if !skip.contains(&child) {
                pending.push(child);
            }
        }
    }
    Ok(listing)
}

/// Inode number, device, metadata and content of a path.
fn describe(path: &Path) -> io::Result<(u64, u64, Metadata, Node<Digest>)> {
    let stat = fs::symlink_metadata(path)?;
    let kind = stat.file_type();
    let device = || {
        (
            rustix::fs::major(stat.rdev()),
            rustix::fs::minor(stat.rdev()),
        )
    };
    let node = match kind {
        kind if kind.is_dir() => Node::Directory,
        kind if kind.is_file() => {
            let (content, size) = hash(File::open(path)?)?;
            if size != stat.size() {
                return Err(io::Error::other(format!(
                    "{size} bytes, and {} announced",
                    stat.size()
                )));
            }
            Node::File { size, content }
        }
        kind if kind.is_symlink() => {
            Node::Symlink(fs::read_link(path)?.into_os_string().into_vec())
        }
        kind if kind.is_char_device() => Node::CharDevice(device().0, device().1),
        kind if kind.is_block_device() => Node::BlockDevice(device().0, device().1),
        kind if kind.is_fifo() => Node::Fifo,
        _ => return Err(io::Error::other("a file of an unknown type")),
    };
    let metadata = Metadata {
        mode: (stat.mode() & 0o7777) as u16,
        uid: stat.uid(),
        gid: stat.gid(),
        mtime: stat.mtime(),
        mtime_nsec: 0,
        xattrs: xattrs(path)?,
    };
    Ok((stat.ino(), stat.dev(), metadata, node))
}

/// The attributes in the namespaces that images have.
fn xattrs(path: &Path) -> io::Result<Vec<Xattr>> {
    let mut list = vec![0; 64 << 10];
    let length = match rustix::fs::llistxattr(path, &mut list[..]) {
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        result => result?,
    };
    let mut xattrs = Vec::new();
    for name in list[..length].split(|&b| b == 0) {
        if xattr::namespace(name).is_some() {
            let mut value = vec![0; 64 << 10];
            let length = rustix::fs::lgetxattr(path, name, &mut value[..])?;
            value.truncate(length);
            xattrs.push(Xattr {
                name: name.to_vec(),
                value,
            });
        }
    }
    xattrs.sort_unstable();
    Ok(xattrs)
}

fn hash(mut file: impl Read) -> io::Result<(Digest, u64)> {
    let mut hash = Sha256::new();
    let size = io::copy(&mut file, &mut hash)?;
    Ok((Digest::from_bytes(hash.finalize().into()), size))
}

fn join(path: &[u8], name: &[u8]) -> Vec<u8> {
    match path {
        [] => name.to_vec(),
        _ => [path, b"/", name].concat(),
    }
}

/// Hashes contents instead of storing them, holes as zeros.
#[derive(Debug)]
pub struct HashSink;

impl ContentSink for HashSink {
    type Content = Digest;

    fn store<R: Read>(&mut self, mut file: FileContent<'_, R>) -> Result<Digest, SinkError> {
        let mut hash = Sha256::new();
        let mut position = 0;
        let whole = [super::tar::Extent {
            offset: 0,
            length: file.size,
        }];
        for extent in file.extents.unwrap_or(&whole) {
            zeros(&mut hash, extent.offset - position);
            let piece = &mut file.reader.by_ref().take(extent.length);
            let copied = io::copy(piece, &mut hash).map_err(SinkError::Read)?;
            if copied != extent.length {
                return Err(SinkError::Read(io::ErrorKind::UnexpectedEof.into()));
            }
            position = extent.end();
        }
        zeros(&mut hash, file.size - position);
        Ok(Digest::from_bytes(hash.finalize().into()))
    }
}

fn zeros(hash: &mut Sha256, mut count: u64) {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    while count > 0 {
        let piece = count.min(ZEROS.len() as u64);
        hash.update(&ZEROS[..piece as usize]);
        count -= piece;
    }
}
