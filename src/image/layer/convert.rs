//! From tar entries to checked [`Change`]s.
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

use std::collections::BTreeMap;
use std::io::{self, Read};

use super::{Action, Change, MAX_INODES, MAX_NAME, MAX_PATH, Metadata, Node, Xattr};
use crate::image::erofs::xattr;
use crate::image::tar::{EntryKind, Extent, Stream, TarEntry, TarError, TarReader, display};

/// Prefix of a whiteout's name (OCI image specification, "Whiteouts").
const WHITEOUT: &[u8] = b".wh.";
/// Name of an opaque whiteout.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Prefix of names that AUFS kept for itself; Docker passes over them.
const AUFS: &[u8] = b".wh..wh.";
/// The most bytes of names, targets and attributes of a layer: what bounds the memory of an import.
const MAX_METADATA: usize = 512 << 20;

/// Why a layer was refused. The texts continue a sentence that names the layer.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The archive is bad.
    #[error("{0}")]
    Tar(#[from] TarError),
    /// An entry is bad.
    #[error("has the entry `{entry}`, {fault}")]
    Entry {
        /// Its path, made printable.
        entry: String,
        /// What is wrong.
        fault: String,
    },
    /// More metadata than is accepted.
    #[error("has more entries or longer attributes than are accepted ({0})")]
    TooMuch(&'static str),
    /// The content could not be stored.
    #[error("could not be stored: {0}")]
    Store(io::Error),
}

/// A piece of a file that is stored, and a reader of all pieces end to end.
pub struct FileContent<'a, R> {
    /// The file's size, holes included.
    pub size: u64,
    /// The pieces; `None`: the whole file is one.
    pub extents: Option<&'a [Extent]>,
    /// The file's attributes: an inode with large ones has no room for a tail.
    pub xattrs: &'a [Xattr],
    /// Gives the stored pieces end to end.
    pub reader: R,
}

/// Where the contents of files go.
pub trait ContentSink {
    /// What becomes of a file's content.
    type Content;

    /// Takes one file's content: reads all of `file.reader`.
    ///
    /// # Errors
    /// The sink's own as [`SinkError::Write`], the reader's as [`SinkError::Read`].
    fn store<R: Read>(&mut self, file: FileContent<'_, R>) -> Result<Self::Content, SinkError>;
}

/// Which side failed while content was copied.
#[derive(Debug)]
pub enum SinkError {
    /// The layer could not be read.
    Read(io::Error),
    /// The content could not be written.
    Write(io::Error),
}

/// Reads a layer's tar to its end and gives its changes in order.
///
/// # Errors
/// [`LayerError`] names the entry and what is wrong with it.
pub fn convert<S: ContentSink>(
    tar: impl Read,
    sink: &mut S,
) -> Result<Vec<Change<S::Content>>, LayerError> {
    let mut reader = TarReader::new(Stream(tar));
    let mut changes = Vec::new();
    let mut budget = MAX_METADATA;
    while let Some(entry) = reader.next_entry()? {
        budget = budget
            .checked_sub(weight(&entry))
            .ok_or(LayerError::TooMuch("512 MiB of names and attributes"))?;
        if changes.len() >= MAX_INODES {
            return Err(LayerError::TooMuch("4,194,304 entries"));
        }
        if let Some(change) = change(entry, &mut reader, sink)? {
            changes.push(change);
        }
    }
    // What follows the end of the archive (zeros, as a rule) counts for the layer's digest.
    io::copy(&mut reader.into_input(), &mut io::sink()).map_err(TarError::Io)?;
    Ok(changes)
}

/// What an entry costs in memory, roughly.
fn weight(entry: &TarEntry) -> usize {
    let xattrs = entry
        .xattrs
        .iter()
        .map(|(name, value)| name.len().saturating_add(value.len()).saturating_add(64));
    xattrs
        .fold(128, usize::saturating_add)
        .saturating_add(entry.path.len())
        .saturating_add(entry.link.len())
}

fn change<R: Read, S: ContentSink>(
    entry: TarEntry,
    reader: &mut TarReader<Stream<R>>,
    sink: &mut S,
) -> Result<Option<Change<S::Content>>, LayerError> {
    let fault = |fault: &str| LayerError::Entry {
        entry: display(&entry.path),
        fault: fault.to_owned(),
    };
    let path = normalise(&entry.path).map_err(fault)?;
    if let Some(special) = whiteout(&path).map_err(fault)? {
        return Ok(match special {
            Special::Change(path, action) => Some(Change { path, action }),
            Special::Ignored => None,
        });
    }
    if path.is_empty() && entry.kind != EntryKind::Directory {
        return Err(fault(
            "which puts something that is not a directory at the root",
        ));
    }
    if entry.kind == EntryKind::HardLink {
        let action = Action::HardLink(hard_link_target(&entry)?);
        return Ok(Some(Change { path, action }));
    }
    let xattrs = attributes(entry.xattrs).map_err(|fault| LayerError::Entry {
        entry: display(&entry.path),
        fault,
    })?;
    let metadata = Metadata {
        mode: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        mtime: entry.mtime,
        mtime_nsec: entry.mtime_nsec,
        xattrs,
    };
    let node = match entry.kind {
        EntryKind::Directory => Node::Directory,
        EntryKind::Symlink => Node::Symlink(symlink_target(&entry.path, entry.link)?),
        EntryKind::CharDevice => Node::CharDevice(entry.major, entry.minor),
        EntryKind::BlockDevice => Node::BlockDevice(entry.major, entry.minor),
        EntryKind::Fifo => Node::Fifo,
        EntryKind::Regular | EntryKind::HardLink => {
            let content = sink.store(FileContent {
                size: entry.size,
                extents: entry.sparse.as_deref(),
                xattrs: &metadata.xattrs,
                reader: &mut *reader,
            });
            let content = content.map_err(|error| match error {
                SinkError::Read(error) => LayerError::Tar(reader.read_failed(error)),
                SinkError::Write(error) => LayerError::Store(error),
            })?;
            let size = entry.size;
            Node::File { size, content }
        }
    };
    let action = Action::Create(metadata, node);
    Ok(Some(Change { path, action }))
}

/// Where a hard link leads, from the image's root: with or without a leading slash.
fn hard_link_target(entry: &TarEntry) -> Result<Vec<u8>, LayerError> {
    let fault = |fault: String| LayerError::Entry {
        entry: display(&entry.path),
        fault,
    };
    let slashes = entry.link.iter().take_while(|&&byte| byte == b'/').count();
    let target = normalise(entry.link.get(slashes..).unwrap_or_default())
        .map_err(|f| fault(format!("a hard link to `{}`, {f}", display(&entry.link))))?;
    if target.is_empty() {
        return Err(fault("a hard link to the root directory".to_owned()));
    }
    Ok(target)
}

/// The text of a symbolic link, as the guest's kernel can hold it.
fn symlink_target(path: &[u8], link: Vec<u8>) -> Result<Vec<u8>, LayerError> {
    let fault = if link.is_empty() {
        "a symbolic link to nothing"
    } else if link.len() > MAX_PATH || link.contains(&0) {
        "a symbolic link whose target is longer than 4,095 bytes or has a NUL"
    } else {
        return Ok(link);
    };
    Err(LayerError::Entry {
        entry: display(path),
        fault: fault.to_owned(),
    })
}

/// Removes `.` and empty components.
fn normalise(path: &[u8]) -> Result<Vec<u8>, &'static str> {
    // Some tools (umoci) call the root itself `/`, which cannot be misread.
    if path.first() == Some(&b'/') && path.iter().any(|&b| b != b'/') {
        return Err("whose path is absolute; paths in a layer count from the image's root");
    }
    if path.contains(&0) {
        return Err("whose path has a NUL in it");
    }
    let mut normal = Vec::with_capacity(path.len());
    for component in path.split(|&b| b == b'/') {
        match component {
            b"" | b"." => continue,
            b".." => return Err("whose path has a `..` component"),
            _ if component.len() > MAX_NAME => {
                return Err("whose path has a component longer than 255 bytes");
            }
            _ => {}
        }
        if !normal.is_empty() {
            normal.push(b'/');
        }
        normal.extend_from_slice(component);
    }
    match normal.len() {
        0..=MAX_PATH => Ok(normal),
        _ => Err("whose path is longer than 4,095 bytes"),
    }
}

