//! Deadlines on one timerfd.
//!
//! The timer is set only when an earlier deadline than the one it is set to comes in: a deadline that is
//! cancelled costs no system call, at the price of a tick that finds nothing.
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

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

/// Deadlines of things named by `T`.
pub struct Deadlines<T> {
    timer: OwnedFd,
    set_to: Option<Instant>,
    pending: BTreeSet<(Instant, T)>,
}

impl<T: Ord + Copy> Deadlines<T> {
    /// No deadline.
    ///
    /// # Errors
    /// No timerfd could be made.
    pub fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Self {
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            set_to: None,
            pending: BTreeSet::new(),
        })
    }

    /// Sets a deadline `after` now. The instant returned names it for [`Deadlines::cancel`].
    ///
    /// # Errors
    /// The timer could not be set.
    pub fn add(&mut self, after: Duration, what: T) -> io::Result<Instant> {
        let now = Instant::now();
        // An instant that cannot be represented is one that never comes; a year will do.
        let at = now
            .checked_add(after)
            .or_else(|| now.checked_add(Duration::from_secs(365 * 86_400)))
            .unwrap_or(now);
        self.pending.insert((at, what));
        self.set()?;
        Ok(at)
    }

    /// Forgets a deadline.
    pub fn cancel(&mut self, at: Instant, what: T) {
        self.pending.remove(&(at, what));
    }

    /// Takes what is due; call it when the timer's descriptor is readable.
    ///
    /// # Errors
    /// The timer could not be set.
    pub fn due(&mut self) -> io::Result<Vec<T>> {
        // Not readable: a tick that was taken already.
        let _ = rustix::io::read(&self.timer, &mut [0u8; 8]);
        self.set_to = None;
        let now = Instant::now();
        let mut due = Vec::new();
        while let Some((at, what)) = self.pending.first().copied()
            && at <= now
        {
            self.pending.pop_first();
            due.push(what);
        }
        self.set()?;
        Ok(due)
    }

    fn set(&mut self) -> io::Result<()> {
        let Some((first, _)) = self.pending.first().copied() else {
            return Ok(());
        };
        if self.set_to.is_some_and(|set_to| set_to <= first) {
            return Ok(());
        }
        // Zero would disarm the timer.
        let left = first
            .saturating_duration_since(Instant::now())
            .max(Duration::from_nanos(1));
        let value = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec::try_from(left).map_err(io::Error::other)?,
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &value)?;
        self.set_to = Some(first);
        Ok(())
    }
}

impl<T> AsFd for Deadlines<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    fn wait(deadlines: &Deadlines<u32>) {
        let mut fds = [PollFd::new(deadlines, PollFlags::IN)];
        assert_eq!(poll(&mut fds, None).unwrap(), 1);
    }

    #[test]
    fn deadlines_come_in_their_order_and_cancelled_ones_do_not() {
        let mut deadlines = Deadlines::new().unwrap();
        deadlines.add(Duration::from_millis(20), 2).unwrap();
        deadlines.add(Duration::from_millis(10), 1).unwrap();
        let gone = deadlines.add(Duration::from_millis(1), 0).unwrap();
        deadlines.add(Duration::MAX, 3).unwrap();
        deadlines.cancel(gone, 0);
        let mut due = Vec::new();
        while due.len() < 2 {
            wait(&deadlines);
            due.extend(deadlines.due().unwrap());
        }
        assert_eq!(due, [1, 2]);
    }
}
