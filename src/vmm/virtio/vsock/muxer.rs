//! The queue handler: packets of the guest to streams, streams to packets for the guest.
//!
//! - A packet from the guest (tx queue) is parsed once; it ends in a stream, in a new stream, or in an RST
//!   among `replies`. When that list is full no further packet is taken until the guest gives buffers, so
//!   a guest that provokes RSTs and never takes them waits for itself.
//! - A buffer of the guest (rx queue) is filled with a reply, or by the stream whose turn it is. A stream
//!   that has more goes to the end of the line, so all get packets alternately. Without anything to send
//!   the buffers stay in the ring, and the driver is asked for no notification.
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

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;

use super::connection::{Connection, Control, Phase, Received};
use super::handshake::{self, Progress};
use super::packet::{HEADER_LEN, HOST_CID, Header, Op, TYPE_STREAM};
use super::poll::{Due, PollSet, Source};
use super::ring::SpareRings;
use super::stream::Stream;
use super::table::{Id, Ports, Table};
use super::{EVENT_QUEUE, Host, Limits, RX_QUEUE, TX_QUEUE};
use crate::vmm::memory::GuestMemory;
use crate::vmm::virtio::chain::Chain;
use crate::vmm::virtio::drain::{Effects, Failure, Outcome, QueueHandler};
use crate::vmm::virtio::{HostError, Interest};

/// RSTs that belong to no stream and wait for a buffer of the guest.
const REPLIES: usize = 64;

/// The most payload in a packet to the guest, as in Linux (`VIRTIO_VSOCK_MAX_PKT_BUF_SIZE`).
const MAX_PAYLOAD: u32 = 64 << 10;

/// Clients accepted in one turn.
const ACCEPTS: usize = 16;

/// How long no client is accepted when descriptors have run out.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (virtio 1.2, section 5.10.6.7).
const EVENT_TRANSPORT_RESET: u32 = 0;

/// The token of the device's epoll.
const POLL: u32 = 0;

/// A client that has not sent its line.
struct Client {
    socket: UnixStream,
    deadline: Instant,
}

/// All streams of a device.
pub struct Muxer {
    cid: u64,
    limits: Limits,
    host: Host,
    poll: PollSet,
    clients: BTreeMap<u32, Client>,
    last_client: u32,
    streams: Table<Stream>,
    replies: VecDeque<Header>,
    spare: SpareRings,
    /// Reused from turn to turn.
    events: Vec<(Source, EventFlags)>,
    announce_reset: bool,
}

impl Muxer {
    /// No streams yet, for the guest `cid`. `poll` polls the host's listener.
    pub fn new(cid: u32, limits: Limits, host: Host, poll: PollSet) -> Self {
        Self {
            cid: cid.into(),
            host,
            poll,
            clients: BTreeMap::new(),
            last_client: 0,
            streams: Table::new(limits.streams),
            replies: VecDeque::new(),
            spare: SpareRings::default(),
            events: Vec::new(),
            announce_reset: false,
            limits,
        }
    }

    /// Ends every stream; the host's side is left to be used again.
    pub fn into_host(self) -> Host {
        self.host
    }

    /// The driver is to be told that its connections are gone.
    pub fn announce_transport_reset(&mut self) {
        self.announce_reset = true;
    }

    // From the guest.

    fn take_packet(
        &mut self,
        memory: &GuestMemory,
        chain: &Chain,
        effects: &mut Effects,
    ) -> Result<(), Failure> {
        let Some(payload) = chain.readable.len().checked_sub(HEADER_LEN as u32) else {
            effects.count_fault();
            return Ok(());
        };
        let mut bytes = [0; HEADER_LEN];
        chain.readable.read(memory, 0, &mut bytes)?;
        let header = Header::parse(&bytes);
        if header.src_cid != self.cid {
            // Nobody to answer: a reply would go to somebody else.
            effects.count_fault();
            return Ok(());
        }
        if header.dst_cid != HOST_CID {
            self.refuse(&header, effects);
            return Ok(());
        }
        let ports = Ports {
            host: header.dst_port,
            guest: header.src_port,
        };
        match (well_formed(&header, payload), self.streams.find(ports)) {
            (Some(op), Some(id)) => self.receive(memory, chain, id, (op, &header), effects)?,
            (Some(Op::Request), None) => self.answer(ports, &header, effects)?,
            (Some(_), None) => self.refuse(&header, effects),
            (None, Some(id)) => {
                effects.count_fault();
                self.abort(id, effects)?;
            }
            (None, None) => {
                effects.count_fault();
                self.refuse(&header, effects);
            }
        }
        Ok(())
    }

