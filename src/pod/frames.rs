//! Control frames out of, and into, a connection that never blocks.
//!
//! The peer is the guest: what it can make the host hold is bounded by one frame each way.
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

use std::io::{self, Read, Write};

use cube_guest::frame::{self, Decoder, FrameError, MAX_FRAME};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Bytes taken from the connection per read.
const READ_SIZE: usize = 16 << 10;
/// Most bytes that may wait for a peer that does not read.
pub(crate) const MAX_QUEUED: usize = MAX_FRAME as usize;

/// What a read from the connection brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fill {
    /// Bytes; there may be more.
    Bytes,
    /// Nothing for now.
    Blocked,
    /// The peer closed its side.
    End,
}

/// Assembles frames from whatever pieces they arrive in.
#[derive(Debug, Default)]
pub(crate) struct FrameReader {
    decoder: Decoder,
}

impl FrameReader {
    /// Reads once. Call [`FrameReader::next`] until it returns `None` before filling again: that is
    /// what bounds the buffer to one frame and one read.
    pub(crate) fn fill(&mut self, from: &mut impl Read) -> io::Result<Fill> {
        let mut piece = [0; READ_SIZE];
        let length = loop {
            match from.read(&mut piece) {
                Ok(length) => break length,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Fill::Blocked),
                Err(e) => return Err(e),
            }
        };
        self.decoder.push(piece.get(..length).unwrap_or_default());
        Ok(if length == 0 { Fill::End } else { Fill::Bytes })
    }

    /// The next whole frame, if it has arrived.
    pub(crate) fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, FrameError> {
        self.decoder.take()
    }

    /// Whether bytes of an unfinished frame are waiting.
    pub(crate) fn is_mid_frame(&self) -> bool {
        !self.decoder.is_empty()
    }
}

/// Frames waiting for a peer to read them.
#[derive(Debug, Default)]
pub(crate) struct FrameWriter {
    bytes: Vec<u8>,
}

impl FrameWriter {
    /// Queues `message`; `false` if the peer is too far behind, and then nothing was queued.
    pub(crate) fn push<T: Serialize>(&mut self, message: &T) -> Result<bool, FrameError> {
        let frame = frame::encode(message)?;
        let fits =
            self.bytes.is_empty() || self.bytes.len().saturating_add(frame.len()) <= MAX_QUEUED;
        if fits {
            self.bytes.extend_from_slice(&frame);
        }
        Ok(fits)
    }

    /// Writes what the peer takes now.
    pub(crate) fn flush(&mut self, to: &mut impl Write) -> io::Result<()> {
        while !self.bytes.is_empty() {
            match to.write(&self.bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(length) => drop(self.bytes.drain(..length)),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Whether nothing is waiting.
    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cube_guest::{GuestEvent, GuestMessage};
    use proptest::prelude::*;

    /// A connection that gives at most `step` bytes per read, then would block.
    struct Trickle<'a> {
        bytes: &'a [u8],
        step: usize,
    }

    impl Read for Trickle<'_> {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            if self.bytes.is_empty() {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let length = self.step.min(into.len()).min(self.bytes.len());
            into[..length].copy_from_slice(&self.bytes[..length]);
            self.bytes = &self.bytes[length..];
            Ok(length)
        }
    }

    fn started(container: String) -> GuestMessage {
        GuestMessage::Event(GuestEvent::Started { container })
    }

    proptest! {
        #[test]
        fn frames_survive_any_fragmentation(
            names in prop::collection::vec("[a-z]{0,40}", 0..20),
            step in 1_usize..64,
        ) {
            let sent: Vec<GuestMessage> = names.into_iter().map(started).collect();
            let bytes: Vec<u8> = sent.iter().flat_map(|m| frame::encode(m).unwrap()).collect();
            let mut connection = Trickle { bytes: &bytes, step };
            let mut reader = FrameReader::default();
            let mut received = Vec::new();
            while reader.fill(&mut connection).unwrap() == Fill::Bytes {
                while let Some(message) = reader.next::<GuestMessage>().unwrap() {
                    received.push(message);
                }
            }
            prop_assert_eq!(sent, received);
            prop_assert!(!reader.is_mid_frame());
        }

        #[test]
        fn any_bytes_are_a_frame_an_error_or_a_wait(
            bytes in prop::collection::vec(any::<u8>(), 0..4096),
        ) {
            let mut reader = FrameReader::default();
            let mut connection = &bytes[..];
            while reader.fill(&mut connection).unwrap() == Fill::Bytes {
                while let Ok(Some(_)) = reader.next::<GuestMessage>() {}
            }
        }
    }

    #[test]
    fn a_length_over_the_limit_is_refused_before_its_bytes_arrive() {
        let mut reader = FrameReader::default();
        let bytes = (MAX_FRAME + 1).to_le_bytes();
        reader.fill(&mut &bytes[..]).unwrap();
        let error = reader.next::<GuestMessage>().unwrap_err();
        assert!(matches!(error, FrameError::TooLong(_)), "{error}");
    }

    #[test]
    fn a_peer_that_never_reads_costs_bounded_memory() {
        let mut writer = FrameWriter::default();
        let message = started("c".repeat(1000));
        let queued = (0..10_000)
            .take_while(|_| writer.push(&message).unwrap())
            .count();
        assert!((500..2000).contains(&queued), "{queued} frames queued");
        assert!(writer.bytes.len() <= MAX_QUEUED);
    }
}
