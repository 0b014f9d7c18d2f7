//! The queues of a network device, on the worker.
//!
//! The link's descriptors are polled for changes only: a queue that has read a link empty, or found it full,
//! remembers so until the descriptor says otherwise. A busy link therefore costs one system call a frame and
//! none to poll.
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

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::Duration;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_ERR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_OK,
};

use super::control::Command;
use super::filter::Filter;
use super::header::{ETHERNET_HEADER, HEADER_LEN, VLAN_TAG};
use super::limiter::Limiter;
use super::receive::{Receiver, Reception, Stop};
use super::tap::{Link, Offloads};
use super::transmit::{Sender, Sent};
use super::{Identity, STATUS, Shared, link_status};
use crate::vmm::memory::GuestMemory;
use crate::vmm::virtio::chain::Chain;
use crate::vmm::virtio::deadlines::Deadlines;
use crate::vmm::virtio::drain::{Effects, Failure, Outcome, QueueHandler};
use crate::vmm::virtio::{GuestFault, HostError, Interest, Interrupt};

/// The token of the eventfd that says that settings changed.
const SETTINGS: u32 = 0;
/// The token of the timer.
const TIMER: u32 = 1;
/// The token of the first queue pair's link; the others follow.
const LINKS: u32 = 2;

/// The longest frame that the host may give the guest to segment: an IP packet of 65,535 bytes with a VLAN
/// tag, and the virtio header.
const LONGEST_SEGMENTED: u32 = 65_535 + (HEADER_LEN + ETHERNET_HEADER + VLAN_TAG) as u32;

/// A way through the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Direction {
    Receive,
    Transmit,
}

/// What a queue is for.
enum Role {
    Receive(usize),
    Transmit(usize),
    Control,
}

/// A receive queue, a transmit queue, and a queue of the link.
struct Pair {
    receiver: Receiver,
    /// The link may have a frame.
    readable: bool,
    /// The link may take a frame.
    writable: bool,
    /// Frames were sent, and what they brought about may be there to read already.
    answered: bool,
}

/// One direction's limit.
#[derive(Default)]
struct Gate {
    limiter: Limiter,
    /// Nothing passes until the timer says so.
    closed: bool,
}

/// Answers the queues of one network device.
pub struct NetHandler<L> {
    link: L,
    shared: Arc<Shared>,
    identity: Identity,
    features: u64,
    interrupt: Interrupt,
    pairs: Vec<Pair>,
    /// Pairs that the driver uses.
    in_use: usize,
    filter: Filter,
    sender: Sender,
    received: Gate,
    sent: Gate,
    link_up: bool,
    timer: Deadlines<Direction>,
}

impl<L: Link> NetHandler<L> {
    /// A handler under the negotiated `features`: one pair in use, nothing filtered that the driver did not
    /// ask for.
    ///
    /// # Errors
    /// No timer can be had, or the link refuses; the link comes back.
    pub fn new(
        mut link: L,
        shared: Arc<Shared>,
        identity: Identity,
        (features, memory, interrupt): (u64, &GuestMemory, Interrupt),
    ) -> Result<Self, (L, io::Error)> {
        let offloads = Offloads::of_features(features);
        let ready = link
            .set_offloads(offloads)
            .and_then(|()| link.use_queues(1));
        let timer = match ready.and_then(|()| Deadlines::new()) {
            Ok(timer) => timer,
            Err(error) => return Err((link, error)),
        };
        let has = |bit: u32| features & (1 << bit) != 0;
        let longest = longest_received(features, identity.mtu);
        let pair = |at: usize| Pair {
            receiver: Receiver::new(
                u16::try_from(at.saturating_mul(2)).unwrap_or(u16::MAX),
                memory,
                has(VIRTIO_NET_F_MRG_RXBUF),
                longest,
            ),
            readable: true,
            writable: true,
            answered: false,
        };
        let pairs = if has(VIRTIO_NET_F_MQ) {
            link.queues().len()
        } else {
            1
        };
        let mut handler = Self {
            pairs: (0..pairs).map(pair).collect(),
            in_use: 1,
            filter: Filter::new(
                identity.mac,
                has(VIRTIO_NET_F_CTRL_RX),
                has(VIRTIO_NET_F_CTRL_VLAN),
            ),
            sender: Sender {
                features,
                mtu: identity.mtu,
                source: identity.check_source.then_some(identity.mac),
            },
            received: Gate::default(),
            sent: Gate::default(),
            link_up: true,
            link,
            shared,
            identity,
            features,
            interrupt,
            timer,
        };
        handler.apply_settings();
        Ok(handler)
    }

