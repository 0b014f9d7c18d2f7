//! The session with the agent: a state machine over one control connection.
//!
//! ```text
//!            adopt_control          Hello, same protocol           end of file, all ended
//! Listening ───────────────▶ Greeting ────────────────▶ Ready ───────────────────────────▶ Closed
//!                               │                         │
//!                               └── anything else ────────┴── a frame out of order ──▶ SessionError
//!
//! each container:  Starting ── Started ──▶ Running ── Exited ──▶ Exited
//!                      └──────────── Exited (not started) ─────────▲
//! ```
//!
//! The guest ends the connection when its containers have ended and every stream was closed by the host;
//! it powers off when the host has closed its side too, which the session does at once.
//!
//! The guest is hostile: every event it may send is one that the state allows, so the number of events
//! is bounded by what the host asked for. The owner polls [`Session::interests`] and calls
//! [`Session::turn`]; nothing here blocks.
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

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use cube_guest::frame::FrameError;
use cube_guest::{
    Answer, ExitStatus, GuestEvent, GuestMessage, HostMessage, HostRequest, PROTOCOL_VERSION,
    PodSpec, Stdio,
};
use rustix::event::PollFlags;

use super::frames::{Fill, FrameReader, FrameWriter};
use super::pairing::Pairing;
use super::ready::Ready;

/// Reads from the control connection per turn; the rest waits for the next.
const MAX_READS: usize = 8;

/// So long a stream is waited for after its process has ended, or after the guest has said that it comes. The agent
/// dials before the one and at once after the other, so it is on its way, or it was lost.
const STREAM_PATIENCE: Duration = Duration::from_secs(10);

/// Why the session ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The control connection failed, or carried what is not a frame.
    #[error("the agent's control connection broke: {0}")]
    Frame(#[from] FrameError),
    /// The host failed to serve the connection.
    #[error("the agent's control connection broke: {0}")]
    Io(#[from] io::Error),
    /// The first frame was another.
    #[error("the agent did not begin with its greeting")]
    NoHello,
    /// Guest and host come from different versions of Cube.
    #[error(
        "the agent (cube-init {version}) speaks protocol {guest}, this side {PROTOCOL_VERSION}: \
         install cube and cube-init of the same version"
    )]
    Protocol {
        /// The guest's protocol version.
        guest: u32,
        /// The guest's version, printable.
        version: String,
    },
    /// A well-formed frame that the state does not allow.
    #[error("the agent broke the protocol: {0}")]
    OutOfOrder(String),
    /// The connection ended while containers were still to report their exit.
    #[error("the agent closed its control connection before every container had ended")]
    ClosedEarly,
    /// The guest has not read requests for too long.
    #[error("the agent does not read its requests")]
    Behind,
    /// A request needs a session that is ready.
    #[error("the agent is not ready")]
    NotReady,
}

/// What the session tells its owner.
#[derive(Debug)]
pub enum SessionEvent {
    /// The handshake is done.
    Ready {
        /// Version of `cube-init`, printable.
        version: String,
    },
    /// A container's process was executed.
    Started {
        /// The container's id.
        container: String,
    },
    /// The guest's OOM killer ended a process of a container that has not ended.
    OomKilled {
        /// The container's id.
        container: String,
    },
    /// A container ended. Its output may still be on its way: a stream is complete at its end of file.
    Exited {
        /// The container's id.
        container: String,
        /// How; the reason in it is the guest's text, made printable.
        status: ExitStatus,
    },
    /// A stdio stream, in blocking mode; one that did not come long after its process's end has ended.
    Stream {
        /// The token that the specification gave it.
        token: u64,
        /// The stream.
        stream: UnixStream,
    },
    /// An exec's process ended. Its output may still be on its way.
    ExecExited {
        /// The exec's id.
        exec: String,
        /// How; the reason in it is the guest's text, made printable.
        status: ExitStatus,
    },
    /// The answer to a request.
    Reply {
        /// What [`Session::request`] returned.
        id: u64,
        /// The error is the guest's sentence, made printable.
        result: Result<Answer, String>,
    },
    /// The guest could not set the pod up and powers off. No container ran.
    Failed {
        /// The guest's sentence, made printable.
        reason: String,
    },
    /// The guest closed the connection after all its containers had ended.
    Closed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Listening,
    Greeting,
    Ready,
    Closed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Starting,
    Running,
    Exited,
}

