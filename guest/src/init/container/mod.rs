//! One container: how the agent starts it, and what it knows of it until it has ended.
//!
//! ```text
//! agent                                        child (PID 1 of the container's namespaces)
//! disks, cgroup, streams
//! clone3 ───────────────────────────────────▶ root, mounts, streams, user, filter, capabilities
//! Starting ◀── report pipe: READY ───────────┤
//! Running  ◀── report pipe: end of file ─────┤ execve
//!     or   ◀── report pipe: why not ─────────┘
//! Ended    ◀── SIGCHLD
//! ```
#![forbid(unsafe_code)]

mod capabilities;
pub(crate) mod cgroup;
mod environment;
mod path;
mod process;
mod rootfs;
pub(crate) mod seccomp;
mod user;

use std::os::fd::{AsFd, OwnedFd};

use cube_guest::{ContainerSpec, ExitStatus};
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, Signal, WaitStatus};

use crate::disks::Disks;
use crate::error::{Context, Error};
use crate::events::{Poller, Source, Watched};
use crate::port::Port;
use crate::stdio::Streams;
use crate::sys;
use cgroup::Cgroup;
use process::{Plan, Report};
use rootfs::Layers;

/// Longest container id, in bytes: its cgroup's name fits a file name.
const MAX_ID: usize = 200;

/// What starting a container needs of the pod.
pub(crate) struct Pod<'a> {
    pub(crate) disks: &'a mut Disks,
    pub(crate) streams: &'a mut Streams,
    pub(crate) poller: &'a Poller,
    pub(crate) port: &'a Port,
}

/// A container that was asked for.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) id: String,
    /// Index of its terminal's stream.
    pub(crate) terminal: Option<u32>,
    state: State,
}

#[derive(Debug)]
enum State {
    /// Its process exists and has not executed its program yet.
    Starting {
        process: Process,
        report: Watched,
        received: Vec<u8>,
    },
    /// Its program was executed.
    Running(Process),
    /// It was reported as ended.
    Ended,
}

#[derive(Debug)]
struct Process {
    pid: Pid,
    cgroup: Cgroup,
}

impl Container {
    /// Starts a container as far as its process; `index` is what its events are called. `is_first`: its
    /// start is marked for the VMM.
    ///
    /// Its streams are dialled in any case, so that the host sees their end.
    ///
    /// # Errors
    /// What the agent's half of the start ran into; the child's half is in the report.
    pub(crate) fn start(
        spec: &ContainerSpec,
        index: u32,
        is_first: bool,
        pod: &mut Pod<'_>,
    ) -> Result<Self, Error> {
        let (stdio, terminal) = pod.streams.open(&spec.process.stdio, pod.poller)?;
        let layers = layers(spec, pod.disks)?;
        let cgroup = Cgroup::create(&spec.id, &spec.resources)?;
        let (report, reporter) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
            .context(|| "make a container's report pipe".into())?;
        let plan = Plan {
            spec,
            layers,
            stdio,
            report: reporter,
            port: is_first.then_some(pod.port),
        };
        let pid = match sys::fork_container(cgroup.directory()) {
            Ok(Some(pid)) => pid,
            Ok(None) => process::run(plan),
            Err(error) => {
                cgroup.remove();
                return Err(error).context(|| format!("fork the container `{}`", spec.id));
            }
        };
        drop(plan);
        let report = watch_report(report, index, pod.poller)
            .inspect_err(|_| _ = rustix::process::kill_process(pid, Signal::KILL))?;
        Ok(Self {
            id: spec.id.clone(),
            terminal,
            state: State::Starting {
                process: Process { pid, cgroup },
                report,
                received: Vec::new(),
            },
        })
    }

    /// A container that never had a process.
    pub(crate) fn not_started(id: &str) -> Self {
        Self {
            id: id.to_owned(),
            terminal: None,
            state: State::Ended,
        }
    }

    /// Whether it has, or may yet have, a process.
    pub(crate) fn is_live(&self) -> bool {
        !matches!(self.state, State::Ended)
    }

    /// Whether `pid` is its first process.
    pub(crate) fn is(&self, pid: Pid) -> bool {
        self.pid() == Some(pid)
    }

    /// Sends `signal` to its first process.
    ///
    /// # Errors
    /// It has ended.
    pub(crate) fn signal(&self, signal: Signal) -> Result<(), Error> {
        let ended = || Error::Refused(format!("the container `{}` has ended", self.id));
        let pid = self.pid().ok_or_else(ended)?;
        rustix::process::kill_process(pid, signal)
            .context(|| format!("signal the container `{}`", self.id))
    }

