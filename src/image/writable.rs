//! Writable disks: sparse ext4 files, made once per size and cloned.
//!
//! The file system has no journal: a writable disk lives as long as its container, is never mounted
//! again after a crash of the guest, and a journal would cost space, start-up and every write twice.
//! Its inode tables are declared zeroed, which they are in a new sparse file, so that neither `mkfs`
//! nor the guest writes them. Labels, UUID and hash seed are fixed: same size, same bytes, but for the
//! time of creation.
#![forbid(unsafe_code)]

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::io::Errno;

use super::store::{Lock, Store, StoreError, publish};

/// What makes the file system (package e2fsprogs, 1.47 or later).
const MKFS: &str = "mkfs.ext4";
/// The smallest disk, in bytes: what an ext4 without a journal has room in.
pub const MIN_SIZE: u64 = 4 << 20;
/// The largest disk, in bytes: what ext4 with blocks of 4,096 bytes and the 64-bit feature is
/// supported for.
pub const MAX_SIZE: u64 = 1 << 50;
/// The file system's UUID and the seed of its directory hashes: guests know disks by serial.
const UUID: &str = "63756265-0000-4000-8000-000000000001";

/// Why there is no writable disk. Each is a sentence.
#[derive(Debug, thiserror::Error)]
pub enum WritableError {
    /// The size is not possible.
    #[error(
        "a writable disk of {0} bytes is not possible: 4 MiB to 1 PiB, in whole 4,096-byte blocks"
    )]
    Size(u64),
    /// A file failed.
    #[error("the writable disk {} cannot be {action}: {error}", .path.display())]
    Io {
        /// What was tried, as a participle.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The program could not be run.
    #[error("{MKFS} cannot be run: {0}; install the package e2fsprogs")]
    NoMkfs(io::Error),
    /// The program failed.
    #[error("{MKFS} could not make a writable disk: {0}")]
    Mkfs(String),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The templates in a store.
#[derive(Debug, Clone)]
pub struct WritableTemplates {
    store: Store,
}

impl WritableTemplates {
    pub(super) fn new(store: Store) -> Self {
        Self { store }
    }

    /// Makes `path`, which must not exist, a writable disk of `size` bytes: an empty ext4 file system
    /// in a sparse file. By reflink where the file systems can, else by copying the few blocks that
    /// have something in them.
    ///
    /// # Errors
    /// [`WritableError`]; nothing is left at `path`.
    pub fn clone_to(&self, size: u64, path: &Path) -> Result<(), WritableError> {
        if !(MIN_SIZE..=MAX_SIZE).contains(&size) || !size.is_multiple_of(4096) {
            return Err(WritableError::Size(size));
        }
        let source = self.template(size)?;
        let failed = |action, error| WritableError::Io {
            action,
            path: path.to_owned(),
            error,
        };
        let mut options = File::options();
        let target = options
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path);
        let target = target.map_err(|error| failed("made", error))?;
        clone(&source, &target, size).map_err(|error| {
            // The first error is the one to report.
            let _removed = fs::remove_file(path);
            failed("written", error)
        })
    }

    /// As [`WritableTemplates::clone_to`], in a file of the store that has no name: it is gone when the
    /// last descriptor is closed.
    ///
    /// # Errors
    /// [`WritableError`].
    pub fn clone_unnamed(&self, size: u64) -> Result<File, WritableError> {
        if !(MIN_SIZE..=MAX_SIZE).contains(&size) || !size.is_multiple_of(4096) {
            return Err(WritableError::Size(size));
        }
        let source = self.template(size)?;
        let directory = self.store.root().join("tmp");
        let made = || {
            let target = tempfile::tempfile_in(&directory)?;
            clone(&source, &target, size).map(|()| target)
        };
        made().map_err(|error| WritableError::Io {
            action: "made",
            path: directory.clone(),
            error,
        })
    }

    /// The template of a size, made if need be. Two that make it at once make the same.
    fn template(&self, size: u64) -> Result<File, WritableError> {
        let path = self
            .store
            .root()
            .join("writable")
            .join(format!("ext4-v1-{size}.img"));
        let failed = |action| {
            let path = path.clone();
            move |error| WritableError::Io {
                action,
                path,
                error,
            }
        };
        match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => return result.map_err(failed("opened")),
        }
        let _shared = self.store.lock("lock", Lock::Shared)?;
        let file = self.store.temporary_file()?;
        file.as_file().set_len(size).map_err(failed("made"))?;
        make_file_system(file.path())?;
        publish(file, &path).map_err(failed("made"))?;
        File::open(&path).map_err(failed("opened"))
    }
}

/// Makes `target` a copy of `source`, by reflink where the file system can.
fn clone(source: &File, target: &File, size: u64) -> io::Result<()> {
    match rustix::fs::ioctl_ficlone(target, source) {
        Ok(()) => Ok(()),
        Err(_) => copy_sparse(source, target, size),
    }
}

