//! Stays with a pod until its container has ended: streams, signals, terminal, exit status.
//!
//! ```text
//!             started              exited, outputs at their end        the pod's process ends
//!  Starting ──────────▶ Running ──────────────────────────────▶ Ending ──────────▶ container's status
//!      │                   │                                       │ the machine does not end: it is
//!      │                   │                                       ▼ killed, the status stands
//!      └── machine ends ───┴── machine ends ──▶ 1 before, 125 after the start
//! ```
//!
//! It is a client of the pod's API like any other, but for what it asked before the pod was there ([`Asked`]).
#![forbid(unsafe_code)]

use std::io;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::asked::Asked;
use super::failure::{FAILURE, Failure, LOST, USAGE};
use super::relay::relay_terminal;
use super::signals::{Arrived, Signals, asks_to_end};
use super::stdio::Relays;
use super::terminal::{self, RawMode};
use super::timeline::Timeline;
use crate::client::{ApiError, MachineEnd, Pod};
use crate::pod::api::body::{Exit, Kill};
use crate::pod::event_log::{EventKind, PodEventRecord};

/// How long a machine may take to power off after its container's end, or to end after its API
/// broke, before it is killed.
const GRACE: Duration = Duration::from_secs(5);
/// That many requests to end, unanswered by the guest, end the machine.
const PATIENCE: usize = 3;

/// What to stay with.
pub(crate) struct Attachment {
    /// The container's id.
    pub(crate) container: String,
    /// Whether it has a terminal.
    pub(crate) tty: bool,
    /// Whether standard input goes to the terminal.
    pub(crate) interactive: bool,
    /// Signals, caught since before the pod's start.
    pub(crate) signals: Signals,
    /// Where stages are noted.
    pub(crate) timeline: Timeline,
}

/// How it went.
pub(crate) struct Outcome {
    /// The container's status as a shell shows it, or a failure.
    pub(crate) result: Result<u8, Failure>,
    /// The timeline, with the machine's own stages.
    pub(crate) timeline: Timeline,
}

#[derive(Debug, Default)]
struct State {
    started: bool,
    exited: bool,
    /// How the container ended: known when all of its output was sent here.
    exit: Option<Exit>,
    /// Outputs that have not come to their end.
    outputs: usize,
    /// Of these, the ones that are relayed.
    relaying: usize,
    ended: Option<MachineEnd>,
    /// What to report when the machine has ended.
    failure: Option<Failure>,
    /// Why the API broke: counts if the machine does not know better.
    broken: Option<Failure>,
    /// Arrived before the container ran.
    held: Option<u8>,
    deadline: Option<Instant>,
}

struct Run {
    pod: Pod,
    relays: Relays,
    attachment: Attachment,
    asked: Asked,
    raw: Option<RawMode>,
    state: State,
}

/// Relays until the container has ended and all its output has been written.
pub(crate) fn stay(pod: Pod, asked: Asked, attachment: Attachment) -> Outcome {
    let relays = match Relays::new() {
        Ok(relays) => relays,
        Err(error) => {
            return Outcome {
                result: Err(Failure::new(format!("cannot relay streams: {error}"))),
                timeline: attachment.timeline,
            };
        }
    };
    let mut run = Run {
        pod,
        relays,
        attachment,
        asked,
        raw: None,
        state: State::default(),
    };
    if let Err(error) = run.relay() {
        run.lose(error.into());
    }
    let result = run.until_the_end();
    // Before anything is said on the terminal.
    run.raw = None;
    run.attachment.timeline.add_machine(&run.pod.timeline());
    Outcome {
        result,
        timeline: run.attachment.timeline,
    }
}

impl Run {
    /// Relays the streams. A terminal is this program's until the container runs.
    fn relay(&mut self) -> io::Result<()> {
        self.state.outputs = usize::from(self.asked.terminal.is_some());
        for (output, upgrading) in std::mem::take(&mut self.asked.outputs) {
            self.relays.output(move || upgrading.finish(), output)?;
            self.state.outputs += 1;
            self.state.relaying += 1;
        }
        match self.asked.input.take() {
            Some(upgrading) => self.relays.input(move || upgrading.finish()),
            None => Ok(()),
        }
    }

    fn until_the_end(&mut self) -> Result<u8, Failure> {
        loop {
            if let Some(result) = self.result() {
                return result;
            }
            self.wait().map_err(|error| self.own_failure(error))?;
            // Before the API: once the process is gone its connections hold all that will ever come.
            let turned = self.pod.turn().map(|end| end.cloned());
            let ended = turned.map_err(|error| self.own_failure(error))?;
            if let Err(error) = self.hear_pod() {
                self.lose(error);
            }
            self.take_relay_ends();
            self.state.ended = ended;
            for signal in self.attachment.signals.arrived() {
                self.take_signal(signal)?;
            }
            self.keep_deadline();
        }
    }

    /// A failure of the host's, which leaves the container in the dark.
    fn own_failure(&self, error: impl std::fmt::Display) -> Failure {
        let status = if self.state.started { LOST } else { FAILURE };
        Failure::with_status(status, format!("cannot serve the pod: {error}"))
    }

    /// The API broke. The machine may have ended, which it then says itself.
    fn lose(&mut self, error: ApiError) {
        let failure = self.own_failure(error);
        self.state.broken.get_or_insert(failure);
        self.asked.give_up();
        self.state.deadline.get_or_insert(Instant::now() + GRACE);
    }

