//! What the driver writes about one queue, until it becomes a [`Queue`].
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

use virtio_queue::{Queue, QueueState};
use vm_memory::{GuestAddress, GuestMemory as GuestMemoryTrait, Permissions};

use super::register::Register;
use crate::vmm::memory::GuestMemory;

/// A queue's registers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct QueueConfig {
    /// QueueNumMax.
    pub(super) max: u16,
    /// QueueReady.
    pub(super) ready: bool,
    /// QueueNum; 0 after a value that the device does not take.
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
}

impl QueueConfig {
    /// The queues of a device after reset.
    pub(super) fn for_sizes(sizes: &[u16]) -> Vec<Self> {
        let fresh = |max: &u16| Self {
            max: *max,
            ready: false,
            size: *max,
            descriptors: 0,
            available: 0,
            used: 0,
        };
        sizes.iter().map(fresh).collect()
    }

    /// Writes one of the queue's registers; false when it, or its value, is refused.
    pub(super) fn write(
        &mut self,
        memory: &GuestMemory,
        event_idx: bool,
        register: Register,
        value: u32,
    ) -> bool {
        if register == Register::QueueReady {
            self.ready = value == 1 && self.build(memory, event_idx).is_some();
            return self.ready || value == 0;
        }
        if self.ready {
            return false;
        }
        match register {
            Register::QueueNum => {
                let size = u16::try_from(value).ok();
                let size = size.filter(|size| size.is_power_of_two() && *size <= self.max);
                self.size = size.unwrap_or(0);
                return size.is_some();
            }
            Register::QueueDescLow => set_low(&mut self.descriptors, value),
            Register::QueueDescHigh => set_high(&mut self.descriptors, value),
            Register::QueueDriverLow => set_low(&mut self.available, value),
            Register::QueueDriverHigh => set_high(&mut self.available, value),
            Register::QueueDeviceLow => set_low(&mut self.used, value),
            Register::QueueDeviceHigh => set_high(&mut self.used, value),
            _ => return false,
        }
        true
    }

    /// The queue, when its size is a power of two up to the maximum, its rings are aligned and lie inside
    /// guest memory, whole (virtio 1.2, section 2.7).
    pub(super) fn build(&self, memory: &GuestMemory, event_idx: bool) -> Option<Queue> {
        let size = usize::from(self.size);
        let parts = [
            // 16 bytes per descriptor.
            (self.descriptors, size.checked_mul(16)?, Permissions::Read),
            // Flags and index before, used_event behind 2 bytes per entry.
            (
                self.available,
                size.checked_mul(2)?.checked_add(6)?,
                Permissions::Read,
            ),
            // Flags and index before, avail_event behind 8 bytes per entry.
            (
                self.used,
                size.checked_mul(8)?.checked_add(6)?,
                Permissions::ReadWrite,
            ),
        ];
        let inside = parts.iter().all(|(address, len, access)| {
            memory.check_range(GuestAddress(*address), *len, *access)
        });
        // virtio-queue takes an available ring at address 0 for a queue that was never set up.
        if !inside || self.available == 0 {
            return None;
        }
        Queue::try_from(QueueState {
            max_size: self.max,
            next_avail: 0,
            next_used: 0,
            event_idx_enabled: event_idx,
            size: self.size,
            ready: true,
            desc_table: self.descriptors,
            avail_ring: self.available,
            used_ring: self.used,
        })
        .ok()
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address & !u64::from(u32::MAX) | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = *address & u64::from(u32::MAX) | u64::from(value) << 32;
}
