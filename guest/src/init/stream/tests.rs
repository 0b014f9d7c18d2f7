#![forbid(unsafe_code)]
//! The host's side of a stream is a Unix socket pair here: the state machine cannot tell.

use proptest::prelude::*;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::pipe::{PipeFlags, pipe_with};

use super::*;

const TOKEN: u64 = 0x0102_0304_0506_0708;

struct Fixture {
    poller: Poller,
    stream: Stream,
    /// The host's end.
    host: OwnedFd,
    /// The container's end.
    child: Option<OwnedFd>,
    buffer: Vec<u8>,
}

fn sockets() -> (OwnedFd, OwnedFd) {
    socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::NONBLOCK,
        None,
    )
    .unwrap()
}

fn fixture(output: bool) -> Fixture {
    let (host, socket) = sockets();
    let (reader, writer) = pipe_with(PipeFlags::NONBLOCK).unwrap();
    let (end, child) = match output {
        true => (End::Output(reader), writer),
        false => (End::Input(writer), reader),
    };
    Fixture {
        poller: Poller::new().unwrap(),
        stream: Stream::new(socket, TOKEN, end, Source::Stream(0)),
        host,
        child: Some(child),
        buffer: vec![0; BUFFER],
    }
}

impl Fixture {
    fn turn(&mut self) -> bool {
        self.stream.turn(&self.poller, &mut self.buffer).unwrap()
    }

    /// Waits for an event, then takes a turn: a stream that waits for the wrong thing hangs here.
    fn wait(&mut self) -> bool {
        self.poller.wait().unwrap();
        self.turn()
    }

    fn write(&self, bytes: &[u8]) -> usize {
        rustix::io::write(self.child.as_ref().unwrap(), bytes).unwrap_or(0)
    }

    fn host_reads(&self) -> Option<Vec<u8>> {
        read(&self.host)
    }
}

