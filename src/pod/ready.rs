//! What a poll found ready: nothing else is read or written in the turn that follows, so a wake for one stream
//! costs the others no system call.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Descriptors by number, sorted. A number that was closed and given again within a turn costs one attempt that
/// would block.
#[derive(Debug, Default)]
pub(crate) struct Ready {
    numbers: Vec<RawFd>,
    /// Tests do without a poll.
    #[cfg(test)]
    everything: bool,
}

impl Ready {
    /// Sleeps until something of `interests` is ready, or the time has come. A signal ends the sleep too.
    pub(crate) fn wait(
        interests: Vec<(BorrowedFd<'_>, PollFlags)>,
        timeout: Option<&Timespec>,
    ) -> rustix::io::Result<Self> {
        let mut fds: Vec<PollFd<'_>> = interests
            .into_iter()
            .map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags))
            .collect();
        match poll(&mut fds, timeout) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(Self::default()),
            Err(error) => return Err(error),
        }
        let ready = fds.iter().filter(|fd| !fd.revents().is_empty());
        let mut numbers: Vec<RawFd> = ready.map(|fd| fd.as_fd().as_raw_fd()).collect();
        numbers.sort_unstable();
        Ok(Self {
            numbers,
            #[cfg(test)]
            everything: false,
        })
    }

    /// Whether `fd` was found ready.
    pub(crate) fn has(&self, fd: &impl AsFd) -> bool {
        #[cfg(test)]
        if self.everything {
            return true;
        }
        let number = fd.as_fd().as_raw_fd();
        self.numbers.binary_search(&number).is_ok()
    }

    /// Whether nothing was.
    pub(crate) fn is_empty(&self) -> bool {
        self.numbers.is_empty()
    }

    /// As if all were ready.
    #[cfg(test)]
    pub(crate) fn everything() -> Self {
        Self {
            everything: true,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    #[test]
    fn only_what_has_something_is_ready() {
        let pairs: Vec<_> = (0..5).map(|_| UnixStream::pair().unwrap()).collect();
        (&pairs[3].1).write_all(b"x").unwrap();
        let interests = pairs.iter().map(|(a, _)| (a.as_fd(), PollFlags::IN));
        let ready = Ready::wait(interests.collect(), None).unwrap();
        let found: Vec<bool> = pairs.iter().map(|(a, _)| ready.has(a)).collect();
        assert_eq!(found, [false, false, false, true, false]);
        let now = Timespec::default();
        let interests = vec![(pairs[0].0.as_fd(), PollFlags::IN)];
        assert!(Ready::wait(interests, Some(&now)).unwrap().is_empty());
    }
}