    /// The link, when the device has left its worker.
    pub fn into_link(self) -> L {
        self.link
    }

    fn role(&self, queue: u16) -> Role {
        let queue = usize::from(queue);
        if queue >= self.pairs.len().saturating_mul(2) {
            Role::Control
        } else if queue % 2 == 0 {
            Role::Receive(queue / 2)
        } else {
            Role::Transmit(queue / 2)
        }
    }

    fn run_all(&self, direction: Direction, effects: &mut Effects) {
        for pair in 0..self.in_use {
            effects.run(queue_index(pair, direction));
        }
    }

    // To the guest.

    fn take_buffer(
        &mut self,
        at: usize,
        memory: &GuestMemory,
        chain: &mut Chain,
        effects: &mut Effects,
    ) -> Result<Outcome, Failure> {
        let pair = self.pairs.get_mut(at).ok_or(GuestFault::Ring)?;
        if !pair.receiver.hold(chain)? {
            effects.count_fault();
            return Ok(Outcome::Done(0));
        }
        self.receive(at, memory, effects)?;
        Ok(Outcome::Pending)
    }

    fn receive(
        &mut self,
        at: usize,
        memory: &GuestMemory,
        effects: &mut Effects,
    ) -> Result<(), Failure> {
        let (Some(pair), Some(link)) = (self.pairs.get_mut(at), self.link.queues().get(at)) else {
            return Ok(());
        };
        if self.received.closed || !pair.readable || !self.link_up || at >= self.in_use {
            return Ok(());
        }
        let mut reception = Reception {
            link: link.as_fd(),
            filter: &self.filter,
            limiter: &mut self.received.limiter,
            counters: &self.shared.counters,
        };
        match pair.receiver.receive(memory, &mut reception, effects)? {
            Stop::Empty => pair.readable = false,
            Stop::Buffers => effects.run(queue_index(at, Direction::Receive)),
            // The descriptor is asked anew whether it is readable, after the others had their turn.
            Stop::Burst => effects.rearm(),
            Stop::Limit(wait) => self.close(Direction::Receive, wait)?,
        }
        Ok(())
    }

    // From the guest.

    fn send(
        &mut self,
        at: usize,
        memory: &GuestMemory,
        chain: &Chain,
        effects: &mut Effects,
    ) -> Result<Outcome, Failure> {
        let (Some(pair), Some(link)) = (self.pairs.get_mut(at), self.link.queues().get(at)) else {
            return Ok(Outcome::Done(0));
        };
        let counters = &self.shared.counters;
        match self
            .sender
            .send(memory, chain, link.as_fd(), (counters, effects))?
        {
            Sent::Full => {
                pair.writable = false;
                effects.rearm();
                Ok(Outcome::PutBack)
            }
            Sent::Done { bytes, frames } => {
                pair.answered = true;
                if let Some(wait) = self.sent.limiter.charge(bytes, frames) {
                    self.shared.counters.sent_throttled.one();
                    self.close(Direction::Transmit, wait)?;
                }
                Ok(Outcome::Done(0))
            }
        }
    }

    // Limits and settings.

    fn gate(&mut self, direction: Direction) -> &mut Gate {
        match direction {
            Direction::Receive => &mut self.received,
            Direction::Transmit => &mut self.sent,
        }
    }

    fn close(&mut self, direction: Direction, wait: Duration) -> Result<(), HostError> {
        self.gate(direction).closed = true;
        let set = self.timer.add(wait, direction);
        set.map(drop)
            .map_err(|e| self.identity.error("set a timer", e))
    }

