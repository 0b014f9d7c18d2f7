use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;
use crate::vmm::virtio::vsock::packet::TYPE_STREAM;

fn packet(op: Op, len: u32, flags: u32, credit: (u32, u32)) -> Header {
    Header {
        socket_type: TYPE_STREAM,
        op: op as u16,
        len,
        flags,
        buf_alloc: credit.0,
        fwd_cnt: credit.1,
        ..Header::default()
    }
}

fn established() -> Connection {
    let mut connection =
        Connection::answer(1024, &packet(Op::Request, 0, 0, (1024, 0))).expect("valid request");
    assert_eq!(connection.control(), Some(Control::plain(Op::Response)));
    connection.tell_credit();
    connection
}

fn feed(connection: &mut Connection, op: Op, len: u32, flags: u32) -> Received {
    connection.receive(op, &packet(op, len, flags, (1024, 0)))
}

#[test]
fn a_dialed_stream_opens_on_response_and_only_on_response() {
    let mut connection = Connection::dial(64);
    assert_eq!(connection.control(), Some(Control::plain(Op::Request)));
    assert_eq!(connection.room(), 0);
    assert_eq!(feed(&mut connection, Op::Response, 0, 0), Received::Opened);
    assert_eq!(connection.room(), 1024);

    for op in [
        Op::Rw,
        Op::Request,
        Op::Shutdown,
        Op::CreditUpdate,
        Op::CreditRequest,
    ] {
        let mut connection = Connection::dial(64);
        connection.control();
        assert_eq!(feed(&mut connection, op, 0, 0), Received::Violation);
        assert_eq!(connection.control(), Some(Control::plain(Op::Rst)));
        assert_eq!(connection.phase(), Phase::Ended);
    }
}

#[test]
fn a_refused_dial_ends_without_an_answer() {
    let mut connection = Connection::dial(64);
    connection.control();
    assert_eq!(feed(&mut connection, Op::Rst, 0, 0), Received::Reset);
    assert_eq!(connection.phase(), Phase::Ended);
    assert_eq!(connection.control(), None);
}

#[test]
fn a_request_that_claims_receipt_of_bytes_never_sent_is_refused() {
    assert!(Connection::answer(64, &packet(Op::Request, 0, 0, (64, 1))).is_none());
}

#[test]
fn requests_and_responses_on_an_open_stream_are_violations() {
    for op in [Op::Request, Op::Response] {
        let mut connection = established();
        assert_eq!(feed(&mut connection, op, 0, 0), Received::Violation);
        assert_eq!(connection.control(), Some(Control::plain(Op::Rst)));
        assert_eq!(connection.control(), None);
    }
}

#[test]
fn more_bytes_than_credit_are_a_violation() {
    let mut connection = established();
    assert_eq!(feed(&mut connection, Op::Rw, 1024, 0), Received::Data);
    connection.forwarded(1024);
    // Free again, but the peer has not been told.
    assert_eq!(feed(&mut connection, Op::Rw, 1, 0), Received::Violation);
}

#[test]
fn half_close_by_the_peer_ends_one_direction_after_the_bytes_before_it() {
    let mut connection = established();
    assert_eq!(feed(&mut connection, Op::Rw, 10, 0), Received::Data);
    assert_eq!(
        feed(&mut connection, Op::Shutdown, 0, SHUTDOWN_SEND),
        Received::Shutdown
    );
    assert!(!connection.write_side_done());
    connection.forwarded(10);
    assert!(connection.write_side_done());
    assert!(!connection.read_side_done());
    assert_eq!(connection.room(), 1024);
    assert_eq!(connection.control(), None);
    // Bytes after the end are a violation.
    assert_eq!(feed(&mut connection, Op::Rw, 1, 0), Received::Violation);
}

#[test]
fn shutdown_flags_add_up_and_unknown_ones_are_ignored() {
    let mut connection = established();
    feed(&mut connection, Op::Shutdown, 0, !SHUTDOWN_BOTH);
    assert!(!connection.write_side_done() && !connection.read_side_done());
    feed(&mut connection, Op::Shutdown, 0, SHUTDOWN_RECEIVE);
    feed(&mut connection, Op::Shutdown, 0, 0);
    assert!(connection.read_side_done());
    assert_eq!(connection.room(), 0);
    feed(&mut connection, Op::Shutdown, 0, SHUTDOWN_SEND);
    assert_eq!(connection.control(), Some(Control::plain(Op::Rst)));
}

#[test]
fn a_peer_that_shut_both_sides_gets_its_rst_after_its_bytes_are_forwarded() {
    let mut connection = established();
    feed(&mut connection, Op::Rw, 10, 0);
    feed(&mut connection, Op::Shutdown, 0, SHUTDOWN_BOTH);
    assert_eq!(connection.control(), None);
    connection.forwarded(9);
    assert_eq!(connection.control(), None);
    connection.forwarded(1);
    assert_eq!(connection.control(), Some(Control::plain(Op::Rst)));
}

