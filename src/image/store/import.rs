//! Importing: layers are converted if they are not there yet, then merged into the image's metadata.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use sha2::{Digest as _, Sha256};

use super::files::{self, Lock, publish};
use super::record::{ImageRecord, MetadataBlob, StoredLayer};
use super::{Store, StoreError, complete};
use crate::image::digest::Digest;
use crate::image::erofs::{self, LayerBlob};
use crate::image::layer::index::Index;
use crate::image::layer::stream::{StreamError, read_layer};
use crate::image::layer::{BlobSink, Content, convert};
use crate::image::source::{Source, SourceLayer};
use crate::image::tree::Tree;

/// How often progress is reported: after this many bytes of a layer's tar.
const REPORT_EVERY: u64 = 1 << 20;

/// Told how an import goes on, in the thread that imports. Layers come one after the other.
pub trait ImportProgress {
    /// Layer `index` of `count` begins: `bytes` to read, or none if it is in the store already.
    fn layer(&mut self, index: usize, count: usize, bytes: Option<u64>);
    /// So many bytes of the layer were read.
    fn read(&mut self, bytes: u64);
    /// All layers are there, and the image's metadata is being made.
    fn merging(&mut self);
}

/// Shows nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoProgress;

impl ImportProgress for NoProgress {
    fn layer(&mut self, _index: usize, _count: usize, _bytes: Option<u64>) {}
    fn read(&mut self, _bytes: u64) {}
    fn merging(&mut self) {}
}

impl Store {
    /// Imports the image at `path` (see [`Source::open`]) under `name`, or the name that it gives
    /// itself. What is in the store already is not read again. Several processes may import at a time.
    ///
    /// # Errors
    /// [`StoreError`]; the store is then as it was, but for whole layers that the next import uses.
    pub fn import(
        &self,
        path: &Path,
        name: Option<&str>,
        progress: &mut dyn ImportProgress,
    ) -> Result<ImageRecord, StoreError> {
        if let Some(name) = name {
            complete(name)?;
        }
        let source = Source::open(path)?;
        self.sweep()?;
        let result = {
            let _shared = self.lock("lock", Lock::Shared)?;
            self.import_locked(&source, name.unwrap_or(&source.name), progress)
        };
        // Something that was removed meanwhile could not be swept, and a failed import leaves nothing.
        self.sweep()?;
        result
    }

    fn import_locked(
        &self,
        source: &Source,
        name: &str,
        progress: &mut dyn ImportProgress,
    ) -> Result<ImageRecord, StoreError> {
        if let Some(record) = self.record(source.digest, &self.names()?)?
            && record.is_complete()
        {
            return self.publish_record(record, name);
        }
        let count = source.layers.len();
        for (index, layer) in source.layers.iter().enumerate() {
            self.ensure_layer(source, layer, (index, count), progress)?;
        }
        progress.merging();
        let record = self.merge(source)?;
        self.publish_record(record, name)
    }

    /// Converts a layer unless it is there. One process does it, others wait.
    fn ensure_layer(
        &self,
        source: &Source,
        layer: &SourceLayer,
        (index, count): (usize, usize),
        progress: &mut dyn ImportProgress,
    ) -> Result<(), StoreError> {
        let hex = layer.expected.diff_id.hex();
        let path = self.root.join("layers").join(&hex);
        let _converting = match path.exists() {
            true => None,
            false => Some(self.lock(&format!("locks/{hex}"), Lock::Exclusive)?),
        };
        if path.exists() {
            progress.layer(index, count, None);
            return Ok(());
        }
        let (blob, size) = source.open_layer(layer)?;
        progress.layer(index, count, Some(size));
        let directory = self.temporary_directory()?;
        let create = |name: &str| {
            let path = directory.path().join(name);
            let mut options = File::options();
            options.read(true).write(true).create_new(true);
            options.open(&path).map_err(self.failed("written", &path))
        };
        let mut sink = BlobSink::new(create("data")?, create("tails")?);
        let read = AtomicU64::new(0);
        let changes = read_layer(blob, &layer.expected, &read, |tar| {
            convert(
                Reporting {
                    tar,
                    read: &read,
                    progress,
                    since: 0,
                },
                &mut sink,
            )
        });
        let changes = changes.map_err(|error| layer_error(source, layer, index, error))?;
        let written = sink.finish().and_then(|(data_size, tails_size)| {
            let index = Index {
                data_size,
                tails_size,
                changes,
            };
            let mut file = File::create(directory.path().join("index"))?;
            index.write(&mut file)?;
            file.sync_all()?;
            files::publish_directory(directory, &path)
        });
        written.map_err(self.failed("written", &path))
    }

