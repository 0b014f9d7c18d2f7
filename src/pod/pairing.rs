//! Streams matched to their owners by token.
//!
//! Anything in the guest can dial the stream port. A stream counts only if it begins with a token
//! that the host drew for this pod and that was not used before; all others are dropped.
//!
//! A stream whose process has ended is waited for until a deadline, and then is one that ended without a byte: the
//! guest may have failed to dial it, and whoever waits for its end waits for nothing.
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

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::rand::{GetRandomFlags, getrandom};

/// Connections that may wait for their token at one time, beyond one for each token that is expected: the agent
/// dials all streams of a burst of requests before it says the first token. A further one displaces the oldest.
const MAX_NAMELESS: usize = 32;
/// Bytes of a token, little-endian.
const TOKEN_SIZE: usize = 8;

/// Draws a stream token: 64 random bits.
///
/// # Errors
/// The kernel's random source is not available.
pub fn new_token() -> io::Result<u64> {
    let mut bytes = [0; TOKEN_SIZE];
    // Requests of up to 256 bytes are served whole.
    getrandom(&mut bytes, GetRandomFlags::empty())?;
    Ok(u64::from_le_bytes(bytes))
}

/// A connection whose token has not arrived in full.
#[derive(Debug)]
struct Nameless {
    stream: UnixStream,
    token: [u8; TOKEN_SIZE],
    filled: usize,
}

/// What a connection is so far.
enum Named {
    NotYet,
    Token(u64),
    Ended,
}

impl Nameless {
    fn read_token(&mut self) -> Named {
        while self.filled < TOKEN_SIZE {
            let rest = self.token.get_mut(self.filled..).unwrap_or_default();
            match self.stream.read(rest) {
                Ok(0) => return Named::Ended,
                Ok(length) => self.filled = self.filled.saturating_add(length),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Named::NotYet,
                Err(_) => return Named::Ended,
            }
        }
        Named::Token(u64::from_le_bytes(self.token))
    }
}

/// The tokens expected and the connections that have not shown theirs.
#[derive(Debug, Default)]
pub(crate) struct Pairing {
    /// With the time until which it is waited for, if there is one.
    expected: BTreeMap<u64, Option<Instant>>,
    nameless: VecDeque<Nameless>,
}

impl Pairing {
    /// A stream with `token` will come, once.
    pub(crate) fn expect(&mut self, token: u64) {
        self.expected.insert(token, None);
    }

    /// The stream with `token`, if it has not come, comes until `by` or not at all.
    pub(crate) fn expect_until(&mut self, token: u64, by: Instant) {
        if let Some(until) = self.expected.get_mut(&token) {
            *until = Some(by);
        }
    }

    /// Whether no connection has to say its token, and no stream is waited for with a deadline.
    pub(crate) fn is_idle(&self) -> bool {
        self.nameless.is_empty() && self.deadline().is_none()
    }

