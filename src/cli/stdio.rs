//! Copies between this process's standard streams and the container's: a thread per direction, so that a
//! reader that is slow on one stream holds up nothing else.
//!
//! An output's relay ends at the stream's end of file, after everything was written here. The input's
//! ends at end of file here, which it passes on, or when the stream is closed.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::client::ApiError;

const BUFFER_SIZE: usize = 64 << 10;

/// Where an output goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Output {
    fn name(self) -> &'static str {
        match self {
            Self::Stdout => "standard output",
            Self::Stderr => "standard error",
        }
    }

    /// A duplicate without the library's line buffer.
    fn open(self) -> io::Result<File> {
        let descriptor = match self {
            Self::Stdout => io::stdout().as_fd().try_clone_to_owned(),
            Self::Stderr => io::stderr().as_fd().try_clone_to_owned(),
        };
        Ok(descriptor?.into())
    }
}

/// An output was relayed to its end. The error is a sentence; a reader that went away is none.
pub(crate) type RelayEnd = Result<(), String>;

/// Gives a stream, on the thread that relays it: the pod may be slow to answer.
pub(crate) trait Open: FnOnce() -> Result<UnixStream, ApiError> + Send + 'static {}

impl<F: FnOnce() -> Result<UnixStream, ApiError> + Send + 'static> Open for F {}

/// The relays that run.
#[derive(Debug)]
pub(crate) struct Relays {
    wake: Arc<OwnedFd>,
    sender: Sender<RelayEnd>,
    ends: Receiver<RelayEnd>,
    /// With keys that leave: whether they were typed.
    left: Option<Arc<AtomicBool>>,
}

impl Relays {
    pub(crate) fn new() -> io::Result<Self> {
        let (sender, ends) = channel();
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self {
            wake: Arc::new(eventfd(0, flags)?),
            sender,
            ends,
            left: None,
        })
    }

    /// From now on Ctrl-P Ctrl-Q in the input ends the input's relay.
    pub(crate) fn leave_by_keys(&mut self) {
        self.left = Some(Arc::default());
    }

    /// Whether these keys were typed.
    pub(crate) fn were_left(&self) -> bool {
        self.left
            .as_ref()
            .is_some_and(|left| left.load(Ordering::Relaxed))
    }

    /// Relays the stream that `open` gives to `output` until its end.
    pub(crate) fn output(&self, open: impl Open, output: Output) -> io::Result<()> {
        let to = output.open()?;
        let (sender, wake) = (self.sender.clone(), Arc::clone(&self.wake));
        spawn(output.name(), move || {
            let end = match open() {
                Ok(stream) => {
                    let end = relay_output(&stream, &to)
                        .map_err(|error| format!("cannot write to {}: {error}", output.name()));
                    // The container must not wait for a reader that is gone; a terminal's input ends too.
                    let _ = stream.shutdown(Shutdown::Both);
                    end
                }
                // The pod's end is reported elsewhere.
                Err(ApiError::Io(_)) => Ok(()),
                Err(error) => Err(format!("there is no {}: {error}", output.name())),
            };
            // The receiver is gone only when the program ends.
            let _ = sender.send(end);
            let _ = rustix::io::write(&*wake, &1_u64.to_ne_bytes());
        })
    }

    /// Relays standard input to the stream that `open` gives until either ends.
    pub(crate) fn input(&self, open: impl Open) -> io::Result<()> {
        let from = File::from(io::stdin().as_fd().try_clone_to_owned()?);
        let left = self.left.clone();
        spawn("standard input", move || {
            // Without a stream there is nobody to read it.
            let Ok(stream) = open() else { return };
            // A container that closed its input, or ended, is no error.
            let keys = left.is_some().then(Keys::default);
            if let (Ok(true), Some(left)) = (relay_input(&from, &stream, keys), left) {
                left.store(true, Ordering::Relaxed);
            }
            let _ = stream.shutdown(Shutdown::Write);
        })
    }

    /// Readable when an output's relay has ended.
    pub(crate) fn interest(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// The ends since the last call.
    pub(crate) fn ended(&self) -> Vec<RelayEnd> {
        let _ = rustix::io::read(&*self.wake, &mut [0; 8]);
        self.ends.try_iter().collect()
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name.to_owned()).spawn(body)?;
    Ok(())
}

fn relay_output(mut stream: &UnixStream, to: &File) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_SIZE];
    loop {
        let length = match stream.read(&mut buffer) {
            // A machine that dies resets its connections; its end is reported elsewhere.
            Ok(0) => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
            Ok(length) => length,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        match write_all(to, &buffer[..length]) {
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            result => result?,
        }
    }
}

