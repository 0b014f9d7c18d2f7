//! One stream between a process in the guest and whoever is attached to it through the API.
//!
//! Bytes are copied in bounded pieces: the guest is read only when the log has them and every attached
//! client has taken the piece before. A slow client therefore delays its own stream and nothing else, and
//! what waits for it is one piece here and the stream's credit in the guest.
#![forbid(unsafe_code)]

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use rustix::event::PollFlags;

use super::log_file::{Line, LogFile};
use super::ready::Ready;

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
            had_client: false,
            input_closed: false,
            output_ended: false,
            line: Line::default(),
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
        !self.clients.is_empty()
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
                    Guest::Awaited | Guest::Ended => 0,
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
mod tests {
    use super::*;

    fn connected(kind: Kind, needs_client: bool) -> (Channel, UnixStream) {
        let (guest, host) = UnixStream::pair().unwrap();
        let mut channel = Channel::new(kind, 7, needs_client);
        channel.connect(host).unwrap();
        (channel, guest)
    }

    fn client(channel: &mut Channel) -> UnixStream {
        let (client, server) = UnixStream::pair().unwrap();
        server.set_nonblocking(true).unwrap();
        channel.attach(server, Vec::new());
        client
    }

    fn turns(channel: &mut Channel) {
        let mut buffer = [0; PIECE];
        for _ in 0..8 {
            let ready = Ready::everything();
            channel.turn(&ready, &mut buffer, None).unwrap();
        }
    }

    #[test]
    fn a_client_that_comes_after_the_end_sees_the_end() {
        let (mut channel, guest) = connected(Kind::Stderr, true);
        drop(guest);
        channel.end();
        let mut late = client(&mut channel);
        assert_eq!(late.read(&mut [0; 8]).unwrap(), 0);
        assert!(channel.is_complete() && channel.is_over());
    }

