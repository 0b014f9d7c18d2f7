//! virtio-mmio, version 2 (virtio 1.2, section 4.2): one slot, with or without a device in it.
//!
//! vCPU threads reach a slot through [`BusDevice`]. Its state is behind one lock, which is held while the
//! worker adopts or releases the device, never while anybody waits for the guest; the worker itself takes
//! no transport's lock, so a vCPU in the middle of a reset and the worker cannot wait for each other. The
//! registers of the hot path (QueueNotify, InterruptACK of used buffers) take no lock. What the driver reads is in
//! the slot's [`Window`] ([`window`] says why), which each of its writes brings up to date.
//!
//! ```text
//!   empty ──attach──▶ RESET ─ACKNOWLEDGE▶ ─DRIVER▶ ─FEATURES_OK▶ ─DRIVER_OK▶ running (device on the worker)
//!     ▲                 ▲                                                       │ ring or chain malformed,
//!     └──────detach─────┤                                                       ▼ host error
//!                       └──────────────── Status := 0 ◀───────────────── NEEDS_RESET (still driven by reset
//!                                                                        alone)
//! ```
//!
//! The driver sets one bit at a time, in order. A register written in the wrong state, with the wrong
//! width or with a value that makes no sense is not written, and a fault is counted. An empty slot reads
//! DeviceID 0: Linux leaves it alone until it is told to look again.
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

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    Activation, ActiveQueue, Counters, HostError, INTERRUPT_CONFIG_CHANGE, Interrupt, VirtioDevice,
};
use crate::vmm::bus::BusDevice;
use crate::vmm::layout::SLOT_SIZE;
use crate::vmm::memory::GuestMemory;
use crate::vmm::worker::{Token, WorkerHandle};

mod queue;
mod register;
pub mod window;

use queue::QueueConfig;
use register::{CONFIG, Register};

pub use register::{INTERRUPT_ACK, QUEUE_NOTIFY};
pub(super) use register::{INTERRUPT_STATUS, STATUS, status};
pub use window::{Window, Windows};

/// Bytes of the config space, which fills the rest of the window.
const CONFIG_LEN: usize = (SLOT_SIZE - CONFIG) as usize;

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
/// The non-legacy interface.
const VERSION: u32 = 2;
/// "CUBE", little-endian: the vendor id is free to choose.
const VENDOR: u32 = 0x4542_5543;

/// One virtio-mmio slot.
pub struct MmioTransport {
    memory: GuestMemory,
    worker: WorkerHandle,
    window: Window,
    kick: EventFd,
    /// Signalled for acknowledgements that KVM takes; nobody reads it.
    acknowledged: EventFd,
    interrupt: Interrupt,
    /// The device has kicks of its own.
    own_kicks: AtomicBool,
    slot: Mutex<Slot>,
}

/// What the lock protects.
#[derive(Default)]
struct Slot {
    device: Option<Box<dyn VirtioDevice>>,
    counters: Arc<Counters>,
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<QueueConfig>,
    /// The worker half, while the device runs.
    active: Option<Token>,
}

impl MmioTransport {
    /// An empty slot, read through `window`. `irqfd` raises the slot's line; `worker` runs whatever device is
    /// attached.
    ///
    /// # Errors
    /// No eventfd could be made.
    pub fn new(
        memory: GuestMemory,
        worker: WorkerHandle,
        irqfd: EventFd,
        window: Window,
    ) -> io::Result<Self> {
        window.set(register::MAGIC_VALUE, MAGIC);
        window.set(register::VERSION, VERSION);
        Ok(Self {
            memory,
            worker,
            interrupt: Interrupt::new(Arc::new(irqfd), window.clone()),
            window,
            kick: EventFd::new(EFD_NONBLOCK)?,
            acknowledged: EventFd::new(EFD_NONBLOCK)?,
            own_kicks: AtomicBool::new(false),
            slot: Mutex::default(),
        })
    }

