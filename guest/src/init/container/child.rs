//! A process of a container as the agent sees it, from its fork to its end.
//!
//! ```text
//! Starting ◀── report pipe: READY ───────────┐
//! Running  ◀── report pipe: end of file ─────┤ execve
//!     or   ◀── report pipe: why not ─────────┘
//! ended    ◀── SIGCHLD
//! ```
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};

use cube_guest::ExitStatus;
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitStatus};

use super::not_started;
use super::process::Report;
use crate::error::{Context, Error};
use crate::events::{Poller, Source, Watched};

/// The process.
#[derive(Debug)]
pub(crate) struct Child {
    pid: Pid,
    /// Index of its terminal's stream.
    pub(crate) terminal: Option<u32>,
    progress: Progress,
}

#[derive(Debug)]
enum Progress {
    /// It has not executed its program yet.
    Starting { report: Watched, received: Vec<u8> },
    /// Its program was executed.
    Running,
}

impl Child {
    /// The process `pid`, whose report comes through `report`.
    ///
    /// # Errors
    /// The pipe cannot be watched.
    pub(crate) fn new(
        pid: Pid,
        terminal: Option<u32>,
        report: OwnedFd,
        source: Source,
        poller: &Poller,
    ) -> Result<Self, Error> {
        let watch = || -> rustix::io::Result<Watched> {
            rustix::io::ioctl_fionbio(report.as_fd(), true)?;
            let mut report = Watched::new(report, source);
            report.watch(poller, Some(EventFlags::IN))?;
            Ok(report)
        };
        Ok(Self {
            pid,
            terminal,
            progress: Progress::Starting {
                report: watch().context(|| "watch a process's report pipe".into())?,
                received: Vec::new(),
            },
        })
    }

    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// Sends it a signal. It has not been reaped, so the number is still its own.
    pub(crate) fn signal(&self, signal: Signal) -> rustix::io::Result<()> {
        rustix::process::kill_process(self.pid, signal)
    }

    /// Reads its report. Returns whether the program was just executed.
    pub(crate) fn hear(&mut self, poller: &Poller) -> bool {
        let Progress::Starting { report, received } = &mut self.progress else {
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
        if let Progress::Starting { report, .. } =
            std::mem::replace(&mut self.progress, Progress::Running)
        {
            report.close(poller);
        }
        true
    }

    /// It ended as `status`. Everything that it reported must have been heard.
    pub(crate) fn end(self, status: WaitStatus, oom_killed: bool, poller: &Poller) -> ExitStatus {
        let report = match self.progress {
            Progress::Starting { report, received } => {
                report.close(poller);
                Report::parse(&received)
            }
            Progress::Running => Report::Executed,
        };
        match report {
            Report::Executed => exit_status(status, oom_killed),
            Report::Failed { code, reason } => ExitStatus::NotStarted { code, reason },
            Report::Silent => not_started(match oom_killed {
                true => "its memory limit is too low to set it up".into(),
                false => format!("it ended while it was being set up ({status:?})"),
            }),
        }
    }
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
