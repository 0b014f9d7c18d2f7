//! How a program of the host that has accepted a stream of the guest's passes it on to somebody else.
//!
//! It is then out of the way: the device moves the bytes between the guest and the new socket itself.
//!
//! ```text
//!  before   guest ══ device ── a ═ b ── program ── client
//!  after    guest ══ device ───────────────────── client          a ═ b stays, and ends with the stream
//! ```
//!
//! The program sends one byte over `b`, behind all that it has to say to the guest, and with it two descriptors
//! (`SCM_RIGHTS`, unix(7)): the client's socket, and `b` once more, from which the device takes what the guest has sent
//! there and the program has not read. It keeps `b`, reads no more from it, and finds it hung up when the stream has
//! ended.
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

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Descriptors of a message.
const DESCRIPTORS: usize = 2;

/// When a stream that was passed on is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// Both directions have ended, or one side has hung up.
    BothEnds,
    /// The guest sends no more: the client's socket is closed then, whether or not the client has ended its own.
    OutputEnds,
}

impl Until {
    fn to_byte(self) -> u8 {
        match self {
            Self::BothEnds => b'b',
            Self::OutputEnds => b'o',
        }
    }

    fn from_byte(byte: u8) -> Option<Self> {
        [Self::BothEnds, Self::OutputEnds]
            .into_iter()
            .find(|until| until.to_byte() == byte)
    }
}

/// What the device gets.
#[derive(Debug)]
pub struct PassedOn {
    /// Takes the stream's place on the host.
    pub client: UnixStream,
    /// What the guest sent before, and nobody has read.
    pub unread: UnixStream,
    /// When it is over.
    pub until: Until,
}

/// Passes the stream behind `accepted` on to `client`. All that was read from `accepted` must have reached the client,
/// all that the client has said so far must have been written there; afterwards the caller waits for its hang-up and
/// drops its own `client`.
///
/// # Errors
/// The operating system's; `WouldBlock` when there is no room for the byte. The stream is as it was then.
pub fn pass_on(accepted: &UnixStream, client: &UnixStream, until: Until) -> io::Result<()> {
    let descriptors = [client.as_fd(), accepted.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::ErrorKind::OutOfMemory.into());
    }
    let byte = [until.to_byte()];
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    sendmsg(accepted, &[IoSlice::new(&byte)], &mut control, flags)?;
    Ok(())
}

/// Reads once from a socket whose other end may pass the stream on. Returns the number of bytes for the guest, and
/// what was passed on behind them; 0 bytes and nothing else is the stream's end.
///
/// # Errors
/// The operating system's; `WouldBlock` when there is nothing now, `InvalidData` when what came with a byte is not what
/// [`pass_on`] sends.
pub fn receive(socket: &UnixStream, buffer: &mut [u8]) -> io::Result<(usize, Option<PassedOn>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, flags)?;
    let mut descriptors = control.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => descriptors.collect::<Vec<OwnedFd>>(),
        _ => Vec::new(),
    });
    let Some(client) = descriptors.next() else {
        return Ok((received.bytes, None));
    };
    // The kernel ends a read with the byte that brought descriptors.
    let data = received.bytes.saturating_sub(1);
    let until = buffer.get(data).and_then(|byte| Until::from_byte(*byte));
    match (descriptors.next(), until) {
        (Some(unread), Some(until)) => {
            let passed = PassedOn {
                client: client.into(),
                unread: unread.into(),
                until,
            };
            Ok((data, Some(passed)))
        }
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn what_was_said_before_comes_before() {
        let (device, mut program) = UnixStream::pair().unwrap();
        let (mut client, served) = UnixStream::pair().unwrap();
        (&device).write_all(b"unread").unwrap();
        program.write_all(b"first ").unwrap();
        program.write_all(b"words").unwrap();
        pass_on(&program, &served, Until::OutputEnds).unwrap();
        drop(served);
        let mut buffer = [0; 64];
        let (mut said, mut passed) = (Vec::new(), None);
        while passed.is_none() {
            let (length, then) = receive(&device, &mut buffer).unwrap();
            said.extend_from_slice(&buffer[..length]);
            passed = then;
        }
        assert_eq!(said, b"first words");
        let mut passed = passed.unwrap();
        assert_eq!(passed.until, Until::OutputEnds);
        let mut unread = [0; 6];
        passed.unread.read_exact(&mut unread).unwrap();
        assert_eq!(&unread, b"unread");
        passed.client.write_all(b"direct").unwrap();
        drop(passed);
        let mut direct = String::new();
        client.read_to_string(&mut direct).unwrap();
        assert_eq!(direct, "direct");
        assert!(
            matches!(receive(&device, &mut buffer), Err(e) if e.kind() == io::ErrorKind::WouldBlock)
        );
    }

    #[test]
    fn other_descriptors_are_no_stream() {
        let (device, program) = UnixStream::pair().unwrap();
        let send = |descriptors: &[std::os::fd::BorrowedFd<'_>], byte: u8| {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
            let bytes = [byte];
            let bytes = [IoSlice::new(&bytes)];
            sendmsg(&program, &bytes, &mut control, SendFlags::empty()).unwrap();
            receive(&device, &mut [0; 8]).unwrap_err().kind()
        };
        let fd = program.as_fd();
        assert_eq!(send(&[fd], b'b'), io::ErrorKind::InvalidData);
        assert_eq!(send(&[fd, fd], b'?'), io::ErrorKind::InvalidData);
        drop(program);
        assert_eq!(receive(&device, &mut [0; 8]).unwrap().0, 0);
    }
}
