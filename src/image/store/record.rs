//! Records: what the store knows of an image, as JSON.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::files::{self, Lock};
use super::{Store, StoreError, complete, names_of};
use crate::image::digest::Digest;
use crate::image::source::ImageConfig;

/// An image in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// Digest of the manifest; of an image from a Docker archive, of the configuration.
    pub digest: Digest,
    /// Its names, sorted.
    #[serde(skip)]
    pub names: Vec<String>,
    /// When it was made, as its configuration says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// What its containers run.
    pub config: ImageConfig,
    /// Its metadata blob, the start of its disk.
    pub metadata: MetadataBlob,
    /// Its layers, lowest first.
    pub layers: Vec<StoredLayer>,
    #[serde(skip)]
    root: PathBuf,
}

/// The metadata blob of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetadataBlob {
    /// Digest of the file.
    pub digest: Digest,
    /// In bytes, a multiple of 4,096.
    pub size: u64,
}

/// A layer of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredLayer {
    /// Digest of its tar.
    pub diff_id: Digest,
    /// Size of its data blob in bytes, a multiple of 4,096.
    pub data_size: u64,
    /// Whether its data blob is part of the image's disk.
    pub on_disk: bool,
}

impl ImageRecord {
    pub(super) fn new(
        store: &Store,
        digest: Digest,
        (created, config): (Option<String>, ImageConfig),
        metadata: MetadataBlob,
        layers: Vec<StoredLayer>,
    ) -> Self {
        let root = store.root.clone();
        Self {
            digest,
            names: Vec::new(),
            created,
            config,
            metadata,
            layers,
            root,
        }
    }

    /// The files, in order, that make the image's read-only disk, and their sizes in bytes, all
    /// multiples of 4,096: at least one, none empty.
    #[must_use]
    pub fn disk_parts(&self) -> Vec<(PathBuf, u64)> {
        let name = format!("{}.erofs", self.metadata.digest.hex());
        let metadata = (self.root.join("metadata").join(name), self.metadata.size);
        let layers = self.layers.iter().filter(|layer| layer.on_disk);
        let data = layers.map(|layer| (self.layer_path(layer, "data"), layer.data_size));
        std::iter::once(metadata).chain(data).collect()
    }

    /// Size of the image's disk in bytes.
    #[must_use]
    pub fn disk_size(&self) -> u64 {
        self.disk_parts().iter().map(|(_, size)| size).sum()
    }

    fn layer_path(&self, layer: &StoredLayer, file: &str) -> PathBuf {
        self.root
            .join("layers")
            .join(layer.diff_id.hex())
            .join(file)
    }

    /// Whether all files of the disk are there, with their sizes.
    pub(super) fn is_complete(&self) -> bool {
        self.disk_parts()
            .iter()
            .all(|(path, size)| fs::metadata(path).is_ok_and(|metadata| metadata.len() == *size))
    }
}

impl Store {
    pub(super) fn record_path(&self, digest: Digest) -> PathBuf {
        self.root
            .join("images")
            .join(format!("{}.json", digest.hex()))
    }

    /// The record of an image, if there is one.
    pub(super) fn record(
        &self,
        digest: Digest,
        names: &BTreeMap<String, Digest>,
    ) -> Result<Option<ImageRecord>, StoreError> {
        let record: Option<ImageRecord> = self.read_json(self.record_path(digest))?;
        Ok(record.map(|record| ImageRecord {
            names: names_of(names, digest),
            root: self.root.clone(),
            ..record
        }))
    }

    /// The digests of all images.
    pub(super) fn digests(&self) -> Result<Vec<Digest>, StoreError> {
        let path = self.root.join("images");
        let names = files::names(&path).map_err(self.failed("read", &path))?;
        let hex = names.iter().filter_map(|name| name.strip_suffix(".json"));
        Ok(hex.filter_map(|hex| Digest::from_hex(hex).ok()).collect())
    }

    pub(super) fn names(&self) -> Result<BTreeMap<String, Digest>, StoreError> {
        Ok(self
            .read_json(self.root.join("names.json"))?
            .unwrap_or_default())
    }

    pub(super) fn write_names(&self, names: &BTreeMap<String, Digest>) -> Result<(), StoreError> {
        self.write_json(&self.root.join("names.json"), names)
    }

    /// Writes a record and its name, after everything that the record refers to.
    pub(super) fn publish_record(
        &self,
        mut record: ImageRecord,
        name: &str,
    ) -> Result<ImageRecord, StoreError> {
        let name = complete(name)?;
        let _records = self.lock("records.lock", Lock::Exclusive)?;
        self.write_json(&self.record_path(record.digest), &record)?;
        let mut names = self.names()?;
        if names.insert(name, record.digest) != Some(record.digest) {
            self.write_names(&names)?;
        }
        record.names = names_of(&names, record.digest);
        Ok(record)
    }

    fn write_json(&self, path: &std::path::Path, value: &impl Serialize) -> Result<(), StoreError> {
        let mut bytes = serde_json::to_vec_pretty(value)
            .map_err(|error| self.failed("written", path)(error.into()))?;
        bytes.push(b'\n');
        self.write_whole(path, &bytes)
    }

    fn read_json<T: DeserializeOwned>(&self, path: PathBuf) -> Result<Option<T>, StoreError> {
        let bytes = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            result => result.map_err(self.failed("read", &path))?,
        };
        serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|error| StoreError::Damaged {
                path,
                fault: error.to_string(),
            })
    }
}
