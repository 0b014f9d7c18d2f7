//! What is made for a pod's network, written down before it is made.
//!
//! A record is a directory with a file in it. Its owner locks the directory for as long as the network lives;
//! the plug-ins that it runs inherit the lock. A record whose lock is free is one whose owner was killed.
#![forbid(unsafe_code)]

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{AboutFile, NetError};

/// Name of the file in a record's directory.
const FILE: &str = "network.json";
/// Name of the lock of all records. Records never begin with a dot.
const LOCK: &str = ".lock";

/// One pod's network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// The pod's id.
    pub pod: String,
    /// The network's configuration, whole: it may have changed when this is undone.
    pub config: Value,
    /// Where that came from.
    pub config_path: PathBuf,
    /// Name of the network namespace.
    pub namespace: String,
    /// Name of the interface in it.
    pub interface: String,
    /// Arguments for the plug-ins' capabilities.
    #[serde(default)]
    pub capabilities: Map<String, Value>,
    /// What the last plug-in that has run returned (ADD); absent: none has.
    #[serde(default)]
    pub result: Option<Value>,
    /// Whether everything is made.
    #[serde(default)]
    pub complete: bool,
}

/// A record that this process owns.
#[derive(Debug)]
pub(super) struct Owned {
    directory: PathBuf,
    pub(super) record: Record,
    lock: File,
}

/// All records of a host.
#[derive(Debug, Clone)]
pub(super) struct Records(PathBuf);

impl Records {
    pub(super) fn new(directory: &Path) -> Self {
        Self(directory.to_owned())
    }

    /// Writes a new record, locked.
    pub(super) fn create(&self, record: Record) -> Result<Owned, NetError> {
        let make = |path: &Path| DirBuilder::new().recursive(true).mode(0o700).create(path);
        make(&self.0).about("create", &self.0)?;
        let guard = self.lock_all()?;
        let directory = self.0.join(&record.pod);
        let made = DirBuilder::new().mode(0o700).create(&directory);
        made.about("create the record", &directory)?;
        let lock = try_lock(&directory).about("lock the record", &directory)?;
        let Some(lock) = lock else {
            let held = io::Error::from(Errno::WOULDBLOCK);
            return Err(held).about("lock the record", &directory);
        };
        let owned = Owned {
            directory,
            record,
            lock,
        };
        owned.write()?;
        drop(guard);
        Ok(owned)
    }

    /// Takes over the records whose owners are gone.
    pub(super) fn abandoned(&self) -> Result<Vec<Owned>, NetError> {
        if !self.0.exists() {
            return Ok(Vec::new());
        }
        let _guard = self.lock_all()?;
        let mut found = Vec::new();
        for directory in self.directories()? {
            let Ok(Some(lock)) = try_lock(&directory) else {
                continue;
            };
            match read(&directory)? {
                Some(record) => found.push(Owned {
                    directory,
                    record,
                    lock,
                }),
                // Nothing was made before the record was written.
                None => fs::remove_dir_all(&directory).about("remove", &directory)?,
            }
        }
        Ok(found)
    }

    /// All records, with whether their owners live.
    pub(super) fn list(&self) -> Result<Vec<(Record, bool)>, NetError> {
        let mut found = Vec::new();
        for directory in self.directories()? {
            let lives = matches!(try_lock(&directory), Ok(None));
            if let Some(record) = read(&directory)? {
                found.push((record, lives));
            }
        }
        found.sort_by(|(one, _), (other, _)| one.pod.cmp(&other.pod));
        Ok(found)
    }

    fn directories(&self) -> Result<Vec<PathBuf>, NetError> {
        let entries = match fs::read_dir(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.about("list", &self.0)?,
        };
        let entries = entries.flatten().map(|entry| entry.path());
        Ok(entries.filter(|path| path.is_dir()).collect())
    }

    fn lock_all(&self) -> Result<File, NetError> {
        let path = self.0.join(LOCK);
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let lock = rustix::fs::open(&path, flags, Mode::from_raw_mode(0o600));
        let lock = lock.about("open", &path)?;
        flock(&lock, FlockOperation::LockExclusive).about("lock", &path)?;
        Ok(lock.into())
    }
}

impl Owned {
    /// Changes the record, on disk too.
    pub(super) fn change(&mut self, change: impl FnOnce(&mut Record)) -> Result<(), NetError> {
        change(&mut self.record);
        self.write()
    }

    /// Lets the processes that `work` starts hold the lock too.
    pub(super) fn shared<T>(&mut self, work: impl FnOnce(&mut Self) -> T) -> T {
        // Neither can fail on a descriptor that is open.
        let _ = fcntl_setfd(self.lock.as_fd(), FdFlags::empty());
        let result = work(self);
        let _ = fcntl_setfd(self.lock.as_fd(), FdFlags::CLOEXEC);
        result
    }

    /// A copy of the lock: the record has an owner for as long as any copy is open.
    pub(super) fn lock_copy(&self) -> io::Result<OwnedFd> {
        self.lock.as_fd().try_clone_to_owned()
    }

    /// Everything is undone.
    pub(super) fn remove(self) -> Result<(), NetError> {
        fs::remove_dir_all(&self.directory).about("remove the record", &self.directory)
    }

    fn write(&self) -> Result<(), NetError> {
        let (path, new) = (self.directory.join(FILE), self.directory.join("new"));
        let text = serde_json::to_vec(&self.record).map_err(io::Error::from);
        let text = text.about("write the record", &path)?;
        fs::write(&new, text).about("write the record", &new)?;
        fs::rename(&new, &path).about("write the record", &path)
    }
}

/// None: not written yet, or just removed.
fn read(directory: &Path) -> Result<Option<Record>, NetError> {
    let path = directory.join(FILE);
    let text = match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text.about("read the record", &path)?,
    };
    let record = serde_json::from_slice(&text);
    record
        .map(Some)
        .map_err(|source| NetError::Record { path, source })
}

/// None: somebody holds it.
fn try_lock(directory: &Path) -> io::Result<Option<File>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::open(directory, flags, Mode::empty())?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file.into())),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
