//! The store's file operations: locks, and files and directories that appear whole or not at all.
#![forbid(unsafe_code)]

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use tempfile::{NamedTempFile, TempDir};

use super::{Store, StoreError};

/// How a lock file is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::image) enum Lock {
    /// With others.
    Shared,
    /// Alone.
    Exclusive,
}

/// A lock, held until it is dropped (or the process ends, however it ends).
#[derive(Debug)]
pub(in crate::image) struct Held(#[expect(dead_code, reason = "holds the lock")] File);

impl Store {
    /// Takes a lock file, waiting for others.
    pub(in crate::image) fn lock(&self, name: &str, lock: Lock) -> Result<Held, StoreError> {
        let path = self.root().join(name);
        let file = open_lock(&path).map_err(self.failed("opened", &path))?;
        let operation = match lock {
            Lock::Shared => FlockOperation::LockShared,
            Lock::Exclusive => FlockOperation::LockExclusive,
        };
        rustix::io::retry_on_intr(|| flock(&file, operation))
            .map_err(|error| self.failed("locked", &path)(error.into()))?;
        Ok(Held(file))
    }

    /// Takes the store's lock alone if nobody has it.
    pub(super) fn try_lock_exclusive(&self) -> Result<Option<Held>, StoreError> {
        let path = self.root().join("lock");
        let file = open_lock(&path).map_err(self.failed("opened", &path))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Held(file))),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(self.failed("locked", &path)(error.into())),
        }
    }

    /// An unfinished file, deleted unless it is [`publish`]ed.
    pub(in crate::image) fn temporary_file(&self) -> Result<NamedTempFile, StoreError> {
        let path = self.root().join("tmp");
        NamedTempFile::new_in(&path).map_err(self.failed("written to", &path))
    }

    /// An unfinished directory, deleted unless it is renamed.
    pub(super) fn temporary_directory(&self) -> Result<TempDir, StoreError> {
        let path = self.root().join("tmp");
        TempDir::new_in(&path).map_err(self.failed("written to", &path))
    }

    /// Writes a small file whole or not at all.
    pub(super) fn write_whole(&self, path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
        let mut file = self.temporary_file()?;
        file.write_all(bytes)
            .and_then(|()| publish(file, path))
            .map_err(self.failed("written", path))
    }
}

fn open_lock(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(path)
}

/// Makes a finished file durable under its name, replacing what is there.
pub(in crate::image) fn publish(file: NamedTempFile, path: &Path) -> io::Result<()> {
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    sync_parent(path)
}

/// Makes a finished directory durable under its name. Its files must be durable already.
pub(super) fn publish_directory(directory: TempDir, path: &Path) -> io::Result<()> {
    File::open(directory.path())?.sync_all()?;
    fs::rename(directory.path(), path)?;
    // Nothing is left to delete.
    let _renamed = directory.keep();
    sync_parent(path)
}

fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

/// Makes a directory and its parents, for this user alone: images may hold secrets.
pub(super) fn make_private(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// The names in a directory, sorted; what is not UTF-8 is none of the store's.
pub(super) fn names(path: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path)? {
        names.extend(entry?.file_name().into_string());
    }
    names.sort_unstable();
    Ok(names)
}

pub(super) fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Removes a file or a directory with its files.
pub(super) fn remove_all(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path)?.is_dir() {
        true => fs::remove_dir_all(path),
        false => remove_if_there(path),
    }
}
