//! One stream: bytes between a vsock connection and a pipe, a terminal or a socket in the pod.
//!
//! ```text
//!  Connecting ──▶ open ───────────────────────────────────────────────▶ done
//!      │            to host:  read source → write socket, at its end: shutdown, then wait for the host
//!      │            to child: read socket → write sink, at its end: close the sink
//!      └─ refused ─────────────────────────────────────────────────────▶ done
//! ```
//! Nothing blocks and nothing is read that there was no room for: bytes that could not be written stay in
//! the stream (at most one buffer's worth), and until they are gone the reading side is not watched. So a
//! slow reader stops its writer and nobody else.
//!
//! A stream that the host broke off closes the container's end: a broken pipe, as between two programs.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};

use cube_guest::TerminalSize;
use rustix::event::epoll::EventFlags;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{Errno, Result};
use rustix::net::{RecvFlags, SendFlags, Shutdown};
use rustix::pipe::SpliceFlags;
use rustix::termios::Winsize;
use rustix::time::Timespec;

use crate::events::{Poller, Source, Watched};

/// What the kernel adds to a packet's bytes in the same piece of memory, rounded up: the header of 44 bytes, and 320 for
/// its own use, both to whole cache lines.
const PACKET_OVERHEAD: usize = 512;
/// Bytes moved at a time: what a packet of vsock carries whose memory is one piece of 64 KiB. Each packet costs a kick,
/// an interrupt and three switches of threads, so they should be long.
pub(crate) const BUFFER: usize = (64 << 10) - PACKET_OVERHEAD;
/// Sizes of packets for when the kernel finds no piece of memory that is long enough: for one of more than 32 KiB it does
/// not look hard, and one page there is as long as there is memory at all.
const PACKETS: [usize; 4] = [
    BUFFER,
    (32 << 10) - PACKET_OVERHEAD,
    (16 << 10) - PACKET_OVERHEAD,
    (4 << 10) - PACKET_OVERHEAD,
];

/// The container's end of a stream.
#[derive(Debug)]
pub(crate) enum End {
    /// The reading end of a pipe that the container writes.
    Output(OwnedFd),
    /// The writing end of a pipe that the container reads.
    Input(OwnedFd),
    /// The master of its terminal, non-blocking, twice: each direction is watched by itself.
    Terminal(OwnedFd, OwnedFd),
    /// A connected, non-blocking socket, twice.
    Socket(OwnedFd, OwnedFd),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Pipe,
    Terminal,
    Socket,
}

/// A stream from its token to its end.
#[derive(Debug)]
pub(crate) struct Stream {
    socket: Watched,
    connected: bool,
    /// What the container writes; gone after its end.
    source: Option<Watched>,
    /// What the container reads; gone after its end.
    sink: Option<Watched>,
    /// Read and not yet written. The token is the first thing the host gets.
    to_host: Pending,
    to_child: Pending,
    kind: Kind,
    has_output: bool,
    /// The host was told of the source's end.
    told_end: bool,
    /// The host sends nothing more.
    host_ended: bool,
    /// The pipe to the container takes nothing now.
    pipe_is_full: bool,
}

#[derive(Debug, Default)]
struct Pending {
    bytes: Vec<u8>,
    written: usize,
}

/// How a step of socket → sink went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// What was there was moved, or is pending.
    Moved,
    /// The pipe has no room.
    Full,
    /// Nobody reads the sink.
    Broken,
    /// The host sends nothing more.
    HostEnded,
    /// The connection is broken.
    HostBroke,
}

/// How a write went.
#[derive(Debug, PartialEq, Eq)]
enum Progress {
    /// Everything was written.
    Whole,
    /// The rest is pending.
    Full,
    /// The reader is gone.
    Broken,
}

impl Stream {
    /// A stream over `socket`, which is connecting; `source` is what its events are called.
    pub(crate) fn new(socket: OwnedFd, token: u64, end: End, source: Source) -> Self {
        let watched = |fd| Some(Watched::new(fd, source));
        let (kind, has_output) = match end {
            End::Output(_) => (Kind::Pipe, true),
            End::Input(_) => (Kind::Pipe, false),
            End::Terminal(..) => (Kind::Terminal, true),
            End::Socket(..) => (Kind::Socket, true),
        };
        let (output, input) = match end {
            End::Output(output) => (watched(output), None),
            End::Input(input) => (None, watched(input)),
            End::Terminal(output, input) | End::Socket(output, input) => {
                (watched(output), watched(input))
            }
        };
        Self {
            socket: Watched::new(socket, source),
            connected: false,
            source: output,
            sink: input,
            to_host: Pending {
                bytes: token.to_le_bytes().to_vec(),
                written: 0,
            },
            to_child: Pending::default(),
            kind,
            has_output,
            told_end: false,
            host_ended: false,
            pipe_is_full: false,
        }
    }