    /// Answers a packet that belongs to no stream with an RST, unless it is one.
    fn refuse(&mut self, header: &Header, effects: &mut Effects) {
        if header.op != Op::Rst as u16 {
            self.replies.push_back(header.reset_reply());
            effects.run(RX_QUEUE);
        }
    }

    fn answer(
        &mut self,
        ports: Ports,
        request: &Header,
        effects: &mut Effects,
    ) -> Result<(), HostError> {
        if self.streams.is_full() {
            self.refuse(request, effects);
            return Ok(());
        }
        let Some(connection) = Connection::answer(self.buffer(), request) else {
            effects.count_fault();
            self.refuse(request, effects);
            return Ok(());
        };
        match self.host.ports.connect(ports.host) {
            Ok(socket) => {
                let stream = Stream::answered(connection, socket);
                if let Some(id) = self.insert(ports, stream)? {
                    self.settle(id, effects)?;
                }
            }
            Err(_) => self.refuse(request, effects),
        }
        Ok(())
    }

    /// How much the next stream may hold.
    fn buffer(&self) -> u32 {
        if self.streams.len() < self.limits.large_streams {
            self.limits.large_buffer
        } else {
            self.limits.small_buffer
        }
    }

    fn insert(&mut self, ports: Ports, stream: Stream) -> Result<Option<Id>, HostError> {
        // The caller has made sure of both: there is space, and nobody has these ports.
        let Ok(id) = self.streams.insert(ports, stream) else {
            return Ok(None);
        };
        if let Some(stream) = self.streams.get_mut(id)
            && let Some(socket) = stream.socket()
        {
            let events = stream.events();
            let added = self.poll.add(socket, Source::Stream(id), events);
            added.map_err(|e| host_error("poll a socket", e))?;
        }
        Ok(Some(id))
    }

    fn receive(
        &mut self,
        memory: &GuestMemory,
        chain: &Chain,
        id: Id,
        (op, header): (Op, &Header),
        effects: &mut Effects,
    ) -> Result<(), Failure> {
        let Some(stream) = self.streams.get_mut(id) else {
            return Ok(());
        };
        match stream.connection.receive(op, header) {
            Received::Nothing => {}
            Received::Opened => {
                stream.opened(header.dst_port);
                self.cancel_deadline(id);
            }
            Received::Data => {
                stream.take_payload(memory, &chain.readable, header.len, &mut self.spare)?;
            }
            Received::Shutdown => stream.apply_shutdown(),
            Received::Reset => {
                self.streams.release_ports(id);
                self.cancel_deadline(id);
            }
            Received::Violation => {
                effects.count_fault();
                stream.close(&mut self.spare);
            }
        }
        Ok(self.settle(id, effects)?)
    }

    /// Ends a stream from this side: an RST to the guest, the socket closed.
    fn abort(&mut self, id: Id, effects: &mut Effects) -> Result<(), HostError> {
        if let Some(stream) = self.streams.get_mut(id) {
            stream.connection.abort();
            stream.close(&mut self.spare);
        }
        self.settle(id, effects)
    }

    /// Whatever happened to a stream: polls for what it waits for, gives it a turn if it has something for
    /// the guest, removes it if it is over.
    fn settle(&mut self, id: Id, effects: &mut Effects) -> Result<(), HostError> {
        let Some(stream) = self.streams.get_mut(id) else {
            return Ok(());
        };
        if stream.is_over() {
            self.remove(id);
            return Ok(());
        }
        if let Some((before, socket, events)) = stream.moved() {
            let poll = &self.poll;
            let polled = poll.remove(before);
            if polled
                .and_then(|()| poll.add(socket, Source::Stream(id), events))
                .is_err()
            {
                // What it was passed on to is nothing that can be polled, so no socket.
                effects.count_error();
                return self.abort(id, effects);
            }
        }
        stream.notice_drought();
        if let Some(events) = stream.changed_events()
            && let Some(socket) = stream.socket()
        {
            let modified = self.poll.modify(socket, Source::Stream(id), events);
            modified.map_err(|e| host_error("poll a socket", e))?;
        }
        if stream.wants_turn() {
            self.streams.queue(id);
            effects.run(RX_QUEUE);
        }
        Ok(())
    }

    fn remove(&mut self, id: Id) {
        self.cancel_deadline(id);
        if let Some(mut stream) = self.streams.remove(id) {
            stream.close(&mut self.spare);
        }
    }

    fn set_deadline(&mut self, id: Id, after: Duration) -> Result<(), HostError> {
        self.cancel_deadline(id);
        let deadline = self.poll.deadline(after, Due::Stream(id));
        let deadline = deadline.map_err(|e| host_error("set a timer", e))?;
        if let Some(stream) = self.streams.get_mut(id) {
            stream.deadline = Some(deadline);
        }
        Ok(())
    }

