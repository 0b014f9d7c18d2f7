//! Reads a layer on two threads: one reads, hashes and decompresses the blob, the other (the caller's)
//! hashes the tar and takes it apart.
//!
//! ```text
//! blob ─▶ SHA-256 ─▶ gzip │ zstd │ nothing ─▶ buffers (bounded channel) ─▶ SHA-256 ─▶ the caller
//! └──────────── thread of its own ────────────┘                            (diff id)
//! ```
//!
//! A digest that is wrong explains every other fault of a layer, so it is what is reported.
#![forbid(unsafe_code)]

use std::io::{self, BufRead, BufReader, Read};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use super::LayerError;
use crate::image::digest::{Digest, HashingReader};
use crate::image::tar::TarError;

/// Size of the buffers between the threads, and their number.
const BUFFER: usize = 256 << 10;
const BUFFERS: usize = 8;
/// Memory that a zstd frame may ask the decompressor to keep, as a power of two: 128 MiB, what the
/// zstd tool accepts.
const ZSTD_WINDOW_LOG: u32 = 27;

/// What a layer's blob is expected to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// Digest of the blob as it is; `None` if the source does not give it.
    pub blob: Option<Digest>,
    /// Size of the blob in bytes; `None` if the source does not give it.
    pub size: Option<u64>,
    /// Digest of the tar in it.
    pub diff_id: Digest,
}

/// Why a layer could not be read. The texts continue a sentence that names the layer.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The blob is not what the manifest says.
    #[error("does not have the digest that the manifest gives: it has {found}")]
    Blob {
        /// The digest it has.
        found: Digest,
    },
    /// The blob is shorter or longer than the manifest says.
    #[error("is {found} bytes long, and the manifest says {expected}")]
    Size {
        /// Bytes that the blob has.
        found: u64,
        /// Bytes that the manifest gives.
        expected: u64,
    },
    /// The tar in the blob is not what the configuration says.
    #[error("does not have the diff id {expected} that the configuration gives: it has {found}")]
    DiffId {
        /// The digest it has.
        found: Digest,
        /// The digest in the configuration.
        expected: Digest,
    },
    /// The blob could not be read or decompressed.
    #[error("cannot be read: {0}")]
    Read(io::Error),
    /// The layer's content is bad.
    #[error(transparent)]
    Layer(#[from] LayerError),
}

/// Runs `consume` on the tar in `blob`, verifying both digests. `read` counts the blob's bytes.
///
/// # Errors
/// [`StreamError`]. What `consume` did must then be discarded.
pub fn read_layer<T>(
    blob: impl Read + Send,
    expected: &Expected,
    read: &AtomicU64,
    consume: impl FnOnce(&mut dyn Read) -> Result<T, LayerError>,
) -> Result<T, StreamError> {
    let (sender, receiver) = sync_channel(BUFFERS);
    std::thread::scope(|scope| {
        let producer = scope.spawn(move || produce(blob, expected, read, &sender));
        let mut tar = HashingReader::new(Buffers {
            receiver,
            current: Vec::new(),
            used: 0,
        });
        let result = consume(&mut tar);
        // An error ends the producer too: its next buffer finds the channel closed.
        let result = match result {
            Ok(value) => tar
                .finish()
                .map(|(diff_id, _)| (value, diff_id))
                .map_err(StreamError::Read),
            Err(error) => {
                drop(tar);
                Err(StreamError::Layer(error))
            }
        };
        let produced = producer
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        match (produced, result) {
            (Err(error @ (StreamError::Blob { .. } | StreamError::Size { .. })), _) => Err(error),
            // The reader only saw that its input ended.
            (
                Err(error),
                Err(
                    StreamError::Read(_)
                    | StreamError::Layer(LayerError::Tar(
                        TarError::Io(_) | TarError::Truncated { .. },
                    )),
                ),
            ) => Err(error),
            (_, Err(error)) | (Err(error), Ok(_)) => Err(error),
            (Ok(()), Ok((_, found))) if found != expected.diff_id => Err(StreamError::DiffId {
                found,
                expected: expected.diff_id,
            }),
            (Ok(()), Ok((value, _))) => Ok(value),
        }
    })
}

/// Decompresses the blob into buffers, then checks the blob's digest. A receiver that is gone only ends
/// the decompression: the digest is checked all the same.
fn produce(
    blob: impl Read,
    expected: &Expected,
    read: &AtomicU64,
    sender: &SyncSender<io::Result<Vec<u8>>>,
) -> Result<(), StreamError> {
    let mut hashing = HashingReader::new(Counting { blob, read });
    let result = decompress(&mut BufReader::with_capacity(BUFFER, &mut hashing), sender);
    let (found, size) = hashing.finish().map_err(StreamError::Read)?;
    if let Some(expected) = expected.size
        && size != expected
    {
        return Err(StreamError::Size {
            found: size,
            expected,
        });
    }
    if expected.blob.is_some_and(|blob| blob != found) {
        return Err(StreamError::Blob { found });
    }
    result.map_err(StreamError::Read)
}

/// Sends the decompressed bytes. The sender outlives this, so a reader must be told of an error: an
/// end of the channel alone would look like an end of the tar.
fn decompress(
    input: &mut impl BufRead,
    sender: &SyncSender<io::Result<Vec<u8>>>,
) -> io::Result<()> {
    let result = match input.fill_buf()? {
        [0x1f, 0x8b, ..] => copy(flate2::bufread::MultiGzDecoder::new(input), sender),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(input)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG)?;
            copy(decoder, sender)
        }
        _ => copy(input, sender),
    };
    if let Err(error) = &result {
        let copy = io::Error::new(error.kind(), error.to_string());
        let _gone = sender.send(Err(copy));
    }
    result
}

fn copy(mut input: impl Read, sender: &SyncSender<io::Result<Vec<u8>>>) -> io::Result<()> {
    loop {
        let mut buffer = Vec::with_capacity(BUFFER);
        input
            .by_ref()
            .take(BUFFER as u64)
            .read_to_end(&mut buffer)?;
        if buffer.is_empty() || sender.send(Ok(buffer)).is_err() {
            return Ok(());
        }
    }
}

struct Counting<'a, R> {
    blob: R,
    read: &'a AtomicU64,
}

impl<R: Read> Read for Counting<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.blob.read(buffer)?;
        self.read.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

/// The receiving end as a reader.
struct Buffers {
    receiver: Receiver<io::Result<Vec<u8>>>,
    current: Vec<u8>,
    used: usize,
}

impl Read for Buffers {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.used == self.current.len() {
            match self.receiver.recv() {
                Ok(next) => (self.current, self.used) = (next?, 0),
                // The producer is done.
                Err(_) => return Ok(0),
            }
        }
        let rest = &self.current[self.used..];
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        self.used += count;
        Ok(count)
    }
}