    /// Does what can be done now, a buffer's worth in each direction at most, and says whether the
    /// stream is done.
    pub(crate) fn turn(&mut self, poller: &Poller, buffer: &mut [u8]) -> Result<bool> {
        if !self.connected {
            match connection(&self.socket) {
                Ok(connected) => self.connected = connected,
                Err(_) => return Ok(true),
            }
        }
        if self.connected
            && (self.towards_host(poller, buffer) || self.towards_child(poller, buffer))
        {
            return Ok(true);
        }
        self.rearm(poller)?;
        Ok(false)
    }

    /// Closes everything that is left.
    pub(crate) fn close(self, poller: &Poller) {
        for watched in [Some(self.socket), self.source, self.sink]
            .into_iter()
            .flatten()
        {
            watched.close(poller);
        }
    }

    /// Changes the terminal's size.
    pub(crate) fn resize(&self, size: TerminalSize) -> Result<()> {
        match &self.source {
            Some(terminal) if self.kind == Kind::Terminal => {
                rustix::termios::tcsetwinsize(terminal, winsize(size))
            }
            _ => Err(Errno::NOTTY),
        }
    }

    /// One step of source → socket. Returns whether the stream is done.
    fn towards_host(&mut self, poller: &Poller, buffer: &mut [u8]) -> bool {
        let send = |bytes: &[u8]| {
            in_packets(bytes, |packet| {
                rustix::net::send(&self.socket, packet, SendFlags::NOSIGNAL)
            })
        };
        match self.to_host.flush(send) {
            Progress::Whole => {}
            Progress::Full => return false,
            Progress::Broken => return true,
        }
        if let Some(source) = &self.source {
            match rustix::io::read(source, &mut *buffer) {
                Ok(read @ 1..) => {
                    return self.to_host.write(&buffer[..read], send) == Progress::Broken;
                }
                Err(Errno::AGAIN | Errno::INTR) => return false,
                // A terminal's end is EIO: its last user has closed it.
                Ok(0) | Err(_) => {}
            }
            close(&mut self.source, poller);
            if self.kind == Kind::Terminal {
                close(&mut self.sink, poller);
            }
        }
        if self.has_output && !self.told_end {
            self.told_end = true;
            return rustix::net::shutdown(&self.socket, Shutdown::Write).is_err();
        }
        false
    }

    /// One step of socket → sink. Returns whether the stream is done.
    fn towards_child(&mut self, poller: &Poller, buffer: &mut [u8]) -> bool {
        let step = match &self.sink {
            Some(pipe) if self.kind == Kind::Pipe => splice(&self.socket, pipe),
            _ => self.copy_to_child(buffer),
        };
        self.pipe_is_full = step == Step::Full;
        match step {
            Step::Moved | Step::Full => {}
            Step::HostEnded => self.host_ended = true,
            Step::Broken => {
                self.to_child = Pending::default();
                close(&mut self.sink, poller);
            }
            Step::HostBroke => return true,
        }
        // A terminal stays open when the host has nothing more to type.
        if self.host_ended && self.to_child.is_empty() && self.kind != Kind::Terminal {
            if self.kind == Kind::Socket
                && let Some(sink) = &self.sink
            {
                let _ = rustix::net::shutdown(sink, Shutdown::Write);
            }
            close(&mut self.sink, poller);
        }
        match self.has_output {
            true => self.told_end && self.host_ended,
            false => self.sink.is_none(),
        }
    }

    /// Through `buffer`, to what cannot be spliced to.
    fn copy_to_child(&mut self, buffer: &mut [u8]) -> Step {
        let write = |bytes: &[u8]| match &self.sink {
            Some(sink) => rustix::io::write(sink, bytes),
            // Nobody reads it: what the host still sends is dropped.
            None => Ok(bytes.len()),
        };
        match self.to_child.flush(write) {
            Progress::Whole => {}
            Progress::Full => return Step::Moved,
            Progress::Broken => return Step::Broken,
        }
        if self.sink.as_ref().is_some_and(reader_is_gone) {
            return Step::Broken;
        }
        if self.host_ended {
            return Step::Moved;
        }
        match rustix::net::recv(&self.socket, &mut *buffer, RecvFlags::empty()) {
            Ok((_, read @ 1..)) => match self.to_child.write(&buffer[..read], write) {
                Progress::Whole | Progress::Full => Step::Moved,
                Progress::Broken => Step::Broken,
            },
            Ok((_, 0)) => Step::HostEnded,
            Err(Errno::AGAIN | Errno::INTR) => Step::Moved,
            Err(_) => Step::HostBroke,
        }
    }