    fn cancel_deadline(&mut self, id: Id) {
        let deadline = self.streams.get_mut(id).and_then(|s| s.deadline.take());
        if let Some(deadline) = deadline {
            self.poll.cancel(deadline, Due::Stream(id));
        }
    }

    // To the guest.

    fn fill_buffer(
        &mut self,
        memory: &GuestMemory,
        chain: &Chain,
        effects: &mut Effects,
    ) -> Result<Outcome, Failure> {
        if chain.writable.len() <= HEADER_LEN as u32 {
            // No use for any packet with bytes; it goes back as it came.
            effects.count_fault();
            return Ok(Outcome::Done(0));
        }
        if self.replies.len() >= REPLIES {
            effects.run(TX_QUEUE);
        }
        if let Some(reply) = self.replies.pop_front() {
            chain.writable.write(memory, 0, &reply.to_bytes())?;
            return Ok(Outcome::Done(HEADER_LEN as u32));
        }
        while let Some(id) = self.streams.next_turn() {
            if let Some(written) = self.give_turn(id, memory, chain, effects)? {
                return Ok(Outcome::Done(written));
            }
        }
        Ok(Outcome::PutBack)
    }

    /// Lets a stream fill the buffer; none if it has nothing to send after all.
    fn give_turn(
        &mut self,
        id: Id,
        memory: &GuestMemory,
        chain: &Chain,
        effects: &mut Effects,
    ) -> Result<Option<u32>, Failure> {
        let (Some(ports), Some(stream)) = (self.streams.ports(id), self.streams.get_mut(id)) else {
            return Ok(None);
        };
        let was = stream.connection.phase();
        let len = stream.read_into(memory, &chain.writable, MAX_PAYLOAD, &mut self.spare)?;
        let control = if len > 0 {
            Some(Control {
                op: Op::Rw,
                flags: 0,
            })
        } else {
            stream.notice_drought();
            stream.connection.control()
        };
        let Some(Control { op, flags }) = control else {
            self.settle(id, effects)?;
            return Ok(None);
        };
        let (buf_alloc, fwd_cnt) = stream.connection.tell_credit();
        let header = Header {
            src_cid: HOST_CID,
            dst_cid: self.cid,
            src_port: ports.host,
            dst_port: ports.guest,
            len,
            socket_type: TYPE_STREAM,
            op: op as u16,
            flags,
            buf_alloc,
            fwd_cnt,
        };
        chain.writable.write(memory, 0, &header.to_bytes())?;
        if stream.connection.phase() == Phase::Closing && was != Phase::Closing {
            stream.close(&mut self.spare);
            self.set_deadline(id, self.limits.close)?;
        }
        self.settle(id, effects)?;
        Ok(Some(len.saturating_add(HEADER_LEN as u32)))
    }

    // The host's side.

    fn on_event(
        &mut self,
        source: Source,
        events: EventFlags,
        effects: &mut Effects,
    ) -> Result<(), HostError> {
        match source {
            Source::Listener => self.accept(effects),
            Source::Timer => self.on_timer(effects),
            Source::Client(client) => self.advance_client(client, effects),
            Source::Stream(id) => {
                if let Some(stream) = self.streams.get_mut(id) {
                    stream.on_events(events, &mut self.spare);
                }
                self.settle(id, effects)
            }
        }
    }

    fn on_timer(&mut self, effects: &mut Effects) -> Result<(), HostError> {
        let due = self.poll.due().map_err(|e| host_error("set a timer", e))?;
        for due in due {
            match due {
                Due::Accept => self.poll_listener(EventFlags::IN)?,
                Due::Client(client) => drop(self.clients.remove(&client)),
                Due::Stream(id) => {
                    effects.count_error();
                    self.abort(id, effects)?;
                }
            }
        }
        Ok(())
    }

    fn poll_listener(&mut self, events: EventFlags) -> Result<(), HostError> {
        let listener = &self.host.listener;
        let modified = self.poll.modify(listener, Source::Listener, events);
        modified.map_err(|e| host_error("poll the listening socket", e))
    }

