//! A process of a running pod and this process's standard streams: what `cube exec` and `cube attach` share.
#![forbid(unsafe_code)]

use std::io;
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, poll};

use super::failure::Failure;
use super::signals::{Arrived, Signals};
use super::stdio::{Output, Relays};
use super::terminal;
use crate::client::PodApi;
use crate::pod::api::body::{Exit, Kill};

/// Which streams there are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Streams {
    /// One for both directions.
    pub(super) tty: bool,
    /// Pass standard input on.
    pub(super) interactive: bool,
}

/// What is done about signals that would end this program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OnSignal {
    /// They are the process's.
    Forward,
    /// They end the relaying.
    Leave,
}

/// Why relaying is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Over {
    /// Every output has ended.
    Ended,
    /// This signal, or the keys that mean so.
    Left(Option<u8>),
}

/// A process, by its path in the API: `/v1/execs/exec1`, `/v1/containers/main`.
pub(super) struct Process<'a> {
    pub(super) api: &'a PodApi,
    pub(super) path: String,
}

impl Process<'_> {
    /// Connects the streams; returns how many outputs there are.
    pub(super) fn attach(&self, relays: &Relays, streams: Streams) -> Result<usize, Failure> {
        let open = |stream: &str| {
            let path = format!("{}/attach/{stream}", self.path);
            self.api.upgrade(&path).map_err(Failure::new)
        };
        if streams.tty {
            let relaying = relay_terminal(relays, open("tty")?, streams.interactive);
            return relaying.map_err(Failure::new).map(|()| 1);
        }
        for (stream, output) in [("stdout", Output::Stdout), ("stderr", Output::Stderr)] {
            let stream = open(stream)?;
            let relaying = relays.output(move || Ok(stream), output);
            relaying.map_err(Failure::new)?;
        }
        if streams.interactive {
            let stream = open("stdin")?;
            relays.input(move || Ok(stream)).map_err(Failure::new)?;
        }
        Ok(2)
    }

    /// Relays until every output has ended, or until a signal if those are not the process's.
    pub(super) fn relay(
        &self,
        relays: &Relays,
        signals: &mut Signals,
        on_signal: OnSignal,
        mut outputs: usize,
    ) -> Result<Over, Failure> {
        while outputs > 0 {
            let mut fds = [
                PollFd::from_borrowed_fd(relays.interest(), PollFlags::IN),
                PollFd::from_borrowed_fd(signals.interest(), PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(Failure::new(error)),
            }
            for end in relays.ended() {
                end.map_err(Failure::new)?;
                outputs -= 1;
            }
            for arrived in signals.arrived() {
                match arrived {
                    Arrived::Forward(signal) if on_signal == OnSignal::Leave => {
                        return Ok(Over::Left(Some(signal)));
                    }
                    arrived => self.pass_on(arrived),
                }
            }
        }
        Ok(match relays.were_left() {
            true => Over::Left(None),
            false => Over::Ended,
        })
    }

    /// Refused at the end of the process, when there is nobody to signal.
    fn pass_on(&self, arrived: Arrived) {
        let path = &self.path;
        let _: Result<(), _> = match (arrived, terminal::size()) {
            (Arrived::Forward(signal), _) => {
                let kill = Kill { signal, all: false };
                self.api.call("POST", &format!("{path}/kill"), &kill)
            }
            (Arrived::WindowChange, Some(size)) => {
                self.api.call("POST", &format!("{path}/resize"), &size)
            }
            (Arrived::WindowChange, None) => Ok(()),
        };
    }

    /// Waits for the process's end; its status as a shell shows it.
    pub(super) fn status(&self) -> Result<u8, Failure> {
        let wait = format!("{}/wait", self.path);
        let exit: Exit = self.api.get(&wait).map_err(Failure::lost)?;
        match exit.reason {
            Some(reason) => Err(Failure::with_status(exit.exit_code, reason)),
            None => Ok(exit.exit_code),
        }
    }
}

/// A terminal's stream goes both ways.
pub(super) fn relay_terminal(
    relays: &Relays,
    stream: UnixStream,
    interactive: bool,
) -> io::Result<()> {
    if interactive {
        let input = stream.try_clone()?;
        relays.input(move || Ok(input))?;
    }
    relays.output(move || Ok(stream), Output::Stdout)
}
