//! One stream between a process in the guest and whoever is attached to it through the API.
//!
//! Bytes are copied in bounded pieces: the guest is read only when the log has them and every attached
//! client has taken the piece before. A slow client therefore delays its own stream and nothing else, and
//! what waits for it is one piece here and the stream's credit in the guest.
//!
//! A stream that has one client in its life and no log is not copied at all: when both ends are there it is passed on,
//! and the vsock device moves its bytes (`vmm/virtio/vsock/passing.rs`).
#![forbid(unsafe_code)]

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use rustix::event::PollFlags;

use super::log_file::{Line, LogFile};
use super::ready::Ready;
use crate::vmm::virtio::vsock::passing::{self, Until};

/// Bytes copied at a time: the size of the buffer that every channel is turned with.
pub(crate) const PIECE: usize = 64 << 10;

/// What a stream carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Client to guest; its client's end closes the guest's input.
    Stdin,
    /// Client to guest, for clients that come and go: the end of one is not the input's.
    SharedStdin,
    /// Guest to client.
    Stdout,
    /// Guest to client.
    Stderr,
    /// Both ways; the client's end means that it goes, not that the terminal does.
    Tty,
    /// Both ways, each with an end of its own: a forwarded port.
    Port,
    /// Guest to client: a file's content.
    File,
}

impl Kind {
    /// The name in the API and, of an output, in the log.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Stdin | Self::SharedStdin => "stdin",
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
            Self::Tty => "tty",
            Self::Port => "port",
            Self::File => "file",
        }
    }

    fn has_output(self) -> bool {
        !self.is_stdin()
    }

    fn has_input(self) -> bool {
        !matches!(self, Self::Stdout | Self::Stderr | Self::File)
    }

    /// Whether it is a standard input, which takes one client at a time.
    pub(crate) fn is_stdin(self) -> bool {
        matches!(self, Self::Stdin | Self::SharedStdin)
    }

    /// Whether a client's end is its going, and not the stream's end.
    fn outlives_clients(self) -> bool {
        matches!(self, Self::Tty | Self::SharedStdin)
    }

    /// A terminal's output is logged as standard output.
    fn log_name(self) -> &'static str {
        match self {
            Self::Stderr => "stderr",
            _ => "stdout",
        }
    }
}

#[derive(Debug)]
enum Guest {
    Awaited,
    Connected(UnixStream),
    /// Its bytes pass us by; it hangs up when the stream has ended.
    PassedOn(UnixStream),
    Ended,
}

#[derive(Debug)]
struct Client {
    socket: UnixStream,
    /// On its way to the client.
    out: Vec<u8>,
    /// On its way to the guest.
    input: Vec<u8>,
    input_ended: bool,
    /// It was told that no more output comes.
    output_closed: bool,
}

/// The stream.
#[derive(Debug)]
pub(crate) struct Channel {
    kind: Kind,
    token: u64,
    guest: Guest,
    clients: Vec<Client>,
    /// Nothing is read without a client: there is no log that takes it.
    needs_client: bool,
    /// Its first client is its only one.
    for_one_client: bool,
    had_client: bool,
    /// The guest was told that no more input comes.
    input_closed: bool,
    /// The guest says that no more output comes, and may take input all the same.
    output_ended: bool,
    line: Line,
}

impl Channel {
    /// A stream that the guest will dial with `token`.
    pub(crate) fn new(kind: Kind, token: u64, needs_client: bool) -> Self {
        Self {
            kind,
            token,
            guest: Guest::Awaited,
            clients: Vec::new(),
            needs_client,
            for_one_client: false,
            had_client: false,
            input_closed: false,
            output_ended: false,
            line: Line::default(),
        }
    }

    /// One that nobody can attach to after its first client, and that has no log.
    pub(crate) fn for_one_client(kind: Kind, token: u64) -> Self {
        Self {
            for_one_client: true,
            ..Self::new(kind, token, true)
        }
    }

    /// What it carries.
    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// The token that it has, or had.
    pub(crate) fn token(&self) -> u64 {
        self.token
    }