/// A container.
#[derive(Debug)]
struct Known {
    phase: Phase,
    /// Of its streams.
    tokens: Vec<u64>,
}

/// The session. See the module's description.
#[derive(Debug)]
pub struct Session {
    state: State,
    control: Option<UnixStream>,
    incoming: FrameReader,
    outgoing: FrameWriter,
    containers: BTreeMap<String, Known>,
    /// Execs that have not ended, with the tokens of their streams.
    execs: BTreeMap<String, Vec<u64>>,
    pairing: Pairing,
    /// [`STREAM_PATIENCE`], but for tests.
    pub(super) stream_patience: Duration,
    next_id: u64,
    unanswered: BTreeMap<u64, Expects>,
}

/// What the answer to a request changes here.
#[derive(Debug)]
enum Expects {
    /// A refused start: the container never was, its streams never come.
    Start(String, Vec<u64>),
    /// A refused exec, likewise.
    Exec(String, Vec<u64>),
    /// A container that is forgotten when that is done.
    Remove(String),
    /// Streams that do not come when it is refused.
    Streams(Vec<u64>),
}

impl Expects {
    fn of(request: &HostRequest) -> Self {
        match request {
            HostRequest::Start(spec) => Self::Start(spec.id.clone(), tokens(&spec.process.stdio)),
            HostRequest::Exec { exec, process, .. } => {
                Self::Exec(exec.clone(), tokens(&process.stdio))
            }
            HostRequest::Remove { container } => Self::Remove(container.clone()),
            HostRequest::WriteFiles { token, .. }
            | HostRequest::ReadFile { token, .. }
            | HostRequest::Forward { token, .. } => Self::Streams(vec![*token]),
            _ => Self::Streams(Vec::new()),
        }
    }
}

impl Session {
    /// A session for a pod that the guest starts from `spec`.
    pub fn new(spec: &PodSpec) -> Self {
        let mut session = Self {
            state: State::Listening,
            control: None,
            incoming: FrameReader::default(),
            outgoing: FrameWriter::default(),
            containers: BTreeMap::new(),
            execs: BTreeMap::new(),
            pairing: Pairing::default(),
            stream_patience: STREAM_PATIENCE,
            next_id: 1,
            unanswered: BTreeMap::new(),
        };
        for container in &spec.containers {
            let tokens = tokens(&container.process.stdio);
            session.expect_container(&container.id, tokens);
        }
        session
    }

    fn expect_container(&mut self, id: &str, tokens: Vec<u64>) {
        self.expect_streams(&tokens);
        let phase = Phase::Starting;
        self.containers
            .insert(id.to_owned(), Known { phase, tokens });
    }

    fn expect_streams(&mut self, tokens: &[u64]) {
        tokens.iter().for_each(|token| self.pairing.expect(*token));
    }

    /// What has not come of these streams is on its way, or lost.
    fn await_streams(&mut self, tokens: &[u64]) {
        let Some(by) = Instant::now().checked_add(self.stream_patience) else {
            return;
        };
        for token in tokens {
            self.pairing.expect_until(*token, by);
        }
    }

    /// When [`Session::turn`] has something to do though nothing is ready.
    pub fn deadline(&self) -> Option<Instant> {
        self.pairing.deadline()
    }

    fn answered(&mut self, expects: Expects, done: bool) {
        let tokens = match expects {
            Expects::Remove(container) => {
                if done {
                    self.containers.remove(&container);
                }
                return;
            }
            Expects::Streams(tokens) if done => return self.await_streams(&tokens),
            _ if done => return,
            Expects::Start(container, tokens) => {
                self.containers.remove(&container);
                tokens
            }
            Expects::Exec(exec, tokens) => {
                self.execs.remove(&exec);
                tokens
            }
            Expects::Streams(tokens) => tokens,
        };
        tokens.iter().for_each(|token| self.pairing.forget(*token));
    }

