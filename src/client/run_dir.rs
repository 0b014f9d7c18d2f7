//! The directory of a living pod: sockets and nothing that outlives it.
//!
//! A pod directory is locked by its owner for as long as it lives, and removed at the end. Whoever
//! creates one also sweeps those whose lock is free: their owner was killed. Both happen under the
//! lock of the base directory, so that a directory is never seen between its creation and its lock.
#![forbid(unsafe_code)]

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags, flock};

/// Name of the lock in the base directory. Pod directories never begin with a dot.
const BASE_LOCK: &str = ".lock";

/// A pod directory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// There is no place for it.
    #[error("no directory for pods: XDG_RUNTIME_DIR is not set and this user is not root")]
    NoBase,
    /// Somebody else could reach into it.
    #[error("{} belongs to another user (uid {owner}): remove it or set CUBE_RUN_DIR", path.display())]
    Owner {
        /// The directory.
        path: PathBuf,
        /// Its owner.
        owner: u32,
    },
    /// Others could put something into it.
    #[error("other users may write to {}: make it mode 0700 or set CUBE_RUN_DIR", path.display())]
    Writable {
        /// The directory.
        path: PathBuf,
    },
    /// An operation on a file failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
}

trait Named<T> {
    fn named(self, action: &'static str, path: &Path) -> Result<T, RunDirError>;
}

impl<T, E: Into<io::Error>> Named<T> for Result<T, E> {
    fn named(self, action: &'static str, path: &Path) -> Result<T, RunDirError> {
        self.map_err(|source| RunDirError::Io {
            action,
            path: path.to_owned(),
            source: source.into(),
        })
    }
}

/// The directory that holds pod directories: `CUBE_RUN_DIR`, or `/run/cube` for root, or
/// `$XDG_RUNTIME_DIR/cube`.
///
/// # Errors
/// [`RunDirError::NoBase`].
pub fn base_directory() -> Result<PathBuf, RunDirError> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(path) = variable("CUBE_RUN_DIR") {
        return Ok(path.into());
    }
    if rustix::process::geteuid().is_root() {
        return Ok("/run/cube".into());
    }
    let runtime = variable("XDG_RUNTIME_DIR").ok_or(RunDirError::NoBase)?;
    Ok(Path::new(&runtime).join("cube"))
}

/// A pod's directory, for its owner alone. Dropping it removes it.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    /// Absent once the directory has another owner.
    lock: Option<File>,
}

impl RunDir {
    /// Makes `<base>/<id>` and removes what pods that were killed have left.
    ///
    /// # Errors
    /// The base belongs to somebody else, or an operation on it fails; the file is named.
    pub fn create(base: &Path, id: &str) -> Result<Self, RunDirError> {
        make_base(base)?;
        let base_lock = lock_base(base)?;
        sweep(base)?;
        let path = base.join(id);
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .named("create", &path)?;
        let lock = try_lock(&path)
            .named("lock", &path)?
            .expect("nobody else locks under the base's lock");
        drop(base_lock);
        Ok(Self {
            path,
            lock: Some(lock),
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A copy of the lock, for a process to inherit: it holds as long as any copy is open.
    pub(crate) fn lock_copy(&self) -> io::Result<File> {
        let lock = self.lock.as_ref().map(File::try_clone);
        lock.unwrap_or_else(|| Err(io::Error::other("the directory has another owner")))
    }

    /// Leaves the directory to the process that inherited the lock.
    pub(crate) fn hand_over(mut self) {
        self.lock = None;
    }
}

/// The pods that live under `base`, by name, after what dead ones have left was removed.
///
/// # Errors
/// The base belongs to somebody else, or an operation on it fails; the file is named.
pub fn living(base: &Path) -> Result<Vec<String>, RunDirError> {
    make_base(base)?;
    let _base_lock = lock_base(base)?;
    sweep(base)?;
    let mut names = Vec::new();
    for entry in fs::read_dir(base).named("list", base)?.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            names.extend(entry.file_name().into_string());
        }
    }
    names.sort();
    Ok(names)
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if self.lock.is_some() {
            // What cannot be removed now is swept by the next pod.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

fn make_base(base: &Path) -> Result<(), RunDirError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(base)
        .named("create", base)?;
    let metadata = fs::metadata(base).named("look at", base)?;
    if metadata.uid() != rustix::process::geteuid().as_raw() {
        return Err(RunDirError::Owner {
            path: base.to_owned(),
            owner: metadata.uid(),
        });
    }
    if metadata.mode() & 0o022 != 0 {
        return Err(RunDirError::Writable {
            path: base.to_owned(),
        });
    }
    Ok(())
}

fn lock_base(base: &Path) -> Result<File, RunDirError> {
    let path = base.join(BASE_LOCK);
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let lock = rustix::fs::open(&path, flags, Mode::from_raw_mode(0o600)).named("open", &path)?;
    flock(&lock, FlockOperation::LockExclusive).named("lock", &path)?;
    Ok(lock.into())
}

/// Locks a pod directory; `None` if its owner lives.
fn try_lock(path: &Path) -> io::Result<Option<File>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = rustix::fs::open(path, flags, Mode::empty())?;
    match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(directory.into())),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Removes the directories whose owners are gone. One that a dying owner removes meanwhile is no error.
fn sweep(base: &Path) -> Result<(), RunDirError> {
    for entry in fs::read_dir(base).named("list", base)?.flatten() {
        let path = entry.path();
        let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
        let is_pod = !hidden && entry.file_type().is_ok_and(|kind| kind.is_dir());
        if is_pod && let Ok(Some(_lock)) = try_lock(&path) {
            let _ = fs::remove_dir_all(&path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn names(base: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(base)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_pod_directory_is_private_and_goes_with_its_owner() {
        let parent = tempfile::tempdir().unwrap();
        let base = parent.path().join("cube");
        let pod = RunDir::create(&base, "a").unwrap();
        fs::write(pod.path().join("socket"), "").unwrap();
        for path in [&base, pod.path()] {
            assert_eq!(fs::metadata(path).unwrap().mode() & 0o777, 0o700);
        }
        drop(pod);
        assert_eq!(names(&base), [BASE_LOCK]);
    }

    #[test]
    fn the_dead_are_swept_and_the_living_are_not() {
        let base = tempfile::tempdir().unwrap();
        let living = RunDir::create(base.path(), "living").unwrap();
        fs::create_dir_all(base.path().join("dead/inner")).unwrap();
        fs::write(base.path().join("dead/inner/file"), "").unwrap();
        let newcomer = RunDir::create(base.path(), "newcomer").unwrap();
        assert_eq!(names(base.path()), [BASE_LOCK, "living", "newcomer"]);
        drop((living, newcomer));
    }

    #[test]
    fn a_base_that_others_may_write_to_is_refused() {
        let base = tempfile::tempdir().unwrap();
        fs::set_permissions(base.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let error = RunDir::create(base.path(), "a").unwrap_err();
        assert!(matches!(error, RunDirError::Writable { .. }), "{error}");
        assert!(names(base.path()).is_empty(), "nothing was left in it");
    }

    #[test]
    fn a_taken_name_is_an_error_that_names_it() {
        let base = tempfile::tempdir().unwrap();
        let _pod = RunDir::create(base.path(), "a").unwrap();
        let sentence = RunDir::create(base.path(), "a").unwrap_err().to_string();
        assert!(sentence.contains("/a: File exists"), "{sentence}");
    }
}
