//! virtio-net (virtio 1.2, section 5.1): an Ethernet interface of the guest on a tap of the host.
//!
//! ```text
//!  guest                       this device, on the worker                    host
//!  ─────                       ─────────────────────────                     ────
//!  frame ── transmitq ──▶ transmit: header and source checked ── writev ──▶ tap
//!  frame ◀── receiveq ─── receive: filter, length        ◀────── readv ──── tap
//!  MAC, VLANs, pairs ── controlq ──▶ control ─▶ filter, queues of the tap
//! ```
//!
//! - [`header`], [`control`], [`filter`], [`limiter`] decide: pure.
//! - [`receive`] and [`transmit`] move frames of one queue pair; [`handler`] is the queue handler over them.
//! - [`tap`] is the host's side.
//! - [`vhost`] is another device with the same driver: its frames pass between guest and a vhost-user backend.
//!
//! Checksums and segmentation are left to whoever needs them, in both directions, as far as driver and host
//! agree: between two guests on one host a TCP stream passes in frames of up to 64 KiB that nobody ever
//! segments or sums. The face belongs to the transport; everything else runs on the worker's thread.
#![deny(unsafe_code)]
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

pub mod control;
pub mod counters;
pub mod filter;
pub mod handler;
pub mod header;
pub mod limiter;
pub mod receive;
pub mod tap;
pub mod transmit;
pub mod vhost;

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use cube_guest::network::MacAddress;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VLAN,
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::drain::Drain;
use super::{Activation, Active, HostError, Interrupt, VirtioDevice};
use crate::vmm::memory::GuestMemory;
use crate::vmm::spec::RateLimit;
use counters::{NetCounters, NetCountersSnapshot};
use handler::NetHandler;
use tap::Link;

/// The most queue pairs of a device.
pub const MAX_PAIRS: usize = 8;

/// Entries of each queue: with buffers of 1.5 KiB, several times the longest frame.
const QUEUE_SIZE: u16 = 256;

/// Bytes of the config space, up to and with `mtu` (section 5.1.4).
const CONFIG_LEN: usize = 12;

/// Who the guest is on this network.
#[derive(Debug, Clone)]
pub struct Identity {
    /// What the interface is called in messages, such as `eth0`.
    pub name: String,
    /// Its address.
    pub mac: MacAddress,
    /// Its MTU in bytes, at least 68.
    pub mtu: u16,
    /// Whether frames with another source address are dropped.
    pub check_source: bool,
}

impl Identity {
    fn device(&self) -> String {
        format!("virtio-net {}", self.name)
    }

    /// `struct virtio_net_config`: mac, status, max_virtqueue_pairs, mtu.
    fn config(&self, link_up: bool, pairs: usize) -> [u8; CONFIG_LEN] {
        let [m0, m1, m2, m3, m4, m5] = self.mac.0;
        let [s0, s1] = link_status(link_up);
        let [p0, p1] = u16::try_from(pairs).unwrap_or(u16::MAX).to_le_bytes();
        let [u0, u1] = self.mtu.to_le_bytes();
        [m0, m1, m2, m3, m4, m5, s0, s1, p0, p1, u0, u1]
    }

    fn error(&self, action: &'static str, source: io::Error) -> HostError {
        HostError {
            device: self.device(),
            action,
            source,
        }
    }
}

/// Where `struct virtio_net_config` has its status.
const STATUS: u64 = 6;

/// The status of a link.
fn link_status(up: bool) -> [u8; 2] {
    let status = if up { VIRTIO_NET_S_LINK_UP } else { 0 };
    let [low, high, ..] = status.to_le_bytes();
    [low, high]
}

/// What can be changed while the device runs.
#[derive(Debug, Clone, Copy)]
struct Settings {
    link_up: bool,
    /// Towards the guest.
    receive: RateLimit,
    /// From the guest.
    transmit: RateLimit,
}

/// What the face, the worker and whoever controls the device have in common.
pub struct Shared {
    counters: NetCounters,
    settings: Mutex<Settings>,
    /// Signalled when the settings changed.
    changed: EventFd,
}

