//! Stays with a pod until its container has ended: streams, signals, terminal, exit status.
//!
//! ```text
//!             Started              Exited, outputs at their end        control connection closed
//!  Starting ──────────▶ Running ──────────────────────────────▶ Ending ──────────▶ container's status
//!      │                   │                                       │ the machine does not end: it is
//!      │                   │                                       ▼ killed, the status stands
//!      └── machine ends ───┴── machine ends ──▶ 1 before, 125 after the start
//! ```
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use cube_guest::{ExitStatus, HostRequest, ProcessId, Stdio};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::failure::{FAILURE, Failure, LOST, USAGE};
use super::signals::{Arrived, Signals, asks_to_end};
use super::stdio::{Output, Relays};
use super::terminal::{self, RawMode};
use super::timeline::Timeline;
use crate::client::{MachineEnd, Pod, PodError, PodEvent};
use crate::pod::SessionEvent;

/// How long a machine may take to power off after its container's end, or to end after its session
/// broke, before it is killed.
const GRACE: Duration = Duration::from_secs(5);
/// That many requests to end, unanswered by the guest, end the machine.
const PATIENCE: usize = 3;

/// What to stay with.
pub(crate) struct Attachment {
    /// The container's id.
    pub(crate) container: String,
    /// Its standard streams.
    pub(crate) stdio: Stdio,
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
    exited: Option<ExitStatus>,
    /// Outputs that have not come to their end.
    outputs: usize,
    /// Of these, the ones that are connected.
    relaying: usize,
    /// The guest said all it had to say.
    closed: bool,
    ended: Option<MachineEnd>,
    /// What to report when the machine has ended.
    failure: Option<Failure>,
    /// Why the session broke: counts if the machine does not know better.
    broken: Option<Failure>,
    /// Arrived before the container ran.
    held: Option<u8>,
    deadline: Option<Instant>,
}

struct Run {
    pod: Pod,
    relays: Relays,
    attachment: Attachment,
    raw: Option<RawMode>,
    state: State,
}