    /// Applies the layers and writes the image's metadata.
    fn merge(&self, source: &Source) -> Result<ImageRecord, StoreError> {
        let mut tree = Tree::<Content>::default();
        let mut blobs = Vec::new();
        let mut uuid = Sha256::new();
        for (index, layer) in source.layers.iter().enumerate() {
            let diff_id = layer.expected.diff_id;
            let directory = self.root.join("layers").join(diff_id.hex());
            let stored = self.read_index(&directory.join("index"))?;
            tree.apply(index, stored.changes)
                .map_err(|error| StoreError::Tree {
                    number: index + 1,
                    digest: diff_id,
                    image: source.path().to_owned(),
                    error: Box::new(error),
                })?;
            let path = directory.join("tails");
            let tails = File::open(&path).map_err(self.failed("read", &path))?;
            blobs.push(LayerBlob {
                data_size: stored.data_size,
                tails,
            });
            uuid.update(diff_id.as_bytes());
        }
        let mut id = [0; 16];
        id.copy_from_slice(&uuid.finalize()[..16]);
        let (metadata, used) = self.write_metadata(source, &tree, &blobs, id)?;
        let layers = source.layers.iter().zip(&blobs).enumerate();
        let layers = layers.map(|(index, (layer, blob))| StoredLayer {
            diff_id: layer.expected.diff_id,
            data_size: blob.data_size,
            on_disk: used.contains(&index),
        });
        let facts = (source.created.clone(), source.config.clone());
        Ok(ImageRecord::new(
            self,
            source.digest,
            facts,
            metadata,
            layers.collect(),
        ))
    }

    fn write_metadata(
        &self,
        source: &Source,
        tree: &Tree<Content>,
        blobs: &[LayerBlob],
        uuid: [u8; 16],
    ) -> Result<(MetadataBlob, Vec<usize>), StoreError> {
        let file = self.temporary_file()?;
        let failed = |error| StoreError::Erofs {
            image: source.path().to_owned(),
            error,
        };
        let hashing = HashingWriter {
            file: file.as_file(),
            hash: Sha256::new(),
        };
        let mut output = BufWriter::with_capacity(1 << 20, hashing);
        let written = erofs::write_metadata(tree, blobs, uuid, &mut output).map_err(failed)?;
        let hashing = output
            .into_inner()
            .map_err(|error| failed(erofs::ErofsError::Write(error.into_error())))?;
        let digest = Digest::from_bytes(hashing.hash.finalize().into());
        let path = self
            .root
            .join("metadata")
            .join(format!("{}.erofs", digest.hex()));
        publish(file, &path).map_err(self.failed("written", &path))?;
        Ok((
            MetadataBlob {
                digest,
                size: written.size,
            },
            written.layers,
        ))
    }

    fn read_index(&self, path: &Path) -> Result<Index, StoreError> {
        let file = File::open(path).map_err(self.failed("read", path))?;
        Index::read(file).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => StoreError::Damaged {
                path: path.parent().unwrap_or(path).to_owned(),
                fault: error.to_string(),
            },
            _ => self.failed("read", path)(error),
        })
    }
}

fn layer_error(
    source: &Source,
    layer: &SourceLayer,
    index: usize,
    error: StreamError,
) -> StoreError {
    StoreError::Layer {
        number: index + 1,
        digest: layer.expected.blob.unwrap_or(layer.expected.diff_id),
        image: source.path().to_owned(),
        error: Box::new(error),
    }
}

/// Reports progress as the tar is read.
struct Reporting<'a> {
    tar: &'a mut dyn Read,
    read: &'a AtomicU64,
    progress: &'a mut dyn ImportProgress,
    /// Bytes read since the last report.
    since: u64,
}

impl Read for Reporting<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.tar.read(buffer)?;
        self.since += count as u64;
        if self.since >= REPORT_EVERY {
            self.since = 0;
            self.progress.read(self.read.load(Ordering::Relaxed));
        }
        Ok(count)
    }
}

struct HashingWriter<'a> {
    file: &'a File,
    hash: Sha256,
}

impl Write for HashingWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write_all(bytes)?;
        self.hash.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}
