//! A set of files on a stream: a frame with their names, then their contents end to end.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

/// All contents of a set together may have so many bytes: Kubernetes' own limit of a ConfigMap or Secret is
/// 1 MiB, and a projected volume joins several.
pub const MAX_SET: u64 = 16 << 20;
/// A set has at most so many files.
pub const MAX_FILES: usize = 4096;

/// The head of a set, sent as one frame ([`crate::frame`]); the contents follow in this order.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileSet {
    /// The files.
    pub files: Vec<FileEntry>,
}

/// One file of a set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Relative path; no empty, `.` or `..` component, none that begins with `..`.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    #[serde(default)]
    pub uid: u32,
    /// Group.
    #[serde(default)]
    pub gid: u32,
    /// Bytes of its content.
    pub size: u64,
}
