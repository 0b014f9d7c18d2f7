//! A guest's vsock driver: packets in and out, and streams on the device's own protocol machine.
use std::collections::{HashMap, VecDeque};
use std::io::{ErrorKind, Read};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{Ordering, fence};

use cube::vmm::virtio::vsock::connection::{Connection, Received};
use cube::vmm::virtio::vsock::packet::{HEADER_LEN, HOST_CID, Header, Op, TYPE_STREAM};
use cube::vmm::virtio::vsock::{Limits, RX_QUEUE, TX_QUEUE, Vsock};

use vm_memory::{Bytes, GuestAddress};

use crate::driver::{Buffer, Driver, DriverQueue};

pub const CID: u32 = 42;
const QUEUE: u16 = 128;
/// As Linux sends them.
pub const MAX_PAYLOAD: usize = 64 << 10;
const HEADER: u32 = HEADER_LEN as u32;

/// A machine with one vsock device, and its driver.
pub struct Guest {
    pub driver: Driver,
    pub rx: DriverQueue,
    pub tx: DriverQueue,
    pub event: DriverQueue,
    pub dir: tempfile::TempDir,
    /// Address of each buffer that the device holds, by head.
    rx_held: HashMap<u16, u64>,
    tx_held: HashMap<u16, u64>,
    tx_free: Vec<u64>,
    rx_payload: u32,
    /// Per queue: chains added ever, and when the device was last told.
    rx_added: (u16, u16),
    tx_added: (u16, u16),
    /// Packets that came while one of another stream was awaited.
    stash: VecDeque<(Header, Vec<u8>)>,
    /// Register writes that a real guest would exit for.
    pub kicks: u64,
    next_port: u32,
}

/// One stream, from the guest's side.
pub struct Peer {
    pub connection: Connection,
    pub host: u32,
    pub guest: u32,
}

impl Guest {
    pub fn new() -> Self {
        Self::with(|vsock| vsock)
    }

    pub fn with_limits(limits: Limits) -> Self {
        Self::with(|vsock| vsock.with_limits(limits))
    }

