//! One stream's protocol state: packets and host events in, packets and verdicts out. It holds no
//! descriptor and no byte of payload, so two of them can be run against each other in a test.
//!
//! ```text
//!           host dials                          guest dials
//!               │ REQUEST                           │ RESPONSE
//!               ▼              RESPONSE             ▼
//!           Dialing ───────────────────────▶ Established ──┐ RW, CREDIT_*, SHUTDOWN of one side
//!               │                              │   │   ▲───┘
//!               │ deadline, wrong packet       │   │ we told SHUTDOWN of both sides
//!               ▼            wrong packet      │   ▼
//!             Ending ◀─────────────────────────┤ Closing (the owner sets a deadline)
//!               │ RST goes out      ▲          │   │
//!               ▼                   └──────────┼───┘ deadline, or the peer told both sides too
//!             Ended ◀──────────────────────────┘ RST comes in (from any state)
//! ```
//!
//! A side that told SHUTDOWN of both waits for the RST, so that neither reuses the ports while the other
//! still processes the old stream (virtio 1.2, section 5.10.6.5).
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

use super::credit::Credit;
use super::packet::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// Where the stream is in its life; see the module's picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// The request is on its way; no answer yet.
    Dialing,
    /// Bytes may flow.
    Established,
    /// Both directions are shut; the peer's RST is awaited.
    Closing,
    /// An RST is to be sent, and nothing else.
    Ending,
    /// Nothing is to be sent or received any more.
    Ended,
}

/// What a packet from the peer means to the stream's owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// Nothing to do on the local side.
    Nothing,
    /// The peer accepted our request.
    Opened,
    /// The payload is accepted and held: the owner forwards it (now or later) and says so with
    /// [`Connection::forwarded`].
    Data,
    /// The peer will send no more, receive no more, or both: see [`Connection::write_side_done`] and
    /// [`Connection::read_side_done`].
    Shutdown,
    /// The peer ended the stream. What is held may still be forwarded.
    Reset,
    /// The peer broke the protocol; an RST is to be sent and the local side closed.
    Violation,
}

/// A packet without payload that is to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Control {
    /// The operation.
    pub op: Op,
    /// Its flags.
    pub flags: u32,
}

impl Control {
    fn plain(op: Op) -> Self {
        Self { op, flags: 0 }
    }
}

/// Whether the local side takes bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Sink {
    Open,
    /// Nobody will read; the peer is told together with the end of our bytes, or when it sends more.
    HungUp,
    /// Bytes were refused.
    Refused,
}

/// One stream, seen from this side.
#[derive(Debug, Clone)]
pub struct Connection {
    phase: Phase,
    credit: Credit,
    /// A REQUEST or RESPONSE is to be sent before anything else.
    greeting: Option<Op>,
    update_asked: bool,
    /// A CREDIT_REQUEST is to be sent.
    starved: bool,
    /// A CREDIT_REQUEST was sent (or is to be) and no credit has come since.
    credit_asked: bool,
    /// SHUTDOWN flags that the peer sent, ever.
    peer_shut: u32,
    /// SHUTDOWN flags that we sent, ever.
    told_shut: u32,
    /// The local side will send no more.
    source_ended: bool,
    sink: Sink,
}

impl Connection {
    /// A stream that this side asks for. `buffer` is how many bytes it may hold for the local side.
    pub fn dial(buffer: u32) -> Self {
        Self {
            phase: Phase::Dialing,
            credit: Credit::new(buffer),
            greeting: Some(Op::Request),
            update_asked: false,
            starved: false,
            credit_asked: false,
            peer_shut: 0,
            told_shut: 0,
            source_ended: false,
            sink: Sink::Open,
        }
    }

    /// A stream that the peer asked for with `request` and that the local side has accepted; `None` if
    /// the request claims to have received what was never sent.
    pub fn answer(buffer: u32, request: &Header) -> Option<Self> {
        let mut connection = Self {
            phase: Phase::Established,
            greeting: Some(Op::Response),
            ..Self::dial(buffer)
        };
        let credit = &mut connection.credit;
        credit.peer_says(request.buf_alloc, request.fwd_cnt).ok()?;
        Some(connection)
    }

