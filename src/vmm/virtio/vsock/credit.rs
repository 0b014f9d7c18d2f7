//! Credit arithmetic (virtio 1.2, section 5.10.6.3): all counters are `u32` and wrap.
//!
//! ```text
//! to the peer:    sent ─────────── in flight ──────────▶ peer_fwd      free = peer_buf_alloc − in flight
//! from the peer:  received ── held here ──▶ forwarded ── untold ──▶ told
//!                 the peer may have sent until received − told = buf_alloc
//! ```
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

/// Forward counts that went backwards by less than this are packets overtaken on the peer's side; a
/// count further "behind" is one that claims bytes never sent.
const HALF: u32 = 1 << 31;

/// The peer broke the rules of credit: it sent more than it was allowed to, or claims to have received
/// what was never sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overdrawn;

/// Both directions' credit of one connection.
#[derive(Debug, Clone)]
pub struct Credit {
    /// Size of our receive buffer as the peer knows it. Constant.
    buf_alloc: u32,
    /// Bytes that the peer sent us.
    received: u32,
    /// Bytes of those that left our buffer.
    forwarded: u32,
    /// `forwarded` as the peer was last told.
    told: u32,
    /// Size of the peer's receive buffer, as it last said.
    peer_buf_alloc: u32,
    /// Bytes that we sent to the peer.
    sent: u32,
    /// Bytes of those that left the peer's buffer, as it last said.
    peer_forwarded: u32,
}

impl Credit {
    /// Nothing sent or received; the peer has announced no buffer yet.
    pub fn new(buf_alloc: u32) -> Self {
        Self {
            buf_alloc,
            received: 0,
            forwarded: 0,
            told: 0,
            peer_buf_alloc: 0,
            sent: 0,
            peer_forwarded: 0,
        }
    }

    /// Size of this side's receive buffer.
    pub fn buf_alloc(&self) -> u32 {
        self.buf_alloc
    }

    /// Takes what a packet from the peer says about its buffer.
    ///
    /// A forward count older than one seen before is ignored: drivers fill a header's counts before
    /// they queue it, so packets of two threads may overtake each other.
    ///
    /// # Errors
    /// [`Overdrawn`] if the peer claims to have received what was never sent.
    pub fn peer_says(&mut self, buf_alloc: u32, forwarded: u32) -> Result<(), Overdrawn> {
        let advance = forwarded.wrapping_sub(self.peer_forwarded);
        if advance <= self.in_flight() {
            self.peer_forwarded = forwarded;
        } else if advance < HALF {
            return Err(Overdrawn);
        }
        self.peer_buf_alloc = buf_alloc;
        Ok(())
    }

    /// Bytes that may be sent now.
    pub fn free(&self) -> u32 {
        self.peer_buf_alloc.saturating_sub(self.in_flight())
    }

    /// Bytes were sent; at most [`Credit::free`] of them.
    pub fn send(&mut self, bytes: u32) {
        debug_assert!(bytes <= self.free(), "credit overdrawn by this side");
        self.sent = self.sent.wrapping_add(bytes);
    }

    /// The peer sent bytes; they are held until [`Credit::forward`].
    ///
    /// # Errors
    /// [`Overdrawn`] if it had no credit for them.
    pub fn receive(&mut self, bytes: u32) -> Result<(), Overdrawn> {
        let used = self.received.wrapping_sub(self.told);
        if bytes > self.buf_alloc.saturating_sub(used) {
            return Err(Overdrawn);
        }
        self.received = self.received.wrapping_add(bytes);
        Ok(())
    }

    /// Held bytes went where they belong; at most [`Credit::held`] of them.
    pub fn forward(&mut self, bytes: u32) {
        debug_assert!(bytes <= self.held(), "more bytes left than were held");
        self.forwarded = self.forwarded.wrapping_add(bytes);
    }