    /// The eventfd for KVM to signal when the guest writes [`QUEUE_NOTIFY`], whatever the value (no
    /// datamatch). Without it the write itself, as a register access, does the same.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// The eventfd for KVM to signal when the guest acknowledges used buffers, and nothing else
    /// ([`INTERRUPT_ACK`], the value [`super::INTERRUPT_USED_BUFFER`]): it means nothing for this device. None: it does.
    pub fn acknowledged(&self) -> Option<&EventFd> {
        let slot = self.lock();
        let often = slot.device.as_ref().is_some_and(|d| d.interrupts_often());
        often.then_some(&self.acknowledged)
    }

    /// The eventfds to be signalled for single queues, by the value written to [`QUEUE_NOTIFY`]; none: all
    /// writes are [`MmioTransport::kick`]'s.
    ///
    /// # Errors
    /// No descriptor can be had.
    pub fn queue_kicks(&self) -> io::Result<Vec<EventFd>> {
        let slot = self.lock();
        let kicks = slot.device.iter().flat_map(|device| device.kicks());
        kicks.map(EventFd::try_clone).collect()
    }

    /// Fills the slot, and returns the device's counters.
    ///
    /// # Errors
    /// The device, when the slot is taken.
    pub fn attach(
        &self,
        device: Box<dyn VirtioDevice>,
    ) -> Result<Arc<Counters>, Box<dyn VirtioDevice>> {
        let mut slot = self.lock();
        if slot.device.is_some() {
            return Err(device);
        }
        let counters = Arc::<Counters>::default();
        let own_kicks = !device.kicks().is_empty();
        self.own_kicks.store(own_kicks, Ordering::Release);
        let track = !device.interrupts_often();
        self.interrupt.track_used_buffers(track);
        *slot = Slot {
            queues: QueueConfig::for_sizes(device.queue_sizes()),
            device: Some(device),
            counters: counters.clone(),
            ..Slot::default()
        };
        self.interrupt.clear();
        self.show(&slot);
        Ok(counters)
    }

    /// Empties the slot and returns the device, stopped and reset. The agent has unbound the driver
    /// before; one that is still there reads zeroes from now on.
    pub fn detach(&self) -> Option<Box<dyn VirtioDevice>> {
        let mut slot = self.lock();
        self.reset(&mut slot);
        self.interrupt.track_used_buffers(true);
        self.interrupt.clear();
        let device = std::mem::take(&mut *slot).device;
        self.show(&slot);
        device
    }

    /// Whether the slot has no device.
    pub fn is_empty(&self) -> bool {
        self.lock().device.is_none()
    }

    /// Whether the device gave up on its driver and waits to be reset.
    pub fn needs_reset(&self) -> bool {
        self.interrupt.is_broken()
    }

    fn lock(&self) -> MutexGuard<'_, Slot> {
        // No code under the lock panics on the guest's behalf; should the host's ever, the registers are
        // plain values and the guest may go on with them.
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings the window up to date, but for what changes by itself.
    fn show(&self, slot: &Slot) {
        let (window, queue) = (&self.window, slot.selected());
        let device = slot.device.as_deref();
        let features = device.map_or(0, |device| {
            half(device.features(), slot.device_features_select)
        });
        for (register, value) in [
            (
                register::DEVICE_ID,
                device.map_or(0, VirtioDevice::device_type),
            ),
            (register::VENDOR_ID, device.map_or(0, |_| VENDOR)),
            (register::DEVICE_FEATURES, features),
            (
                register::QUEUE_NUM_MAX,
                queue.map_or(0, |queue| queue.max.into()),
            ),
            (
                register::QUEUE_READY,
                queue.map_or(0, |queue| queue.ready.into()),
            ),
        ] {
            window.set(register, value);
        }
        // No device has shared memory: its length and address read as all ones (virtio 1.2, 4.2.2).
        for register in register::SHARED_MEMORY {
            window.set(register, device.map_or(0, |_| u32::MAX));
        }
        // The worker may set the device's own bit at any time.
        let (status, own) = (window.register(STATUS), status::NEEDS_RESET);
        let shown = |now| Some(now & own | slot.status);
        let _ = status.fetch_update(Ordering::AcqRel, Ordering::Acquire, shown);
        let mut config = [0; CONFIG_LEN];
        if let Some(device) = device {
            device.read_config(0, &mut config);
        }
        window.set_config(0, &config);
    }

