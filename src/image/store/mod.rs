//! The store: a directory with everything that was imported.
//!
//! ```text
//!  lock               shared by imports, exclusive to who deletes
//!  records.lock       held while records and names change
//!  names.json         name → digest of the image
//!  images/<hex>.json  one record per image, by digest of its manifest; written last
//!  metadata/<hex>.erofs              by digest of the file
//!  layers/<hex>/{data,tails,index}   by diff id of the layer
//!  writable/          templates of writable disks
//!  locks/  tmp/       one lock per layer being converted; what is unfinished
//!  garbage            exists if something was removed that is not deleted yet
//! ```
//!
//! Everything is written to `tmp`, made durable and renamed into place, and a record is written after
//! all that it refers to: an import that is killed leaves only files that the next one uses or sweeps.
//! Files are only ever unlinked, so a pod that has its disk open is not disturbed by a removal.
#![forbid(unsafe_code)]

mod files;
mod import;
mod record;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

pub use import::{ImportProgress, NoProgress};
pub use record::{ImageRecord, MetadataBlob, StoredLayer};

use super::digest::Digest;
use super::erofs::ErofsError;
use super::layer::stream::StreamError;
use super::source::SourceError;
use super::tree::TreeError;
use super::writable::WritableTemplates;
pub(super) use files::{Lock, publish};

/// Where root's store is.
const SYSTEM_STORE: &str = "/var/lib/cube/images";
/// The fewest hexadecimal digits that stand for a digest.
const MIN_PREFIX: usize = 6;
/// The longest name of an image, in bytes.
const MAX_NAME: usize = 512;

/// Why something with the store failed. Each is a sentence.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file or directory of the store.
    #[error("{} of the image store cannot be {action}: {error}", .path.display())]
    Io {
        /// What was tried, as a participle.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// No directory to put the store in.
    #[error(
        "there is no place for the image store: HOME is not set; set CUBE_STORE or use --store"
    )]
    NoHome,
    /// A file of the store was damaged.
    #[error(
        "{} of the image store is damaged: {fault}; remove the file and import the image again",
        .path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        fault: String,
    },
    /// The image's own files.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A layer.
    #[error("layer {number} of {} ({digest}) {error}", .image.display())]
    Layer {
        /// Counted from 1, the lowest.
        number: usize,
        /// The layer's blob, or its diff id if the image does not name the blob.
        digest: Digest,
        /// The image.
        image: PathBuf,
        /// What is wrong.
        error: Box<StreamError>,
    },
    /// A layer does not fit on those below.
    #[error("layer {number} of {} ({digest}) {error}", .image.display())]
    Tree {
        /// Counted from 1, the lowest.
        number: usize,
        /// The layer's diff id.
        digest: Digest,
        /// The image.
        image: PathBuf,
        /// What is wrong.
        error: Box<TreeError>,
    },
    /// The image's metadata.
    #[error("the image {} cannot be stored: {error}", .image.display())]
    Erofs {
        /// The image.
        image: PathBuf,
        /// Why.
        error: ErofsError,
    },
    /// No such image.
    #[error("there is no image `{0}`; `cube images` lists those there are, `cube import` adds one")]
    NotFound(String),
    /// A short digest that several images have.
    #[error("`{0}` stands for several images; write more digits of the digest")]
    Ambiguous(String),
    /// Not a name.
    #[error("`{0}` cannot be an image's name: it is empty, too long, or has spaces in it")]
    BadName(String),
}

/// What [`Store::remove`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removed {
    /// The names that are gone.
    pub names: Vec<String>,
    /// The image, if its last name went and it is gone too.
    pub image: Option<Digest>,
}

/// An image store. Cheap to open; many processes may use one at a time.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