    /// Watches exactly what the next step waits for.
    fn rearm(&mut self, poller: &Poller) -> Result<()> {
        let when = |condition: bool, flags| condition.then_some(flags);
        if !self.connected {
            return self.socket.watch(poller, Some(EventFlags::OUT));
        }
        let mut socket = EventFlags::empty();
        socket.set(EventFlags::OUT, !self.to_host.is_empty());
        let waiting = !self.to_child.is_empty() || self.pipe_is_full;
        socket.set(EventFlags::IN, !waiting && !self.host_ended);
        self.socket
            .watch(poller, when(!socket.is_empty(), socket))?;
        if let Some(source) = &mut self.source {
            source.watch(poller, when(self.to_host.is_empty(), EventFlags::IN))?;
        }
        if let Some(sink) = &mut self.sink {
            // A pipe with no flags reports that its reader is gone. A terminal reports that at its source.
            let idle = when(self.kind != Kind::Terminal, EventFlags::empty());
            sink.watch(poller, if waiting { Some(EventFlags::OUT) } else { idle })?;
        }
        Ok(())
    }
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Writes what is pending.
    fn flush(&mut self, write: impl Fn(&[u8]) -> Result<usize>) -> Progress {
        let bytes = std::mem::take(&mut self.bytes);
        let written = std::mem::take(&mut self.written);
        match push(&bytes[written..], write) {
            Ok(more) if written + more < bytes.len() => {
                *self = Self {
                    bytes,
                    written: written + more,
                };
                Progress::Full
            }
            Ok(_) => Progress::Whole,
            Err(_) => Progress::Broken,
        }
    }

    /// Writes `bytes` with nothing pending before them, and keeps what did not fit.
    fn write(&mut self, bytes: &[u8], write: impl Fn(&[u8]) -> Result<usize>) -> Progress {
        match push(bytes, write) {
            Ok(written) if written < bytes.len() => {
                self.bytes = bytes[written..].to_vec();
                Progress::Full
            }
            Ok(_) => Progress::Whole,
            Err(_) => Progress::Broken,
        }
    }
}

/// Writes until everything is written or there is no room; returns how much was.
fn push(bytes: &[u8], write: impl Fn(&[u8]) -> Result<usize>) -> Result<usize> {
    let mut written = 0;
    while written < bytes.len() {
        match write(&bytes[written..]) {
            Ok(more) => written += more,
            Err(Errno::AGAIN) => break,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(written)
}

/// Sends `bytes`, or as much of them as the kernel finds memory for in one piece.
fn in_packets(bytes: &[u8], send: impl Fn(&[u8]) -> Result<usize>) -> Result<usize> {
    for most in PACKETS {
        match send(&bytes[..bytes.len().min(most)]) {
            Err(Errno::NOMEM) => {}
            sent => return sent,
        }
    }
    Err(Errno::NOMEM)
}

/// Lets the kernel move what has come from the host into the container's pipe: copied once, into the pages that the
/// container reads, and in one call.
fn splice(socket: impl AsFd, pipe: impl AsFd) -> Step {
    let room = ready(&pipe, PollFlags::OUT);
    if room.contains(PollFlags::ERR) {
        return Step::Broken;
    }
    if !room.contains(PollFlags::OUT) {
        return Step::Full;
    }
    match rustix::pipe::splice(socket, None, pipe, None, BUFFER, SpliceFlags::NONBLOCK) {
        Ok(1..) | Err(Errno::AGAIN | Errno::INTR) => Step::Moved,
        Ok(0) => Step::HostEnded,
        Err(Errno::PIPE) => Step::Broken,
        Err(_) => Step::HostBroke,
    }
}

/// Whether a non-blocking connect is done.
///
/// # Errors
/// It failed.
pub(crate) fn connection(socket: impl AsFd) -> Result<bool> {
    if ready(&socket, PollFlags::OUT).is_empty() {
        return Ok(false);
    }
    rustix::net::sockopt::socket_error(&socket)??;
    Ok(true)
}

/// Whether nobody has the reading end of the pipe `sink` open.
fn reader_is_gone(sink: impl AsFd) -> bool {
    ready(&sink, PollFlags::empty()).contains(PollFlags::ERR)
}

/// What a poll that does not wait says.
fn ready(fd: &impl AsFd, flags: PollFlags) -> PollFlags {
    let mut fds = [PollFd::new(fd, flags)];
    match poll(&mut fds, Some(&Timespec::default())) {
        Ok(_) => fds[0].revents(),
        Err(_) => PollFlags::empty(),
    }
}

fn close(watched: &mut Option<Watched>, poller: &Poller) {
    if let Some(watched) = watched.take() {
        watched.close(poller);
    }
}

/// The kernel's form of a terminal's size.
pub(crate) fn winsize(size: TerminalSize) -> Winsize {
    Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

#[cfg(test)]
mod tests;
