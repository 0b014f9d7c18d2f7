//! Writes images around layers, and imports them.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use cube::image::{Digest, ImageRecord, NoProgress, Store, StoreError};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::erofs_reader::Image;
use crate::tar_builder::{Entry, tar};

/// How a layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
}

pub(crate) fn compress(bytes: &[u8], compression: Compression) -> Vec<u8> {
    match compression {
        Compression::None => bytes.to_vec(),
        Compression::Zstd => zstd::encode_all(bytes, 1).unwrap(),
        Compression::Gzip => {
            let mut encoder =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        }
    }
}

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
    // It calls itself for each level of directories, with large buffers on the stack.
    let output = Command::new("sh")
        .args(["-c", "ulimit -s unlimited; exec fsck.erofs \"$1\"", "fsck"])
        .arg(path)
        .output()
        .expect("erofs-utils is installed");
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !text.contains("<E>"), "{text}");
}

/// Writes blobs and remembers nothing else.
pub(crate) fn blob(path: &Path, bytes: &[u8]) -> Digest {
    let digest = Digest::of(bytes);
    let directory = path.join("blobs/sha256");
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join(digest.hex()), bytes).unwrap();
    digest
}

pub(crate) fn config(diff_ids: &[Digest]) -> Value {
    json!({
        "architecture": "amd64", "os": "linux", "created": "2024-05-06T07:08:09Z",
        "config": { "Cmd": ["/bin/sh"], "Env": ["PATH=/bin"], "WorkingDir": "/srv" },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    })
}

/// Writes an OCI layout with one image, tagged `latest`.
pub(crate) fn write_layout(path: &Path, tars: &[Vec<u8>], compression: Compression) {
    let diff_ids: Vec<_> = tars.iter().map(|tar| Digest::of(tar)).collect();
    let kind = match compression {
        Compression::None => "",
        Compression::Gzip => "+gzip",
        Compression::Zstd => "+zstd",
    };
    let layers = tars.iter().map(|tar| {
        let bytes = compress(tar, compression);
        descriptor(
            &format!("application/vnd.oci.image.layer.v1.tar{kind}"),
            path,
            &bytes,
        )
    });
    let layers: Vec<_> = layers.collect();
    write_manifest(path, &config(&diff_ids), &layers);
}

/// Writes a blob and gives its descriptor.
pub(crate) fn descriptor(media_type: &str, path: &Path, bytes: &[u8]) -> Value {
    json!({ "mediaType": media_type, "digest": blob(path, bytes), "size": bytes.len() })
}

/// Writes configuration, manifest, index and `oci-layout`.
pub(crate) fn write_manifest(path: &Path, config: &Value, layers: &[Value]) {
    let config = config.to_string();
    let config = descriptor(
        "application/vnd.oci.image.config.v1+json",
        path,
        config.as_bytes(),
    );
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let manifest =
        json!({ "schemaVersion": 2, "mediaType": kind, "config": config, "layers": layers });
    let mut manifest = descriptor(kind, path, manifest.to_string().as_bytes());
    manifest["annotations"] = json!({ "org.opencontainers.image.ref.name": "latest" });
    write_index(path, &[manifest]);
}

pub(crate) fn write_index(path: &Path, manifests: &[Value]) {
    let index = json!({ "schemaVersion": 2, "manifests": manifests });
    fs::write(path.join("index.json"), index.to_string()).unwrap();
    fs::write(path.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}

/// Packs a directory into a tar with GNU tar.
pub(crate) fn pack(directory: &Path, archive: &Path) {
    let status = Command::new("tar")
        .arg("-cf")
        .arg(archive)
        .arg("-C")
        .arg(directory)
        .arg(".")
        .status();
    assert!(status.unwrap().success());
}
