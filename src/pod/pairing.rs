//! Streams matched to their owners by token.
//!
//! Anything in the guest can dial the stream port. A stream counts only if it begins with a token
//! that the host drew for this pod and that was not used before; all others are dropped.
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

use std::collections::{BTreeSet, VecDeque};
use std::io::{self, Read};
use std::os::unix::net::UnixStream;

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
    expected: BTreeSet<u64>,
    nameless: VecDeque<Nameless>,
}

impl Pairing {
    /// A stream with `token` will come, once.
    pub(crate) fn expect(&mut self, token: u64) {
        self.expected.insert(token);
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

    /// Reads what arrived; returns the streams whose token was expected, in blocking mode.
    pub(crate) fn turn(&mut self) -> io::Result<Vec<(u64, UnixStream)>> {
        let mut paired = Vec::new();
        for mut nameless in std::mem::take(&mut self.nameless) {
            match nameless.read_token() {
                Named::NotYet => self.nameless.push_back(nameless),
                Named::Token(token) if self.expected.remove(&token) => {
                    nameless.stream.set_nonblocking(false)?;
                    paired.push((token, nameless.stream));
                }
                Named::Token(_) | Named::Ended => {}
            }
        }
        Ok(paired)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

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
        assert!(pairing.turn().unwrap().is_empty());
        guest.write_all(&7_u64.to_le_bytes()[3..]).unwrap();
        guest.write_all(b"data").unwrap();
        let (token, mut stream) = pairing.turn().unwrap().pop().unwrap();
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
            let streams = pairing.turn().unwrap();
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
        assert_eq!(pairing.turn().unwrap().len(), 1);
        assert!(pairing.waiting().count() <= MAX_NAMELESS);
        drop(silent);
        assert!(pairing.turn().unwrap().is_empty());
        assert_eq!(pairing.waiting().count(), 0, "closed ones are forgotten");
    }

    #[test]
    fn a_burst_of_expected_streams_is_kept_whole() {
        let tokens: Vec<u64> = (0..150).collect();
        let mut pairing = pairing(&tokens);
        let mut guests: Vec<UnixStream> = tokens.iter().map(|_| dial(&mut pairing)).collect();
        assert!(pairing.turn().unwrap().is_empty());
        for (guest, token) in guests.iter_mut().zip(&tokens) {
            guest.write_all(&token.to_le_bytes()).unwrap();
        }
        assert_eq!(pairing.turn().unwrap().len(), tokens.len());
    }

    #[test]
    fn tokens_differ() {
        let tokens: BTreeSet<u64> = (0..100).map(|_| new_token().unwrap()).collect();
        assert_eq!(tokens.len(), 100);
    }
}