    /// Where the stream is in its life.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Takes a packet of operation `op` that the peer sent on this stream.
    pub fn receive(&mut self, op: Op, header: &Header) -> Received {
        match (self.phase, op) {
            (Phase::Ended, _) => return Received::Nothing,
            (_, Op::Rst) => {
                // Also when an RST of ours is due: it would hit the peer's next stream on these ports.
                self.phase = Phase::Ended;
                return Received::Reset;
            }
            (Phase::Ending, _) => return Received::Nothing,
            _ => {}
        }
        if self
            .credit
            .peer_says(header.buf_alloc, header.fwd_cnt)
            .is_err()
        {
            return self.violation();
        }
        if self.credit.free() > 0 {
            self.credit_asked = false;
        }
        match (self.phase, op) {
            (Phase::Dialing, Op::Response) => {
                self.phase = Phase::Established;
                Received::Opened
            }
            (Phase::Dialing, _) | (_, Op::Request | Op::Response) => self.violation(),
            (_, Op::Rw) => self.receive_data(header.len),
            (_, Op::CreditRequest) => {
                self.update_asked = true;
                Received::Nothing
            }
            (_, Op::Shutdown) => self.receive_shutdown(header.flags),
            (_, Op::CreditUpdate | Op::Rst) => Received::Nothing,
        }
    }

    fn receive_data(&mut self, len: u32) -> Received {
        if self.peer_shut & SHUTDOWN_SEND != 0 || self.credit.receive(len).is_err() {
            return self.violation();
        }
        if self.sink == Sink::Refused {
            // Sent before the peer could know: accepted, and lost.
            self.credit.forward(len);
            return Received::Nothing;
        }
        Received::Data
    }

    /// Flags stay set once they were; bits that the specification does not know are ignored.
    fn receive_shutdown(&mut self, flags: u32) -> Received {
        self.peer_shut |= flags & SHUTDOWN_BOTH;
        self.end_if_both_shut();
        Received::Shutdown
    }

    fn violation(&mut self) -> Received {
        self.phase = Phase::Ending;
        Received::Violation
    }

    /// Answers a peer that has shut both directions, once all that it sent has been forwarded.
    fn end_if_both_shut(&mut self) {
        let open = matches!(self.phase, Phase::Established | Phase::Closing);
        if open && self.peer_shut == SHUTDOWN_BOTH && self.credit.held() == 0 {
            self.phase = Phase::Ending;
        }
    }

    /// The most bytes that may be held for the local side.
    pub fn buffer(&self) -> u32 {
        self.credit.buf_alloc()
    }

    /// Bytes received and not forwarded yet.
    pub fn held(&self) -> u32 {
        self.credit.held()
    }

    /// The local side took `bytes` of those held.
    pub fn forwarded(&mut self, bytes: u32) {
        self.credit.forward(bytes);
        self.end_if_both_shut();
    }

    /// The local side refused bytes: nobody will read. What is held is lost, what comes is dropped.
    pub fn sink_refused(&mut self) {
        self.sink = Sink::Refused;
        self.forwarded(self.credit.held());
    }

    /// The local side has closed its end, so it will not read; bytes it wrote before may remain.
    pub fn hung_up(&mut self) {
        self.sink = self.sink.max(Sink::HungUp);
    }

    /// The local side will send no more, and all that it sent has been passed to the peer.
    pub fn source_ended(&mut self) {
        self.source_ended = true;
    }

    /// The deadline of the phase passed, or the owner gives up: send an RST.
    pub fn abort(&mut self) {
        if self.phase != Phase::Ended {
            self.phase = Phase::Ending;
        }
    }

    /// The peer will send no more and all it sent was forwarded: the local side shall see the end.
    pub fn write_side_done(&self) -> bool {
        self.peer_shut & SHUTDOWN_SEND != 0 && self.credit.held() == 0
    }