    fn write_register(&self, register: Register, value: u32) {
        match register {
            Register::QueueNotify => return self.notify(value),
            Register::InterruptAck => {
                self.interrupt.acknowledge(value);
                // A change that came while another write was shown may have been shown over.
                if value & INTERRUPT_CONFIG_CHANGE == 0 {
                    return;
                }
            }
            _ => {}
        }
        let mut slot = self.lock();
        let slot = &mut *slot;
        if slot.device.is_none() {
            return;
        }
        match register {
            Register::InterruptAck | Register::SharedMemorySel => {}
            Register::Status => self.write_status(slot, value),
            Register::DeviceFeaturesSel => slot.device_features_select = value,
            Register::DriverFeaturesSel => slot.driver_features_select = value,
            Register::DriverFeatures => slot.write_features(value),
            Register::QueueSel => slot.queue_select = value,
            _ => slot.write_queue(&self.memory, register, value),
        }
        self.show(slot);
    }

    /// A notification that KVM did not take.
    fn notify(&self, queue: u32) {
        // It fails only when the counter is full, and then the kick is there already.
        if !self.own_kicks.load(Ordering::Acquire) {
            let _ = self.kick.write(1);
        } else if let Some(device) = &self.lock().device {
            let queue = usize::try_from(queue).unwrap_or(usize::MAX);
            let kick = device.kicks().get(queue);
            let _ = kick.map(|kick| kick.write(1));
        }
    }

    /// Takes one step of the driver's handshake (virtio 1.2, section 3.1.1), or refuses it.
    fn write_status(&self, slot: &mut Slot, value: u32) {
        if value == 0 {
            return self.reset(slot);
        }
        // Drivers write back what they read, the device's own bit included.
        let added = (value & !status::NEEDS_RESET) ^ slot.status;
        match (slot.status, added) {
            (_, 0) => {}
            (before, status::FAILED) if before & status::FAILED == 0 => slot.status |= added,
            (status::NONE, status::ACKNOWLEDGE) | (status::ACKNOWLEDGED, status::DRIVER) => {
                slot.status |= added;
            }
            (status::DRIVING, status::FEATURES_OK) if slot.features_are_acceptable() => {
                slot.status |= added;
            }
            (status::NEGOTIATED, status::DRIVER_OK) => {
                slot.status |= added;
                self.start(slot);
            }
            _ => slot.counters.fault(),
        }
    }

    /// DRIVER_OK: moves the queues into the device and the device's worker half to the worker. Whatever
    /// goes wrong, the driver sees NEEDS_RESET.
    fn start(&self, slot: &mut Slot) {
        match self.activate(slot) {
            Ok(Some(token)) => slot.active = Some(token),
            Ok(None) => {
                slot.counters.fault();
                self.interrupt.needs_reset();
            }
            Err(error) => {
                slot.counters.error();
                self.interrupt.needs_reset();
                self.worker.report(error);
            }
        }
    }

    /// None when the driver did not enable the queues that the device needs.
    fn activate(&self, slot: &mut Slot) -> Result<Option<Token>, HostError> {
        let Some(device) = &mut slot.device else {
            return Ok(None);
        };
        let Some(queues) = active_queues(
            &slot.queues,
            &self.memory,
            slot.driver_features,
            device.required_queues(),
        ) else {
            return Ok(None);
        };
        let name = device.name();
        let failed = |action, source| HostError {
            device: name,
            action,
            source,
        };
        let kick = match self.kick.try_clone() {
            Ok(kick) => kick,
            Err(source) => return Err(failed("duplicate the kick eventfd", source)),
        };
        let active = device.activate(Activation {
            memory: self.memory.clone(),
            features: slot.driver_features,
            queues,
            kick,
            interrupt: self.interrupt.clone(),
            counters: slot.counters.clone(),
        })?;
        match self.worker.adopt(active) {
            Ok(token) => Ok(Some(token)),
            Err(error) => Err(failed(
                "give the device to its worker",
                io::Error::other(error),
            )),
        }
    }