    /// When the first stream is overdue.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.expected.values().flatten().min().copied()
    }

    /// No stream with `token` will come.
    pub(crate) fn forget(&mut self, token: u64) {
        self.expected.remove(&token);
    }

    /// Takes a connection in.
    pub(crate) fn adopt(&mut self, stream: UnixStream) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        if self.nameless.len() >= self.expected.len().saturating_add(MAX_NAMELESS) {
            self.nameless.pop_front();
        }
        self.nameless.push_back(Nameless {
            stream,
            token: [0; TOKEN_SIZE],
            filled: 0,
        });
        Ok(())
    }

    /// Connections to poll for reading.
    pub(crate) fn waiting(&self) -> impl Iterator<Item = &UnixStream> {
        self.nameless.iter().map(|nameless| &nameless.stream)
    }

    /// Reads what arrived; returns the streams whose token was expected, in blocking mode, and for each that is
    /// overdue `now` one that has ended.
    pub(crate) fn turn(&mut self, now: Instant) -> io::Result<Vec<(u64, UnixStream)>> {
        let mut paired = Vec::new();
        for mut nameless in std::mem::take(&mut self.nameless) {
            match nameless.read_token() {
                Named::NotYet => self.nameless.push_back(nameless),
                Named::Token(token) if self.expected.remove(&token).is_some() => {
                    nameless.stream.set_nonblocking(false)?;
                    paired.push((token, nameless.stream));
                }
                Named::Token(_) | Named::Ended => {}
            }
        }
        self.give_up(now, &mut paired)?;
        Ok(paired)
    }

    fn give_up(&mut self, now: Instant, paired: &mut Vec<(u64, UnixStream)>) -> io::Result<()> {
        let is_late = |until: &Option<Instant>| until.is_some_and(|until| until <= now);
        let late = self.expected.iter().filter(|(_, until)| is_late(until));
        for token in late.map(|(token, _)| *token).collect::<Vec<_>>() {
            let (ended, _) = UnixStream::pair()?;
            self.expected.remove(&token);
            paired.push((token, ended));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::io::Write;
    use std::time::Duration;

    fn pairing(tokens: &[u64]) -> Pairing {
        let mut pairing = Pairing::default();
        tokens.iter().for_each(|token| pairing.expect(*token));
        pairing
    }

    fn dial(pairing: &mut Pairing) -> UnixStream {
        let (guest, host) = UnixStream::pair().unwrap();
        pairing.adopt(host).unwrap();
        guest
    }

    #[test]
    fn a_token_in_pieces_pairs_and_leaves_the_data_behind_it() {
        let mut pairing = pairing(&[7]);
        let mut guest = dial(&mut pairing);
        guest.write_all(&7_u64.to_le_bytes()[..3]).unwrap();
        assert!(pairing.turn(Instant::now()).unwrap().is_empty());
        guest.write_all(&7_u64.to_le_bytes()[3..]).unwrap();
        guest.write_all(b"data").unwrap();
        let (token, mut stream) = pairing.turn(Instant::now()).unwrap().pop().unwrap();
        let mut data = [0; 4];
        stream.read_exact(&mut data).unwrap();
        assert_eq!((token, &data), (7, b"data"));
    }

    #[test]
    fn an_unknown_or_used_token_is_dropped() {
        let mut pairing = pairing(&[7]);
        for (token, paired) in [(8_u64, 0), (7, 1), (7, 0)] {
            let mut guest = dial(&mut pairing);
            guest.write_all(&token.to_le_bytes()).unwrap();
            let streams = pairing.turn(Instant::now()).unwrap();
            assert_eq!(streams.len(), paired, "token {token}");
            drop(streams);
            assert_eq!(guest.read(&mut [0]).unwrap(), 0, "the host closed it");
        }
    }

    #[test]
    fn silent_connections_are_bounded_and_do_not_lock_others_out() {
        let mut pairing = pairing(&[7]);
        let silent: Vec<UnixStream> = (0..200).map(|_| dial(&mut pairing)).collect();
        let mut guest = dial(&mut pairing);
        guest.write_all(&7_u64.to_le_bytes()).unwrap();
        assert_eq!(pairing.turn(Instant::now()).unwrap().len(), 1);
        assert!(pairing.waiting().count() <= MAX_NAMELESS);
        drop(silent);
        assert!(pairing.turn(Instant::now()).unwrap().is_empty());
        assert_eq!(pairing.waiting().count(), 0, "closed ones are forgotten");
    }

    #[test]
    fn a_burst_of_expected_streams_is_kept_whole() {
        let tokens: Vec<u64> = (0..150).collect();
        let mut pairing = pairing(&tokens);
        let mut guests: Vec<UnixStream> = tokens.iter().map(|_| dial(&mut pairing)).collect();
        assert!(pairing.turn(Instant::now()).unwrap().is_empty());
        for (guest, token) in guests.iter_mut().zip(&tokens) {
            guest.write_all(&token.to_le_bytes()).unwrap();
        }
        assert_eq!(pairing.turn(Instant::now()).unwrap().len(), tokens.len());
    }

    #[test]
    fn what_is_overdue_is_a_stream_that_has_ended_and_does_not_come_any_more() {
        let mut pairing = pairing(&[7, 8]);
        let by = Instant::now();
        pairing.expect_until(7, by);
        pairing.expect_until(9, by);
        assert_eq!(pairing.deadline(), Some(by));
        assert!(
            pairing
                .turn(by - Duration::from_millis(1))
                .unwrap()
                .is_empty()
        );
        let (token, mut stream) = pairing.turn(by).unwrap().pop().unwrap();
        assert_eq!((token, stream.read(&mut [0]).unwrap()), (7, 0));
        assert_eq!(pairing.deadline(), None);
        let mut guest = dial(&mut pairing);
        guest.write_all(&7_u64.to_le_bytes()).unwrap();
        assert!(pairing.turn(by).unwrap().is_empty());
    }

    #[test]
    fn what_comes_in_time_is_not_overdue() {
        let mut pairing = pairing(&[7]);
        let by = Instant::now();
        pairing.expect_until(7, by);
        let mut guest = dial(&mut pairing);
        guest.write_all(&7_u64.to_le_bytes()).unwrap();
        guest.write_all(b"x").unwrap();
        let (_, mut stream) = pairing.turn(by).unwrap().pop().unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 1);
    }

    #[test]
    fn tokens_differ() {
        let tokens: BTreeSet<u64> = (0..100).map(|_| new_token().unwrap()).collect();
        assert_eq!(tokens.len(), 100);
    }
}