impl Store {
    /// Opens the store in the directory `root`, which is made if it is absent.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let store = Self { root: root.into() };
        for directory in ["images", "layers", "metadata", "writable", "locks", "tmp"] {
            let path = store.root.join(directory);
            files::make_private(&path).map_err(store.failed("made", &path))?;
        }
        // An absolute root, so that the paths of disks stay true when the process changes directory.
        let root = store
            .root
            .canonicalize()
            .map_err(store.failed("found", &store.root))?;
        Ok(Self { root })
    }

    /// Where the store is if nothing else is said: `CUBE_STORE`; `/var/lib/cube/images` for root; else
    /// `cube/images` in the user's data directory.
    ///
    /// # Errors
    /// [`StoreError::NoHome`].
    pub fn default_path() -> Result<PathBuf, StoreError> {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        if let Some(path) = variable("CUBE_STORE") {
            return Ok(path.into());
        }
        if rustix::process::geteuid().is_root() {
            return Ok(SYSTEM_STORE.into());
        }
        let data = match (variable("XDG_DATA_HOME"), variable("HOME")) {
            (Some(data), _) => PathBuf::from(data),
            (None, Some(home)) => Path::new(&home).join(".local/share"),
            (None, None) => return Err(StoreError::NoHome),
        };
        Ok(data.join("cube/images"))
    }

    /// Its directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The templates of writable disks.
    #[must_use]
    pub fn writable(&self) -> WritableTemplates {
        WritableTemplates::new(self.clone())
    }

    /// All images, by name, those without one last.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn list(&self) -> Result<Vec<ImageRecord>, StoreError> {
        let names = self.names()?;
        let mut records = Vec::new();
        for digest in self.digests()? {
            // One that is removed meanwhile is not there.
            records.extend(self.record(digest, &names)?);
        }
        records.sort_by(|a, b| {
            let key =
                |record: &ImageRecord| (record.names.is_empty(), record.names.first().cloned());
            key(a).cmp(&key(b)).then(a.digest.cmp(&b.digest))
        });
        Ok(records)
    }

    /// The image with this name (the tag `latest` may be left out), digest, or first digits of its
    /// digest.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Ambiguous`].
    pub fn resolve(&self, reference: &str) -> Result<ImageRecord, StoreError> {
        let names = self.names()?;
        let digest = match named(&names, reference) {
            Some((_, digest)) => digest,
            None => self.by_prefix(reference)?,
        };
        self.record(digest, &names)?
            .ok_or_else(|| StoreError::NotFound(reference.to_owned()))
    }

    /// The image named, or, if there is none and `reference` is the path of an image, that image,
    /// imported. What begins with `/` or `.` is always a path.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn resolve_or_import(
        &self,
        reference: &str,
        progress: &mut dyn ImportProgress,
    ) -> Result<ImageRecord, StoreError> {
        let path = Path::new(reference);
        if reference.starts_with(['/', '.']) {
            return self.import(path, None, progress);
        }
        match self.resolve(reference) {
            Err(StoreError::NotFound(_)) if path.exists() => self.import(path, None, progress),
            result => result,
        }
    }

    /// Removes a name, or, by digest, an image with all its names. An image without a name left goes
    /// too, with all that no other image uses; pods that run it are not disturbed.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn remove(&self, reference: &str) -> Result<Removed, StoreError> {
        let removed = {
            let _records = self.lock("records.lock", Lock::Exclusive)?;
            let mut names = self.names()?;
            let (gone, digest) = match named(&names, reference) {
                Some((name, digest)) => (vec![name], digest),
                None => {
                    let digest = self.by_prefix(reference)?;
                    (names_of(&names, digest), digest)
                }
            };
            names.retain(|name, _| !gone.contains(name));
            self.write_names(&names)?;
            let last = names_of(&names, digest).is_empty();
            if last {
                let path = self.record_path(digest);
                files::remove_if_there(&path).map_err(self.failed("removed", &path))?;
                let path = self.root.join("garbage");
                std::fs::write(&path, "").map_err(self.failed("written", &path))?;
            }
            Removed {
                names: gone,
                image: last.then_some(digest),
            }
        };
        self.sweep()?;
        Ok(removed)
    }

    /// If nobody imports: removes what is unfinished, and what no image uses if something was removed.
    /// An import that is under way does this when it ends.
    fn sweep(&self) -> Result<(), StoreError> {
        let Some(_alone) = self.try_lock_exclusive()? else {
            return Ok(());
        };
        for directory in ["tmp", "locks"] {
            self.empty(directory, |_| true)?;
        }
        let marker = self.root.join("garbage");
        if !marker.exists() {
            return Ok(());
        }
        let mut used = BTreeSet::new();
        for digest in self.digests()? {
            if let Some(record) = self.record(digest, &BTreeMap::new())? {
                used.insert(format!("{}.erofs", record.metadata.digest.hex()));
                used.extend(record.layers.iter().map(|layer| layer.diff_id.hex()));
            }
        }
        for directory in ["metadata", "layers"] {
            self.empty(directory, |name| !used.contains(name))?;
        }
        files::remove_if_there(&marker).map_err(self.failed("removed", &marker))
    }

    /// Removes the entries of a directory that `unwanted` says.
    fn empty(&self, directory: &str, unwanted: impl Fn(&str) -> bool) -> Result<(), StoreError> {
        let path = self.root.join(directory);
        for name in files::names(&path).map_err(self.failed("read", &path))? {
            if unwanted(&name) {
                let path = path.join(name);
                files::remove_all(&path).map_err(self.failed("removed", &path))?;
            }
        }
        Ok(())
    }

    /// The one image whose digest starts with these digits.
    fn by_prefix(&self, reference: &str) -> Result<Digest, StoreError> {
        let digits = reference.strip_prefix("sha256:").unwrap_or(reference);
        let not_found = || StoreError::NotFound(reference.to_owned());
        if digits.len() < MIN_PREFIX || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(not_found());
        }
        let digests = self.digests()?;
        let mut found = digests
            .into_iter()
            .filter(|digest| digest.hex().starts_with(digits));
        match (found.next(), found.next()) {
            (None, _) => Err(not_found()),
            (Some(digest), None) => Ok(digest),
            (Some(_), Some(_)) => Err(StoreError::Ambiguous(reference.to_owned())),
        }
    }

    /// Makes the error for a failed operation on a file.
    pub(super) fn failed(
        &self,
        action: &'static str,
        path: &Path,
    ) -> impl FnOnce(io::Error) -> StoreError + use<> {
        let path = path.to_owned();
        move |error| StoreError::Io {
            action,
            path,
            error,
        }
    }
}

/// The name and the digest that a reference stands for.
fn named(names: &BTreeMap<String, Digest>, reference: &str) -> Option<(String, Digest)> {
    [reference.to_owned(), format!("{reference}:latest")]
        .into_iter()
        .find_map(|name| names.get(&name).map(|digest| (name.clone(), *digest)))
}

fn names_of(names: &BTreeMap<String, Digest>, digest: Digest) -> Vec<String> {
    names
        .iter()
        .filter(|(_, d)| **d == digest)
        .map(|(name, _)| name.clone())
        .collect()
}

/// Checks a name and gives it the tag `latest` if it has none.
fn complete(name: &str) -> Result<String, StoreError> {
    let bad = name.is_empty()
        || name.len() > MAX_NAME
        || name.chars().any(|c| c.is_whitespace() || c.is_control());
    if bad {
        return Err(StoreError::BadName(name.to_owned()));
    }
    // A colon before the last slash is that of a port.
    let has_tag = name
        .rsplit('/')
        .next()
        .is_some_and(|last| last.contains([':', '@']));
    Ok(if has_tag {
        name.to_owned()
    } else {
        format!("{name}:latest")
    })
}
