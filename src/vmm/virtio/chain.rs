//! Descriptor chains, parsed once, by copy.
//!
//! [`Chain::parse`] walks a chain in the descriptor table, copies every descriptor out, and checks it:
//! what comes out is a list of device-readable and a list of device-writable segments, each of which
//! lies inside guest memory. The descriptor table is never read again. The bytes that segments name stay
//! the guest's, who may change them at any time: a handler copies what it decides on ([`Segments::read`])
//! and hands the rest to the kernel ([`super::iovec`]).
//!
//! Indirect descriptors are not offered (VIRTIO_F_INDIRECT_DESC), so a chain that has one is malformed;
//! a chain has at most as many descriptors as the queue has entries, and at most 2^32 - 1 bytes.
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

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory as GuestMemoryTrait, Permissions};

use super::GuestFault;
use crate::vmm::memory::GuestMemory;

/// Bytes of one descriptor (virtio 1.2, section 2.7.5).
const DESCRIPTOR_SIZE: u64 = 16;

/// A stretch of guest memory, not empty, checked to lie inside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address of the first byte.
    pub address: GuestAddress,
    /// Length in bytes, at least 1.
    pub len: u32,
}

/// Segments in order: one side (readable or writable) of a chain, addressed by byte offset, so that no
/// device depends on how the driver split its request into descriptors.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Segments {
    list: Vec<Segment>,
    total: u32,
}

impl Segments {
    /// The number of bytes in all segments.
    pub fn len(&self) -> u32 {
        self.total
    }

    /// Whether there is no byte at all.
    pub fn is_empty(&self) -> bool {
        self.total == 0
    }

    /// The number of segments.
    pub fn count(&self) -> usize {
        self.list.len()
    }

    /// The segments that hold the bytes `offset..offset + len`, cut to that range.
    ///
    /// # Errors
    /// [`GuestFault::Request`] when the range goes beyond the end.
    pub fn range(
        &self,
        offset: u32,
        len: u32,
    ) -> Result<impl Iterator<Item = Segment>, GuestFault> {
        let end = offset.checked_add(len).ok_or(GuestFault::Request)?;
        if end > self.total {
            return Err(GuestFault::Request);
        }
        let mut skip = offset;
        let mut left = len;
        Ok(self.list.iter().filter_map(move |segment| {
            let skipped = skip.min(segment.len);
            skip = skip.saturating_sub(skipped);
            let taken = segment.len.saturating_sub(skipped).min(left);
            left = left.saturating_sub(taken);
            // The sum stays inside the segment, which was checked when it was parsed.
            let address = segment.address.unchecked_add(skipped.into());
            (taken > 0).then_some(Segment {
                address,
                len: taken,
            })
        }))
    }

    /// Copies the bytes from `offset` on out of guest memory, as many as `buffer` holds.
    ///
    /// # Errors
    /// [`GuestFault::Request`] when the range goes beyond the end.
    pub fn read(
        &self,
        memory: &GuestMemory,
        offset: u32,
        buffer: &mut [u8],
    ) -> Result<(), GuestFault> {
        let len = u32::try_from(buffer.len()).map_err(|_| GuestFault::Request)?;
        let mut rest = buffer;
        for segment in self.range(offset, len)? {
            let (now, later) = rest
                .split_at_mut_checked(segment.len as usize)
                .ok_or(GuestFault::Request)?;
            memory
                .read_slice(now, segment.address)
                .map_err(|_| GuestFault::Address)?;
            rest = later;
        }
        Ok(())
    }

    /// Copies `bytes` into guest memory from `offset` on.
    ///
    /// # Errors
    /// [`GuestFault::Request`] when the range goes beyond the end.
    pub fn write(&self, memory: &GuestMemory, offset: u32, bytes: &[u8]) -> Result<(), GuestFault> {
        let len = u32::try_from(bytes.len()).map_err(|_| GuestFault::Request)?;
        let mut rest = bytes;
        for segment in self.range(offset, len)? {
            let (now, later) = rest
                .split_at_checked(segment.len as usize)
                .ok_or(GuestFault::Request)?;
            memory
                .write_slice(now, segment.address)
                .map_err(|_| GuestFault::Address)?;
            rest = later;
        }
        Ok(())
    }

