//! A virtio driver without a guest: it programs a slot's registers as a vCPU thread would, keeps rings in
//! guest memory, and waits for the slot's interrupt. The device under it runs on a real worker.
//!
//! Everything can also be done wrong: descriptors, ring indices and registers can be written raw.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    reason = "each test binary includes this as a module and uses a part of it"
)]

pub mod queue;

pub use queue::{Buffer, DriverQueue};

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};

use cube::vmm::bus::BusDevice;
use cube::vmm::memory::{GuestMemory, allocate_shared};
use cube::vmm::virtio::mmio::{MmioTransport, Window};
use cube::vmm::virtio::{Active, Counters, HostError, Interest, Turn, VirtioDevice};
use cube::vmm::worker::Worker;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Guest memory of the fixture, in bytes, from address 0.
pub const MEMORY: u64 = 64 << 20;
/// Where buffers are allocated from; below it are the queues, 1 MiB each.
const BUFFERS: u64 = 16 << 20;

/// What a wait takes at most before the test is declared hung.
const HANG_MS: i32 = 20_000;

/// Register offsets (virtio 1.2, section 4.2.2).
pub mod reg {
    pub const MAGIC: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_NUM_MAX: u64 = 0x034;
    pub const QUEUE_NUM: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC: u64 = 0x080;
    pub const QUEUE_DRIVER: u64 = 0x090;
    pub const QUEUE_DEVICE: u64 = 0x0a0;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}

/// Status bits (virtio 1.2, section 2.1).
pub mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
    pub const FAILED: u32 = 128;
}

pub const F_EVENT_IDX: u64 = 1 << 29;
pub const F_VERSION_1: u64 = 1 << 32;

/// One slot, its device's worker, guest memory, and the driver's side of the interrupt.
pub struct Driver {
    pub slot: Arc<MmioTransport>,
    pub memory: GuestMemory,
    pub counters: Arc<Counters>,
    pub worker: Worker,
    irq: EventFd,
    poll: Epoll,
    next_buffer: u64,
}

