//! virtio-blk (virtio 1.2, section 5.2).
//!
//! - [`Blk`] is the face; vCPU threads read its config space.
//! - [`BlkHandler`] runs on the worker: it parses a request once ([`request`]), gives its transfer to the
//!   [`Backend`], and writes the status byte when the backend is done, now or later.
//! - [`Backend`] is where the bytes are: [`Disk`] for local files. One that completes later (io_uring, a
//!   remote) returns nothing from [`Backend::submit`] and reports through [`Backend::ready`].
//!
//! ```text
//!   chain ─▶ Request::parse ─▶ refused ───────────────▶ status byte ─▶ used
//!                         └──▶ Backend::submit ─ done ─────▲
//!                                   └─ in flight ─ ready ──┘
//! ```
#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::arithmetic_side_effects
    )
)]

mod disk;
mod handler;
mod request;

use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::chain::Segments;
use super::drain::Drain;
use super::{Activation, Active, HostError, Interest, VirtioDevice};
use crate::vmm::memory::GuestMemory;

pub use disk::{Disk, DiskError, PartFile};
pub use handler::BlkHandler;

/// Bytes of a sector, the unit of every address in virtio-blk whatever the disk's own block size is.
pub const SECTOR: u64 = 512;

/// Bytes of the serial that GET_ID returns.
pub const SERIAL: usize = 20;

/// Entries of each request queue. Linux allocates a request for each, of about a KiB, at once.
const QUEUE_SIZE: u16 = 128;

/// Data segments of one request: the queue's entries less the header's and the status byte's.
const MAX_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;

/// Sectors of one DISCARD range: 1 GiB, a hole punched in one call.
const MAX_DISCARD: u32 = 1 << 21;

/// Ranges of one DISCARD request.
const MAX_DISCARD_RANGES: u32 = 16;

/// Sectors of a WRITE_ZEROES request, which has one range: 16 MiB, because a file system that cannot zero a
/// range has it written.
const MAX_WRITE_ZEROES: u32 = 1 << 15;

/// Bytes of the config space, up to and with the fields of WRITE_ZEROES (virtio 1.2, section 5.2.4).
const CONFIG_LEN: usize = 60;

/// Which request a completion belongs to; chosen by the handler, opaque to the backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag {
    /// The queue it came from.
    pub queue: u16,
    /// The head of its chain.
    pub head: u16,
}

/// Bytes in guest memory that a transfer reads or fills.
#[derive(Clone, Copy)]
pub struct Data<'a> {
    /// Guest memory; a backend that completes later keeps a clone of its own.
    pub memory: &'a GuestMemory,
    /// The side of the chain that has the data.
    pub segments: &'a Segments,
    /// Where in `segments` the data begins.
    pub offset: u32,
    /// How many bytes.
    pub len: u32,
}

/// A range of the disk in bytes, inside the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub at: u64,
    /// Length.
    pub len: u64,
}

/// What a backend is asked to do. Every range has been checked against [`Backend::len`], and nothing that
/// changes the disk is asked of a read-only one.
pub enum Op<'a> {
    /// Fills guest memory from byte `at` of the disk on.
    Read {
        /// First byte on the disk.
        at: u64,
        /// Where the bytes go.
        data: Data<'a>,
    },
    /// Writes guest memory to byte `at` of the disk on.
    Write {
        /// First byte on the disk.
        at: u64,
        /// Where the bytes come from.
        data: Data<'a>,
        /// They must be on stable storage before it completes: the driver cannot flush.
        durable: bool,
    },
    /// Puts everything that was written before on stable storage.
    Flush,
    /// The ranges are not needed any more.
    Discard(&'a [Extent]),
    /// The range reads as zeroes from now on; `unmap`: it may lose its space.
    WriteZeroes {
        /// The range.
        extent: Extent,
        /// Whether the space may be given back.
        unmap: bool,
    },
}