#[test]
fn a_host_that_hung_up_is_told_with_the_end_of_its_bytes() {
    let mut connection = established();
    connection.hung_up();
    assert_eq!(connection.control(), None);
    assert_eq!(connection.room(), 1024);
    connection.source_ended();
    let both = Control {
        op: Op::Shutdown,
        flags: SHUTDOWN_BOTH,
    };
    assert_eq!(connection.control(), Some(both));
    assert_eq!(connection.phase(), Phase::Closing);
    // What the peer had under way is dropped, and its RST ends it.
    assert_eq!(feed(&mut connection, Op::Rw, 10, 0), Received::Nothing);
    assert_eq!(feed(&mut connection, Op::Rst, 0, 0), Received::Reset);
    assert_eq!(connection.phase(), Phase::Ended);
}

#[test]
fn a_host_that_hung_up_on_a_deaf_peer_closes_without_being_read() {
    let mut connection = established();
    feed(&mut connection, Op::Shutdown, 0, SHUTDOWN_RECEIVE);
    connection.hung_up();
    assert_eq!(connection.control().map(|c| c.flags), Some(SHUTDOWN_BOTH));
}

#[test]
fn bytes_refused_by_the_host_shut_that_direction_only() {
    let mut connection = established();
    assert_eq!(feed(&mut connection, Op::Rw, 10, 0), Received::Data);
    connection.sink_refused();
    assert_eq!(connection.held(), 0);
    assert_eq!(
        connection.control().map(|c| c.flags),
        Some(SHUTDOWN_RECEIVE)
    );
    assert_eq!(connection.room(), 1024);
    connection.source_ended();
    assert_eq!(connection.control().map(|c| c.flags), Some(SHUTDOWN_BOTH));
}

#[test]
fn a_closing_stream_whose_deadline_passes_is_reset() {
    let mut connection = established();
    connection.hung_up();
    connection.source_ended();
    connection.control();
    connection.abort();
    assert_eq!(connection.control(), Some(Control::plain(Op::Rst)));
    assert_eq!(connection.phase(), Phase::Ended);
}

#[test]
fn an_rst_that_crosses_ours_makes_ours_unnecessary() {
    let mut connection = established();
    connection.abort();
    assert_eq!(feed(&mut connection, Op::Rst, 0, 0), Received::Reset);
    assert_eq!(connection.control(), None);
}

#[test]
fn credit_is_asked_for_once_per_drought() {
    let mut connection = established();
    connection.sending(1024);
    connection.wants_room();
    assert_eq!(
        connection.control(),
        Some(Control::plain(Op::CreditRequest))
    );
    connection.wants_room();
    assert_eq!(connection.control(), None);
    // "None" is an answer.
    feed(&mut connection, Op::CreditUpdate, 0, 0);
    connection.wants_room();
    assert_eq!(connection.control(), None);
    connection.receive(
        Op::CreditUpdate,
        &packet(Op::CreditUpdate, 0, 0, (1024, 24)),
    );
    connection.sending(24);
    connection.wants_room();
    assert_eq!(
        connection.control(),
        Some(Control::plain(Op::CreditRequest))
    );
}

#[test]
fn a_credit_request_is_answered() {
    let mut connection = established();
    feed(&mut connection, Op::CreditRequest, 0, 0);
    assert!(connection.has_control());
    assert_eq!(connection.control(), Some(Control::plain(Op::CreditUpdate)));
    assert_eq!(connection.control(), None);
}

/// One end of a stream with an application that sends `source` and then closes.
struct End {
    connection: Connection,
    source: VecDeque<u8>,
    held: VecDeque<u8>,
    got: Vec<u8>,
    eof: bool,
    /// Packets under way to the other end.
    wire: VecDeque<(Op, Header, Vec<u8>)>,
    in_flight_limit: u32,
}

impl End {
    fn new(connection: Connection, source: Vec<u8>, buffer: u32) -> Self {
        Self {
            connection,
            source: source.into(),
            held: VecDeque::new(),
            got: Vec::new(),
            eof: false,
            wire: VecDeque::new(),
            in_flight_limit: buffer,
        }
    }

    fn put(&mut self, op: Op, flags: u32, payload: Vec<u8>) {
        let credit = self.connection.tell_credit();
        let len = u32::try_from(payload.len()).unwrap();
        self.wire
            .push_back((op, packet(op, len, flags, credit), payload));
    }

