//! A directory with a store, images imported into it, and their disks checked and opened.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use cube::image::{Digest, ImageRecord, NoProgress, Store, StoreError};
use tempfile::TempDir;

use crate::archive::layout::{Compression, write_layout};
use crate::archive::tar::{Entry, tar};
use crate::erofs_reader::Image;

/// A directory with a store and the images of a test.
pub(crate) struct Place {
    pub(crate) directory: TempDir,
    pub(crate) store: Store,
}

impl Place {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path().join("store")).unwrap();
        Self { directory, store }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn import(&self, path: &Path) -> Result<ImageRecord, StoreError> {
        self.store.import(path, None, &mut NoProgress)
    }

    /// Makes a layout of the layers' tars, uncompressed, and imports it.
    pub(crate) fn import_tars(&self, tars: &[Vec<u8>]) -> Result<ImageRecord, StoreError> {
        let path = self.path(&format!("layout-{}", Digest::of(&tars.concat()).hex()));
        write_layout(&path, tars, Compression::None);
        self.import(&path)
    }

    /// Imports layers and opens the disk.
    pub(crate) fn build(&self, layers: &[&[Entry]]) -> Image {
        let tars: Vec<_> = layers.iter().map(|entries| tar(entries)).collect();
        self.open(&self.import_tars(&tars).unwrap())
    }

    /// Joins an image's disk into one file, has `fsck.erofs` check it, and opens it.
    pub(crate) fn open(&self, record: &ImageRecord) -> Image {
        let path = self.path("disk");
        // A command copies holes as holes: some disks are terabytes of them.
        drop(fs::remove_file(&path));
        let mut offset = 0;
        for (part, size) in record.disk_parts() {
            assert_eq!(fs::metadata(&part).unwrap().len(), size);
            assert!(size > 0 && size % 4096 == 0);
            copy_sparse(&part, &path, offset);
            offset += size;
        }
        fsck(&path);
        Image::open(&path)
    }

    /// The sentence that refuses the layers.
    pub(crate) fn refuse(&self, layers: &[&[Entry]]) -> String {
        let tars: Vec<_> = layers.iter().map(|entries| tar(entries)).collect();
        self.refuse_tars(&tars)
    }

    /// The sentence that refuses the tars; nothing may be left of the image.
    pub(crate) fn refuse_tars(&self, tars: &[Vec<u8>]) -> String {
        let error = self.import_tars(tars).unwrap_err().to_string();
        assert!(self.store.list().unwrap().is_empty());
        assert_eq!(fs::read_dir(self.path("store/tmp")).unwrap().count(), 0);
        error
    }
}

fn copy_sparse(from: &Path, to: &Path, offset: u64) {
    let status = Command::new("dd")
        .arg(format!("if={}", from.display()))
        .arg(format!("of={}", to.display()))
        .arg(format!("seek={}", offset / 4096))
        .args(["bs=4096", "conv=sparse,notrunc", "status=none"])
        .status()
        .unwrap();
    assert!(status.success());
    let size = offset + fs::metadata(from).unwrap().len();
    fs::File::options()
        .write(true)
        .open(to)
        .unwrap()
        .set_len(size)
        .unwrap();
}

/// Has erofs-utils look at an image.
pub(crate) fn fsck(path: &Path) {
    // It reads the head of attributes behind every inode, also of one that has none and ends with the disk: for such a
    // read to succeed, it looks at a copy with a block more.
    let copy = path.with_extension("fsck");
    let size = fs::copy(path, &copy).unwrap();
    let longer = fs::File::options().write(true).open(&copy).unwrap();
    longer.set_len(size + 4096).unwrap();
    // It calls itself for each level of directories, with large buffers on the stack.
    let output = Command::new("sh")
        .args(["-c", "ulimit -s unlimited; exec fsck.erofs \"$1\"", "fsck"])
        .arg(&copy)
        .output()
        .expect("erofs-utils is installed");
    fs::remove_file(&copy).unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !text.contains("<E>"), "{text}");
}
