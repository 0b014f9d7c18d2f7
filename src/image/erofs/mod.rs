//! Our own EROFS writer: from a merged tree to the metadata of an uncompressed EROFS image.
//!
//! ```text
//!  block 0        superblock
//!  block 1 …      inodes, each with its attributes and its inline tail or chunk map
//!  …              whole blocks of directories and of very long link targets
//!  ── end of the metadata blob; a multiple of a block ──
//!  …              data blob of the first layer that is used, then the next …
//! ```
//! The guest sees the blobs end to end as one disk. Same layers, same bytes: nothing depends on time,
//! chance or the order of a hash table.
//!
//! - [`format`] encodes superblock, inodes and directory blocks.
//! - [`xattr`] encodes attributes.
//! - [`plan`] gives every inode its place.
//! - [`write`] writes the blob from the plan.
#![forbid(unsafe_code)]

pub mod format;
pub mod plan;
pub mod write;
pub mod xattr;

pub use write::{ErofsError, LayerBlob, Metadata, write_metadata};

/// Size of a block in bytes: the only one that Linux 6.1 mounts on x86.
pub const BLOCK_SIZE: u64 = 4096;
