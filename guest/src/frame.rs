//! Frames: a little-endian `u32` length, then that many bytes of JSON.
#![forbid(unsafe_code)]

use std::io::{self, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// The longest frame accepted, in bytes. Bulk data never rides in frames.
pub const MAX_FRAME: u32 = 1 << 20;

/// Why a frame could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The connection failed or ended within a frame.
    #[error("the control connection failed: {0}")]
    Io(#[from] io::Error),
    /// The peer announced more than [`MAX_FRAME`] bytes.
    #[error("a control frame of {0} bytes is longer than the {MAX_FRAME} allowed")]
    TooLong(u64),
    /// The bytes are not the message expected; the text names the field.
    #[error("a control frame is malformed: {0}")]
    Malformed(serde_json::Error),
}

/// Encodes `message` as one frame, length included.
///
/// # Errors
/// [`FrameError::TooLong`] if its JSON exceeds [`MAX_FRAME`].
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message).map_err(FrameError::Malformed)?;
    let length = bytes.len() - 4;
    match u32::try_from(length) {
        Ok(length) if length <= MAX_FRAME => bytes[..4].copy_from_slice(&length.to_le_bytes()),
        _ => return Err(FrameError::TooLong(length as u64)),
    }
    Ok(bytes)
}

/// Writes `message` as one frame.
///
/// # Errors
/// The connection's error, or a message over the limit.
pub fn write<T: Serialize>(to: &mut impl Write, message: &T) -> Result<(), FrameError> {
    Ok(to.write_all(&encode(message)?)?)
}

/// Reads one frame; `None` at a clean end of the connection.
///
/// # Errors
/// The connection's error, a frame over the limit, or bytes that are not a `T`.
pub fn read<T: DeserializeOwned>(from: &mut impl Read) -> Result<Option<T>, FrameError> {
    let mut length = [0; 4];
    match from.read(&mut length[..1])? {
        0 => return Ok(None),
        _ => from.read_exact(&mut length[1..])?,
    }
    let length = u32::from_le_bytes(length);
    if length > MAX_FRAME {
        return Err(FrameError::TooLong(length.into()));
    }
    let mut body = vec![0; length as usize];
    from.read_exact(&mut body)?;
    serde_json::from_slice(&body)
        .map(Some)
        .map_err(FrameError::Malformed)
}

/// Splits bytes that arrive in any pieces into frames: for a connection that never blocks.
///
/// Holds at most one unfinished frame, so at most [`MAX_FRAME`] bytes and what one `push` added.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
}

impl Decoder {
    /// Adds bytes that arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Takes the next whole frame out; `None` until more bytes arrive.
    ///
    /// # Errors
    /// A frame over the limit, or bytes that are not a `T`. The connection cannot be used any more.
    pub fn take<T: DeserializeOwned>(&mut self) -> Result<Option<T>, FrameError> {
        let Some((length, rest)) = self.buffer.split_first_chunk::<4>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*length);
        if length > MAX_FRAME {
            return Err(FrameError::TooLong(length.into()));
        }
        let Some(body) = rest.get(..length as usize) else {
            return Ok(None);
        };
        let message = serde_json::from_slice(body).map_err(FrameError::Malformed)?;
        self.buffer.drain(..4 + length as usize);
        if self.buffer.is_empty() {
            self.buffer = Vec::new();
        }
        Ok(Some(message))
    }

    /// Whether the connection ended between two frames.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::message::{HostMessage, HostRequest, ProcessId};

    fn signal(id: u64, container: String, signal: u8) -> HostMessage {
        HostMessage {
            id,
            request: HostRequest::Signal {
                process: ProcessId::Container(container),
                signal,
                all: false,
            },
        }
    }

    proptest! {
        #[test]
        fn frames_survive_any_split(
            contents in prop::collection::vec((any::<u64>(), ".{0,40}", any::<u8>()), 1..8),
            pieces in prop::collection::vec(1_usize..50, 1..200),
        ) {
            let sent: Vec<_> = contents.into_iter().map(|(i, c, s)| signal(i, c, s)).collect();
            let bytes: Vec<u8> = sent.iter().flat_map(|m| encode(m).unwrap()).collect();
            let (mut decoder, mut received, mut rest) = (Decoder::default(), vec![], &bytes[..]);
            for piece in pieces.iter().cycle() {
                let (now, later) = rest.split_at((*piece).min(rest.len()));
                decoder.push(now);
                while let Some(message) = decoder.take::<HostMessage>().unwrap() {
                    received.push(message);
                }
                rest = later;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert!(decoder.is_empty());
            prop_assert_eq!(received, sent);
        }

        #[test]
        fn any_bytes_are_an_error_or_wait_for_more(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let mut decoder = Decoder::default();
            decoder.push(&bytes);
            let from_decoder = decoder.take::<HostMessage>();
            let from_read = read::<HostMessage>(&mut &bytes[..]);
            prop_assert!(!matches!((&from_decoder, &from_read), (Ok(Some(_)), Err(_)) | (Err(_), Ok(Some(_)))));
        }
    }

    #[test]
    fn a_frame_over_the_limit_is_refused_before_its_body() {
        let mut decoder = Decoder::default();
        decoder.push(&(MAX_FRAME + 1).to_le_bytes());
        assert!(matches!(
            decoder.take::<HostMessage>(),
            Err(FrameError::TooLong(n)) if n == u64::from(MAX_FRAME) + 1
        ));
    }

    #[test]
    fn reading_stops_cleanly_between_frames_only() {
        let frame = encode(&signal(1, "c".into(), 15)).unwrap();
        let mut whole = &frame[..];
        assert!(read::<HostMessage>(&mut whole).unwrap().is_some());
        assert!(read::<HostMessage>(&mut whole).unwrap().is_none());
        assert!(matches!(
            read::<HostMessage>(&mut &frame[..frame.len() - 1]),
            Err(FrameError::Io(_))
        ));
    }
}
