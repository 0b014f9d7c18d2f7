//! Results that outlive the work tree, found by a hash of everything that went into them.
//!
//! ```text
//! <cache>/<kind>/<key>/            whole: it appeared by rename
//! <cache>/<kind>/.building-XXXX/   being built, by the holder of .lock; a dead builder's is swept by the next
//! <cache>/<kind>/.lock             held exclusively while building
//! ```
#![forbid(unsafe_code)]

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::error::{Doing, Error, Result};

/// Hash of a result's ingredients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Key(String);

impl Key {
    /// Each ingredient has a name; order counts. Lengths are hashed too, so that no two lists run together.
    pub(crate) fn of(ingredients: &[(&str, &[u8])]) -> Self {
        let mut hash = Sha256::new();
        for (name, bytes) in ingredients {
            for part in [name.as_bytes(), bytes] {
                hash.update((part.len() as u64).to_le_bytes());
                hash.update(part);
            }
        }
        let mut hex = hex::encode(hash.finalize());
        hex.truncate(24);
        Self(hex)
    }
}

/// Where a result lies, and whether it was there already.
#[derive(Debug)]
pub(crate) struct Found {
    /// The entry's directory.
    pub(crate) directory: PathBuf,
    /// False: it was built just now.
    pub(crate) cached: bool,
}

/// The cache's root directory: `$XDG_CACHE_HOME/cube` or `~/.cache/cube`.
#[derive(Debug, Clone)]
pub(crate) struct Cache {
    root: PathBuf,
}

impl Cache {
    /// The user's cache.
    pub(crate) fn of_user() -> Result<Self> {
        let base = match env::var_os("XDG_CACHE_HOME").filter(|v| Path::new(v).is_absolute()) {
            Some(directory) => PathBuf::from(directory),
            None => env::home_dir()
                .filter(|home| home.is_absolute())
                .map(|home| home.join(".cache"))
                .ok_or_else(|| {
                    Error::Said(
                        "neither XDG_CACHE_HOME nor HOME is set to an absolute path: set one, \
                         for the kernel and the images are kept there"
                            .into(),
                    )
                })?,
        };
        Ok(Self::at(base.join("cube")))
    }

    /// A cache below `root`.
    pub(crate) fn at(root: PathBuf) -> Self {
        Self { root }
    }

    /// The root directory, which may not exist yet.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// The entry if it is there.
    pub(crate) fn find(&self, kind: &str, key: &Key) -> Option<PathBuf> {
        let directory = self.root.join(kind).join(&key.0);
        directory.is_dir().then_some(directory)
    }

    /// The entry, built by `build` into the empty directory that it is given if nobody has yet.
    ///
    /// Builders of one kind take turns. An entry appears whole or not at all.
    ///
    /// # Errors
    /// Those of `build`, and those of the file system.
    pub(crate) fn entry(
        &self,
        kind: &str,
        key: &Key,
        build: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<Found> {
        if let Some(directory) = self.find(kind, key) {
            return Ok(Found {
                directory,
                cached: true,
            });
        }
        let shelf = self.root.join(kind);
        fs::create_dir_all(&shelf).doing("create", &shelf)?;
        let lock_path = shelf.join(".lock");
        let lock = File::create(&lock_path).doing("create", &lock_path)?;
        lock.lock().doing("lock", &lock_path)?;
        if let Some(directory) = self.find(kind, key) {
            return Ok(Found {
                directory,
                cached: true,
            });
        }
        sweep(&shelf)?;
        let building = tempfile::Builder::new()
            .prefix(".building-")
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .tempdir_in(&shelf)
            .doing("create a directory in", &shelf)?;
        build(building.path())?;
        sync(building.path())?;
        let directory = shelf.join(&key.0);
        fs::rename(building.keep(), &directory).doing("rename the result to", &directory)?;
        Ok(Found {
            directory,
            cached: false,
        })
    }
}

/// Removes what killed builders left. The caller holds the shelf's lock, so nobody is at work there.
fn sweep(shelf: &Path) -> Result<()> {
    for entry in fs::read_dir(shelf).doing("read", shelf)? {
        let path = entry.doing("read", shelf)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(".building-") {
            fs::remove_dir_all(&path).doing("remove", &path)?;
        }
    }
    Ok(())
}

/// Writes the entry's file system back, so that no crash of the machine leaves a renamed entry with empty files.
fn sync(directory: &Path) -> Result<()> {
    let file = File::open(directory).doing("open", directory)?;
    rustix::fs::syncfs(&file).doing("write back", directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(text: &str) -> Key {
        Key::of(&[("text", text.as_bytes())])
    }

    #[test]
    fn keys_depend_on_every_ingredient_and_on_where_it_ends() {
        assert_eq!(key("a"), key("a"));
        assert_ne!(key("a"), key("b"));
        assert_ne!(Key::of(&[("a", b"bc")]), Key::of(&[("ab", b"c")]));
        assert_ne!(
            Key::of(&[("a", b"b"), ("c", b"d")]),
            Key::of(&[("c", b"d"), ("a", b"b")])
        );
    }

    #[test]
    fn an_entry_is_built_once() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::at(root.path().join("cube"));
        let first = cache
            .entry("kernel", &key("a"), |dir| {
                fs::write(dir.join("f"), "x").doing("write", dir)
            })
            .unwrap();
        assert!(!first.cached);
        let second = cache
            .entry("kernel", &key("a"), |_| panic!("built twice"))
            .unwrap();
        assert!(second.cached);
        assert_eq!(fs::read(second.directory.join("f")).unwrap(), b"x");
    }

    #[test]
    fn a_failed_build_leaves_no_entry_and_no_debris() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::at(root.path().into());
        let failed = cache.entry("kernel", &key("a"), |dir| {
            fs::write(dir.join("half"), "x").doing("write", dir)?;
            Err(Error::Said("no".into()))
        });
        assert!(failed.is_err());
        let left: Vec<_> = fs::read_dir(root.path().join("kernel"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(left, [".lock"]);
    }

    #[test]
    fn what_a_killed_builder_left_is_no_entry_and_is_swept() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::at(root.path().into());
        let stale = root.path().join("kernel/.building-dead");
        fs::create_dir_all(&stale).unwrap();
        fs::write(stale.join("vmlinux"), "half").unwrap();
        assert!(cache.find("kernel", &key("a")).is_none());
        cache.entry("kernel", &key("a"), |_| Ok(())).unwrap();
        assert!(!stale.exists());
    }

    #[test]
    fn concurrent_builders_take_turns_and_one_builds() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::at(root.path().into());
        let builds = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    cache
                        .entry("kernel", &key("a"), |_| {
                            builds.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                            Ok(())
                        })
                        .unwrap();
                });
            }
        });
        assert_eq!(builds.into_inner(), 1);
    }
}