    /// Takes the guest's end.
    pub(crate) fn connect(&mut self, stream: UnixStream) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        self.guest = Guest::Connected(stream);
        Ok(())
    }

    /// Takes a client, whose first bytes came with its request. One that comes after the end sees just that.
    pub(crate) fn attach(&mut self, socket: UnixStream, first: Vec<u8>) {
        self.had_client = true;
        if matches!(self.guest, Guest::Ended) {
            return;
        }
        self.clients.push(Client {
            socket,
            out: Vec::new(),
            input: first,
            input_ended: false,
            output_closed: false,
        });
    }

    /// Whether it has a client: an input takes one at a time.
    pub(crate) fn has_client(&self) -> bool {
        !self.clients.is_empty() || matches!(self.guest, Guest::PassedOn(_))
    }

    /// Leaves the stream to the device, if nothing of it is here and nobody else will come for it.
    pub(crate) fn pass_on(&mut self) {
        let until = match self.kind {
            Kind::Stdin | Kind::Port => Until::BothEnds,
            Kind::Stdout | Kind::Stderr => Until::OutputEnds,
            // Those survive their clients, or begin with an answer.
            Kind::SharedStdin | Kind::Tty | Kind::File => return,
        };
        let ([client], Guest::Connected(stream), true) =
            (&self.clients[..], &self.guest, self.for_one_client)
        else {
            return;
        };
        let is_here = !client.out.is_empty() || !client.input.is_empty();
        if is_here || client.input_ended || self.output_ended {
            return;
        }
        // What cannot be passed on now is copied, and tried again.
        if passing::pass_on(stream, &client.socket, until).is_ok() {
            self.clients.clear();
            if let Guest::Connected(stream) = std::mem::replace(&mut self.guest, Guest::Ended) {
                self.guest = Guest::PassedOn(stream);
            }
        }
    }

    /// Whether every byte of output has gone where it should; an output that nobody ever attached to and no
    /// log takes holds nobody up.
    pub(crate) fn is_complete(&self) -> bool {
        if !self.kind.has_output() {
            return true;
        }
        let unread = self.needs_client && !self.had_client;
        let delivered = self.clients.iter().all(|client| client.out.is_empty());
        unread || (matches!(self.guest, Guest::Ended) && delivered)
    }

    /// Whether a client has still to take what was read for it.
    pub(crate) fn is_owed(&self) -> bool {
        self.clients.iter().any(|client| !client.out.is_empty())
    }

    /// Whether nothing is left of it.
    pub(crate) fn is_over(&self) -> bool {
        matches!(self.guest, Guest::Ended) && self.clients.is_empty()
    }

    /// Ends it: the process behind it has gone, or never came.
    pub(crate) fn end(&mut self) {
        self.guest = Guest::Ended;
    }

    fn wants_output(&self) -> bool {
        self.kind.has_output()
            && !self.output_ended
            && matches!(self.guest, Guest::Connected(_))
            && (!self.needs_client || self.had_client)
            && self.clients.iter().all(|client| client.out.is_empty())
    }

    /// Descriptors to poll, level-triggered.
    pub(crate) fn interests<'a>(&'a self, into: &mut Vec<(BorrowedFd<'a>, PollFlags)>) {
        let mut has_input = false;
        for client in &self.clients {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::OUT, !client.out.is_empty());
            let reads = self.kind.has_input() && client.input.is_empty() && !client.input_ended;
            flags.set(PollFlags::IN, reads);
            let ends = client.input_ended && !self.input_closed;
            has_input |= ends || !client.input.is_empty();
            // A client that is asked nothing is not polled: its hang-up would wake the loop for ever.
            if !flags.is_empty() {
                into.push((client.socket.as_fd(), flags));
            }
        }
        if let Guest::PassedOn(stream) = &self.guest {
            into.push((stream.as_fd(), PollFlags::empty()));
        }
        if let Guest::Connected(stream) = &self.guest {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, self.wants_output());
            flags.set(PollFlags::OUT, has_input);
            if !flags.is_empty() {
                into.push((stream.as_fd(), flags));
            }
        }
    }

    /// Copies what is ready through `buffer`, of [`PIECE`] bytes. Returns whether output went to the log.
    ///
    /// # Errors
    /// The log cannot be written.
    pub(crate) fn turn(
        &mut self,
        ready: &Ready,
        buffer: &mut [u8],
        mut log: Option<&mut LogFile>,
    ) -> io::Result<bool> {
        if matches!(&self.guest, Guest::PassedOn(stream) if ready.has(stream)) {
            self.guest = Guest::Ended;
        }
        let (kind, guest) = (self.kind, &mut self.guest);
        let mut hung_up = false;
        self.clients.retain_mut(|client| {
            let stays = !ready.has(&client.socket)
                || (client.flush() && (!kind.has_input() || client.read(kind, buffer, guest)));
            hung_up |= !stays;
            stays
        });
        self.pass_input(ready);
        if hung_up && self.needs_client && self.clients.is_empty() {
            // As a pipe whose reader is gone.
            self.guest = Guest::Ended;
        }
        let mut logged = false;
        if self.wants_output() {
            logged = self.pass_output(ready, buffer, log.as_deref_mut())?;
        }
        if self.output_ended {
            self.clients.iter_mut().for_each(Client::end_output);
        }
        if matches!(self.guest, Guest::Ended) {
            if let Some(log) = log {
                log.end(kind.log_name(), &mut self.line)?;
            }
            // What is dropped is closed, which is how a client sees the end.
            self.clients.retain(|client| !client.out.is_empty());
        }
        Ok(logged)
    }

    fn pass_output(
        &mut self,
        ready: &Ready,
        buffer: &mut [u8],
        log: Option<&mut LogFile>,
    ) -> io::Result<bool> {
        let Guest::Connected(stream) = &mut self.guest else {
            return Ok(false);
        };
        if !ready.has(stream) {
            return Ok(false);
        }
        let length = match stream.read(buffer) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return Ok(false),
            Ok(0) if self.kind == Kind::Port && !self.input_closed => {
                self.output_ended = true;
                return Ok(true);
            }
            Ok(0) | Err(_) => {
                self.guest = Guest::Ended;
                return Ok(true);
            }
            Ok(length) => length,
        };
        let piece = &buffer[..length];
        // First the log: what a client has seen is in it. One that cannot be written costs clients nothing.
        let logged = match log {
            Some(log) => log.write(self.kind.log_name(), &mut self.line, piece),
            None => Ok(()),
        };
        for client in &mut self.clients {
            client.give(piece);
        }
        logged.map(|()| true)
    }

    fn pass_input(&mut self, ready: &Ready) {
        let Guest::Connected(stream) = &mut self.guest else {
            return;
        };
        // What a client has just sent is tried at once; what the guest did not take before waits for it.
        let sent = |client: &Client| ready.has(&client.socket);
        if !ready.has(stream) && !self.clients.iter().any(sent) {
            return;
        }
        let mut broken = false;
        for client in &mut self.clients {
            // One that is broken: the process closed its input.
            broken = broken || !flush(&mut client.input, stream);
            if broken {
                client.input.clear();
            }
        }
        let ended = |client: &Client| client.input_ended && client.input.is_empty();
        if self.input_closed || (!self.clients.iter().any(ended) && !broken) {
            return;
        }
        match self.kind {
            Kind::Stdin => self.guest = Guest::Ended,
            Kind::Port if self.output_ended => self.guest = Guest::Ended,
            Kind::Port => {
                self.input_closed = true;
                drop(stream.shutdown(Shutdown::Write));
            }
            Kind::SharedStdin if broken => self.guest = Guest::Ended,
            Kind::SharedStdin | Kind::Tty | Kind::Stdout | Kind::Stderr | Kind::File => {}
        }
    }
}