    fn wait(&self) -> io::Result<()> {
        let mut interests = self.pod.interests();
        interests.extend(self.asked.interests());
        interests.push(self.relays.interest());
        interests.push(self.attachment.signals.interest());
        let readable = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        let mut fds: Vec<PollFd<'_>> = interests.into_iter().map(readable).collect();
        let timeout = self.state.deadline.map(|deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            Timespec::try_from(left).unwrap_or_default()
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn result(&self) -> Option<Result<u8, Failure>> {
        let state = &self.state;
        let end = state.ended.as_ref()?;
        if state.relaying > 0 {
            return None;
        }
        let machine_knows = !end.killed_here && !end.status.success();
        let broken = state.broken.as_ref().filter(|_| !machine_knows);
        if let Some(failure) = state.failure.as_ref().or(broken) {
            return Some(Err(failure.clone()));
        }
        Some(match &state.exit {
            Some(exit) => exit_status(exit),
            None if state.started => Err(Failure::lost(format!(
                "the machine ended before its container: {}",
                end.sentence()
            ))),
            // The VMM says 2 of values that no machine can have, as this program does.
            None if end.status.code() == Some(USAGE.into()) => Err(Failure::usage(end.sentence())),
            None => Err(Failure::new(end.sentence())),
        })
    }

    /// Takes what the pod answered.
    fn hear_pod(&mut self) -> Result<(), ApiError> {
        while let Some(event) = self.asked.next_event()? {
            self.take_event(event)?;
        }
        if self.asked.is_over() {
            self.state.deadline.get_or_insert(Instant::now() + GRACE);
        }
        if let Some(exit) = self.asked.exit()? {
            self.state.exit = Some(exit);
        }
        self.asked.forget_answered()
    }

    fn take_event(&mut self, event: PodEventRecord) -> Result<(), ApiError> {
        if event.container.as_ref() != Some(&self.attachment.container) {
            return Ok(());
        }
        match event.kind {
            EventKind::Started => {
                self.state.started = true;
                self.relay_terminal(self.attachment.interactive)?;
                // The size may have changed since it was put into the specification.
                self.resize();
                if let Some(signal) = self.state.held.take() {
                    self.forward(signal);
                }
            }
            EventKind::Exited => {
                self.attachment.timeline.mark("container exited");
                self.state.exited = true;
                // Of one that never ran, the end of its stream.
                self.relay_terminal(false)?;
            }
            _ => {}
        }
        Ok(())
    }

    /// The terminal is the container's from now on.
    fn relay_terminal(&mut self, interactive: bool) -> Result<(), ApiError> {
        if let Some(upgrading) = self.asked.terminal.take() {
            // It was answered before the container started.
            let stream = upgrading.finish()?;
            if interactive {
                self.raw = RawMode::enter()?;
            }
            relay_terminal(&self.relays, stream, interactive)?;
            self.state.relaying += 1;
        }
        Ok(())
    }

    fn take_relay_ends(&mut self) {
        for end in self.relays.ended() {
            self.state.relaying -= 1;
            self.state.outputs -= 1;
            if let Err(sentence) = end {
                self.state.failure.get_or_insert(Failure::new(sentence));
            }
        }
        let state = &mut self.state;
        if state.exited && state.outputs == 0 && state.deadline.is_none() {
            self.attachment.timeline.mark("output complete");
            state.deadline = Some(Instant::now() + GRACE);
        }
    }

    fn keep_deadline(&mut self) {
        if self.state.deadline.is_some_and(|d| d <= Instant::now()) {
            self.state.deadline = None;
            self.pod.kill();
        }
    }

    fn take_signal(&mut self, arrived: Arrived) -> Result<(), Failure> {
        match arrived {
            Arrived::WindowChange => self.resize(),
            Arrived::Forward(signal) if self.state.started => {
                if asks_to_end(signal) && self.asked.unanswered() + 1 >= PATIENCE {
                    return Err(ended_by(signal));
                }
                self.forward(signal);
            }
            Arrived::Forward(signal) if asks_to_end(signal) && self.state.held.is_some() => {
                return Err(ended_by(signal));
            }
            Arrived::Forward(signal) => self.state.held = Some(signal),
        }
        Ok(())
    }

    fn forward(&mut self, signal: u8) {
        let kill = Kill { signal, all: false };
        self.asked.call(self.pod.api(), "kill", &kill);
    }

    fn resize(&mut self) {
        if self.attachment.tty
            && self.state.started
            && let Some(size) = terminal::size()
        {
            self.asked.call(self.pod.api(), "resize", &size);
        }
    }
}

/// The user lost patience: the machine ends with the pod.
fn ended_by(signal: u8) -> Failure {
    let sentence = format!("ended the machine on signal {signal}: its guest did not answer");
    Failure::with_status(128 | signal, sentence)
}

/// The status of `cube run` for a container that ended.
fn exit_status(exit: &Exit) -> Result<u8, Failure> {
    match (&exit.reason, exit.signal) {
        (Some(reason), _) => Err(Failure::with_status(exit.exit_code, reason)),
        (None, Some(_)) if exit.oom_killed => Err(Failure::with_status(
            exit.exit_code,
            "the container ran out of memory and was killed: give it more with --memory",
        )),
        (None, _) => Ok(exit.exit_code),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cube_guest::ExitStatus;

    #[test]
    fn the_exit_status_is_what_a_shell_shows() {
        let status = |status: &ExitStatus| exit_status(&Exit::from(status));
        let signal = |oom_killed| ExitStatus::Signal {
            signal: 9,
            oom_killed,
        };
        assert_eq!(status(&ExitStatus::Code(255)), Ok(255));
        assert_eq!(status(&signal(false)), Ok(137));
        assert_eq!(status(&signal(true)).unwrap_err().status, 137);
        let not_found = ExitStatus::NotStarted {
            code: 127,
            reason: "no such program: nope".to_owned(),
        };
        let failure = status(&not_found).unwrap_err();
        assert_eq!(
            (failure.status, &*failure.sentence),
            (127, "no such program: nope")
        );
    }
}