    pub fn with(change: impl FnOnce(Vsock) -> Vsock) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let vsock = Vsock::new(CID, &dir.path().join("v.sock")).unwrap();
        Self::with_device(change(vsock), dir)
    }

    pub fn with_device(vsock: Vsock, dir: tempfile::TempDir) -> Self {
        let mut guest = Self::without_buffers(vsock, dir);
        guest.fill_rx(100, 4096);
        guest
    }

    /// A driver that has given the device no buffers to receive with.
    pub fn without_buffers(vsock: Vsock, dir: tempfile::TempDir) -> Self {
        let driver = Driver::new(Box::new(vsock));
        let (rx, tx, event) = Self::start(&driver);
        let mut guest = Self {
            driver,
            rx,
            tx,
            event,
            dir,
            rx_held: HashMap::new(),
            tx_held: HashMap::new(),
            tx_free: Vec::new(),
            rx_payload: 0,
            rx_added: (0, 0),
            tx_added: (0, 0),
            stash: VecDeque::new(),
            kicks: 0,
            next_port: 50_000,
        };
        guest.allocate_tx();
        guest
    }

    fn start(driver: &Driver) -> (DriverQueue, DriverQueue, DriverQueue) {
        let mut queues = driver.start(&[QUEUE, QUEUE, 16]).into_iter();
        let mut next = || queues.next().unwrap();
        (next(), next(), next())
    }

    fn allocate_tx(&mut self) {
        for _ in 0..100 {
            let at = self.driver.alloc((HEADER_LEN + MAX_PAYLOAD) as u32);
            self.tx_free.push(at);
        }
    }

    /// Resets the device, and starts it again with empty queues.
    pub fn restart(&mut self) {
        self.driver.reset();
        (self.rx, self.tx, self.event) = Self::start(&self.driver);
        self.rx_held.clear();
        self.tx_held.clear();
        self.tx_free.clear();
        self.rx_added = (0, 0);
        self.tx_added = (0, 0);
        self.stash.clear();
        self.allocate_tx();
        self.fill_rx(100, 4096);
    }

    /// Gives the device `count` buffers with space for `payload` bytes, each in two descriptors if the
    /// queue has space for that.
    pub fn fill_rx(&mut self, count: u16, payload: u32) {
        self.rx_payload = payload;
        for _ in 0..count {
            let at = self.driver.alloc(HEADER + payload);
            self.add_rx(at);
        }
        self.kick(RX_QUEUE);
    }

    fn add_rx(&mut self, at: u64) {
        let head = self.rx.add(&[Buffer::write(at, HEADER + self.rx_payload)]);
        self.rx_held.insert(head, at);
        self.rx_added.0 = self.rx_added.0.wrapping_add(1);
    }

    /// Kicks unless the device has said that it wants none yet, as Linux does (virtio 1.2, section 2.7.10).
    fn kick(&mut self, queue: u16) {
        fence(Ordering::SeqCst);
        let (event, added) = match queue {
            RX_QUEUE => (self.rx.avail_event(), &mut self.rx_added),
            _ => (self.tx.avail_event(), &mut self.tx_added),
        };
        let (new, old) = *added;
        added.1 = new;
        if new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old) {
            self.kicks += 1;
            self.driver.kick(queue.into());
        }
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("v.sock")
    }

    /// A service of the host at `port`.
    pub fn service(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.dir.path().join(format!("v.sock_{port}"))).unwrap()
    }

    /// A client of the host, connected to the device's socket.
    pub fn client(&self) -> UnixStream {
        UnixStream::connect(self.path()).unwrap()
    }

    /// A packet from `guest` port to `host` port with plausible credit.
    pub fn header(host: u32, guest: u32, op: Op) -> Header {
        Header {
            src_cid: CID.into(),
            dst_cid: HOST_CID,
            src_port: guest,
            dst_port: host,
            socket_type: TYPE_STREAM,
            op: op as u16,
            buf_alloc: 256 << 10,
            ..Header::default()
        }
    }

    /// Sends a packet whose length is that of the payload.
    pub fn send(&mut self, header: Header, payload: &[u8]) {
        let len = payload.len() as u32;
        self.send_raw(&Header { len, ..header }.to_bytes(), payload);
    }

    /// Sends a packet of these bytes; waits for a free buffer if need be.
    pub fn send_raw(&mut self, header: &[u8], payload: &[u8]) {
        while self.tx_free.is_empty() {
            let (head, _) = self.driver.wait_used(&mut self.tx);
            self.tx_free.push(self.tx_held.remove(&head).unwrap());
        }
        self.unsent();
        let at = self.tx_free.pop().unwrap();
        let memory = &self.driver.memory;
        memory.write_slice(header, GuestAddress(at)).unwrap();
        let behind = GuestAddress(at + header.len() as u64);
        memory.write_slice(payload, behind).unwrap();
        self.offer(at, Buffer::read(at, (header.len() + payload.len()) as u32));
    }

    /// Offers any one descriptor to the tx queue.
    pub fn offer(&mut self, at: u64, buffer: Buffer) {
        let head = self.tx.add(&[buffer]);
        self.tx_held.insert(head, at);
        self.tx_added.0 = self.tx_added.0.wrapping_add(1);
        self.kick(TX_QUEUE);
    }

    /// Waits until the device has taken every packet.
    pub fn wait_sent(&mut self) {
        self.wait_taken(0);
    }

    /// Packets that the device has not taken, as far as is known.
    pub fn unsent(&mut self) -> usize {
        while let Some((head, _)) = self.tx.pop_used() {
            self.tx_free.push(self.tx_held.remove(&head).unwrap());
        }
        self.tx_held.len()
    }

    /// Waits until the device has taken all but `left` packets.
    pub fn wait_taken(&mut self, left: usize) {
        while self.tx_held.len() > left {
            let (head, _) = self.driver.wait_used(&mut self.tx);
            self.tx_free.push(self.tx_held.remove(&head).unwrap());
        }
    }

    /// Waits for the next packet.
    pub fn receive(&mut self) -> (Header, Vec<u8>) {
        if let Some(packet) = self.stash.pop_front() {
            return packet;
        }
        let (head, written) = self.driver.wait_used(&mut self.rx);
        self.take(head, written)
    }

    /// Waits for the next packet of a stream; those of others are kept for later.
    pub fn receive_for(&mut self, peer: &Peer) -> (Header, Vec<u8>) {
        let is_its =
            |header: &Header| (header.src_port, header.dst_port) == (peer.host, peer.guest);
        if let Some(at) = self.stash.iter().position(|(header, _)| is_its(header)) {
            return self.stash.remove(at).unwrap();
        }
        loop {
            let (head, written) = self.driver.wait_used(&mut self.rx);
            let packet = self.take(head, written);
            if is_its(&packet.0) {
                return packet;
            }
            self.stash.push_back(packet);
        }
    }

    /// The next packet if there is one.
    pub fn try_receive(&mut self) -> Option<(Header, Vec<u8>)> {
        if let Some(packet) = self.stash.pop_front() {
            return Some(packet);
        }
        let (head, written) = self.rx.pop_used()?;
        Some(self.take(head, written))
    }

    fn take(&mut self, head: u16, written: u32) -> (Header, Vec<u8>) {
        let at = self.rx_held.remove(&head).unwrap();
        let bytes = self.driver.bytes(at, written as usize);
        let header = Header::parse(bytes[..HEADER_LEN].try_into().unwrap());
        assert_eq!(header.len, written - HEADER, "length and used length agree");
        assert_eq!(header.dst_cid, u64::from(CID));
        self.add_rx(at);
        self.kick(RX_QUEUE);
        (header, bytes[HEADER_LEN..].to_vec())
    }

    /// Waits for a packet and checks its operation.
    pub fn expect(&mut self, op: Op) -> Header {
        let (header, _) = self.receive();
        assert_eq!(Op::from_raw(header.op), Some(op), "{header:?}");
        header
    }

    /// Nothing has been sent to the guest that it has not seen: asks for an RST of a stream that nobody
    /// knows and sees that it is the next packet.
    pub fn expect_silence(&mut self) {
        let port = self.port();
        self.send(Self::header(9, port, Op::CreditRequest), &[]);
        let reply = self.expect(Op::Rst);
        assert_eq!(reply.dst_port, port);
    }

    pub fn port(&mut self) -> u32 {
        self.next_port += 1;
        self.next_port
    }

    /// Connects to a service of the host.
    pub fn connect(&mut self, host: u32) -> Peer {
        self.try_connect(host).expect("refused")
    }

    /// Connects to a host port; none if it is refused.
    pub fn try_connect(&mut self, host: u32) -> Option<Peer> {
        let mut peer = Peer {
            connection: Connection::dial(256 << 10),
            host,
            guest: self.port(),
        };
        self.send_control(&mut peer);
        let (header, _) = self.receive_for(&peer);
        (peer.receive(&header) == Received::Opened).then_some(peer)
    }

    /// Accepts a stream of the host to `port`.
    pub fn accept(&mut self, port: u32) -> Peer {
        let request = self.expect(Op::Request);
        assert_eq!(request.dst_port, port);
        let mut peer = Peer {
            connection: Connection::answer(256 << 10, &request).unwrap(),
            host: request.src_port,
            guest: port,
        };
        self.send_control(&mut peer);
        peer
    }

    /// Sends whatever control packets the stream has.
    pub fn send_control(&mut self, peer: &mut Peer) {
        while let Some(control) = peer.connection.control() {
            let (buf_alloc, fwd_cnt) = peer.connection.tell_credit();
            let header = Header {
                flags: control.flags,
                buf_alloc,
                fwd_cnt,
                ..Self::header(peer.host, peer.guest, control.op)
            };
            self.send(header, &[]);
        }
    }

    /// Sends as much as credit allows, at most `MAX_PAYLOAD` at a time; returns how many bytes.
    pub fn send_data(&mut self, peer: &mut Peer, bytes: &[u8]) -> usize {
        let mut sent = 0;
        loop {
            let room = peer.connection.room() as usize;
            let take = room.min(bytes.len() - sent).min(MAX_PAYLOAD);
            if take == 0 {
                return sent;
            }
            peer.connection.sending(take as u32);
            let (buf_alloc, fwd_cnt) = peer.connection.tell_credit();
            let header = Header {
                buf_alloc,
                fwd_cnt,
                ..Self::header(peer.host, peer.guest, Op::Rw)
            };
            self.send(header, &bytes[sent..sent + take]);
            sent += take;
        }
    }

    /// Sends all the bytes and then the end, and meanwhile receives until the host's end; returns what
    /// came.
    pub fn converse(&mut self, peer: &mut Peer, bytes: &[u8]) -> Vec<u8> {
        let mut sent = 0;
        let mut got = Vec::new();
        loop {
            sent += self.send_data(peer, &bytes[sent..]);
            if sent == bytes.len() {
                peer.connection.source_ended();
            } else {
                peer.connection.wants_room();
            }
            self.send_control(peer);
            if sent == bytes.len() && peer.connection.write_side_done() {
                return got;
            }
            let (header, payload) = self.receive_for(peer);
            match peer.receive(&header) {
                Received::Data => {
                    got.extend_from_slice(&payload);
                    peer.connection.forwarded(header.len);
                }
                Received::Violation => panic!("the device broke the protocol: {header:?}"),
                _ => {}
            }
        }
    }

    /// Sends until neither the device nor the host's socket takes any more, with nobody reading there;
    /// returns how many bytes.
    pub fn send_until_full(&mut self, peer: &mut Peer, bytes: &[u8]) -> usize {
        let mut sent = 0;
        loop {
            sent += self.send_data(peer, &bytes[sent..]);
            // All taken, and the answer tells what has left the device's buffer.
            self.send(peer.header(Op::CreditRequest), &[]);
            let (update, _) = self.receive_for(peer);
            peer.receive(&update);
            if peer.connection.room() == 0 {
                return sent;
            }
        }
    }
}

/// Waits until the other side has closed a socket: with bytes of ours unread, that is an error.
pub fn expect_closed(socket: &mut UnixStream) {
    match socket.read(&mut [0; 8]) {
        Ok(n) => assert_eq!(n, 0),
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
}

impl Peer {
    /// Takes a packet of this stream.
    pub fn receive(&mut self, header: &Header) -> Received {
        assert_eq!((header.src_port, header.dst_port), (self.host, self.guest));
        let op = Op::from_raw(header.op).expect("a known operation");
        self.connection.receive(op, header)
    }

    /// A packet of this stream with the credit at hand.
    pub fn header(&mut self, op: Op) -> Header {
        let (buf_alloc, fwd_cnt) = self.connection.tell_credit();
        Header {
            buf_alloc,
            fwd_cnt,
            ..Guest::header(self.host, self.guest, op)
        }
    }
}

/// Bytes that tell their place.
pub fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len as u64)
        .map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8 ^ seed)
        .collect()
}