/// Runs `mkfs.ext4`.
fn make_file_system(path: &Path) -> Result<(), WritableError> {
    // Everything that a configuration file could change is said.
    let features = "none,dir_index,dir_nlink,ext_attr,extent,extra_isize,filetype,flex_bg,huge_file,\
                    large_file,metadata_csum,sparse_super,64bit";
    let extended = format!(
        "assume_storage_prezeroed=1,nodiscard,lazy_itable_init=1,root_owner=0:0,hash_seed={UUID}"
    );
    let arguments = [
        "-q",
        "-F",
        "-b",
        "4096",
        "-I",
        "256",
        "-i",
        "16384",
        "-m",
        "0",
        "-e",
        "remount-ro",
        "-O",
        features,
        "-E",
        &extended,
        "-U",
        UUID,
        "--",
    ];
    let output = Command::new(find_program(MKFS))
        .args(arguments)
        .arg(path)
        .env("LC_ALL", "C")
        .env("MKE2FS_CONFIG", "/dev/null")
        .stdin(Stdio::null())
        .output()
        .map_err(WritableError::NoMkfs)?;
    match output.status.success() {
        true => Ok(()),
        false => {
            let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            Err(WritableError::Mkfs(format!("{text} ({})", output.status)))
        }
    }
}

/// The directories of system programs are not in every user's `PATH`.
fn find_program(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let fixed = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(fixed)
        .map(|directory| directory.join(OsStr::new(name)))
        .find(|program| program.is_file())
        .unwrap_or_else(|| PathBuf::from(name))
}

/// Copies what is not a hole.
fn copy_sparse(mut source: &File, mut target: &File, size: u64) -> io::Result<()> {
    target.set_len(size)?;
    let mut offset = 0;
    while let Some((start, end)) = next_data(source, offset, size)? {
        source.seek(SeekFrom::Start(start))?;
        target.seek(SeekFrom::Start(start))?;
        // `io::copy` between files lets the kernel copy.
        let copied = io::copy(&mut source.take(end - start), &mut target)?;
        if copied != end - start {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        offset = end;
    }
    Ok(())
}

/// The next run of data at or after `offset`.
fn next_data(file: &File, offset: u64, size: u64) -> io::Result<Option<(u64, u64)>> {
    let start = match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(offset)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let end = rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(start))?;
    Ok((start < size).then_some((start, end.min(size))))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path().join("store")).unwrap();
        (directory, store)
    }

    #[test]
    fn a_clone_is_a_sparse_and_sound_ext4() {
        let (directory, store) = store();
        let size = 1 << 30;
        for name in ["one", "two"] {
            let path = directory.path().join(name);
            store.writable().clone_to(size, &path).unwrap();
            let metadata = fs::metadata(&path).unwrap();
            assert_eq!(metadata.len(), size);
            assert!(
                metadata.blocks() * 512 < 1 << 20,
                "{} bytes",
                metadata.blocks() * 512
            );
            let check = Command::new(find_program("e2fsck"))
                .arg("-fn")
                .arg(&path)
                .output()
                .unwrap();
            assert!(
                check.status.success(),
                "{}",
                String::from_utf8_lossy(&check.stdout)
            );
        }
        let read = |name| fs::read(directory.path().join(name)).unwrap();
        assert!(read("one") == read("two"));
    }

    #[test]
    fn a_clone_without_a_name_is_the_same_and_leaves_nothing() {
        let (directory, store) = store();
        let path = directory.path().join("named");
        store.writable().clone_to(MIN_SIZE, &path).unwrap();
        let mut unnamed = store.writable().clone_unnamed(MIN_SIZE).unwrap();
        let mut bytes = Vec::new();
        unnamed.rewind().unwrap();
        unnamed.read_to_end(&mut bytes).unwrap();
        assert!(bytes == fs::read(&path).unwrap());
        let left = fs::read_dir(store.root().join("tmp")).unwrap().count();
        assert_eq!(left, 0, "files in tmp");
        let error = store.writable().clone_unnamed(0).unwrap_err();
        assert!(matches!(error, WritableError::Size(0)), "{error}");
    }

    #[test]
    fn the_smallest_disk_is_possible_and_others_are_refused() {
        let (directory, store) = store();
        let path = directory.path().join("disk");
        store.writable().clone_to(MIN_SIZE, &path).unwrap();
        for size in [0, MIN_SIZE - 4096, MIN_SIZE + 1, MAX_SIZE + 4096] {
            let path = directory.path().join("none");
            let error = store.writable().clone_to(size, &path).unwrap_err();
            assert!(matches!(error, WritableError::Size(_)), "{error}");
            assert!(!path.exists());
        }
    }

    #[test]
    fn what_exists_is_not_overwritten() {
        let (directory, store) = store();
        let path = directory.path().join("disk");
        fs::write(&path, "mine").unwrap();
        let error = store.writable().clone_to(MIN_SIZE, &path).unwrap_err();
        assert!(error.to_string().contains("disk cannot be made"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"mine");
    }

    #[test]
    fn holes_are_kept_without_reflinks() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("from"), directory.path().join("to"));
        let source = File::create_new(&from).unwrap();
        let size = 64 << 20;
        source.set_len(size).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&source, b"middle", 20 << 20).unwrap();
        let open = |path| {
            File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(path)
        };
        copy_sparse(&open(&from).unwrap(), &open(&to).unwrap(), size).unwrap();
        assert!(fs::read(&from).unwrap() == fs::read(&to).unwrap());
        assert!(fs::metadata(&to).unwrap().blocks() * 512 < 1 << 20);
    }
}
