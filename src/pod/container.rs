//! A container and an exec as the supervisor knows them.
#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;

use cube_guest::{ContainerSpec, ExitStatus, Stdio, TerminalSize};
use rustix::time::{ClockId, clock_gettime};

use super::api::body::{ContainerState, ContainerStatus, Exit};
use super::api::http::Refusal;
use super::api::server::ConnectionId;
use super::channel::{Channel, Kind};
use super::log_file::{LogFile, timestamp};
use super::pairing::new_token;
use super::ready::Ready;

/// Now, as the API writes times.
pub(crate) fn now() -> String {
    timestamp(clock_gettime(ClockId::Realtime))
}

/// A container.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) spec: ContainerSpec,
    pub(crate) state: ContainerState,
    pub(crate) exit: Option<Exit>,
    /// Absent: its output waits in the guest for a client that takes it.
    pub(crate) log: Option<LogFile>,
    pub(crate) log_error: Option<String>,
    pub(crate) channels: Vec<Channel>,
    /// The slots of its disks.
    pub(crate) slots: Vec<u16>,
    /// Clients that wait for its end.
    pub(crate) waiters: Vec<ConnectionId>,
    /// Its log grew in this turn.
    pub(crate) log_grew: bool,
    pub(crate) restarts: u32,
    stdin: Kind,
    oom_killed: bool,
    created_at: String,
    started_at: Option<String>,
    finished_at: Option<String>,
}

impl Container {
    /// A container whose disks are in `slots`, with a log if there is a path for it. `stdin_once`: its standard
    /// input ends with its first client.
    pub(crate) fn new(
        spec: ContainerSpec,
        log_path: Option<PathBuf>,
        slots: Vec<u16>,
        stdin_once: bool,
    ) -> io::Result<Self> {
        let stdin = match stdin_once {
            true => Kind::Stdin,
            false => Kind::SharedStdin,
        };
        Ok(Self {
            state: ContainerState::Creating,
            exit: None,
            channels: channels(&spec.process.stdio, stdin, |kind, token| {
                Channel::new(kind, token, log_path.is_none())
            }),
            log: log_path.map(|path| LogFile::open(&path)).transpose()?,
            log_error: None,
            slots,
            waiters: Vec::new(),
            log_grew: false,
            restarts: 0,
            stdin,
            oom_killed: false,
            created_at: now(),
            started_at: None,
            finished_at: None,
            spec,
        })
    }

    /// Its process was executed.
    pub(crate) fn started(&mut self) {
        self.state = ContainerState::Running;
        self.started_at = Some(now());
    }

    /// It is to start once more, as new but for its log and its disks.
    ///
    /// # Errors
    /// No tokens can be drawn for its streams.
    pub(crate) fn renew(&mut self) -> io::Result<()> {
        self.spec.process.stdio = renewed(&self.spec.process.stdio)?;
        let needs_client = self.log.is_none();
        let new = |kind, token| Channel::new(kind, token, needs_client);
        self.channels = channels(&self.spec.process.stdio, self.stdin, new);
        self.state = ContainerState::Starting;
        self.restarts += 1;
        self.exit = None;
        self.oom_killed = false;
        (self.started_at, self.finished_at) = (None, None);
        Ok(())
    }

    /// A process of it was killed for want of memory.
    pub(crate) fn oom_killed(&mut self) {
        self.oom_killed = true;
    }

    /// Its process ended.
    pub(crate) fn exited(&mut self, status: &ExitStatus) {
        self.state = ContainerState::Exited;
        self.finished_at = Some(now());
        self.exit = Some(Exit::from(status));
        if matches!(status, ExitStatus::NotStarted { .. }) {
            self.channels.iter_mut().for_each(Channel::end);
        }
    }

    /// How it ended, once every byte of its output is where it should be.
    pub(crate) fn end(&self) -> Option<Exit> {
        let complete = self.channels.iter().all(Channel::is_complete);
        self.exit.clone().filter(|_| complete)
    }