    fn clear(&mut self) {
        self.list.clear();
        self.total = 0;
    }

    fn push(&mut self, address: GuestAddress, len: u32) -> Result<(), GuestFault> {
        self.total = self.total.checked_add(len).ok_or(GuestFault::Chain)?;
        self.list.push(Segment { address, len });
        Ok(())
    }
}

/// A descriptor chain that has been validated. The drain loop keeps one and parses into it again and
/// again; a handler that completes later takes what it needs out of it (`std::mem::take`).
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Chain {
    queue: u16,
    head: u16,
    /// What the driver wrote for the device.
    pub readable: Segments,
    /// Where the device may write.
    pub writable: Segments,
}

impl Chain {
    /// Index of the queue that the chain came from.
    pub fn queue(&self) -> u16 {
        self.queue
    }

    /// Index of the chain's first descriptor: its name in the used ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Replaces the chain by the one that starts at `head` in the descriptor table of `queue`.
    ///
    /// # Errors
    /// - [`GuestFault::Ring`]: `head` is no index of the queue.
    /// - [`GuestFault::Chain`]: cyclic or over-long, an indirect descriptor, a `next` beyond the table, a
    ///   readable descriptor after a writable one, or more than 2^32 - 1 bytes.
    /// - [`GuestFault::Address`]: a descriptor names bytes outside guest memory.
    pub fn parse(
        &mut self,
        memory: &GuestMemory,
        queue_index: u16,
        queue: &Queue,
        head: u16,
    ) -> Result<(), GuestFault> {
        self.queue = queue_index;
        self.head = head;
        self.readable.clear();
        self.writable.clear();
        if head >= queue.size() {
            return Err(GuestFault::Ring);
        }
        let mut index = head;
        let mut writing = false;
        for _ in 0..queue.size() {
            let descriptor = read_descriptor(memory, queue, index)?;
            writing = self.push(memory, &descriptor, writing)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = descriptor.next();
        }
        // As many descriptors as the table has, and the last one still names a next: a cycle.
        Err(GuestFault::Chain)
    }

    /// Checks and adds one descriptor; `writing`: a writable one came before. Returns the new state.
    fn push(
        &mut self,
        memory: &GuestMemory,
        descriptor: &Descriptor,
        writing: bool,
    ) -> Result<bool, GuestFault> {
        let writable = descriptor.is_write_only();
        if descriptor.refers_to_indirect_table() || (writing && !writable) {
            return Err(GuestFault::Chain);
        }
        let (side, access) = if writable {
            (&mut self.writable, Permissions::Write)
        } else {
            (&mut self.readable, Permissions::Read)
        };
        // A descriptor without bytes is legal and says nothing; its address is not looked at.
        if descriptor.len() > 0 {
            if !memory.check_range(descriptor.addr(), descriptor.len() as usize, access) {
                return Err(GuestFault::Address);
            }
            side.push(descriptor.addr(), descriptor.len())?;
        }
        Ok(writable)
    }
}

/// Copies descriptor `index` out of the queue's table.
fn read_descriptor(
    memory: &GuestMemory,
    queue: &Queue,
    index: u16,
) -> Result<Descriptor, GuestFault> {
    if index >= queue.size() {
        return Err(GuestFault::Chain);
    }
    let address = GuestAddress(queue.desc_table())
        .checked_add(u64::from(index).saturating_mul(DESCRIPTOR_SIZE))
        .ok_or(GuestFault::Address)?;
    memory.read_obj(address).map_err(|_| GuestFault::Address)
}

#[cfg(test)]
mod tests;