impl Shared {
    fn settings(&self) -> Settings {
        *self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Controls a device while it runs, from any thread.
#[derive(Clone)]
pub struct NetControl(Arc<Shared>);

impl NetControl {
    /// Shows the guest a link that is up or down.
    pub fn set_link(&self, up: bool) {
        self.change(|settings| settings.link_up = up);
    }

    /// Replaces the limits, towards the guest and from it; the buckets are full.
    pub fn set_limits(&self, receive: RateLimit, transmit: RateLimit) {
        self.change(|settings| {
            settings.receive = receive;
            settings.transmit = transmit;
        });
    }

    /// What has passed and what was dropped.
    pub fn counters(&self) -> NetCountersSnapshot {
        self.0.counters.snapshot()
    }

    fn change(&self, change: impl FnOnce(&mut Settings)) {
        let settings = self.0.settings.lock();
        change(&mut settings.unwrap_or_else(PoisonError::into_inner));
        // Fails only when the counter is full, and then it is signalled already.
        let _ = self.0.changed.write(1);
    }
}

/// The face of a network device.
pub struct Net<L> {
    identity: Identity,
    shared: Arc<Shared>,
    features: u64,
    queue_sizes: Vec<u16>,
    /// None while the worker has it.
    link: Option<L>,
}

impl<L: Link> Net<L> {
    /// A device on `link`, with as many queue pairs as that has queues, and the limits towards the guest and
    /// from it.
    ///
    /// # Errors
    /// No eventfd can be had.
    pub fn new(
        identity: Identity,
        link: L,
        (receive, transmit): (RateLimit, RateLimit),
    ) -> io::Result<Self> {
        let pairs = link.queues().len().clamp(1, MAX_PAIRS);
        let shared = Shared {
            counters: NetCounters::default(),
            settings: Mutex::new(Settings {
                link_up: true,
                receive,
                transmit,
            }),
            changed: EventFd::new(EFD_NONBLOCK)?,
        };
        Ok(Self {
            identity,
            shared: Arc::new(shared),
            features: features(&link, pairs),
            queue_sizes: vec![QUEUE_SIZE; pairs.saturating_mul(2).saturating_add(1)],
            link: Some(link),
        })
    }

    /// The way to change and watch the device while it runs.
    pub fn control(&self) -> NetControl {
        NetControl(self.shared.clone())
    }

    /// The handler of the queues under the negotiated features; the device has it until it comes back.
    ///
    /// # Errors
    /// The link does not do what it should, or is with another handler.
    pub fn handler(
        &mut self,
        features: u64,
        memory: &GuestMemory,
        interrupt: Interrupt,
    ) -> Result<NetHandler<L>, HostError> {
        let Some(link) = self.link.take() else {
            let lost = io::ErrorKind::NotFound.into();
            let action = "start again: its tap was lost with its worker";
            return Err(self.identity.error(action, lost));
        };
        let (shared, identity) = (self.shared.clone(), self.identity.clone());
        let handler = NetHandler::new(link, shared, identity, (features, memory, interrupt));
        handler.map_err(|(link, error)| {
            self.link = Some(link);
            self.identity.error("set up its tap", error)
        })
    }
}

/// Everything that the device does, and what the link can leave undone.
fn features(link: &impl Link, pairs: usize) -> u64 {
    const ALWAYS: [u32; 15] = [
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_NET_F_MAC,
        VIRTIO_NET_F_MTU,
        VIRTIO_NET_F_STATUS,
        VIRTIO_NET_F_MRG_RXBUF,
        VIRTIO_NET_F_CTRL_VQ,
        VIRTIO_NET_F_CTRL_RX,
        VIRTIO_NET_F_CTRL_VLAN,
        VIRTIO_NET_F_CTRL_MAC_ADDR,
        // A frame from the guest goes to the host's kernel with the work still to be done. It takes all of
        // these from whoever writes to a tap.
        VIRTIO_NET_F_CSUM,
        VIRTIO_NET_F_HOST_TSO4,
        VIRTIO_NET_F_HOST_TSO6,
        VIRTIO_NET_F_HOST_ECN,
        VIRTIO_NET_F_HOST_UFO,
    ];
    let offloads = link.offloads();
    let mut features = offloads.features();
    for bit in ALWAYS {
        features |= 1 << bit;
    }
    // A kernel that gives USO frames also takes them (both since Linux 6.2).
    if offloads.has_uso() {
        features |= 1 << VIRTIO_NET_F_HOST_USO;
    }
    if pairs > 1 {
        features |= 1 << VIRTIO_NET_F_MQ;
    }
    features
}

/// Copies what lies at `offset` of the config space.
fn read_config(config: &[u8; CONFIG_LEN], offset: u64, data: &mut [u8]) {
    let from = usize::try_from(offset).unwrap_or(usize::MAX);
    let source = config.get(from..).unwrap_or_default();
    for (to, byte) in data.iter_mut().zip(source) {
        *to = *byte;
    }
}

impl<L: Link> VirtioDevice for Net<L> {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn name(&self) -> String {
        self.identity.device()
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn required_queues(&self) -> usize {
        2
    }

    fn interrupts_often(&self) -> bool {
        true
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let link_up = self.shared.settings().link_up;
        let pairs = self.queue_sizes.len() / 2;
        read_config(&self.identity.config(link_up, pairs), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<Box<dyn Active>, HostError> {
        let handler = self.handler(
            activation.features,
            &activation.memory,
            activation.interrupt.clone(),
        )?;
        Ok(Box::new(Drain::new(activation, handler)))
    }

    fn reset(&mut self, stopped: Box<dyn Active>) {
        self.link = Drain::into_handler(stopped).map(NetHandler::<L>::into_link);
    }
}
