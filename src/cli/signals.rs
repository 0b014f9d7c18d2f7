//! Signals as a descriptor to poll.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;

/// Those that are the container's.
const FORWARDED: [i32; 6] = [SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2];
/// Those that end a program which does not say otherwise, sent by people and service managers.
const ENDING: [i32; 4] = [SIGINT, SIGTERM, SIGHUP, SIGQUIT];

/// A signal that arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Arrived {
    /// To be forwarded.
    Forward(u8),
    /// The terminal's size changed.
    WindowChange,
}

/// Catches the signals from its creation on, for the rest of the program.
pub(crate) struct Signals {
    delivery: SignalDelivery<UnixStream, SignalOnly>,
}

impl Signals {
    pub(crate) fn catch() -> io::Result<Self> {
        let (read, write) = UnixStream::pair()?;
        let caught = FORWARDED.into_iter().chain([SIGWINCH]);
        Ok(Self {
            delivery: SignalDelivery::with_pipe(read, write, SignalOnly, caught)?,
        })
    }

    /// Readable when signals arrived.
    pub(crate) fn interest(&self) -> BorrowedFd<'_> {
        self.delivery.get_read().as_fd()
    }

    /// The signals since the last call; several of one number count once.
    pub(crate) fn arrived(&mut self) -> Vec<Arrived> {
        self.delivery
            .pending()
            .map(|number| match u8::try_from(number) {
                Ok(number) if number != SIGWINCH as u8 => Arrived::Forward(number),
                _ => Arrived::WindowChange,
            })
            .collect()
    }
}

/// Whether `signal` asks a program to end.
pub(crate) fn asks_to_end(signal: u8) -> bool {
    ENDING.contains(&i32::from(signal))
}