    fn accept(&mut self, effects: &mut Effects) -> Result<(), HostError> {
        for _ in 0..ACCEPTS {
            match self.host.listener.accept() {
                Ok(socket) => self.greet(socket, effects)?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(_) => {
                    // Out of descriptors, most likely: the listener stays ready, so look away for a while.
                    effects.count_error();
                    self.poll_listener(EventFlags::empty())?;
                    let resumed = self.poll.deadline(ACCEPT_PAUSE, Due::Accept);
                    resumed.map_err(|e| host_error("set a timer", e))?;
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// A client has connected; its line may be there already.
    fn greet(&mut self, socket: UnixStream, effects: &mut Effects) -> Result<(), HostError> {
        match handshake::advance(&socket) {
            Progress::Port(port) => self.dial(port, socket, effects),
            Progress::Partial if self.clients.len() < self.limits.clients => {
                self.last_client = self.last_client.wrapping_add(1);
                let client = self.last_client;
                let events = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
                let added = self.poll.add(&socket, Source::Client(client), events);
                added.map_err(|e| host_error("poll a socket", e))?;
                let deadline = self.poll.deadline(self.limits.line, Due::Client(client));
                let deadline = deadline.map_err(|e| host_error("set a timer", e))?;
                self.clients.insert(client, Client { socket, deadline });
                Ok(())
            }
            Progress::Partial | Progress::Invalid => {
                effects.count_error();
                Ok(())
            }
        }
    }

    fn advance_client(&mut self, id: u32, effects: &mut Effects) -> Result<(), HostError> {
        let Some(client) = self.clients.get(&id) else {
            return Ok(());
        };
        let progress = handshake::advance(&client.socket);
        if progress == Progress::Partial {
            return Ok(());
        }
        let Some(client) = self.clients.remove(&id) else {
            return Ok(());
        };
        self.poll.cancel(client.deadline, Due::Client(id));
        if let Progress::Port(port) = progress {
            self.poll
                .remove(&client.socket)
                .map_err(|e| host_error("poll a socket", e))?;
            return self.dial(port, client.socket, effects);
        }
        effects.count_error();
        Ok(())
    }

    /// Asks the guest for a stream to its `port`, for a client. Dropped when there are too many.
    fn dial(
        &mut self,
        port: u32,
        client: UnixStream,
        effects: &mut Effects,
    ) -> Result<(), HostError> {
        if self.streams.is_full() {
            effects.count_error();
            return Ok(());
        }
        let ports = Ports {
            host: self.streams.assign_port(port),
            guest: port,
        };
        let stream = Stream::dialled(Connection::dial(self.buffer()), client);
        if let Some(id) = self.insert(ports, stream)? {
            self.set_deadline(id, self.limits.dial)?;
            self.settle(id, effects)?;
        }
        Ok(())
    }
}

impl QueueHandler for Muxer {
    fn wants(&self, queue: u16) -> bool {
        match queue {
            RX_QUEUE => !self.replies.is_empty() || self.streams.has_turns(),
            TX_QUEUE => self.replies.len() < REPLIES,
            EVENT_QUEUE => self.announce_reset,
            _ => false,
        }
    }

    fn handle(
        &mut self,
        memory: &GuestMemory,
        chain: &mut Chain,
        effects: &mut Effects,
    ) -> Result<Outcome, Failure> {
        match chain.queue() {
            RX_QUEUE => self.fill_buffer(memory, chain, effects),
            TX_QUEUE => {
                self.take_packet(memory, chain, effects)?;
                Ok(Outcome::Done(0))
            }
            _ => {
                self.announce_reset = false;
                let event = EVENT_TRANSPORT_RESET.to_le_bytes();
                chain.writable.write(memory, 0, &event)?;
                Ok(Outcome::Done(event.len() as u32))
            }
        }
    }

    fn interests(&self) -> Vec<Interest> {
        vec![Interest {
            fd: self.poll.fd(),
            token: POLL,
            readable: true,
            writable: false,
            edge_triggered: false,
        }]
    }

    fn ready(
        &mut self,
        _memory: &GuestMemory,
        _token: u32,
        effects: &mut Effects,
    ) -> Result<(), Failure> {
        let mut events = std::mem::take(&mut self.events);
        let taken = self.poll.take(&mut events);
        taken.map_err(|e| host_error("wait for its sockets", e))?;
        for (source, flags) in events.drain(..) {
            self.on_event(source, flags, effects)?;
        }
        self.events = events;
        Ok(())
    }
}

/// The operation of a packet whose type, operation and length are what they may be; `payload` is the
/// number of bytes behind the header.
fn well_formed(header: &Header, payload: u32) -> Option<Op> {
    let op = Op::from_raw(header.op)?;
    let len = match op {
        Op::Rw => header.len <= payload,
        _ => header.len == 0,
    };
    (header.socket_type == TYPE_STREAM && len).then_some(op)
}

fn host_error(action: &'static str, source: io::Error) -> HostError {
    HostError {
        device: "virtio-vsock".to_owned(),
        action,
        source,
    }
}