    /// Takes the control connection. The first one counts: the agent dials before any container
    /// runs, so a later one is not the agent's and is dropped.
    ///
    /// # Errors
    /// The connection cannot be made non-blocking.
    pub fn adopt_control(&mut self, stream: UnixStream) -> io::Result<()> {
        if self.state == State::Listening {
            stream.set_nonblocking(true)?;
            self.control = Some(stream);
            self.state = State::Greeting;
        }
        Ok(())
    }

    /// Takes a stdio stream, which names itself by its token.
    ///
    /// # Errors
    /// The connection cannot be made non-blocking.
    pub fn adopt_stream(&mut self, stream: UnixStream) -> io::Result<()> {
        self.pairing.adopt(stream)
    }

    /// Descriptors to poll, level-triggered.
    pub fn interests(&self) -> Vec<(BorrowedFd<'_>, PollFlags)> {
        let mut interests: Vec<_> = self
            .pairing
            .waiting()
            .map(|stream| (stream.as_fd(), PollFlags::IN))
            .collect();
        if let Some(control) = &self.control {
            let mut flags = PollFlags::IN;
            flags.set(PollFlags::OUT, !self.outgoing.is_empty());
            interests.push((control.as_fd(), flags));
        }
        interests
    }

    /// Queues a request; its reply carries the id returned.
    ///
    /// # Errors
    /// [`SessionError::NotReady`] before the handshake and after the end, [`SessionError::Behind`] if
    /// the guest does not read.
    pub fn request(&mut self, request: HostRequest) -> Result<u64, SessionError> {
        if self.state != State::Ready {
            return Err(SessionError::NotReady);
        }
        let expects = Expects::of(&request);
        let id = self.next_id;
        if !self.outgoing.push(&HostMessage { id, request })? {
            return Err(SessionError::Behind);
        }
        self.next_id = self.next_id.wrapping_add(1);
        match &expects {
            Expects::Start(container, tokens) => {
                self.expect_container(container, tokens.clone());
            }
            Expects::Exec(exec, tokens) => {
                self.execs.insert(exec.clone(), tokens.clone());
                self.expect_streams(tokens);
            }
            Expects::Streams(tokens) => self.expect_streams(tokens),
            Expects::Remove(_) => {}
        }
        self.unanswered.insert(id, expects);
        self.flush()?;
        Ok(id)
    }