/// What is there now; empty at the end, `None` if there is nothing yet.
fn read(from: &OwnedFd) -> Option<Vec<u8>> {
    let mut buffer = vec![0; 8192];
    match rustix::io::read(from, &mut buffer) {
        Ok(read) => {
            buffer.truncate(read);
            Some(buffer)
        }
        Err(Errno::AGAIN) => None,
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn output_begins_with_the_token_and_ends_after_the_host_has_read_all() {
    let mut it = fixture(true);
    assert!(!it.turn());
    assert_eq!(it.host_reads().unwrap(), TOKEN.to_le_bytes());
    it.write(b"hello");
    assert!(!it.wait());
    assert_eq!(it.host_reads().unwrap(), b"hello");
    it.child = None;
    assert!(!it.wait());
    assert_eq!(it.host_reads().unwrap(), b"");
    rustix::net::shutdown(&it.host, Shutdown::Both).unwrap();
    assert!(it.wait());
}

#[test]
fn a_full_host_stops_the_container_and_nothing_is_lost() {
    let mut it = fixture(true);
    let mut sent = vec![];
    // Until neither the socket, the stream nor the pipe takes more.
    for number in 0_u32.. {
        let bytes = number.to_le_bytes().repeat(1024);
        let written = it.write(&bytes);
        sent.extend_from_slice(&bytes[..written]);
        it.turn();
        if written == 0 && !it.stream.to_host.is_empty() {
            break;
        }
    }
    assert!(it.stream.to_host.bytes.len() <= BUFFER);
    it.child = None;
    let mut received = vec![];
    loop {
        match it.host_reads() {
            Some(bytes) if bytes.is_empty() => break,
            Some(bytes) => received.extend(bytes),
            None => assert!(!it.wait()),
        }
    }
    assert_eq!(&received[..8], TOKEN.to_le_bytes());
    assert!(received[8..] == sent);
}

#[test]
fn a_host_that_leaves_breaks_the_containers_pipe() {
    let mut it = fixture(true);
    it.turn();
    let Fixture {
        poller,
        mut stream,
        host,
        child,
        mut buffer,
    } = it;
    drop(host);
    rustix::io::write(child.as_ref().unwrap(), b"more").unwrap();
    while !stream.turn(&poller, &mut buffer).unwrap() {
        poller.wait().unwrap();
    }
    stream.close(&poller);
    assert_eq!(
        rustix::io::write(child.unwrap(), b"more").unwrap_err(),
        Errno::PIPE
    );
}

#[test]
fn a_host_that_only_stops_sending_still_gets_the_output() {
    let mut it = fixture(true);
    it.turn();
    rustix::net::shutdown(&it.host, Shutdown::Write).unwrap();
    assert!(!it.wait());
    it.host_reads().unwrap();
    it.write(b"late");
    assert!(!it.wait());
    assert_eq!(it.host_reads().unwrap(), b"late");
    it.child = None;
    assert!(it.wait());
}

#[test]
fn input_reaches_the_container_and_its_end_does_too() {
    let mut it = fixture(false);
    it.turn();
    it.host_reads().unwrap();
    rustix::io::write(&it.host, b"typed").unwrap();
    assert!(!it.wait());
    assert_eq!(read(it.child.as_ref().unwrap()).unwrap(), b"typed");
    rustix::net::shutdown(&it.host, Shutdown::Write).unwrap();
    assert!(it.wait());
    assert_eq!(read(it.child.as_ref().unwrap()).unwrap(), b"");
}

#[test]
fn input_waits_for_a_container_that_does_not_read() {
    let mut it = fixture(false);
    it.turn();
    it.host_reads().unwrap();
    let mut sent = 0_usize;
    while !it.stream.pipe_is_full {
        sent += rustix::io::write(&it.host, &[7; 4096]).unwrap_or(0);
        it.turn();
    }
    rustix::net::shutdown(&it.host, Shutdown::Write).unwrap();
    let mut received = 0;
    loop {
        match read(it.child.as_ref().unwrap()) {
            Some(bytes) if bytes.is_empty() => break,
            Some(bytes) => received += bytes.len(),
            None => drop(it.wait()),
        }
    }
    assert_eq!(received, sent);
}

#[test]
fn a_container_that_closes_its_input_ends_the_stream() {
    let mut it = fixture(false);
    it.turn();
    it.host_reads().unwrap();
    it.child = None;
    assert!(it.wait());
    let Fixture {
        poller,
        stream,
        host,
        ..
    } = it;
    stream.close(&poller);
    assert_eq!(read(&host).unwrap(), b"");
}

#[test]
fn a_terminal_carries_both_directions_and_ends_with_its_last_user() {
    use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY;
    let master = openpt(flags).unwrap();
    unlockpt(&master).unwrap();
    let slave = ioctl_tiocgptpeer(&master, flags).unwrap();
    rustix::io::ioctl_fionbio(&master, true).unwrap();
    let again = master.try_clone().unwrap();
    let (host, socket) = sockets();
    let mut it = Fixture {
        poller: Poller::new().unwrap(),
        stream: Stream::new(
            socket,
            TOKEN,
            End::Terminal(master, again),
            Source::Stream(0),
        ),
        host,
        child: Some(slave),
        buffer: vec![0; BUFFER],
    };
    assert!(!it.turn());
    assert_eq!(it.host_reads().unwrap(), TOKEN.to_le_bytes());
    it.write(b"prompt");
    assert!(!it.wait());
    assert_eq!(it.host_reads().unwrap(), b"prompt");
    rustix::io::write(&it.host, b"line\r").unwrap();
    assert!(!it.wait());
    assert_eq!(read(it.child.as_ref().unwrap()).unwrap(), b"line\n");
    it.stream
        .resize(TerminalSize {
            rows: 12,
            columns: 34,
        })
        .unwrap();
    let size = rustix::termios::tcgetwinsize(it.child.as_ref().unwrap()).unwrap();
    assert_eq!((size.ws_row, size.ws_col), (12, 34));
    it.write(b"last words");
    it.child = None;
    let mut received = vec![];
    loop {
        match it.host_reads() {
            Some(bytes) if bytes.is_empty() => break,
            Some(bytes) => received.extend(bytes),
            None => assert!(!it.wait()),
        }
    }
    assert_eq!(received, b"line\r\nlast words");
    rustix::net::shutdown(&it.host, Shutdown::Both).unwrap();
    assert!(it.wait());
}

#[test]
fn a_packet_that_finds_no_memory_is_sent_shorter() {
    let most = std::cell::Cell::new(0);
    let send = |packet: &[u8]| match packet.len() <= most.get() {
        true => Ok(packet.len()),
        false => Err(Errno::NOMEM),
    };
    let bytes = vec![0; BUFFER];
    for size in PACKETS {
        most.set(size);
        assert_eq!(in_packets(&bytes, send), Ok(size));
        assert_eq!(push(&bytes, |rest| in_packets(rest, send)), Ok(BUFFER));
    }
    // A page is found as long as there is memory, and there is an end to it.
    assert!(PACKETS[3] + PACKET_OVERHEAD <= 4096);
    most.set(PACKETS[3] - 1);
    assert_eq!(in_packets(&bytes, send), Err(Errno::NOMEM));
}

#[test]
fn input_goes_to_its_pipe_in_one_piece_and_in_order() {
    let mut it = fixture(false);
    it.turn();
    it.host_reads().unwrap();
    let bytes: Vec<u8> = (0..60_000_u32).map(|n| (n % 251) as u8).collect();
    assert_eq!(rustix::io::write(&it.host, &bytes).unwrap(), bytes.len());
    assert!(!it.wait());
    assert!(it.stream.to_child.is_empty(), "nothing of it is copied");
    let mut received = vec![];
    while let Some(piece) = read(it.child.as_ref().unwrap()) {
        received.extend(piece);
        if received.len() < bytes.len() {
            it.turn();
        }
    }
    assert!(received == bytes);
}

proptest! {
    #[test]
    fn pending_bytes_keep_their_order_whatever_room_there_is(
        chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..50), 1..20),
        rooms in prop::collection::vec(0_usize..20, 1..50),
    ) {
        let written = std::cell::RefCell::new(vec![]);
        let rooms = std::cell::RefCell::new(rooms.into_iter().chain(std::iter::repeat(5)));
        let write = |bytes: &[u8]| match rooms.borrow_mut().next().unwrap().min(bytes.len()) {
            0 => Err(Errno::AGAIN),
            room => {
                written.borrow_mut().extend_from_slice(&bytes[..room]);
                Ok(room)
            }
        };
        let mut pending = Pending::default();
        for chunk in &chunks {
            pending.write(chunk, write);
            while pending.flush(write) != Progress::Whole {}
        }
        prop_assert!(pending.is_empty());
        prop_assert_eq!(written.into_inner(), chunks.concat());
    }
}