    /// As the API shows it.
    pub(crate) fn status(&self) -> ContainerStatus {
        let exit = self.exit.clone().map(|exit| Exit {
            oom_killed: exit.oom_killed || self.oom_killed,
            ..exit
        });
        ContainerStatus {
            id: self.spec.id.clone(),
            state: self.state,
            created_at: self.created_at.clone(),
            started_at: self.started_at.clone(),
            finished_at: self.finished_at.clone(),
            exit,
            log_path: self.log.as_ref().map(|log| log.path().to_owned()),
            terminal: matches!(self.spec.process.stdio, Stdio::Terminal { .. }),
            restarts: self.restarts,
            log_error: self.log_error.clone(),
        }
    }

    /// Copies what its streams have. A log that cannot be written is noted and does not stop the container.
    pub(crate) fn turn(&mut self, ready: &Ready, buffer: &mut [u8]) {
        for channel in &mut self.channels {
            match channel.turn(ready, buffer, self.log.as_mut()) {
                Ok(logged) => self.log_grew |= logged,
                Err(error) => self.log_error = Some(error.to_string()),
            }
        }
    }
}

/// A further process in a container.
#[derive(Debug)]
pub(crate) struct Exec {
    pub(crate) container: String,
    pub(crate) channels: Vec<Channel>,
    pub(crate) exit: Option<Exit>,
    pub(crate) waiters: Vec<ConnectionId>,
}

impl Exec {
    /// An exec with these streams.
    pub(crate) fn new(container: &str, stdio: &Stdio) -> Self {
        Self {
            container: container.to_owned(),
            channels: channels(stdio, Kind::Stdin, Channel::for_one_client),
            exit: None,
            waiters: Vec::new(),
        }
    }

    /// Its process ended.
    pub(crate) fn exited(&mut self, status: &ExitStatus) {
        self.exit = Some(Exit::from(status));
        if matches!(status, ExitStatus::NotStarted { .. }) {
            self.channels.iter_mut().for_each(Channel::end);
        }
    }

    /// How it ended, once every byte of its output was taken.
    pub(crate) fn end(&self) -> Option<Exit> {
        let complete = self.channels.iter().all(Channel::is_complete);
        self.exit.clone().filter(|_| complete)
    }
}

/// Draws tokens for the streams that a client asked for.
pub(crate) fn stdio(
    given: &Stdio,
    stdin: bool,
    terminal: Option<TerminalSize>,
) -> Result<Stdio, Refusal> {
    if *given != Stdio::Null {
        let sentence = "the pod draws the tokens of streams: say `stdin` or `terminal` instead";
        return Err(Refusal::field("process.stdio", sentence));
    }
    let token =
        || new_token().map_err(|e| Refusal::new(503, format!("cannot draw a stream's token: {e}")));
    Ok(match terminal {
        Some(size) => Stdio::Terminal {
            token: token()?,
            size,
        },
        None => Stdio::Pipes {
            stdin: stdin.then(token).transpose()?,
            stdout: Some(token()?),
            stderr: Some(token()?),
        },
    })
}

/// The same streams under new tokens.
fn renewed(stdio: &Stdio) -> io::Result<Stdio> {
    let renew = |token: &Option<u64>| token.map(|_| new_token()).transpose();
    Ok(match stdio {
        Stdio::Null => Stdio::Null,
        Stdio::Terminal { size, .. } => Stdio::Terminal {
            token: new_token()?,
            size: *size,
        },
        Stdio::Pipes {
            stdin,
            stdout,
            stderr,
        } => Stdio::Pipes {
            stdin: renew(stdin)?,
            stdout: renew(stdout)?,
            stderr: renew(stderr)?,
        },
    })
}

fn channels(stdio: &Stdio, input: Kind, new: impl Fn(Kind, u64) -> Channel) -> Vec<Channel> {
    match *stdio {
        Stdio::Null => Vec::new(),
        Stdio::Terminal { token, .. } => vec![new(Kind::Tty, token)],
        Stdio::Pipes {
            stdin,
            stdout,
            stderr,
        } => [
            (input, stdin),
            (Kind::Stdout, stdout),
            (Kind::Stderr, stderr),
        ]
        .into_iter()
        .filter_map(|(kind, token)| Some(new(kind, token?)))
        .collect(),
    }
}