    /// The peer will receive no more: the local side shall not be read any further.
    pub fn read_side_done(&self) -> bool {
        self.peer_shut & SHUTDOWN_RECEIVE != 0
    }

    /// Bytes that may be read from the local side and sent now.
    pub fn room(&self) -> u32 {
        if !self.may_read() {
            return 0;
        }
        self.credit.free()
    }

    /// Whether the stream is in a state in which bytes of the local side flow, given credit.
    fn may_read(&self) -> bool {
        self.phase == Phase::Established
            && self.greeting.is_none()
            && !self.source_ended
            && !self.read_side_done()
    }

    /// The local side has bytes: asks the peer for credit if that is what they lack. Once per drought:
    /// a peer that answers "none" is not asked again.
    pub fn wants_room(&mut self) {
        if self.may_read() && self.credit.free() == 0 && !self.credit_asked {
            self.credit_asked = true;
            self.starved = true;
        }
    }

    /// SHUTDOWN flags that the peer should know.
    fn due_shut(&self) -> u32 {
        // What a peer does not receive need not be read to its end.
        let no_more = self.source_ended || (self.sink != Sink::Open && self.read_side_done());
        let deaf = match self.sink {
            Sink::Open => no_more && self.write_side_done(),
            Sink::HungUp => no_more,
            Sink::Refused => true,
        };
        let mut flags = 0;
        if no_more {
            flags |= SHUTDOWN_SEND;
        }
        if deaf {
            flags |= SHUTDOWN_RECEIVE;
        }
        flags
    }

    fn update_due(&self) -> bool {
        self.phase == Phase::Established
            && self.peer_shut & SHUTDOWN_SEND == 0
            && self.credit.update_due()
    }

    /// Whether [`Connection::control`] has a packet.
    pub fn has_control(&self) -> bool {
        match self.phase {
            Phase::Ended => false,
            Phase::Ending => true,
            Phase::Closing => self.update_asked,
            Phase::Dialing | Phase::Established => {
                self.greeting.is_some()
                    || self.phase == Phase::Established
                        && (self.due_shut() & !self.told_shut != 0
                            || self.update_asked
                            || self.starved
                            || self.update_due())
            }
        }
    }

    /// Takes the next packet without payload that is to be sent. Afterwards the phase may be
    /// [`Phase::Closing`] (set a deadline) or [`Phase::Ended`] (drop the stream).
    pub fn control(&mut self) -> Option<Control> {
        match self.phase {
            Phase::Ended => return None,
            Phase::Ending => {
                self.phase = Phase::Ended;
                return Some(Control::plain(Op::Rst));
            }
            Phase::Dialing | Phase::Established | Phase::Closing => {}
        }
        if let Some(op) = self.greeting.take() {
            return Some(Control::plain(op));
        }
        if self.phase == Phase::Dialing {
            return None;
        }
        let flags = self.due_shut();
        if self.phase == Phase::Established && flags & !self.told_shut != 0 {
            self.told_shut |= flags;
            let flags = self.told_shut;
            if flags == SHUTDOWN_BOTH {
                self.phase = Phase::Closing;
                self.sink_refused();
            }
            return Some(Control {
                op: Op::Shutdown,
                flags,
            });
        }
        if std::mem::take(&mut self.update_asked) || self.update_due() {
            return Some(Control::plain(Op::CreditUpdate));
        }
        if std::mem::take(&mut self.starved) && self.phase == Phase::Established {
            return Some(Control::plain(Op::CreditRequest));
        }
        None
    }

    /// Accounts for `bytes` of payload about to be sent; at most [`Connection::room`].
    pub fn sending(&mut self, bytes: u32) {
        self.credit.send(bytes);
    }

    /// `buf_alloc` and `fwd_cnt` for the header of a packet about to be sent.
    pub fn tell_credit(&mut self) -> (u32, u32) {
        self.update_asked = false;
        self.credit.tell()
    }
}

#[cfg(test)]
#[path = "connection_tests.rs"]
mod tests;
