//! The device's own epoll: every socket, the listener, and one timer for all deadlines.
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
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::time::Timespec;

use super::host::Listener;
use super::table::Id;
use crate::vmm::virtio::deadlines::Deadlines;

/// Socket events handled in one turn.
const EVENTS: usize = 64;

/// Who an event is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Clients wait to be accepted.
    Listener,
    /// A deadline has passed.
    Timer,
    /// A client that has not sent its line.
    Client(u32),
    /// A stream's socket.
    Stream(Id),
}

impl Source {
    fn to_data(self) -> EventData {
        EventData::new_u64(match self {
            Self::Listener => 0,
            Self::Timer => 1 << 48,
            Self::Client(client) => 2 << 48 | u64::from(client),
            Self::Stream(id) => 3 << 48 | id.to_bits(),
        })
    }

    fn from_data(data: EventData) -> Self {
        let bits = data.u64();
        match bits >> 48 {
            0 => Self::Listener,
            1 => Self::Timer,
            2 => Self::Client(bits as u32),
            _ => Self::Stream(Id::from_bits(bits)),
        }
    }
}

/// What a deadline ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Due {
    /// The pause in accepting clients.
    Accept,
    /// A client that has not sent its line.
    Client(u32),
    /// A stream that the guest has not answered or not confirmed.
    Stream(Id),
}

/// The device's epoll and its deadlines.
pub struct PollSet {
    epoll: OwnedFd,
    deadlines: Deadlines<Due>,
}

impl PollSet {
    /// Polls `listener` and the deadlines.
    ///
    /// # Errors
    /// No epoll or timer could be made.
    pub fn new(listener: &Listener) -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let deadlines = Deadlines::new()?;
        epoll::add(&epoll, listener, Source::Listener.to_data(), EventFlags::IN)?;
        epoll::add(&epoll, &deadlines, Source::Timer.to_data(), EventFlags::IN)?;
        Ok(Self { epoll, deadlines })
    }

    /// The descriptor that is readable when [`PollSet::take`] has something.
    pub fn fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Moves the events at hand, a bounded number of them, to `into`.
    ///
    /// # Errors
    /// The operating system's.
    pub fn take(&self, into: &mut Vec<(Source, EventFlags)>) -> io::Result<()> {
        let now = Timespec::default();
        let mut events = [MaybeUninit::<Event>::uninit(); EVENTS];
        let events = match epoll::wait(&self.epoll, &mut events, Some(&now)) {
            Ok((events, _)) => events,
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let events = events.iter();
        into.extend(events.map(|event| (Source::from_data(event.data), event.flags)));
        Ok(())
    }

    /// Polls a socket more. It leaves the set when it is closed.
    ///
    /// # Errors
    /// The operating system's.
    pub fn add(&self, socket: impl AsFd, source: Source, events: EventFlags) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, socket, source.to_data(), events)?)
    }

    /// Polls a socket differently.
    ///
    /// # Errors
    /// The operating system's.
    pub fn modify(&self, socket: impl AsFd, source: Source, events: EventFlags) -> io::Result<()> {
        Ok(epoll::modify(
            &self.epoll,
            socket,
            source.to_data(),
            events,
        )?)
    }

    /// Polls a socket no more.
    ///
    /// # Errors
    /// The operating system's.
    pub fn remove(&self, socket: impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&self.epoll, socket)?)
    }

    /// Sets a deadline; the instant returned cancels it.
    ///
    /// # Errors
    /// The timer could not be set.
    pub fn deadline(&mut self, after: Duration, due: Due) -> io::Result<Instant> {
        self.deadlines.add(after, due)
    }

    /// Forgets a deadline.
    pub fn cancel(&mut self, at: Instant, due: Due) {
        self.deadlines.cancel(at, due);
    }

    /// What is due.
    ///
    /// # Errors
    /// The timer could not be set.
    pub fn due(&mut self) -> io::Result<Vec<Due>> {
        self.deadlines.due()
    }
}
