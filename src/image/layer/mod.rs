//! One layer: its tar becomes a list of [`Change`]s, and the contents of its files go to a
//! [`ContentSink`] as they pass by, so that a layer is read once and never held in memory.
//!
//! - [`convert`] parses and checks the entries: paths, whiteouts, limits.
//! - [`blob`] is the sink of an import: a data blob that guests read, and the tails of files that the
//!   image's metadata will hold.
//! - [`index`] stores the changes beside the blob.
//! - [`stream`] decompresses and hashes a layer on a thread of its own.
#![forbid(unsafe_code)]

pub mod blob;
pub mod convert;
pub mod index;
pub mod stream;

use serde::{Deserialize, Serialize};

pub use blob::{BlobSink, Content};
pub use convert::{ContentSink, LayerError, convert};

/// The longest name of a file, in bytes (Linux NAME_MAX).
pub const MAX_NAME: usize = 255;
/// The longest path and link target, in bytes (Linux PATH_MAX less the NUL).
pub const MAX_PATH: usize = 4095;
/// The most entries of a layer, and inodes of an image.
pub const MAX_INODES: usize = 4 << 20;

/// What all inodes have.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    /// Permission bits, at most 0o7777.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time, seconds since the epoch.
    pub mtime: i64,
    /// Nanoseconds past that, below 1,000,000,000.
    pub mtime_nsec: u32,
    /// Extended attributes, sorted by name, each once, all in a namespace that EROFS has.
    pub xattrs: Vec<Xattr>,
}

/// An extended attribute.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Xattr {
    /// Full name, such as `security.capability`.
    pub name: Vec<u8>,
    /// At most 65,535 bytes.
    pub value: Vec<u8>,
}

/// What an inode is; `C` is what a [`ContentSink`] made of a file's content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Node<C> {
    /// A directory.
    Directory,
    /// A regular file.
    File {
        /// In bytes, holes included.
        size: u64,
        /// Where the content is.
        content: C,
    },
    /// A symbolic link to these 1 to 4,095 bytes.
    Symlink(Vec<u8>),
    /// A character device: major, minor.
    CharDevice(u32, u32),
    /// A block device: major, minor.
    BlockDevice(u32, u32),
    /// A FIFO.
    Fifo,
}

/// What a layer does at a path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Action<C> {
    /// Removes what the layers below have there.
    Whiteout,
    /// Empties the directory that the layers below have there.
    Opaque,
    /// Makes a file, or changes a directory's metadata.
    Create(Metadata, Node<C>),
    /// Makes another name of the file at this path.
    HardLink(Vec<u8>),
}

/// One entry of a layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change<C> {
    /// Path from the root without a leading slash; no empty, `.` or `..` components. Empty: the root.
    pub path: Vec<u8>,
    /// What happens there.
    pub action: Action<C>,
}