enum Special<C> {
    Change(Vec<u8>, Action<C>),
    Ignored,
}

/// What a name that starts with `.wh.` means.
fn whiteout<C>(path: &[u8]) -> Result<Option<Special<C>>, &'static str> {
    // Below one of AUFS' directories everything is its own.
    let mut components = path.rsplitn(2, |&b| b == b'/');
    let name = components.next().unwrap_or_default();
    let parent = components.next().unwrap_or_default();
    if parent.split(|&b| b == b'/').any(|c| c.starts_with(AUFS)) {
        return Ok(Some(Special::Ignored));
    }
    if parent
        .split(|&b| b == b'/')
        .any(|c| c.starts_with(WHITEOUT))
    {
        return Err("which lies below a whiteout");
    }
    if name == OPAQUE {
        return Ok(Some(Special::Change(parent.to_vec(), Action::Opaque)));
    }
    if name.starts_with(AUFS) {
        return Ok(Some(Special::Ignored));
    }
    let Some(hidden) = name.strip_prefix(WHITEOUT) else {
        return Ok(None);
    };
    if matches!(hidden, b"" | b"." | b"..") {
        return Err("a whiteout of nothing: `.wh.` must be followed by a name");
    }
    let path = match parent {
        [] => hidden.to_vec(),
        _ => [parent, b"/", hidden].concat(),
    };
    Ok(Some(Special::Change(path, Action::Whiteout)))
}

/// Attributes in the namespaces that EROFS has; the others (such as macOS') mean nothing on Linux.
fn attributes(pairs: Vec<(Vec<u8>, Vec<u8>)>) -> Result<Vec<Xattr>, String> {
    let mut sorted = BTreeMap::new();
    for (name, value) in pairs {
        let Some((_, rest)) = xattr::namespace(&name) else {
            continue;
        };
        if rest.len() > MAX_NAME || name.contains(&0) {
            return Err(format!(
                "with the extended attribute `{}`, whose name is longer than 255 bytes or has a NUL",
                display(&name)
            ));
        }
        if value.len() > xattr::MAX_VALUE {
            return Err(format!(
                "with the extended attribute `{}`, whose value is longer than 65,535 bytes",
                display(&name)
            ));
        }
        sorted.insert(name, value);
    }
    let xattrs: Vec<_> = sorted
        .into_iter()
        .map(|(name, value)| Xattr { name, value })
        .collect();
    match xattr::body_size(&xattrs) {
        Some(_) => Ok(xattrs),
        None => Err("whose extended attributes are longer than 256 KiB together".to_owned()),
    }
}