    /// Reads the child's report. Returns whether the program was just executed.
    pub(crate) fn hear(&mut self, poller: &Poller) -> bool {
        let State::Starting {
            report, received, ..
        } = &mut self.state
        else {
            return false;
        };
        let mut buffer = [0; 512];
        loop {
            match rustix::io::read(&*report, &mut buffer) {
                Ok(read @ 1..) => received.extend_from_slice(&buffer[..read]),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return false,
                Ok(0) | Err(_) => break,
            }
        }
        if !matches!(Report::parse(received), Report::Executed) {
            // SIGCHLD follows, and the report says why.
            _ = report.watch(poller, None);
            return false;
        }
        if let State::Starting {
            process, report, ..
        } = std::mem::replace(&mut self.state, State::Ended)
        {
            report.close(poller);
            self.state = State::Running(process);
        }
        true
    }

    /// Its first process ended as `status`: cleans up after it and says how it ended. Everything that it
    /// reported must have been heard.
    pub(crate) fn end(&mut self, status: WaitStatus, poller: &Poller) -> ExitStatus {
        let (process, report) = match std::mem::replace(&mut self.state, State::Ended) {
            State::Starting {
                process,
                report,
                received,
            } => {
                report.close(poller);
                (process, Report::parse(&received))
            }
            State::Running(process) => (process, Report::Executed),
            State::Ended => return not_started("it was not running".into()),
        };
        let oom_killed = process.cgroup.oom_killed();
        process.cgroup.remove();
        match report {
            Report::Executed => exit_status(status, oom_killed),
            Report::Failed { code, reason } => ExitStatus::NotStarted { code, reason },
            Report::Silent => not_started(match oom_killed {
                true => "its memory limit is too low to set it up".into(),
                false => format!("it ended while it was being set up ({status:?})"),
            }),
        }
    }

    fn pid(&self) -> Option<Pid> {
        match &self.state {
            State::Starting { process, .. } | State::Running(process) => Some(process.pid),
            State::Ended => None,
        }
    }
}

/// Checks what cannot be left to the kernel's errors.
///
/// # Errors
/// A sentence that names the field.
pub(crate) fn validate(spec: &ContainerSpec) -> Result<(), Error> {
    let id = &spec.id;
    let is_file_name = !id.is_empty()
        && id.len() <= MAX_ID
        && id
            .bytes()
            .all(|byte| byte.is_ascii_graphic() && byte != b'/');
    if !is_file_name {
        return Err(Error::Refused(format!(
            "the container id `{}` is not a file name of 1 to {MAX_ID} printable ASCII characters",
            id.escape_debug()
        )));
    }
    if spec.process.argv.is_empty() {
        return Err(Error::Refused(format!(
            "the container `{id}` has no program to run: argv is empty"
        )));
    }
    Ok(())
}

/// The status of a container that the agent could not start.
pub(crate) fn not_started(reason: String) -> ExitStatus {
    ExitStatus::NotStarted {
        code: process::CANNOT_START,
        reason,
    }
}

fn layers(spec: &ContainerSpec, disks: &mut Disks) -> Result<Layers, Error> {
    Ok(Layers {
        image: disks.image(&spec.rootfs.image)?,
        writable: match &spec.rootfs.writable {
            Some(serial) => Some(disks.writable(serial, &spec.id)?),
            None => None,
        },
        read_only: spec.rootfs.read_only,
    })
}

fn watch_report(report: OwnedFd, index: u32, poller: &Poller) -> Result<Watched, Error> {
    let watch = || -> rustix::io::Result<Watched> {
        rustix::io::ioctl_fionbio(report.as_fd(), true)?;
        let mut report = Watched::new(report, Source::Report(index));
        report.watch(poller, Some(EventFlags::IN))?;
        Ok(report)
    };
    watch().context(|| "watch a container's report pipe".into())
}

fn exit_status(status: WaitStatus, oom_killed: bool) -> ExitStatus {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => ExitStatus::Code(code as u8),
        (None, Some(signal)) => ExitStatus::Signal {
            signal: signal as u8,
            oom_killed: oom_killed && signal == Signal::KILL.as_raw(),
        },
        (None, None) => not_started(format!(
            "the kernel gave a wait status nobody knows: {status:?}"
        )),
    }
}