impl Driver {
    /// A machine of one slot with `device` in it.
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        // Shared, for devices that another process serves; to the others it is the same.
        let memory = allocate_shared(MEMORY, false).unwrap();
        let worker = Worker::spawn("worker", || Ok(())).unwrap();
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let poll = Epoll::new().unwrap();
        let event = EpollEvent::new(EventSet::IN, 0);
        poll.ctl(ControlOperation::Add, irq.as_raw_fd(), event)
            .unwrap();
        let irqfd = irq.try_clone().unwrap();
        let slot =
            MmioTransport::new(memory.clone(), worker.handle(), irqfd, Window::alone()).unwrap();
        let Ok(counters) = slot.attach(device) else {
            panic!("the new slot is taken");
        };
        Self {
            slot: Arc::new(slot),
            memory,
            counters,
            worker,
            irq,
            poll,
            next_buffer: BUFFERS,
        }
    }

    pub fn read(&self, register: u64) -> u32 {
        let mut data = [0xee; 4];
        self.slot.read(register, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn write(&self, register: u64, value: u32) {
        self.slot.write(register, &value.to_le_bytes());
    }

    /// Writes a pair of low and high registers.
    pub fn write_address(&self, register: u64, address: u64) {
        self.write(register, address as u32);
        self.write(register + 4, (address >> 32) as u32);
    }

    pub fn config<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0xee; N];
        self.slot.read(reg::CONFIG + offset, &mut data);
        data
    }

    pub fn status(&self) -> u32 {
        self.read(reg::STATUS)
    }

    /// Adds a bit to Status, as Linux does: to what it reads.
    pub fn add_status(&self, bit: u32) {
        self.write(reg::STATUS, self.status() | bit);
    }

    pub fn reset(&mut self) {
        self.write(reg::STATUS, 0);
        assert_eq!(
            self.status(),
            0,
            "a reset is complete when the write returns"
        );
        // Interrupts of the past.
        let _ = self.irq.read();
        self.next_buffer = BUFFERS;
    }

    pub fn offered_features(&self) -> u64 {
        let mut features = 0;
        for half in 0..2u32 {
            self.write(reg::DEVICE_FEATURES_SEL, half);
            features |= u64::from(self.read(reg::DEVICE_FEATURES)) << (32 * half);
        }
        features
    }

    /// From reset to FEATURES_OK with exactly these features; whether the device accepts them.
    pub fn negotiate(&self, features: u64) -> bool {
        self.add_status(status::ACKNOWLEDGE);
        self.add_status(status::DRIVER);
        for half in 0..2u32 {
            self.write(reg::DRIVER_FEATURES_SEL, half);
            self.write(reg::DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
        self.add_status(status::FEATURES_OK);
        self.status() & status::FEATURES_OK != 0
    }

    /// Sets up queue `index` with well-placed rings of `size` entries.
    pub fn queue(&self, index: u32, size: u16) -> DriverQueue {
        let queue = DriverQueue::new(self.memory.clone(), (u64::from(index) + 1) << 20, size);
        self.set_up_queue(index, size.into(), queue.addresses());
        queue
    }

    /// Writes a queue's registers, whatever they say; returns whether the device took the queue.
    pub fn set_up_queue(&self, index: u32, size: u32, addresses: [u64; 3]) -> bool {
        self.write(reg::QUEUE_SEL, index);
        self.write(reg::QUEUE_NUM, size);
        self.write_address(reg::QUEUE_DESC, addresses[0]);
        self.write_address(reg::QUEUE_DRIVER, addresses[1]);
        self.write_address(reg::QUEUE_DEVICE, addresses[2]);
        self.write(reg::QUEUE_READY, 1);
        self.read(reg::QUEUE_READY) == 1
    }

    /// The whole handshake with all offered features and `sizes.len()` queues.
    pub fn start(&self, sizes: &[u16]) -> Vec<DriverQueue> {
        self.start_with(self.offered_features(), sizes)
    }

    /// The whole handshake with these features.
    pub fn start_with(&self, features: u64, sizes: &[u16]) -> Vec<DriverQueue> {
        assert!(self.negotiate(features), "the device refuses {features:#x}");
        let queues = sizes.iter().enumerate();
        let mut queues: Vec<_> = queues
            .map(|(index, size)| self.queue(index as u32, *size))
            .collect();
        for queue in &mut queues {
            queue.event_idx = features & F_EVENT_IDX != 0;
        }
        self.add_status(status::DRIVER_OK);
        assert_eq!(
            self.status() & status::NEEDS_RESET,
            0,
            "the device did not start"
        );
        queues
    }

    pub fn kick(&self, queue: u32) {
        self.write(reg::QUEUE_NOTIFY, queue);
    }

    /// Guest memory for a buffer; never given out twice before a reset.
    pub fn alloc(&mut self, len: u32) -> u64 {
        let at = self.next_buffer;
        self.next_buffer += u64::from(len).next_multiple_of(64);
        assert!(
            self.next_buffer <= MEMORY,
            "the fixture's memory is used up"
        );
        at
    }

    /// A buffer with these bytes in it.
    pub fn alloc_with(&mut self, bytes: &[u8]) -> u64 {
        let at = self.alloc(bytes.len() as u32);
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        at
    }

    /// Lets [`Driver::alloc`] begin anew; the device must have nothing.
    pub fn free_buffers(&mut self) {
        self.next_buffer = BUFFERS;
    }

    pub fn memory_fill(&self, at: u64, len: u32, byte: u8) {
        let bytes = vec![byte; len as usize];
        self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    pub fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        bytes
    }

    /// Waits for the next interrupt; returns the bits of InterruptStatus.
    pub fn take_interrupt(&self) -> u32 {
        self.poll_irq();
        self.irq.read().unwrap();
        self.read(reg::INTERRUPT_STATUS)
    }

    /// Waits for the next interrupt and acknowledges it; returns the bits of InterruptStatus.
    pub fn wait_interrupt(&self) -> u32 {
        let bits = self.take_interrupt();
        self.write(reg::INTERRUPT_ACK, bits);
        bits
    }

    /// Waits until the device has used a chain of `queue`; returns its head and the bytes written.
    pub fn wait_used(&self, queue: &mut DriverQueue) -> (u16, u32) {
        loop {
            queue.want_interrupt();
            if let Some(used) = queue.pop_used() {
                return used;
            }
            assert_eq!(
                self.status() & status::NEEDS_RESET,
                0,
                "the device gave up instead of using the chain"
            );
            self.wait_interrupt();
        }
    }

    /// Offers a chain, kicks, and waits for it: the bytes written.
    pub fn call(&self, index: u32, queue: &mut DriverQueue, buffers: &[Buffer]) -> u32 {
        let head = queue.add(buffers);
        self.kick(index);
        let (used, written) = self.wait_used(queue);
        assert_eq!(used, head, "another chain was used");
        written
    }

    /// Waits until the device says NEEDS_RESET.
    pub fn wait_needs_reset(&self) {
        while self.status() & status::NEEDS_RESET == 0 {
            self.wait_interrupt();
        }
    }

    /// Returns when the worker has dealt with every kick (and every other descriptor) that was there when
    /// this was called, up to one turn each. Epoll may report the adoption before an older kick, but the
    /// kick at the latest with the next batch, which is dealt with before an adopted device resumes.
    pub fn settle(&self) {
        let (resumed, wait) = channel();
        let handle = self.worker.handle();
        let token = handle.adopt(Box::new(Idle { resumed })).unwrap();
        wait.recv().unwrap();
        handle.release(token).unwrap();
    }

    fn poll_irq(&self) {
        let mut events = [EpollEvent::default()];
        let ready = self.poll.wait(HANG_MS, &mut events).unwrap();
        assert_eq!(ready, 1, "no interrupt: the device hangs");
    }
}

/// A device that does nothing but say that it has been resumed.
struct Idle {
    resumed: Sender<()>,
}

impl Active for Idle {
    fn interests(&self) -> Vec<Interest> {
        Vec::new()
    }

    fn ready(&mut self, _token: u32) -> Result<Turn, HostError> {
        self.resumed.send(()).unwrap();
        Ok(Turn::default())
    }
}