/// Also for a descriptor that somebody has made non-blocking: the flag is shared with other processes.
fn write_all(mut to: &File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match to.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(length) => bytes = &bytes[length..],
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                poll(&mut [PollFd::new(to, PollFlags::OUT)], None)?;
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// The keys that leave a terminal, wherever they are cut.
#[derive(Debug, Default)]
struct Keys {
    /// Ctrl-P was typed, and nothing since.
    held: bool,
}

impl Keys {
    const FIRST: u8 = 0x10;
    const SECOND: u8 = 0x11;

    /// What of `typed` goes on; `None`: the keys were among it.
    fn filter(&mut self, typed: &[u8]) -> Option<Vec<u8>> {
        let mut on = Vec::with_capacity(typed.len() + 1);
        for byte in typed {
            if std::mem::take(&mut self.held) {
                if *byte == Self::SECOND {
                    return None;
                }
                on.push(Self::FIRST);
            }
            match *byte {
                Self::FIRST => self.held = true,
                byte => on.push(byte),
            }
        }
        Some(on)
    }
}

/// Returns whether it was left by `keys`.
fn relay_input(
    mut from: &File,
    mut stream: &UnixStream,
    mut keys: Option<Keys>,
) -> io::Result<bool> {
    let mut buffer = vec![0; BUFFER_SIZE];
    loop {
        let mut fds = [
            PollFd::new(from, PollFlags::IN),
            // Nothing asked: a hang-up is always told.
            PollFd::new(stream, PollFlags::empty()),
        ];
        poll(&mut fds, None)?;
        if !fds[1].revents().is_empty() {
            return Ok(false);
        }
        match from.read(&mut buffer) {
            Ok(0) => return Ok(false),
            Ok(length) => match &mut keys {
                None => stream.write_all(&buffer[..length])?,
                Some(keys) => match keys.filter(&buffer[..length]) {
                    Some(typed) => stream.write_all(&typed)?,
                    None => return Ok(true),
                },
            },
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;

    fn file(fd: impl Into<OwnedFd>) -> File {
        File::from(fd.into())
    }

    #[test]
    fn an_output_is_written_whole_to_a_slow_reader() {
        let (guest, stream) = UnixStream::pair().unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        rustix::io::ioctl_fionbio(&writer, true).unwrap();
        let sent: Vec<u8> = (0..3_000_000_u32).map(|i| (i % 251) as u8).collect();
        let to_send = sent.clone();
        let sending = thread::spawn(move || (&guest).write_all(&to_send).unwrap());
        let relaying = thread::spawn(move || relay_output(&stream, &file(writer)));
        let mut received = Vec::new();
        reader.read_to_end(&mut received).unwrap();
        assert!(received == sent);
        sending.join().unwrap();
        relaying.join().unwrap().unwrap();
    }

    #[test]
    fn an_output_whose_reader_is_gone_is_closed_and_no_error() {
        let (guest, stream) = UnixStream::pair().unwrap();
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        (&guest).write_all(b"for nobody").unwrap();
        relay_output(&stream, &file(writer)).unwrap();
        drop(stream);
        let error = (&guest).write_all(b"more").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_full_device_is_an_error() {
        let (guest, stream) = UnixStream::pair().unwrap();
        (&guest).write_all(b"too much").unwrap();
        let full = File::options().write(true).open("/dev/full").unwrap();
        assert!(relay_output(&stream, &full).is_err());
    }

    #[test]
    fn input_passes_on_and_ends_at_end_of_file() {
        let (mut guest, stream) = UnixStream::pair().unwrap();
        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(b"typed").unwrap();
        drop(writer);
        relay_input(&file(reader), &stream, None).unwrap();
        drop(stream);
        let mut received = String::new();
        guest.read_to_string(&mut received).unwrap();
        assert_eq!(received, "typed");
    }

    #[test]
    fn two_keys_leave_and_every_other_goes_on() {
        let mut keys = Keys::default();
        assert_eq!(keys.filter(b"ab\x10"), Some(b"ab".to_vec()));
        assert_eq!(keys.filter(b"\x10c\x11"), Some(b"\x10\x10c\x11".to_vec()));
        assert_eq!(keys.filter(b"\x10"), Some(Vec::new()));
        assert_eq!(keys.filter(b"\x11rest"), None);
        let (_guest, stream) = UnixStream::pair().unwrap();
        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(b"x\x10\x11").unwrap();
        assert!(relay_input(&file(reader), &stream, Some(Keys::default())).unwrap());
    }

    #[test]
    fn input_that_nobody_types_ends_with_its_stream() {
        let (guest, stream) = UnixStream::pair().unwrap();
        let (reader, _writer) = io::pipe().unwrap();
        let relaying = thread::spawn(move || relay_input(&file(reader), &stream, None));
        drop(guest);
        relaying.join().unwrap().unwrap();
    }
}