    #[test]
    fn output_waits_for_its_client_and_ends_with_the_process() {
        let (mut channel, mut guest) = connected(Kind::Stdout, true);
        guest.write_all(b"early").unwrap();
        turns(&mut channel);
        assert!(channel.is_complete(), "nobody reads: nobody waits");
        let mut reader = client(&mut channel);
        turns(&mut channel);
        assert!(!channel.is_complete());
        drop(guest);
        turns(&mut channel);
        assert!(channel.is_complete() && channel.is_over());
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "early");
    }

    #[test]
    fn a_slow_client_holds_one_piece_and_the_guest_back() {
        let (mut channel, guest) = connected(Kind::Stdout, true);
        let _slow = client(&mut channel);
        guest.set_nonblocking(true).unwrap();
        let mut sent = 0;
        for _ in 0..1000 {
            sent += (&guest).write(&[0; 4096]).unwrap_or(0);
            turns(&mut channel);
        }
        assert!(channel.clients[0].out.len() <= PIECE);
        assert!(sent < 4 << 20, "{sent} bytes were taken from the guest");
    }

    #[test]
    fn bytes_keep_their_order_whatever_each_side_takes_at_a_time() {
        let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
        let (mut channel, guest) = connected(Kind::Port, true);
        let there = client(&mut channel);
        let write = |mut side: &UnixStream, bytes: &[u8]| side.write_all(bytes).unwrap();
        let (to_guest, to_client) = (there.try_clone().unwrap(), guest.try_clone().unwrap());
        let (first, second) = (bytes.clone(), bytes.clone());
        let writers = [
            std::thread::spawn(move || {
                write(&to_guest, &first);
                to_guest.shutdown(Shutdown::Write).unwrap();
            }),
            std::thread::spawn(move || {
                write(&to_client, &second);
                to_client.shutdown(Shutdown::Write).unwrap();
            }),
        ];
        let readers = [there, guest].map(|mut side| {
            std::thread::spawn(move || {
                let mut received = Vec::new();
                // Less at a time than is written.
                let mut piece = [0; 7919];
                loop {
                    match side.read(&mut piece).unwrap() {
                        0 => return received,
                        length => received.extend_from_slice(&piece[..length]),
                    }
                }
            })
        });
        let mut buffer = [0; PIECE];
        while !channel.is_over() {
            let mut interests = Vec::new();
            channel.interests(&mut interests);
            let ready = Ready::wait(interests, None).unwrap();
            channel.turn(&ready, &mut buffer, None).unwrap();
        }
        drop(channel);
        for writer in writers {
            writer.join().unwrap();
        }
        for reader in readers {
            assert!(reader.join().unwrap() == bytes);
        }
    }

    #[test]
    fn a_port_has_an_end_each_way() {
        let (mut channel, mut guest) = connected(Kind::Port, true);
        let mut there = client(&mut channel);
        guest.write_all(b"all").unwrap();
        guest.shutdown(Shutdown::Write).unwrap();
        turns(&mut channel);
        let mut text = String::new();
        there.read_to_string(&mut text).unwrap();
        assert_eq!(text, "all");
        there.write_all(b"still").unwrap();
        turns(&mut channel);
        let mut bytes = [0; 5];
        guest.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"still");
        assert!(!channel.is_over());
        there.shutdown(Shutdown::Write).unwrap();
        turns(&mut channel);
        assert!(channel.is_over());
        drop(channel);
        assert_eq!(guest.read(&mut bytes).unwrap(), 0);
        // A guest that has gone altogether takes nothing, which is found when something is sent.
        let (mut channel, guest) = connected(Kind::Port, true);
        let mut there = client(&mut channel);
        drop(guest);
        turns(&mut channel);
        there.write_all(b"nobody").unwrap();
        turns(&mut channel);
        assert!(channel.is_over());
    }

    #[test]
    fn the_end_of_input_closes_the_guests() {
        let (mut channel, mut guest) = connected(Kind::Stdin, true);
        let mut writer = client(&mut channel);
        writer.write_all(b"typed").unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
        turns(&mut channel);
        let mut text = String::new();
        guest.read_to_string(&mut text).unwrap();
        assert_eq!(text, "typed");
    }

    #[test]
    fn a_shared_input_outlives_its_clients_and_ends_with_its_reader() {
        let (mut channel, mut guest) = connected(Kind::SharedStdin, false);
        for word in [b"one", b"two"] {
            let mut writer = client(&mut channel);
            writer.write_all(word).unwrap();
            drop(writer);
            turns(&mut channel);
            let mut read = [0; 3];
            guest.read_exact(&mut read).unwrap();
            assert_eq!(&read, word);
            assert!(!channel.has_client() && !channel.is_over());
        }
        drop(guest);
        let mut writer = client(&mut channel);
        writer.write_all(b"more").unwrap();
        turns(&mut channel);
        assert!(channel.is_over());
    }

    #[test]
    fn an_input_that_ended_before_the_guest_came_ends_then() {
        let mut channel = Channel::new(Kind::Stdin, 7, true);
        let writer = client(&mut channel);
        drop(writer);
        turns(&mut channel);
        let (mut guest, host) = UnixStream::pair().unwrap();
        channel.connect(host).unwrap();
        let mut interests = Vec::new();
        channel.interests(&mut interests);
        let ready = Ready::wait(interests, None).unwrap();
        channel.turn(&ready, &mut [0; PIECE], None).unwrap();
        assert_eq!(guest.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn a_port_whose_client_has_said_all_does_not_keep_the_loop_awake() {
        let (mut channel, _guest) = connected(Kind::Port, true);
        let writer = client(&mut channel);
        writer.shutdown(Shutdown::Write).unwrap();
        turns(&mut channel);
        let mut interests = Vec::new();
        channel.interests(&mut interests);
        let now = rustix::event::Timespec::default();
        assert!(Ready::wait(interests, Some(&now)).unwrap().is_empty());
    }

    #[test]
    fn what_is_not_ready_is_not_read() {
        let (mut channel, mut guest) = connected(Kind::Stdout, true);
        let mut reader = client(&mut channel);
        guest.write_all(b"x").unwrap();
        let mut buffer = [0; PIECE];
        let nothing = Ready::default();
        assert!(!channel.turn(&nothing, &mut buffer, None).unwrap());
        let mut interests = Vec::new();
        channel.interests(&mut interests);
        let ready = Ready::wait(interests, None).unwrap();
        assert!(channel.turn(&ready, &mut buffer, None).unwrap());
        let mut byte = [0];
        reader.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
    }

    #[test]
    fn a_terminal_goes_both_ways_and_outlives_its_clients() {
        let (mut channel, mut guest) = connected(Kind::Tty, false);
        let mut first = client(&mut channel);
        first.write_all(b"keys").unwrap();
        turns(&mut channel);
        let mut keys = [0; 4];
        guest.read_exact(&mut keys).unwrap();
        drop(first);
        guest.write_all(b"lost").unwrap();
        turns(&mut channel);
        let mut second = client(&mut channel);
        guest.write_all(b"seen").unwrap();
        turns(&mut channel);
        let mut seen = [0; 4];
        second.read_exact(&mut seen).unwrap();
        assert_eq!((&keys, &seen), (b"keys", b"seen"));
    }
}
