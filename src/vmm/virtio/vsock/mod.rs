//! virtio-vsock (virtio 1.2, section 5.10): stream sockets between guest and host.
//!
//! ```text
//!  guest                        this device, on the worker                      host
//!  ─────                        ─────────────────────────                       ────
//!  connect(2, N)  ── REQUEST ─▶ muxer ─ HostPorts ─▶ a listener in this process, or <path>_N
//!  listen(N)      ◀─ REQUEST ── muxer ◀─ handshake ◀─ CONNECT N\n on <path>  (answered OK <port>\n)
//!  bytes ─── RW ──────────────▶ stream ─ sendmsg from guest memory ─▶ socket
//!  bytes ◀── RW ─────────────── stream ◀ recvmsg into guest memory ── socket
//! ```
//!
//! - [`packet`] parses headers, [`credit`] counts, [`connection`] is the protocol of one stream: pure.
//! - [`table`] holds the streams, [`stream`] joins one to its socket, [`muxer`] is the queue handler.
//! - [`host`] is where streams lead on the host; [`handshake`] is the dialect spoken on `<path>`; [`passing`] is how
//!   who accepted a stream leaves it to the device and somebody else.
//!
//! [`Vsock`] is the face and belongs to the transport; everything else runs on the worker's thread. All
//! sockets sit in one epoll of the device, which the worker polls as one descriptor. Nothing waits: not
//! for the guest, not for a client, not for a service.
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

pub mod connection;
pub mod credit;
pub mod handshake;
pub mod host;
pub mod muxer;
pub mod packet;
pub mod passing;
pub mod poll;
pub mod ring;
pub mod stream;
pub mod table;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::drain::Drain;
use super::{Activation, Active, HostError, VirtioDevice};
use host::{HostPorts, Listener, LocalPorts, UnixPorts};
use muxer::Muxer;
use poll::PollSet;

/// Index of the queue towards the guest (virtio 1.2, section 5.10.2).
pub const RX_QUEUE: u16 = 0;
/// Index of the queue from the guest.
pub const TX_QUEUE: u16 = 1;
/// Index of the queue of events.
pub const EVENT_QUEUE: u16 = 2;

/// Sizes of the queues. Linux fills the first with buffers of 4 KiB, so 128 cost the guest 512 KiB; it
/// posts eight event buffers.
const QUEUE_SIZES: [u16; 3] = [128, 128, 16];

/// `VIRTIO_VSOCK_F_STREAM` (virtio 1.2, section 5.10.3).
const VIRTIO_VSOCK_F_STREAM: u32 = 0;

/// The smallest context id of a guest; below are the hypervisor, the host and "local" (virtio 1.2,
/// section 5.10.4).
const FIRST_GUEST_CID: u32 = 3;

/// What bounds the device. The defaults are what a pod runs with; tests take smaller ones.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Streams at a time, those that only finish delivering included. Beyond, requests are refused.
    pub streams: usize,
    /// Streams that get [`Limits::large_buffer`]; the others, [`Limits::small_buffer`].
    pub large_streams: usize,
    /// Bytes that may wait for the host side of one of the first streams: four packets of the largest
    /// size that Linux sends.
    pub large_buffer: u32,
    /// The same for the streams after them, so that all of them together hold less than 80 MiB when
    /// nobody on the host reads.
    pub small_buffer: u32,
    /// Clients that have not sent their line yet. Beyond, new ones are dropped.
    pub clients: usize,
    /// How long a client may take for its line.
    pub line: Duration,
    /// How long the guest may take to accept or refuse a stream.
    pub dial: Duration,
    /// How long the guest may take to confirm the end of a stream: Linux gives its peers eight seconds.
    pub close: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            streams: 1024,
            large_streams: 64,
            large_buffer: 256 << 10,
            small_buffer: 64 << 10,
            clients: 64,
            line: Duration::from_secs(5),
            dial: Duration::from_secs(10),
            close: Duration::from_secs(8),
        }
    }
}

/// Why a vsock device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The context id is reserved.
    #[error("vsock context id {0} is reserved: take one from 3 to 4294967294")]
    Cid(u32),
    /// The socket's path leaves no room for `_<port>`.
    #[error(
        "the vsock socket path {} is too long: at most {most} bytes, so that _<port> fits behind it",
        path.display()
    )]
    PathTooLong {
        /// The path given.
        path: PathBuf,
        /// The longest possible, in bytes.
        most: usize,
    },
    /// Something is at the path that must not be removed.
    #[error("cannot listen at {}: {why}; remove it or take another path", path.display())]
    Taken {
        /// The path given.
        path: PathBuf,
        /// What is there.
        why: &'static str,
    },
    /// The operating system refused.
    #[error("cannot listen at {}: {source}", path.display())]
    Listen {
        /// The path given.
        path: PathBuf,
        /// Its answer.
        #[source]
        source: io::Error,
    },
}

