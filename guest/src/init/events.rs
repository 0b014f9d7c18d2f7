//! The epoll set: what is watched, and what an event says.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::{Errno, Result};

/// Who an event is for. Numbers are places in the agent's tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// A child ended.
    Children,
    /// The grace period of a shutdown is over.
    Grace,
    /// The control connection.
    Control,
    /// A starting container's report.
    Report(u32),
    /// A starting exec's report.
    ExecReport(u32),
    /// One end of a stream.
    Stream(u32),
    /// `memory.events` of a container's cgroup.
    Memory(u32),
    /// `cgroup.events` of a container's cgroup.
    Cgroup(u32),
    /// A job's report.
    Job(u32),
    /// A connection to a port of the pod.
    Forward(u32),
}

impl Source {
    fn encode(self) -> u64 {
        let (kind, index) = match self {
            Self::Children => (0, 0),
            Self::Grace => (1, 0),
            Self::Control => (2, 0),
            Self::Report(index) => (3, index),
            Self::Stream(index) => (4, index),
            Self::ExecReport(index) => (5, index),
            Self::Memory(index) => (6, index),
            Self::Cgroup(index) => (7, index),
            Self::Job(index) => (8, index),
            Self::Forward(index) => (9, index),
        };
        kind << 32 | u64::from(index)
    }

    fn decode(word: u64) -> Option<Self> {
        let index = word as u32;
        match word >> 32 {
            0 => Some(Self::Children),
            1 => Some(Self::Grace),
            2 => Some(Self::Control),
            3 => Some(Self::Report(index)),
            4 => Some(Self::Stream(index)),
            5 => Some(Self::ExecReport(index)),
            6 => Some(Self::Memory(index)),
            7 => Some(Self::Cgroup(index)),
            8 => Some(Self::Job(index)),
            9 => Some(Self::Forward(index)),
            _ => None,
        }
    }
}

/// The epoll set, level-triggered.
#[derive(Debug)]
pub(crate) struct Poller(OwnedFd);

impl Poller {
    pub(crate) fn new() -> Result<Self> {
        epoll::create(epoll::CreateFlags::CLOEXEC).map(Self)
    }

    /// Waits for at least one event and returns who they are for, each once.
    pub(crate) fn wait(&self) -> Result<Vec<Source>> {
        let mut events = Vec::with_capacity(32);
        match epoll::wait(&self.0, rustix::buffer::spare_capacity(&mut events), None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        let mut sources: Vec<Source> = Vec::with_capacity(events.len());
        for event in events {
            match Source::decode(event.data.u64()) {
                Some(source) if !sources.contains(&source) => sources.push(source),
                _ => {}
            }
        }
        Ok(sources)
    }
}

/// A descriptor that is watched for what its owner wants at the moment.
#[derive(Debug)]
pub(crate) struct Watched {
    fd: OwnedFd,
    source: Source,
    watching: Option<EventFlags>,
}

impl Watched {
    /// Not watched yet.
    pub(crate) fn new(fd: OwnedFd, source: Source) -> Self {
        Self {
            fd,
            source,
            watching: None,
        }
    }

    /// Watches for `wanted`; `None` stops watching. (An epoll entry with no flags still reports errors
    /// and hang-ups, over and over.)
    pub(crate) fn watch(&mut self, poller: &Poller, wanted: Option<EventFlags>) -> Result<()> {
        let data = EventData::new_u64(self.source.encode());
        match (self.watching, wanted) {
            (now, wanted) if now == wanted => {}
            (_, None) => epoll::delete(&poller.0, &self.fd)?,
            (None, Some(flags)) => epoll::add(&poller.0, &self.fd, data, flags)?,
            (Some(_), Some(flags)) => epoll::modify(&poller.0, &self.fd, data, flags)?,
        }
        self.watching = wanted;
        Ok(())
    }

    /// Stops watching and closes. Closing alone is not enough: a child that was just forked has a copy
    /// until it executes its program, and the entry would live as long as the copy.
    pub(crate) fn close(self, poller: &Poller) {
        drop(self.release(poller));
    }

    /// Stops watching and gives the descriptor back.
    pub(crate) fn release(mut self, poller: &Poller) -> OwnedFd {
        let _ = self.watch(poller, None);
        self.fd
    }
}

impl AsFd for Watched {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_survive_the_round_trip() {
        for source in [
            Source::Children,
            Source::Grace,
            Source::Control,
            Source::Report(0),
            Source::Report(u32::MAX),
            Source::Stream(7),
            Source::ExecReport(1),
            Source::Memory(2),
            Source::Cgroup(3),
            Source::Job(4),
            Source::Forward(5),
        ] {
            assert_eq!(Source::decode(source.encode()), Some(source));
        }
        assert_eq!(Source::decode(99 << 32), None);
    }

    #[test]
    fn a_closed_descriptor_reports_nothing_though_a_copy_lives() {
        let poller = Poller::new().unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let copy = reader.try_clone().unwrap();
        let mut watched = Watched::new(reader, Source::Stream(1));
        watched.watch(&poller, Some(EventFlags::IN)).unwrap();
        rustix::io::write(&writer, b"x").unwrap();
        assert_eq!(poller.wait().unwrap(), [Source::Stream(1)]);
        watched.close(&poller);
        let (marker, other) = rustix::pipe::pipe().unwrap();
        drop(other);
        let mut marker = Watched::new(marker, Source::Grace);
        marker.watch(&poller, Some(EventFlags::IN)).unwrap();
        assert_eq!(poller.wait().unwrap(), [Source::Grace]);
        drop(copy);
    }
}
