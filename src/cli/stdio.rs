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
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

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

/// The relays that run.
#[derive(Debug)]
pub(crate) struct Relays {
    wake: Arc<OwnedFd>,
    sender: Sender<RelayEnd>,
    ends: Receiver<RelayEnd>,
}

impl Relays {
    pub(crate) fn new() -> io::Result<Self> {
        let (sender, ends) = channel();
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self {
            wake: Arc::new(eventfd(0, flags)?),
            sender,
            ends,
        })
    }

    /// Relays `stream` to `output` until its end.
    pub(crate) fn output(&self, stream: UnixStream, output: Output) -> io::Result<()> {
        let to = output.open()?;
        let (sender, wake) = (self.sender.clone(), Arc::clone(&self.wake));
        spawn(output.name(), move || {
            let end = relay_output(&stream, &to)
                .map_err(|error| format!("cannot write to {}: {error}", output.name()));
            // The container must not wait for a reader that is gone; a terminal's input ends too.
            let _ = stream.shutdown(Shutdown::Both);
            drop(stream);
            // The receiver is gone only when the program ends.
            let _ = sender.send(end);
            let _ = rustix::io::write(&*wake, &1_u64.to_ne_bytes());
        })
    }

    /// Relays standard input to `stream` until either ends.
    pub(crate) fn input(&self, stream: UnixStream) -> io::Result<()> {
        let from = File::from(io::stdin().as_fd().try_clone_to_owned()?);
        spawn("standard input", move || {
            // A container that closed its input, or ended, is no error.
            let _ = relay_input(&from, &stream);
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

fn relay_input(mut from: &File, mut stream: &UnixStream) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_SIZE];
    loop {
        let mut fds = [
            PollFd::new(from, PollFlags::IN),
            // Nothing asked: a hang-up is always told.
            PollFd::new(stream, PollFlags::empty()),
        ];
        poll(&mut fds, None)?;
        if !fds[1].revents().is_empty() {
            return Ok(());
        }
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => stream.write_all(&buffer[..length])?,
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
        relay_input(&file(reader), &stream).unwrap();
        drop(stream);
        let mut received = String::new();
        guest.read_to_string(&mut received).unwrap();
        assert_eq!(received, "typed");
    }

    #[test]
    fn input_that_nobody_types_ends_with_its_stream() {
        let (guest, stream) = UnixStream::pair().unwrap();
        let (reader, _writer) = io::pipe().unwrap();
        let relaying = thread::spawn(move || relay_input(&file(reader), &stream));
        drop(guest);
        relaying.join().unwrap().unwrap();
    }
}