    /// Stops the device, in the middle of I/O too, and puts every register back. When this returns,
    /// nothing touches guest memory on the device's behalf.
    fn reset(&self, slot: &mut Slot) {
        if let Some(token) = slot.active.take() {
            // Fails only when the worker has stopped, which ends the machine: the device went with it.
            if let (Ok(stopped), Some(device)) = (self.worker.release(token), &mut slot.device) {
                device.reset(stopped);
            }
        }
        // A kick that nobody has taken belongs to the queues that are gone.
        let _ = self.kick.read();
        for kick in slot.device.iter().flat_map(|device| device.kicks()) {
            let _ = kick.read();
        }
        self.interrupt.clear();
        *slot = Slot {
            queues: slot
                .device
                .as_ref()
                .map(|device| QueueConfig::for_sizes(device.queue_sizes()))
                .unwrap_or_default(),
            device: slot.device.take(),
            counters: slot.counters.clone(),
            ..Slot::default()
        };
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        let mut slot = self.lock();
        if slot.status & status::DRIVER == 0 {
            slot.counters.fault();
        } else if let Some(device) = &mut slot.device {
            device.write_config(offset, data);
        }
        self.show(&slot);
    }
}

impl Slot {
    fn selected(&self) -> Option<&QueueConfig> {
        self.queues.get(usize::try_from(self.queue_select).ok()?)
    }

    fn write_features(&mut self, value: u32) {
        let writable = self.status == status::DRIVING;
        match (writable, self.driver_features_select) {
            (true, 0) => {
                self.driver_features =
                    self.driver_features & !u64::from(u32::MAX) | u64::from(value);
            }
            (true, 1) => {
                self.driver_features =
                    self.driver_features & u64::from(u32::MAX) | u64::from(value) << 32;
            }
            // Linux writes both halves only; beyond them are no features to accept.
            (true, _) if value == 0 => {}
            _ => self.counters.fault(),
        }
    }

    /// A subset of what was offered, and not the legacy interface.
    fn features_are_acceptable(&self) -> bool {
        let offered = self.device.as_ref().map_or(0, |device| device.features());
        let accepted = self.driver_features;
        accepted & !offered == 0 && accepted & (1 << VIRTIO_F_VERSION_1) != 0
    }

    /// A queue register: only between FEATURES_OK and DRIVER_OK.
    fn write_queue(&mut self, memory: &GuestMemory, register: Register, value: u32) {
        let negotiated = self.status == status::NEGOTIATED;
        let event_idx = has_event_idx(self.driver_features);
        let select = usize::try_from(self.queue_select).ok();
        let queue = select.and_then(|at| self.queues.get_mut(at));
        let written = match queue {
            // Linux makes sure of it after a reset.
            Some(queue) if !queue.ready && register == Register::QueueReady && value == 0 => true,
            Some(queue) if negotiated => queue.write(memory, event_idx, register, value),
            _ => false,
        };
        if !written {
            self.counters.fault();
        }
    }
}

/// The enabled queues as the device gets them; none when a required one is not enabled.
fn active_queues(
    configs: &[QueueConfig],
    memory: &GuestMemory,
    features: u64,
    required: usize,
) -> Option<Vec<ActiveQueue>> {
    let mut queues = Vec::new();
    for (index, config) in configs.iter().enumerate() {
        if config.ready {
            queues.push(ActiveQueue {
                index: u16::try_from(index).ok()?,
                queue: config.build(memory, has_event_idx(features))?,
            });
        } else if index < required {
            return None;
        }
    }
    Some(queues)
}

fn has_event_idx(features: u64) -> bool {
    features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0
}

/// The 32 feature bits that a select register chooses.
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => (features & u64::from(u32::MAX)) as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

impl BusDevice for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.window.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.write_config(offset, data);
        } else if let (Some(register), Ok(data)) = (Register::at(offset), <[u8; 4]>::try_from(data))
        {
            self.write_register(register, u32::from_le_bytes(data));
        } else {
            self.lock().counters.fault();
        }
    }
}