/// The host's side of the device: who connects, and where the guest's connections go.
pub struct Host {
    /// The socket that clients connect to.
    pub listener: Listener,
    /// Who answers for host ports.
    pub ports: Box<dyn HostPorts>,
}

/// The face of a vsock device.
pub struct Vsock {
    cid: u32,
    limits: Limits,
    /// With the muxer while the device is active.
    host: Option<Host>,
    announce_reset: bool,
}

impl Vsock {
    /// A device for guest `cid`. Clients connect to the Unix socket `path`, which is made now and removed
    /// when the device is dropped; what the guest connects to on port N is `<path>_N`.
    ///
    /// # Errors
    /// A reserved context id, or no socket can be made at `path`.
    pub fn new(cid: u32, path: &Path) -> Result<Self, VsockError> {
        Self::with_ports(cid, path, Box::new(UnixPorts::new(path)))
    }

    /// As [`Vsock::new`], but a host port on which `local` has a listener leads there.
    ///
    /// # Errors
    /// As [`Vsock::new`].
    pub fn with_local(cid: u32, path: &Path, local: LocalPorts) -> Result<Self, VsockError> {
        let ports = LocalThenUnix {
            local,
            unix: UnixPorts::new(path),
        };
        Self::with_ports(cid, path, Box::new(ports))
    }

    /// As [`Vsock::new`], with `ports` answering for all host ports.
    ///
    /// # Errors
    /// As [`Vsock::new`].
    pub fn with_ports(
        cid: u32,
        path: &Path,
        ports: Box<dyn HostPorts>,
    ) -> Result<Self, VsockError> {
        if !(FIRST_GUEST_CID..u32::MAX).contains(&cid) {
            return Err(VsockError::Cid(cid));
        }
        let listener = Listener::bind(path)?;
        Ok(Self {
            cid,
            limits: Limits::default(),
            host: Some(Host { listener, ports }),
            announce_reset: false,
        })
    }

    /// Replaces the limits; before activation.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// The next activation tells the driver that all its connections are gone
    /// (`VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`): for a guest restored from a snapshot.
    pub fn announce_transport_reset(&mut self) {
        self.announce_reset = true;
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn name(&self) -> String {
        "virtio-vsock".to_owned()
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_VSOCK_F_STREAM
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// `struct virtio_vsock_config`: the guest's context id, 64 bits (virtio 1.2, section 5.10.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = u64::from(self.cid).to_le_bytes();
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let rest = config.get(from..).unwrap_or_default();
        data.fill(0);
        for (to, from) in data.iter_mut().zip(rest) {
            *to = *from;
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<Box<dyn Active>, HostError> {
        let name = self.name();
        let failed = |source| HostError {
            device: name,
            action: "set up its poll set",
            source,
        };
        let Some(host) = self.host.take() else {
            return Err(failed(io::Error::other("the device is active already")));
        };
        let poll = match PollSet::new(&host.listener) {
            Ok(poll) => poll,
            Err(error) => {
                self.host = Some(host);
                return Err(failed(error));
            }
        };
        let mut muxer = Muxer::new(self.cid, self.limits.clone(), host, poll);
        if std::mem::take(&mut self.announce_reset) {
            muxer.announce_transport_reset();
        }
        Ok(Box::new(Drain::new(activation, muxer)))
    }

    fn reset(&mut self, stopped: Box<dyn Active>) {
        // The transport gives back what `activate` returned. The streams end here.
        if let Some(muxer) = Drain::<Muxer>::into_handler(stopped) {
            self.host = Some(muxer.into_host());
        }
    }
}

/// Listeners of this process first, then Unix sockets.
struct LocalThenUnix {
    local: LocalPorts,
    unix: UnixPorts,
}

impl HostPorts for LocalThenUnix {
    fn connect(&mut self, port: u32) -> io::Result<std::os::unix::net::UnixStream> {
        if self.local.has(port) {
            return self.local.connect(port);
        }
        self.unix.connect(port)
    }
}