    /// Bytes received and not yet forwarded: the most that this connection may buffer.
    pub fn held(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// Whether the peer should be told: it believes that less than half of the buffer is free, and
    /// telling it would give it half or more. (Half, so that a stream in full flow needs one update per
    /// half buffer, and a slow reader does not dribble out credit byte by byte.)
    pub fn update_due(&self) -> bool {
        self.forwarded.wrapping_sub(self.told) >= self.buf_alloc.div_ceil(2)
    }

    /// `buf_alloc` and `fwd_cnt` for a header that is about to be sent: the peer is told.
    pub fn tell(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        (self.buf_alloc, self.forwarded)
    }

    fn in_flight(&self) -> u32 {
        self.sent.wrapping_sub(self.peer_forwarded)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nothing_may_be_sent_before_the_peer_announced_a_buffer() {
        let mut credit = Credit::new(64);
        assert_eq!(credit.free(), 0);
        credit.peer_says(10, 0).unwrap();
        assert_eq!(credit.free(), 10);
        credit.send(10);
        assert_eq!(credit.free(), 0);
        credit.peer_says(10, 4).unwrap();
        assert_eq!(credit.free(), 4);
    }

    #[test]
    fn a_peer_that_shrinks_its_buffer_below_what_is_in_flight_gets_nothing() {
        let mut credit = Credit::new(64);
        credit.peer_says(100, 0).unwrap();
        credit.send(80);
        credit.peer_says(50, 0).unwrap();
        assert_eq!(credit.free(), 0);
        credit.peer_says(50, 40).unwrap();
        assert_eq!(credit.free(), 10);
    }

    #[test]
    fn a_count_of_bytes_never_sent_is_overdrawn_and_an_old_count_is_ignored() {
        let mut credit = Credit::new(64);
        credit.peer_says(100, 0).unwrap();
        credit.send(50);
        assert_eq!(credit.peer_says(100, 51), Err(Overdrawn));
        credit.peer_says(100, 50).unwrap();
        credit.peer_says(100, 20).unwrap();
        assert_eq!(credit.free(), 100);
    }

    #[test]
    fn the_buffer_is_what_was_told_not_what_is_free() {
        let mut credit = Credit::new(64);
        credit.receive(64).unwrap();
        credit.forward(64);
        // The peer cannot know yet.
        assert_eq!(credit.receive(1), Err(Overdrawn));
        assert!(credit.update_due());
        assert_eq!(credit.tell(), (64, 64));
        assert!(!credit.update_due());
        credit.receive(64).unwrap();
        assert_eq!(credit.receive(1), Err(Overdrawn));
        assert_eq!(credit.held(), 64);
    }

    proptest! {
        /// Against a model in `u64`, from any starting point of the wrapping counters.
        #[test]
        fn wraps_like_the_unbounded_model(start in any::<u32>(),
                                          buffer in 1u32..1 << 20,
                                          steps in proptest::collection::vec((0u8..4, any::<u32>()), 0..200)) {
            let mut credit = Credit::new(buffer);
            credit.received = start;
            credit.forwarded = start;
            credit.told = start;
            let (mut received, mut forwarded, mut told) = (0u64, 0u64, 0u64);
            for (what, amount) in steps {
                match what {
                    0 => {
                        let amount = amount % (2 * buffer);
                        let fits = received - told + u64::from(amount) <= u64::from(buffer);
                        prop_assert_eq!(credit.receive(amount).is_ok(), fits);
                        if fits {
                            received += u64::from(amount);
                        }
                    }
                    1 => {
                        let amount = amount % (credit.held() + 1);
                        credit.forward(amount);
                        forwarded += u64::from(amount);
                    }
                    2 if credit.update_due() => {
                        credit.tell();
                        told = forwarded;
                    }
                    _ => {}
                }
                prop_assert_eq!(u64::from(credit.held()), received - forwarded);
                prop_assert!(credit.held() <= buffer);
            }
        }

        /// Whatever a peer says, in whatever order, what is in flight never exceeds what it offered then.
        #[test]
        fn in_flight_never_exceeds_the_offer(steps in proptest::collection::vec((any::<u32>(), any::<u32>()), 0..200)) {
            let mut credit = Credit::new(1);
            for (buf_alloc, forwarded) in steps {
                let _ = credit.peer_says(buf_alloc, forwarded);
                let free = credit.free();
                prop_assert!(u64::from(free) + u64::from(credit.in_flight()) <= u64::from(credit.peer_buf_alloc.max(credit.in_flight())));
                credit.send(free.min(1 << 16));
            }
        }
    }
}
