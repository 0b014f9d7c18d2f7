//! Frames from the link into the guest's buffers, for one queue pair.
//!
//! The chains that the driver offers are held until there is a frame for them. With merged buffers
//! (`VIRTIO_NET_F_MRG_RXBUF`) as many are held as the longest possible frame needs, since nobody can ask a
//! tap how long the next one is. Each frame is one `readv`: its first bytes (virtio header, Ethernet header,
//! a VLAN tag) come to the host, which decides on them, and then to the guest by copy; all others go
//! straight into the guest's buffers.
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

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;

use super::counters::NetCounters;
use super::filter::Filter;
use super::header::{ETHERNET_HEADER, HEADER_LEN, VLAN_TAG, received_frames};
use super::limiter::Limiter;
use crate::vmm::memory::GuestMemory;
use crate::vmm::virtio::GuestFault;
use crate::vmm::virtio::chain::Chain;
use crate::vmm::virtio::drain::Effects;
use crate::vmm::virtio::iovec::ReceiveBuffers;

/// Bytes of a frame that the host looks at.
pub const PREFIX: usize = HEADER_LEN + ETHERNET_HEADER + VLAN_TAG;

/// Frames read in one call, so that a flood of frames that the guest does not want starves nobody.
const BURST: u32 = 64;

/// Chains without a frame kept for reuse.
const SPARE_CHAINS: usize = 64;

/// Descriptors of a chain that may be one of many: with 256 chains, no more than one system call takes.
const MERGED_DESCRIPTORS: usize = 3;

/// What stopped the reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The link has no frame.
    Empty,
    /// The driver must offer more buffers.
    Buffers,
    /// The rate limit, for that long.
    Limit(std::time::Duration),
    /// Enough for now.
    Burst,
}

/// Where frames come from and what becomes of them.
pub struct Reception<'a> {
    /// Where the frames come from.
    pub link: BorrowedFd<'a>,
    /// What the driver wants.
    pub filter: &'a Filter,
    /// How fast.
    pub limiter: &'a mut Limiter,
    /// What happened.
    pub counters: &'a NetCounters,
}

/// The receive queue of one pair.
pub struct Receiver {
    queue: u16,
    /// Whether a frame may lie in several chains.
    merged: bool,
    /// Bytes of the longest frame, its virtio header included.
    longest: u32,
    buffers: ReceiveBuffers,
    held: VecDeque<Held>,
    /// Bytes in all held chains.
    capacity: u32,
    spare: Vec<Chain>,
}

struct Held {
    chain: Chain,
    vectors: usize,
}

impl Receiver {
    /// Nothing held.
    pub fn new(queue: u16, memory: &GuestMemory, merged: bool, longest: u32) -> Self {
        Self {
            queue,
            merged,
            longest,
            buffers: ReceiveBuffers::new(memory.clone()),
            held: VecDeque::new(),
            capacity: 0,
            spare: Vec::new(),
        }
    }

    /// Whether another chain is needed for a frame.
    pub fn needs_buffers(&self) -> bool {
        if self.merged {
            self.capacity < self.longest
        } else {
            self.held.is_empty()
        }
    }

    /// Takes a chain, whose place an empty one takes. Returns whether it can hold a frame.
    ///
    /// # Errors
    /// The chain names memory that is not there.
    pub fn hold(&mut self, chain: &mut Chain) -> Result<bool, GuestFault> {
        let shredded = self.merged && chain.writable.count() > MERGED_DESCRIPTORS;
        if (chain.writable.len() as usize) < PREFIX || !chain.readable.is_empty() || shredded {
            return Ok(false);
        }
        let chain = std::mem::replace(chain, self.spare.pop().unwrap_or_default());
        let vectors = self.buffers.push(&chain.writable)?;
        self.capacity = self.capacity.saturating_add(chain.writable.len());
        self.held.push_back(Held { chain, vectors });
        Ok(true)
    }