/// Relays until the container has ended and all its output has been written.
pub(crate) fn stay(pod: Pod, attachment: Attachment) -> Outcome {
    let outputs = match &attachment.stdio {
        Stdio::Null => 0,
        Stdio::Pipes { stdout, stderr, .. } => [stdout, stderr].into_iter().flatten().count(),
        Stdio::Terminal { .. } => 1,
    };
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
        raw: None,
        state: State {
            outputs,
            ..State::default()
        },
    };
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
    fn until_the_end(&mut self) -> Result<u8, Failure> {
        loop {
            if let Some(result) = self.result() {
                return result;
            }
            self.wait().map_err(|error| self.own_failure(error))?;
            let mut events = Vec::new();
            let result = self.pod.turn(&mut events);
            for event in events {
                self.take(event)?;
            }
            result.map_err(|error| self.own_failure(error))?;
            self.take_relay_ends();
            for signal in self.attachment.signals.arrived() {
                self.take_signal(signal)?;
            }
            self.keep_deadline();
        }
    }

    /// A failure of the host's, which leaves the container in the dark.
    fn own_failure(&self, error: impl Into<PodError>) -> Failure {
        let status = if self.state.started { LOST } else { FAILURE };
        Failure::with_status(status, error.into())
    }

    fn wait(&self) -> std::io::Result<()> {
        let mut fds: Vec<PollFd<'_>> = self
            .pod
            .interests()
            .into_iter()
            .map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags))
            .collect();
        for fd in [self.relays.interest(), self.attachment.signals.interest()] {
            fds.push(PollFd::from_borrowed_fd(fd, PollFlags::IN));
        }
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
        let complete = state.outputs == 0 && (state.closed || end.killed_here);
        Some(match &state.exited {
            // A guest powers off in good order only after its output was taken.
            Some(status) if complete || end.status.success() => exit_status(status),
            _ if state.started => Err(Failure::lost(format!(
                "the machine ended before its container: {}",
                end.sentence()
            ))),
            // The VMM says 2 of values that no machine can have, as this program does.
            _ if end.status.code() == Some(USAGE.into()) => Err(Failure::usage(end.sentence())),
            _ => Err(Failure::new(end.sentence())),
        })
    }

    fn take(&mut self, event: PodEvent) -> Result<(), Failure> {
        match event {
            PodEvent::Session(event) => self.take_session_event(event)?,
            PodEvent::Broken(error) => {
                let status = if self.state.started { LOST } else { FAILURE };
                self.state.broken = Some(Failure::with_status(status, error));
                self.state.deadline = Some(Instant::now() + GRACE);
            }
            PodEvent::Ended(end) => self.state.ended = Some(end),
        }
        Ok(())
    }

    fn take_session_event(&mut self, event: SessionEvent) -> Result<(), Failure> {
        match event {
            // A signal that came too late, or a resize of no terminal: nothing to be done.
            SessionEvent::Ready { .. } | SessionEvent::Reply { .. } => {}
            // The exit status says what killed the container; execs are not asked for.
            SessionEvent::OomKilled { .. } | SessionEvent::ExecExited { .. } => {}
            SessionEvent::Stream { token, stream } => {
                self.take_stream(token, stream)
                    .map_err(|error| self.own_failure(error))?;
            }
            SessionEvent::Started { .. } => {
                self.state.started = true;
                // The size may have changed since it was put into the specification.
                self.resize();
                if let Some(signal) = self.state.held.take() {
                    self.forward(signal);
                }
            }
            SessionEvent::Exited { status, .. } => {
                self.attachment.timeline.mark("container exited");
                self.state.exited = Some(status);
            }
            SessionEvent::Failed { reason } => {
                self.state.failure = Some(Failure::new(format!(
                    "the guest could not set the pod up: {reason}"
                )));
                self.state.deadline = Some(Instant::now() + GRACE);
            }
            SessionEvent::Closed => self.state.closed = true,
        }
        Ok(())
    }

    fn take_stream(
        &mut self,
        token: u64,
        stream: std::os::unix::net::UnixStream,
    ) -> std::io::Result<()> {
        let output = match &self.attachment.stdio {
            Stdio::Null => None,
            Stdio::Pipes { stdin, .. } if *stdin == Some(token) => None,
            Stdio::Pipes { stderr, .. } if *stderr == Some(token) => Some(Output::Stderr),
            Stdio::Pipes { .. } => Some(Output::Stdout),
            Stdio::Terminal { .. } => {
                if self.attachment.interactive {
                    self.raw = RawMode::enter()?;
                    self.relays.input(stream.try_clone()?)?;
                }
                Some(Output::Stdout)
            }
        };
        match output {
            Some(output) => {
                self.state.relaying += 1;
                self.relays.output(stream, output)
            }
            None => self.relays.input(stream),
        }
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
        if state.exited.is_some() && state.outputs == 0 && state.deadline.is_none() {
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
                if asks_to_end(signal) && self.pod.unanswered() + 1 >= PATIENCE {
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
        let request = HostRequest::Signal {
            process: ProcessId::Container(self.attachment.container.clone()),
            signal,
            all: false,
        };
        // Refused only at the end of the session, when there is nobody to signal.
        let _ = self.pod.request(request);
    }

    fn resize(&mut self) {
        let is_terminal = matches!(self.attachment.stdio, Stdio::Terminal { .. });
        if !is_terminal || !self.state.started {
            return;
        }
        if let Some(size) = terminal::size() {
            let process = ProcessId::Container(self.attachment.container.clone());
            let _ = self.pod.request(HostRequest::Resize { process, size });
        }
    }
}

/// The user lost patience: the machine ends with the pod.
fn ended_by(signal: u8) -> Failure {
    let sentence = format!("ended the machine on signal {signal}: its guest did not answer");
    Failure::with_status(128 | signal, sentence)
}

/// The status of `cube run` for a container that ended.
fn exit_status(status: &ExitStatus) -> Result<u8, Failure> {
    match status {
        ExitStatus::Code(code) => Ok(*code),
        ExitStatus::Signal {
            signal,
            oom_killed: true,
        } => Err(Failure::with_status(
            128 | signal,
            "the container ran out of memory and was killed: give it more with --memory",
        )),
        ExitStatus::Signal { signal, .. } => Ok(128 | signal),
        ExitStatus::NotStarted { code, reason } => Err(Failure::with_status(*code, reason)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_status_is_what_a_shell_shows() {
        let signal = |oom_killed| ExitStatus::Signal {
            signal: 9,
            oom_killed,
        };
        assert_eq!(exit_status(&ExitStatus::Code(255)), Ok(255));
        assert_eq!(exit_status(&signal(false)), Ok(137));
        assert_eq!(exit_status(&signal(true)).unwrap_err().status, 137);
        let not_found = ExitStatus::NotStarted {
            code: 127,
            reason: "no such program: nope".to_owned(),
        };
        let failure = exit_status(&not_found).unwrap_err();
        assert_eq!(
            (failure.status, &*failure.sentence),
            (127, "no such program: nope")
        );
    }
}