    fn open(
        &mut self,
        direction: Direction,
        memory: &GuestMemory,
        effects: &mut Effects,
    ) -> Result<(), Failure> {
        self.gate(direction).closed = false;
        self.run_all(direction, effects);
        if direction == Direction::Receive {
            // Those that hold enough buffers wait for no more.
            for at in 0..self.in_use {
                self.receive(at, memory, effects)?;
            }
        }
        Ok(())
    }

    /// Returns whether the link went up or down.
    fn apply_settings(&mut self) -> bool {
        let settings = self.shared.settings();
        self.received.limiter = Limiter::new(settings.receive);
        self.sent.limiter = Limiter::new(settings.transmit);
        std::mem::replace(&mut self.link_up, settings.link_up) != settings.link_up
    }

    fn on_settings(&mut self, memory: &GuestMemory, effects: &mut Effects) -> Result<(), Failure> {
        // Not readable: another turn has taken it.
        let _ = self.shared.changed.read();
        if self.apply_settings() {
            let status = link_status(self.link_up);
            self.interrupt.config_change(STATUS, &status);
        }
        self.open(Direction::Receive, memory, effects)?;
        self.open(Direction::Transmit, memory, effects)
    }

    fn on_timer(&mut self, memory: &GuestMemory, effects: &mut Effects) -> Result<(), Failure> {
        let due = self.timer.due();
        let due = due.map_err(|e| self.identity.error("set a timer", e))?;
        for direction in due {
            // The settings may have changed since the timer was set, and the new limit be reached too.
            match self.gate(direction).limiter.charge(0, 0) {
                Some(wait) => self.close(direction, wait)?,
                None => self.open(direction, memory, effects)?,
            }
        }
        Ok(())
    }

    // Control.

    fn obey(
        &mut self,
        memory: &GuestMemory,
        chain: &Chain,
        effects: &mut Effects,
    ) -> Result<Outcome, Failure> {
        // Without a byte for the answer there is no way to give one.
        if chain.writable.is_empty() {
            return Err(GuestFault::Request.into());
        }
        let command = Command::parse(memory, &chain.readable);
        let done = match command {
            Some(command) => self.apply(command, effects)?,
            None => false,
        };
        if !done {
            effects.count_fault();
        }
        let answer = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
        chain
            .writable
            .write(memory, 0, &answer.to_le_bytes()[..1])?;
        Ok(Outcome::Done(1))
    }

    /// Whether the command was carried out.
    fn apply(&mut self, command: Command, effects: &mut Effects) -> Result<bool, HostError> {
        match command {
            Command::Promiscuous(on) => self.filter.set_promiscuous(on),
            Command::AllMulticast(on) => self.filter.set_all_multicast(on),
            Command::MacTable { unicast, multicast } => self.filter.set_table(unicast, multicast),
            // Who may send from one address only, has that one.
            Command::MacAddress(own) if self.sender.source.is_none_or(|source| source == own) => {
                self.filter.set_own(own);
            }
            Command::MacAddress(_) => return Ok(false),
            Command::Vlan { id, on } => return Ok(self.filter.set_vlan(id, on)),
            Command::QueuePairs(pairs) => return self.use_pairs(pairs.into(), effects),
        }
        Ok(true)
    }

    fn use_pairs(&mut self, pairs: usize, effects: &mut Effects) -> Result<bool, HostError> {
        if self.features & (1 << VIRTIO_NET_F_MQ) == 0 || pairs == 0 || pairs > self.pairs.len() {
            return Ok(false);
        }
        let used = self.link.use_queues(pairs);
        used.map_err(|e| self.identity.error("attach or detach the tap's queues", e))?;
        self.in_use = pairs;
        self.run_all(Direction::Receive, effects);
        self.run_all(Direction::Transmit, effects);
        // What arrived before a queue was attached has left its mark on nothing.
        for pair in &mut self.pairs {
            pair.readable = true;
        }
        Ok(true)
    }
}

