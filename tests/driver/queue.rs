//! The driver's half of a split virtqueue (virtio 1.2, section 2.7), in guest memory.
use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};

use cube::vmm::memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// One descriptor's worth of buffer.
#[derive(Debug, Clone, Copy)]
pub struct Buffer {
    pub address: u64,
    pub len: u32,
    /// Writable by the device.
    pub writable: bool,
}

impl Buffer {
    /// What the driver tells the device.
    pub fn read(address: u64, len: u32) -> Self {
        Self {
            address,
            len,
            writable: false,
        }
    }

    /// Where the device answers.
    pub fn write(address: u64, len: u32) -> Self {
        Self {
            address,
            len,
            writable: true,
        }
    }
}

/// A queue as its driver sees it.
pub struct DriverQueue {
    memory: GuestMemory,
    pub size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    /// VIRTIO_F_RING_EVENT_IDX was negotiated.
    pub event_idx: bool,
    next_available: u16,
    last_used: u16,
    free: VecDeque<u16>,
    /// Descriptors of each chain that the device has, by head.
    held: std::collections::BTreeMap<u16, Vec<u16>>,
}

impl DriverQueue {
    /// Rings of `size` entries one after the other from `base` on, zeroed.
    pub fn new(memory: GuestMemory, base: u64, size: u16) -> Self {
        let descriptors = base;
        let available = descriptors + 16 * u64::from(size);
        let used = (available + 6 + 2 * u64::from(size)).next_multiple_of(4);
        let end = used + 6 + 8 * u64::from(size);
        let zeroes = vec![0; (end - base) as usize];
        memory.write_slice(&zeroes, GuestAddress(base)).unwrap();
        Self {
            memory,
            size,
            descriptors,
            available,
            used,
            event_idx: false,
            next_available: 0,
            last_used: 0,
            free: (0..size).collect(),
            held: Default::default(),
        }
    }

    /// The same rings for another thread to look at.
    pub fn clone_view(&self) -> Self {
        Self {
            memory: self.memory.clone(),
            free: VecDeque::new(),
            held: Default::default(),
            ..*self
        }
    }

    /// Descriptor table, available ring, used ring.
    pub fn addresses(&self) -> [u64; 3] {
        [self.descriptors, self.available, self.used]
    }

    /// Writes a descriptor, whatever it says.
    pub fn set_descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&address.to_le_bytes());
        raw[8..12].copy_from_slice(&len.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        let at = self.descriptors + 16 * u64::from(index);
        self.memory.write_slice(&raw, GuestAddress(at)).unwrap();
    }

    /// Puts a head into the available ring, whatever it is.
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.next_available % self.size);
        self.put16(self.available + 4 + 2 * slot, head);
        self.set_available_index(self.next_available.wrapping_add(1));
    }

    /// Writes the available ring's index, whatever it is.
    pub fn set_available_index(&mut self, index: u16) {
        self.next_available = index;
        self.memory
            .store(
                index.to_le(),
                GuestAddress(self.available + 2),
                Ordering::Release,
            )
            .unwrap();
    }

    /// Descriptors that the device does not have.
    pub fn free_descriptors(&self) -> usize {
        self.free.len()
    }

    /// Makes a chain of the buffers and offers it; returns its head.
    pub fn add(&mut self, buffers: &[Buffer]) -> u16 {
        assert!(!buffers.is_empty() && buffers.len() <= self.free.len());
        let chain: Vec<u16> = self.free.drain(..buffers.len()).collect();
        for (at, buffer) in buffers.iter().enumerate() {
            let next = chain.get(at + 1);
            let flags = if buffer.writable { WRITE } else { 0 } | next.map_or(0, |_| NEXT);
            self.set_descriptor(
                chain[at],
                buffer.address,
                buffer.len,
                flags,
                next.copied().unwrap_or(0),
            );
        }
        let head = chain[0];
        self.held.insert(head, chain);
        self.offer(head);
        head
    }

    /// The next used chain, if there is one: its head and the bytes written.
    pub fn pop_used(&mut self) -> Option<(u16, u32)> {
        if self.used_index() == self.last_used {
            return None;
        }
        let slot = u64::from(self.last_used % self.size);
        let at = self.used + 4 + 8 * slot;
        let mut raw = [0; 8];
        self.memory.read_slice(&mut raw, GuestAddress(at)).unwrap();
        self.last_used = self.last_used.wrapping_add(1);
        let head = u32::from_le_bytes(raw[..4].try_into().unwrap());
        let written = u32::from_le_bytes(raw[4..].try_into().unwrap());
        let head = u16::try_from(head).expect("the used ring names a head");
        let chain = self.held.remove(&head);
        self.free.extend(chain.into_iter().flatten());
        Some((head, written))
    }

    /// The used ring's index.
    pub fn used_index(&self) -> u16 {
        let at = GuestAddress(self.used + 2);
        u16::from_le(self.memory.load(at, Ordering::Acquire).unwrap())
    }

    /// Asks for an interrupt at the next used chain.
    pub fn want_interrupt(&self) {
        if self.event_idx {
            self.set_used_event(self.last_used);
        }
        // The device either sees this before it decides, or its used index is seen after.
        fence(Ordering::SeqCst);
    }

    /// Asks for an interrupt when the used index passes `index` (EVENT_IDX).
    pub fn set_used_event(&self, index: u16) {
        self.put16(self.available + 4 + 2 * u64::from(self.size), index);
    }

    /// Sets the available ring's flags: 1 asks for no interrupts (without EVENT_IDX).
    pub fn set_available_flags(&self, flags: u16) {
        self.put16(self.available, flags);
    }

    /// Up to which available index the device wants no kick (EVENT_IDX).
    pub fn avail_event(&self) -> u16 {
        let at = GuestAddress(self.used + 4 + 8 * u64::from(self.size));
        u16::from_le(self.memory.load(at, Ordering::Acquire).unwrap())
    }

    fn put16(&self, at: u64, value: u16) {
        self.memory
            .store(value.to_le(), GuestAddress(at), Ordering::Release)
            .unwrap();
    }
}