/// Where a disk's bytes are. Runs on the worker.
pub trait Backend: Send + 'static {
    /// The disk's size in bytes, a multiple of [`SECTOR`]; constant.
    fn len(&self) -> u64;

    /// Whether the disk has no sector at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether [`Op::Write`], [`Op::Discard`] and [`Op::WriteZeroes`] are refused.
    fn is_read_only(&self) -> bool;

    /// Starts an operation. Returns its result, or nothing when `tag` completes later.
    fn submit(&mut self, tag: Tag, op: Op<'_>) -> Option<io::Result<()>>;

    /// Descriptors that announce completions.
    fn interests(&self) -> Vec<Interest> {
        Vec::new()
    }

    /// One of them is ready: adds what has completed to `done`.
    fn ready(&mut self, _token: u32, _done: &mut Vec<(Tag, io::Result<()>)>) {}

    /// Finishes or cancels everything in flight; after it nothing touches guest memory.
    fn quiesce(&mut self, _done: &mut Vec<(Tag, io::Result<()>)>) {}
}

/// The face of a disk.
pub struct Blk<B: Backend> {
    serial: String,
    read_only: bool,
    config: [u8; CONFIG_LEN],
    queue_sizes: Vec<u16>,
    /// None while the worker has it.
    backend: Option<B>,
}

impl Blk<Disk> {
    /// A device of one request queue for `disk`.
    pub fn new(disk: Disk) -> Self {
        let serial = disk.serial().to_owned();
        Self::with_backend(serial, disk, 1)
    }
}

impl<B: Backend> Blk<B> {
    /// A device of `queues` request queues (0 counts as 1) for any backend. `serial` is cut to
    /// [`SERIAL`] bytes.
    pub fn with_backend(serial: String, backend: B, queues: u16) -> Self {
        let queues = queues.max(1);
        Self {
            serial,
            read_only: backend.is_read_only(),
            config: config_space(&backend, queues),
            queue_sizes: vec![QUEUE_SIZE; queues.into()],
            backend: Some(backend),
        }
    }
}

impl<B: Backend> VirtioDevice for Blk<B> {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn name(&self) -> String {
        format!("virtio-blk {}", self.serial)
    }

    fn features(&self) -> u64 {
        let common = 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_FLUSH;
        let queues = if self.queue_sizes.len() > 1 {
            1 << VIRTIO_BLK_F_MQ
        } else {
            0
        };
        let access = if self.read_only {
            1 << VIRTIO_BLK_F_RO
        } else {
            1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        };
        common | queues | access
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn required_queues(&self) -> usize {
        1
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let source = self.config.get(from..).unwrap_or_default();
        for (to, byte) in data.iter_mut().zip(source) {
            *to = *byte;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<Box<dyn Active>, HostError> {
        let backend = self.backend.take().ok_or_else(|| HostError {
            device: self.name(),
            action: "start again: its backend was lost with its worker",
            source: io::ErrorKind::NotFound.into(),
        })?;
        let features = activation.features;
        let handler = BlkHandler::new(backend, &self.serial, features);
        Ok(Box::new(Drain::new(activation, handler)))
    }

    fn reset(&mut self, stopped: Box<dyn Active>) {
        self.backend = Drain::into_handler(stopped).map(BlkHandler::into_backend);
    }
}

/// The config space (virtio 1.2, section 5.2.4).
fn config_space(backend: &impl Backend, queues: u16) -> [u8; CONFIG_LEN] {
    let fields: [(usize, &[u8]); 8] = [
        // capacity, in sectors
        (0, &(backend.len() / SECTOR).to_le_bytes()),
        // seg_max
        (12, &MAX_SEGMENTS.to_le_bytes()),
        // num_queues
        (34, &queues.to_le_bytes()),
        // max_discard_sectors, max_discard_seg
        (36, &MAX_DISCARD.to_le_bytes()),
        (40, &MAX_DISCARD_RANGES.to_le_bytes()),
        // discard_sector_alignment: a hole has the file system's granularity
        (44, &8u32.to_le_bytes()),
        // max_write_zeroes_sectors, max_write_zeroes_seg; write_zeroes_may_unmap is the byte after
        (48, &MAX_WRITE_ZEROES.to_le_bytes()),
        (52, &[1, 0, 0, 0, 1]),
    ];
    let mut config = [0; CONFIG_LEN];
    for (at, bytes) in fields {
        for (to, byte) in config.iter_mut().skip(at).zip(bytes) {
            *to = *byte;
        }
    }
    config
}