impl<L: Link> QueueHandler for NetHandler<L> {
    fn wants(&self, queue: u16) -> bool {
        let usable = |at: usize| {
            let used = self.link_up && at < self.in_use;
            used.then(|| self.pairs.get(at)).flatten()
        };
        match self.role(queue) {
            Role::Receive(at) => usable(at).is_some_and(|pair| {
                pair.readable && !self.received.closed && pair.receiver.needs_buffers()
            }),
            Role::Transmit(at) => usable(at).is_some_and(|pair| pair.writable && !self.sent.closed),
            Role::Control => self.features & (1 << VIRTIO_NET_F_CTRL_VQ) != 0,
        }
    }

    fn handle(
        &mut self,
        memory: &GuestMemory,
        chain: &mut Chain,
        effects: &mut Effects,
    ) -> Result<Outcome, Failure> {
        match self.role(chain.queue()) {
            Role::Receive(at) => self.take_buffer(at, memory, chain, effects),
            Role::Transmit(at) => self.send(at, memory, chain, effects),
            Role::Control => self.obey(memory, chain, effects),
        }
    }

    fn interests(&self) -> Vec<Interest> {
        let own = |fd, token| Interest {
            fd,
            token,
            readable: true,
            writable: false,
            edge_triggered: false,
        };
        let mut interests = vec![
            own(self.shared.changed.as_raw_fd(), SETTINGS),
            own(self.timer.as_fd().as_raw_fd(), TIMER),
        ];
        let links = self.link.queues().iter().zip(&self.pairs);
        interests.extend((LINKS..).zip(links).map(|(token, (link, pair))| Interest {
            fd: link.as_raw_fd(),
            token,
            readable: true,
            // One that can be written is always ready, and would be reported for a frame read long since.
            writable: !pair.writable,
            edge_triggered: true,
        }));
        interests
    }

    fn ready(
        &mut self,
        memory: &GuestMemory,
        token: u32,
        effects: &mut Effects,
    ) -> Result<(), Failure> {
        match token {
            SETTINGS => return self.on_settings(memory, effects),
            TIMER => return self.on_timer(memory, effects),
            _ => {}
        }
        let at = token.saturating_sub(LINKS) as usize;
        if let Some(pair) = self.pairs.get_mut(at) {
            // One of the two is new, or both; the other costs one attempt.
            pair.readable = true;
            if !std::mem::replace(&mut pair.writable, true) {
                effects.rearm();
                effects.run(queue_index(at, Direction::Transmit));
            }
        }
        self.receive(at, memory, effects)
    }

    /// The host's stack answers while a frame is being written: acknowledgements from the guest bring the next
    /// segments, segments their acknowledgements. Both are told of by one interrupt.
    fn served(&mut self, memory: &GuestMemory, effects: &mut Effects) -> Result<(), Failure> {
        for at in 0..self.in_use {
            let Some(pair) = self.pairs.get_mut(at) else {
                continue;
            };
            if std::mem::take(&mut pair.answered) {
                pair.readable = true;
                self.receive(at, memory, effects)?;
            }
        }
        Ok(())
    }

    fn quiesce(&mut self, _memory: &GuestMemory, effects: &mut Effects) {
        for pair in &mut self.pairs {
            pair.receiver.give_back(effects);
        }
    }
}

fn queue_index(pair: usize, direction: Direction) -> u16 {
    let first = pair.saturating_mul(2);
    let index = match direction {
        Direction::Receive => first,
        Direction::Transmit => first.saturating_add(1),
    };
    u16::try_from(index).unwrap_or(u16::MAX)
}

/// Bytes of the longest frame for the guest, its virtio header included.
fn longest_received(features: u64, mtu: u16) -> u32 {
    let plain = (HEADER_LEN + ETHERNET_HEADER + VLAN_TAG) as u32;
    let offloads = Offloads::of_features(features);
    if offloads.can_segment() {
        LONGEST_SEGMENTED
    } else {
        plain.saturating_add(mtu.into())
    }
}
