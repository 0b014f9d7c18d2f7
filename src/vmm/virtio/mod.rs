//! The device model in four words.
//!
//! - [`VirtioDevice`] is the face: id, features, config space. vCPU threads touch it through the
//!   transport (`mmio`), under the transport's lock.
//! - [`Activation`] is everything a device needs to run, moved in once when the driver sets DRIVER_OK.
//! - [`Active`] is the worker half, owned by exactly one thread. In no loop, it is paused. On reset it is
//!   consumed and gives back its queues and whatever the face needs to be activated again.
//! - [`drain::QueueHandler`] is what a device's author writes: one call per descriptor chain; no
//!   epoll, no thread, no transport in sight. [`drain::Drain`] is the one [`Active`] over it.
//!
//! ```text
//!             DRIVER_OK                      worker.adopt
//! VirtioDevice ───────▶ activate(Activation) ───────────▶ Active (on the worker)
//!      ▲                                                      │ worker.release: quiesce
//!      └──────────────── reset(Box<dyn Active>) ◀─────────────┘
//! ```
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

pub mod blk;
pub mod chain;
pub mod counters;
pub mod deadlines;
pub mod drain;
pub mod iovec;
pub mod mmio;
pub mod net;
pub mod rng;
pub mod vhost_user;
pub mod vsock;

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use crate::vmm::memory::GuestMemory;

use mmio::{INTERRUPT_STATUS, STATUS, Window, status};

pub use counters::Counters;

/// The face of a device: what the transport shows to the driver.
pub trait VirtioDevice: Send {
    /// Virtio device id (virtio 1.2, section 5).
    fn device_type(&self) -> u32;

    /// What the host's log calls the device, such as `virtio-blk image0`.
    fn name(&self) -> String;

    /// Feature bits offered to the driver, transport bits (VERSION_1, EVENT_IDX) included.
    fn features(&self) -> u64;

    /// The largest size of each queue, a power of two; the length is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// How many queues, from the first, the driver must enable; a driver that sets DRIVER_OK with
    /// fewer gets NEEDS_RESET, and the device is not activated.
    fn required_queues(&self) -> usize {
        self.queue_sizes().len()
    }

    /// Kicks of its own, one a queue, which are signalled instead of [`Activation::kick`]: for a device whose
    /// queues are served by another process. Non-blocking. Each costs the machine's start a grace period.
    fn kicks(&self) -> &[EventFd] {
        &[]
    }

    /// Whether the driver is interrupted so often that its acknowledgements are KVM's to take: nobody then keeps
    /// account of used buffers in InterruptStatus. Costs the machine's start a grace period.
    fn interrupts_often(&self) -> bool {
        false
    }

    /// Reads the device's config space; bytes beyond its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the device's config space. Most devices have nothing writable.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Starts the device: consumes the activation, returns the worker half.
    ///
    /// # Errors
    /// A host-side failure; the transport answers the driver with NEEDS_RESET.
    fn activate(&mut self, activation: Activation) -> Result<Box<dyn Active>, HostError>;

    /// Takes the stopped worker half back after the driver reset the device, so that it can be
    /// activated again.
    fn reset(&mut self, stopped: Box<dyn Active>);
}

/// Everything a device gets when the driver is ready. Moved in once.
pub struct Activation {
    /// Guest memory.
    pub memory: GuestMemory,
    /// Features that driver and device agreed on.
    pub features: u64,
    /// The queues that the driver enabled, in index order; validated against guest memory.
    pub queues: Vec<ActiveQueue>,
    /// Signalled (by KVM through an ioeventfd) when the driver notifies any queue of the device. One
    /// for all queues: each ioeventfd costs a grace period when the machine starts, and looking at a
    /// queue that has nothing costs one load. Non-blocking.
    pub kick: EventFd,
    /// The way to interrupt the driver.
    pub interrupt: Interrupt,
    /// What the device has done, read by other threads.
    pub counters: Arc<Counters>,
}

/// One enabled virtqueue.
pub struct ActiveQueue {
    /// Index of the queue in the device.
    pub index: u16,
    /// The split ring.
    pub queue: Queue,
}

/// Interrupts the driver (call): an irqfd, and the registers that say why.
#[derive(Clone)]
pub struct Interrupt {
    irqfd: Arc<EventFd>,
    window: Window,
    /// Bits of InterruptStatus that are always set, whatever the driver acknowledges.
    constant: Arc<AtomicU32>,
}

/// InterruptStatus bit 0: used buffers (virtio 1.2, section 4.2.2).
pub const INTERRUPT_USED_BUFFER: u32 = 1;
/// InterruptStatus bit 1: configuration change (virtio 1.2, section 4.2.2).
pub const INTERRUPT_CONFIG_CHANGE: u32 = 2;

impl Interrupt {
    /// `irqfd` raises the line; the registers are those of `window`.
    pub fn new(irqfd: Arc<EventFd>, window: Window) -> Self {
        Self {
            irqfd,
            window,
            constant: Arc::default(),
        }
    }

    /// Tells the driver that used buffers are waiting.
    pub fn used_buffer(&self) {
        self.raise(INTERRUPT_USED_BUFFER);
    }