    /// Sends one packet if there is one to send.
    fn pump(&mut self, most: usize) -> bool {
        let room = self.connection.room() as usize;
        if room > 0 && self.source.is_empty() {
            self.connection.source_ended();
        }
        let take = room.min(self.source.len()).min(most);
        if take > 0 {
            let payload: Vec<u8> = self.source.drain(..take).collect();
            self.connection.sending(u32::try_from(take).unwrap());
            self.put(Op::Rw, 0, payload);
            return true;
        }
        if !self.source.is_empty() {
            self.connection.wants_room();
        }
        let expected = self.connection.has_control();
        match self.connection.control() {
            Some(control) => {
                assert!(expected);
                self.put(control.op, control.flags, Vec::new());
                true
            }
            None => {
                assert!(!expected, "has_control promised a packet");
                false
            }
        }
    }

    fn deliver(&mut self, (op, header, payload): (Op, Header, Vec<u8>)) {
        match self.connection.receive(op, &header) {
            Received::Data => {
                assert!(!self.eof, "bytes after the end");
                self.held.extend(payload);
                assert!(self.held.len() <= self.in_flight_limit as usize);
                assert_eq!(self.held.len(), self.connection.held() as usize);
            }
            Received::Violation => panic!("two honest ends violated the protocol: {op:?}"),
            _ => {}
        }
        self.eof |= self.connection.write_side_done();
    }

    /// The application reads.
    fn read(&mut self, most: usize) -> bool {
        let take = most.min(self.held.len());
        self.got.extend(self.held.drain(..take));
        self.connection.forwarded(u32::try_from(take).unwrap());
        self.eof |= self.connection.write_side_done();
        take > 0
    }
}

fn bytes(seed: u8, len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| seed.wrapping_add((i.wrapping_mul(31) >> 3) as u8))
        .collect()
}

proptest! {
    /// Two ends under any schedule deliver all bytes exactly, in order, then the end, and both end.
    #[test]
    fn two_ends_deliver_everything(
        lens in (0usize..5000, 0usize..5000),
        buffers in (1u32..2000, 1u32..2000),
        schedule in proptest::collection::vec((0u8..6, 1usize..1500), 0..400),
    ) {
        let (up, down) = (bytes(1, lens.0), bytes(2, lens.1));
        let mut a = End::new(Connection::dial(buffers.0), up.clone(), buffers.0);
        a.pump(1);
        let (_, request, _) = a.wire.pop_front().unwrap();
        let answer = Connection::answer(buffers.1, &request).unwrap();
        let mut b = End::new(answer, down.clone(), buffers.1);

        for (what, amount) in schedule {
            match what {
                0 => { a.pump(amount); }
                1 => { b.pump(amount); }
                2 => if let Some(p) = a.wire.pop_front() { b.deliver(p) },
                3 => if let Some(p) = b.wire.pop_front() { a.deliver(p) },
                4 => { a.read(amount); }
                _ => { b.read(amount); }
            }
        }
        loop {
            let mut busy = a.pump(700) | b.pump(700);
            while let Some(p) = a.wire.pop_front() { b.deliver(p); busy = true; }
            while let Some(p) = b.wire.pop_front() { a.deliver(p); busy = true; }
            busy |= a.read(300) | b.read(300);
            if !busy { break; }
        }
        prop_assert_eq!(b.got, up);
        prop_assert_eq!(a.got, down);
        prop_assert!(a.eof && b.eof);
        prop_assert_eq!(a.connection.phase(), Phase::Ended);
        prop_assert_eq!(b.connection.phase(), Phase::Ended);
    }

    /// A hostile peer gets no more than an RST, whatever it sends, and never makes us hold more than
    /// the buffer.
    #[test]
    fn a_hostile_peer_is_contained(
        dialed in any::<bool>(),
        packets in proptest::collection::vec((1u16..8, any::<(u16, u32, u32, u32)>(), 0u8..5), 0..200),
    ) {
        let mut connection = if dialed { Connection::dial(4096) } else { established() };
        let mut violated = false;
        for (op, (len, flags, buf_alloc, fwd_cnt), host) in packets {
            let op = Op::from_raw(op).unwrap();
            let small = |n: u32| if n & 1 == 0 { n >> 20 } else { n };
            let header = packet(op, u32::from(len) >> 4, flags, (buf_alloc, small(fwd_cnt)));
            let verdict = connection.receive(op, &header);
            if violated {
                prop_assert!(matches!(verdict, Received::Nothing | Received::Reset));
            }
            violated |= verdict == Received::Violation;
            match host {
                0 => connection.forwarded(connection.held() / 2),
                1 => connection.sending(connection.room()),
                2 => connection.hung_up(),
                3 => { let expected = connection.has_control(); prop_assert_eq!(connection.control().is_some(), expected); }
                _ => connection.wants_room(),
            }
            prop_assert!(connection.held() <= 4096);
        }
    }
}
