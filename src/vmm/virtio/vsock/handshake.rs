//! A client's first line: `CONNECT <port>\n`, the dialect of Firecracker and Cloud Hypervisor.
//!
//! Nothing after the line is taken from the socket: a client may send its first bytes without waiting
//! for the `OK`.
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
use std::os::unix::net::UnixStream;

use rustix::net::RecvFlags;

/// The longest line, newline included: "CONNECT 4294967295\n" and some blanks.
const LINE_MAX: usize = 32;

/// How far a client is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// The line is not complete.
    Partial,
    /// The guest's port that the client asks for.
    Port(u32),
    /// The client is gone, or its line is not of the dialect: drop it.
    Invalid,
}

/// Looks at what the client has sent; takes the line when it is complete.
pub fn advance(client: &UnixStream) -> Progress {
    let mut line = [0; LINE_MAX];
    let seen = match receive(client, &mut line, RecvFlags::PEEK) {
        Ok(0) => return Progress::Invalid,
        Ok(seen) => seen,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Progress::Partial,
        Err(_) => return Progress::Invalid,
    };
    let line = line.get(..seen).unwrap_or_default();
    let Some(end) = line.iter().position(|byte| *byte == b'\n') else {
        return if seen < LINE_MAX && may_become_a_line(line) {
            Progress::Partial
        } else {
            Progress::Invalid
        };
    };
    let Some(port) = line.get(..end).and_then(parse) else {
        return Progress::Invalid;
    };
    let mut taken = [0; LINE_MAX];
    let Some(taken) = taken.get_mut(..end.saturating_add(1)) else {
        return Progress::Invalid;
    };
    // The bytes are there: this side alone reads the socket.
    match receive(client, taken, RecvFlags::empty()) {
        Ok(n) if n == taken.len() => Progress::Port(port),
        _ => Progress::Invalid,
    }
}

/// Only a prefix of the keyword, or the keyword and more, is worth waiting for.
fn may_become_a_line(line: &[u8]) -> bool {
    line.iter()
        .zip(b"CONNECT ")
        .all(|(byte, expected)| byte.eq_ignore_ascii_case(expected))
}

/// The port of a line without its newline. The keyword's case does not matter, as in Firecracker.
fn parse(line: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(line).ok()?;
    let mut words = line.split_ascii_whitespace();
    let keyword = words.next()?;
    let port = words.next()?;
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    (keyword.eq_ignore_ascii_case("connect") && words.next().is_none() && digits)
        .then(|| port.parse().ok())
        .flatten()
}

fn receive(client: &UnixStream, buffer: &mut [u8], flags: RecvFlags) -> io::Result<usize> {
    loop {
        match rustix::net::recv(client, &mut *buffer, flags) {
            Ok((n, _)) => return Ok(n),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use proptest::prelude::*;

    use super::*;

    fn pair() -> (UnixStream, UnixStream) {
        let (ours, client) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (ours, client)
    }

    #[test]
    fn the_line_is_taken_and_nothing_after_it() {
        let (mut ours, mut client) = pair();
        assert_eq!(advance(&ours), Progress::Partial);
        client.write_all(b"CONN").unwrap();
        assert_eq!(advance(&ours), Progress::Partial);
        client.write_all(b"ECT 52\nhello").unwrap();
        assert_eq!(advance(&ours), Progress::Port(52));
        drop(client);
        let mut rest = String::new();
        ours.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "hello");
    }

    #[test]
    fn other_lines_are_invalid_as_soon_as_they_can_be_told() {
        for line in [
            "GET / HTTP/1.1\r\n",
            "GET",
            "\n",
            "CONNECT\n",
            "CONNECT x\n",
            "CONNECT -1\n",
            "CONNECT +1\n",
            "CONNECT 4294967296\n",
            "CONNECT 1 2\n",
            "CONNECT 1                          ",
            "CONNECT \u{e9}\n",
        ] {
            let (ours, mut client) = pair();
            client.write_all(line.as_bytes()).unwrap();
            assert_eq!(advance(&ours), Progress::Invalid, "{line:?}");
        }
        let (ours, client) = pair();
        drop(client);
        assert_eq!(advance(&ours), Progress::Invalid);
    }

    #[test]
    fn case_blanks_and_carriage_returns_are_forgiven() {
        for line in ["connect 7\n", "CONNECT  7\n", "CONNECT 7\r\n"] {
            let (ours, mut client) = pair();
            client.write_all(line.as_bytes()).unwrap();
            assert_eq!(advance(&ours), Progress::Port(7), "{line:?}");
        }
    }

    proptest! {
        #[test]
        fn any_port_parses_and_any_bytes_do_not_panic(port in any::<u32>(), bytes in any::<Vec<u8>>()) {
            prop_assert_eq!(parse(format!("CONNECT {port}").as_bytes()), Some(port));
            let _ = parse(&bytes);
        }
    }
}