    /// Does what is ready; pushes what happened, in order, also when it ends with an error.
    ///
    /// # Errors
    /// The session is over; the machine should be ended.
    pub(crate) fn turn(
        &mut self,
        ready: &Ready,
        events: &mut Vec<SessionEvent>,
    ) -> Result<(), SessionError> {
        if !self.pairing.is_idle() {
            for (token, stream) in self.pairing.turn(Instant::now())? {
                events.push(SessionEvent::Stream { token, stream });
            }
        }
        self.flush()?;
        for _ in 0..MAX_READS {
            let Some(control) = self.control.as_mut().filter(|c| ready.has(*c)) else {
                return Ok(());
            };
            match self.incoming.fill(control)? {
                Fill::Blocked => return Ok(()),
                Fill::End => return self.end(events),
                Fill::Bytes => {}
            }
            while let Some(message) = self.incoming.next()? {
                let event = self.take(message)?;
                let failed = matches!(event, SessionEvent::Failed { .. });
                events.push(event);
                if failed {
                    // Before its end is read and the guest told: it would power off as if all were well.
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), SessionError> {
        let Some(control) = &mut self.control else {
            return Ok(());
        };
        match self.outgoing.flush(control) {
            // The guest closed its side: what it said before that is still to be read.
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            result => Ok(result?),
        }
    }

    fn end(&mut self, events: &mut Vec<SessionEvent>) -> Result<(), SessionError> {
        self.control = None;
        self.state = State::Closed;
        let all_ended = self.containers.values().all(|c| c.phase == Phase::Exited);
        if self.incoming.is_mid_frame() || !all_ended {
            return Err(SessionError::ClosedEarly);
        }
        events.push(SessionEvent::Closed);
        Ok(())
    }

    fn take(&mut self, message: GuestMessage) -> Result<SessionEvent, SessionError> {
        match (self.state, message) {
            (State::Greeting, GuestMessage::Hello { protocol, version }) => {
                let version = printable(&version);
                if protocol != PROTOCOL_VERSION {
                    return Err(SessionError::Protocol {
                        guest: protocol,
                        version,
                    });
                }
                self.state = State::Ready;
                Ok(SessionEvent::Ready { version })
            }
            (State::Greeting, _) => Err(SessionError::NoHello),
            (_, GuestMessage::Hello { .. }) => Err(out_of_order("a second greeting")),
            (_, GuestMessage::Reply { id, result }) => {
                let Some(expects) = self.unanswered.remove(&id) else {
                    return Err(out_of_order(&format!("a reply to no request ({id})")));
                };
                self.answered(expects, result.is_ok());
                let result = result.map_err(|sentence| printable(&sentence));
                Ok(SessionEvent::Reply { id, result })
            }
            (_, GuestMessage::Event(event)) => self.take_event(event),
        }
    }

    fn take_event(&mut self, event: GuestEvent) -> Result<SessionEvent, SessionError> {
        match event {
            GuestEvent::Failed { reason } => {
                if self.containers.values().any(|c| c.phase != Phase::Starting) {
                    return Err(out_of_order(
                        "a failure to set up after a container's start",
                    ));
                }
                self.containers.clear();
                let reason = printable(&reason);
                Ok(SessionEvent::Failed { reason })
            }
            GuestEvent::Started { container } => {
                self.advance(&container, Phase::Running)?;
                Ok(SessionEvent::Started { container })
            }
            GuestEvent::ExecExited { exec, status } => {
                let Some(tokens) = self.execs.remove(&exec) else {
                    return Err(out_of_order("an end of an exec that does not run"));
                };
                self.await_streams(&tokens);
                let status = printable_status(status);
                Ok(SessionEvent::ExecExited { exec, status })
            }
            GuestEvent::OomKilled { container } => {
                let known = self.containers.get(&container);
                match known.is_some_and(|known| known.phase != Phase::Exited) {
                    true => Ok(SessionEvent::OomKilled { container }),
                    false => Err(out_of_order(
                        "the OOM killer in a container that is not live",
                    )),
                }
            }
            GuestEvent::Exited { container, status } => {
                self.advance(&container, Phase::Exited)?;
                let status = printable_status(status);
                Ok(SessionEvent::Exited { container, status })
            }
        }
    }

    fn advance(&mut self, container: &str, to: Phase) -> Result<(), SessionError> {
        let Some(known) = self.containers.get_mut(container) else {
            return Err(out_of_order(
                "an event of a container that is not the pod's",
            ));
        };
        match (known.phase, to) {
            (Phase::Starting, Phase::Running)
            | (Phase::Starting | Phase::Running, Phase::Exited) => known.phase = to,
            _ => return Err(out_of_order("a container's event came out of order")),
        }
        if to == Phase::Exited {
            let tokens = std::mem::take(&mut known.tokens);
            self.await_streams(&tokens);
        }
        Ok(())
    }
}

fn out_of_order(what: &str) -> SessionError {
    SessionError::OutOfOrder(what.to_owned())
}

fn tokens(stdio: &Stdio) -> Vec<u64> {
    match stdio {
        Stdio::Null => Vec::new(),
        Stdio::Pipes {
            stdin,
            stdout,
            stderr,
        } => [stdin, stdout, stderr]
            .into_iter()
            .flatten()
            .copied()
            .collect(),
        Stdio::Terminal { token, .. } => vec![*token],
    }
}

fn printable_status(status: ExitStatus) -> ExitStatus {
    match status {
        ExitStatus::NotStarted { code, reason } => ExitStatus::NotStarted {
            code,
            reason: printable(&reason),
        },
        status => status,
    }
}

/// The guest's text, fit to be shown: no control characters (terminals obey them), at most 1,000
/// characters.
fn printable(text: &str) -> String {
    text.chars()
        .take(1000)
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

#[cfg(test)]
mod tests;