impl Client {
    /// Writes what it takes now; `false` if it has gone.
    fn flush(&mut self) -> bool {
        flush(&mut self.out, &mut self.socket)
    }

    /// Says, once it has everything, that no more output comes.
    fn end_output(&mut self) {
        if self.out.is_empty() && !std::mem::replace(&mut self.output_closed, true) {
            // One that has gone is found when it is read.
            drop(self.socket.shutdown(Shutdown::Write));
        }
    }

    /// Writes `piece`, and keeps what it does not take now; whether it has gone is seen later.
    fn give(&mut self, piece: &[u8]) {
        let taken = push(piece, &mut self.socket).unwrap_or(0);
        self.out.extend_from_slice(&piece[taken..]);
    }

    /// Reads what came, if the guest has taken what came before, and passes on what the guest takes now; `false` if
    /// the client has gone.
    fn read(&mut self, kind: Kind, buffer: &mut [u8], guest: &mut Guest) -> bool {
        if self.input_ended || !self.input.is_empty() {
            return true;
        }
        match self.socket.read(buffer) {
            Ok(0) if kind.outlives_clients() => return false,
            Ok(0) => self.input_ended = true,
            Ok(length) => {
                let piece = &buffer[..length];
                let taken = match guest {
                    // One that takes no more for good is found when the rest is tried.
                    Guest::Connected(stream) => push(piece, stream).unwrap_or(0),
                    Guest::Awaited | Guest::PassedOn(_) | Guest::Ended => 0,
                };
                self.input.extend_from_slice(&piece[taken..]);
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return false,
        }
        true
    }
}

/// Writes until everything is written or there is no room; how much was. What was written before an error counts: the
/// next write finds the error again.
fn push(bytes: &[u8], to: &mut UnixStream) -> io::Result<usize> {
    let mut written = 0;
    while written < bytes.len() {
        match to.write(&bytes[written..]) {
            Ok(length @ 1..) => written += length,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
            _ if written > 0 => break,
            Ok(_) => return Err(io::ErrorKind::WriteZero.into()),
            Err(error) => return Err(error),
        }
    }
    Ok(written)
}

/// Writes what is taken now of what waits; `false` if nobody takes it any more.
fn flush(waiting: &mut Vec<u8>, to: &mut UnixStream) -> bool {
    if waiting.is_empty() {
        return true;
    }
    let written = push(waiting, to);
    waiting.drain(..*written.as_ref().unwrap_or(&0));
    written.is_ok()
}

#[cfg(test)]
mod tests;