    /// Puts `bytes` at `offset` of the config space, and tells the driver. The device's own
    /// [`VirtioDevice::read_config`] says the same by now.
    pub fn config_change(&self, offset: u64, bytes: &[u8]) {
        self.window.set_config(offset, bytes);
        self.raise(INTERRUPT_CONFIG_CHANGE);
    }

    /// Shows DEVICE_NEEDS_RESET and tells the driver: the answer to a broken ring.
    pub fn needs_reset(&self) {
        self.window
            .register(STATUS)
            .fetch_or(status::NEEDS_RESET, Ordering::AcqRel);
        self.raise(INTERRUPT_CONFIG_CHANGE);
    }

    /// The eventfd that raises the line, for another process that uses buffers (call); only where used buffers
    /// are not tracked, since that process cannot say so in the InterruptStatus register.
    pub fn lend(&self) -> &EventFd {
        &self.irqfd
    }

    /// From now on InterruptStatus tells the driver with every interrupt that buffers may be waiting: looking for
    /// nothing costs it a load, and an acknowledgement of used buffers then means nothing, whoever takes it.
    pub fn track_used_buffers(&self, track: bool) {
        let constant = if track { 0 } else { INTERRUPT_USED_BUFFER };
        self.constant.store(constant, Ordering::Release);
    }

    /// Clears the bits that the driver wrote to InterruptACK.
    pub fn acknowledge(&self, bits: u32) {
        let cleared = bits & !self.constant.load(Ordering::Acquire);
        self.window
            .register(INTERRUPT_STATUS)
            .fetch_and(!cleared, Ordering::AcqRel);
    }

    /// Whether the device gave up on its driver.
    pub fn is_broken(&self) -> bool {
        let status = self.window.register(STATUS).load(Ordering::Acquire);
        status & status::NEEDS_RESET != 0
    }

    /// Back to the state after a reset: nothing pending, not broken.
    pub fn clear(&self) {
        let constant = self.constant.load(Ordering::Acquire);
        let pending = self.window.register(INTERRUPT_STATUS);
        pending.store(constant, Ordering::Release);
        self.window.register(STATUS).store(0, Ordering::Release);
    }

    fn raise(&self, bit: u32) {
        let pending = self.window.register(INTERRUPT_STATUS);
        pending.fetch_or(bit, Ordering::AcqRel);
        // An eventfd write fails only when its counter is full, and then the line is raised already.
        let _ = self.irqfd.write(1);
    }
}

/// The token that [`Active::ready`] gets when no descriptor is ready: once after adoption, and after
/// each turn that asked for [`Turn::again`].
pub const RESUME: u32 = u32::MAX;

/// The worker half of a device: owned by exactly one thread, polled by its loop.
pub trait Active: Send + std::any::Any {
    /// Descriptors to poll, with the token that [`Active::ready`] is called with. Read at adoption
    /// and again after every `ready` that returns [`Turn::rearm`]. Each descriptor at most once. A
    /// device with many descriptors keeps them in an epoll of its own and returns that one.
    fn interests(&self) -> Vec<Interest>;

    /// Does the work that a ready descriptor (or [`RESUME`]) asks for; bounded, so that devices on one
    /// worker share it.
    ///
    /// # Errors
    /// Only a failure of the host. Whatever the guest did wrong is handled inside (status byte,
    /// NEEDS_RESET, a counter). A device that returns an error has shown NEEDS_RESET; the worker
    /// reports the error and polls the device no more, but keeps it until it is released.
    fn ready(&mut self, token: u32) -> Result<Turn, HostError>;

    /// Called on the worker's thread before the device is released: finishes or cancels what is in
    /// flight. After it nothing touches guest memory on the device's behalf.
    fn quiesce(&mut self) {}
}

/// One descriptor that an active device wants polled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interest {
    /// The descriptor, owned by the device.
    pub fd: RawFd,
    /// Given back to [`Active::ready`]. Unique within the device; not [`RESUME`].
    pub token: u32,
    /// Wake up when readable.
    pub readable: bool,
    /// Wake up when writable.
    pub writable: bool,
    /// Wake up when it becomes ready, and not again while it stays so: for a device that remembers.
    pub edge_triggered: bool,
}

/// What the worker does after a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Turn {
    /// The set of descriptors changed: ask [`Active::interests`] again.
    pub rearm: bool,
    /// There is more to do and no descriptor says so: call `ready(RESUME)` after the other devices
    /// had their turn.
    pub again: bool,
}

/// What the guest did wrong. It costs the guest its request or its device, never the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GuestFault {
    /// A ring or a descriptor points outside guest memory.
    #[error("a ring or descriptor points outside guest memory")]
    Address,
    /// A chain is cyclic, over-long, or its descriptors are in the wrong order or direction.
    #[error("a descriptor chain is malformed")]
    Chain,
    /// The available ring claims more entries than the queue holds, or the same head twice.
    #[error("the available ring is inconsistent")]
    Ring,
    /// The device-specific request is malformed.
    #[error("a request is malformed")]
    Request,
}

/// What failed on the host. Only this can end the pod.
#[derive(Debug, thiserror::Error)]
#[error("{device}: {action}: {source}")]
pub struct HostError {
    /// The device, as its author calls it, such as `virtio-blk image0`.
    pub device: String,
    /// What was being done, as a verb phrase such as `read the backing file`.
    pub action: &'static str,
    /// The operating system's answer.
    #[source]
    pub source: std::io::Error,
}