    /// Gives the chains back, the last one first.
    pub fn give_back(&mut self, effects: &mut Effects) {
        while let Some(held) = self.held.pop_back() {
            effects.give_back(self.queue, held.chain.head());
        }
        self.buffers.clear();
        self.capacity = 0;
    }

    /// Fills held chains until something stops it.
    ///
    /// # Errors
    /// The chains name memory that is not there.
    pub fn receive(
        &mut self,
        memory: &GuestMemory,
        reception: &mut Reception<'_>,
        effects: &mut Effects,
    ) -> Result<Stop, GuestFault> {
        for _ in 0..BURST {
            if self.needs_buffers() {
                return Ok(Stop::Buffers);
            }
            let mut prefix = [0; PREFIX];
            let len = match self.buffers.read(reception.link, &mut prefix) {
                Ok(len) => u32::try_from(len).unwrap_or(u32::MAX),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    if error.kind() != io::ErrorKind::WouldBlock {
                        // The interface is gone or down; the next event says when it is back.
                        effects.count_error();
                    }
                    return Ok(Stop::Empty);
                }
            };
            let Some(frame_len) = self.accept(&prefix, len, reception) else {
                continue;
            };
            let (header, _) = prefix
                .split_first_chunk::<HEADER_LEN>()
                .ok_or(GuestFault::Request)?;
            let frames = received_frames(header, frame_len);
            self.deliver(memory, prefix, len, effects)?;
            reception.counters.received_frames.one();
            reception.counters.received_bytes.add(frame_len.into());
            if let Some(wait) = reception.limiter.charge(frame_len, frames) {
                reception.counters.received_throttled.one();
                return Ok(Stop::Limit(wait));
            }
        }
        Ok(Stop::Burst)
    }

    /// The length of a frame that goes to the guest; none: the next one takes its place.
    fn accept(&self, prefix: &[u8; PREFIX], len: u32, reception: &Reception<'_>) -> Option<u32> {
        if len > self.longest || len > self.capacity {
            reception.counters.received_oversized.one();
            return None;
        }
        let frame_len = len.checked_sub(HEADER_LEN as u32)?;
        let frame = prefix.get(HEADER_LEN..PREFIX.min(len as usize))?;
        if frame.len() < ETHERNET_HEADER || !reception.filter.wants(frame) {
            reception.counters.received_filtered.one();
            return None;
        }
        Some(frame_len)
    }

    /// Publishes the first chains, which hold a frame of `len` bytes.
    fn deliver(
        &mut self,
        memory: &GuestMemory,
        mut prefix: [u8; PREFIX],
        len: u32,
        effects: &mut Effects,
    ) -> Result<(), GuestFault> {
        let mut left = len;
        let mut used: u16 = 0;
        for held in &self.held {
            used = used.saturating_add(1);
            left = left.saturating_sub(held.chain.writable.len());
            if left == 0 {
                break;
            }
        }
        // num_buffers, which is 1 without merged buffers (section 5.1.6.4.1).
        if let Some(field) = prefix.get_mut(HEADER_LEN.saturating_sub(2)..HEADER_LEN) {
            field.copy_from_slice(&used.to_le_bytes());
        }
        let first = self.held.front().ok_or(GuestFault::Ring)?;
        let known = prefix.get(..PREFIX.min(len as usize)).unwrap_or_default();
        first.chain.writable.write(memory, 0, known)?;
        let mut left = len;
        for _ in 0..used {
            let held = self.held.pop_front().ok_or(GuestFault::Ring)?;
            let size = held.chain.writable.len();
            let written = left.min(size);
            left = left.saturating_sub(written);
            effects.complete(self.queue, held.chain.head(), written);
            self.buffers.drop_first(held.vectors);
            self.capacity = self.capacity.saturating_sub(size);
            if self.spare.len() < SPARE_CHAINS {
                self.spare.push(held.chain);
            }
        }
        Ok(())
    }
}
