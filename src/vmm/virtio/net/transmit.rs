//! Frames of the guest to the link: checked, then one `writev` each from the guest's buffers. The bytes that
//! were checked (virtio header and Ethernet header) are sent from the host's copy of them, so that the guest
//! cannot change them in between.
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
use std::os::fd::BorrowedFd;

use cube_guest::network::MacAddress;

use super::counters::NetCounters;
use super::header::{ETHERNET_HEADER, HEADER_LEN, TransmitHeader, VLAN_TAG};
use crate::vmm::memory::GuestMemory;
use crate::vmm::virtio::GuestFault;
use crate::vmm::virtio::chain::Chain;
use crate::vmm::virtio::drain::Effects;
use crate::vmm::virtio::iovec::Gather;

/// Bytes that are checked.
const PREFIX: usize = HEADER_LEN + ETHERNET_HEADER;

/// The longest frame that the host segments: an IP packet of 65,535 bytes with two VLAN tags.
const LONGEST_SEGMENTED: u32 = 65_535 + ETHERNET_HEADER as u32 + 2 * VLAN_TAG as u32;

/// What became of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// It went, or was dropped. With what the rate limit is charged: bytes and frames on the wire.
    Done {
        /// Bytes.
        bytes: u32,
        /// Frames.
        frames: u32,
    },
    /// The link takes nothing now.
    Full,
}

/// What frames are checked against.
#[derive(Debug, Clone, Copy)]
pub struct Sender {
    /// Negotiated features.
    pub features: u64,
    /// Bytes of an IP packet that is not segmented.
    pub mtu: u16,
    /// The only source address that passes; none: any does.
    pub source: Option<MacAddress>,
}

impl Sender {
    /// Sends the frame in `chain`.
    ///
    /// # Errors
    /// The chain names memory that is not there.
    pub fn send(
        &self,
        memory: &GuestMemory,
        chain: &Chain,
        link: BorrowedFd<'_>,
        (counters, effects): (&NetCounters, &mut Effects),
    ) -> Result<Sent, GuestFault> {
        const DROPPED: Sent = Sent::Done {
            bytes: 0,
            frames: 1,
        };
        let mut prefix = [0; PREFIX];
        let frame_len = match chain.readable.len().checked_sub(HEADER_LEN as u32) {
            Some(len) if len as usize >= ETHERNET_HEADER => len,
            _ => {
                counters.sent_malformed.one();
                effects.count_fault();
                return Ok(DROPPED);
            }
        };
        chain.readable.read(memory, 0, &mut prefix)?;
        let header = match self.check(&prefix, frame_len) {
            Ok(header) => header,
            Err(refusal) => {
                refusal.count(counters);
                effects.count_fault();
                return Ok(DROPPED);
            }
        };
        if let Some(bytes) = prefix.first_chunk_mut::<HEADER_LEN>() {
            *bytes = header.to_bytes();
        }
        let gather = Gather::new(memory, &prefix, &chain.readable)?;
        let done = Sent::Done {
            bytes: frame_len,
            frames: header.frames(frame_len),
        };
        match gather.write(link) {
            Ok(_) => {
                counters.sent_frames.one();
                counters.sent_bytes.add(frame_len.into());
                Ok(done)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Sent::Full),
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                // The kernel looks deeper: a header that does not fit the packet's protocol.
                counters.sent_malformed.one();
                effects.count_fault();
                Ok(done)
            }
            Err(_) => {
                counters.sent_refused.one();
                effects.count_error();
                Ok(done)
            }
        }
    }

    fn check(&self, prefix: &[u8; PREFIX], frame_len: u32) -> Result<TransmitHeader, Refusal> {
        let (header, frame) = prefix.split_first_chunk().ok_or(Refusal::Malformed)?;
        let header = TransmitHeader::parse(header, frame_len, self.features)
            .map_err(|_| Refusal::Malformed)?;
        let longest = if header.is_segmented() {
            LONGEST_SEGMENTED
        } else {
            let link_header = ETHERNET_HEADER.saturating_add(VLAN_TAG.saturating_mul(2));
            u32::from(self.mtu).saturating_add(link_header as u32)
        };
        if frame_len > longest {
            return Err(Refusal::Oversized);
        }
        let source = frame.get(6..).and_then(<[u8]>::first_chunk);
        match (self.source, source) {
            (Some(own), Some(source)) if own != MacAddress(*source) => Err(Refusal::Spoofed),
            _ => Ok(header),
        }
    }
}

enum Refusal {
    Malformed,
    Oversized,
    Spoofed,
}

impl Refusal {
    fn count(&self, counters: &NetCounters) {
        match self {
            Self::Malformed => counters.sent_malformed.one(),
            Self::Oversized => counters.sent_oversized.one(),
            Self::Spoofed => counters.sent_spoofed.one(),
        }
    }
}
