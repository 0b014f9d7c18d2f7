//! Work that may take its time: a file system or a server may keep it waiting, the agent must not be.
//!
//! A job is a fork of the agent, in its namespaces, that answers through a pipe and ends. It has none of
//! the agent's descriptors but those it works with.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use cube_guest::Answer;
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::Pid;

use crate::error::{Context, Error};
use crate::events::{Poller, Source, Watched};
use crate::sys::{self, NewNamespaces};
use crate::table::Table;

/// The jobs that have not ended.
#[derive(Debug, Default)]
pub(crate) struct Jobs(Table<Job>);

#[derive(Debug)]
struct Job {
    pid: Pid,
    subject: Subject,
    /// Gone once it has answered.
    report: Option<Watched>,
    received: Vec<u8>,
    then: Option<Then>,
}

/// What a job works on, so that nobody takes it away meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Subject {
    /// The files of the container with this number.
    Container(u32),
    /// A volume, which knows itself that it is busy.
    Volume,
}

/// What follows a job's answer. `request` is the one that it answers.
#[derive(Debug)]
pub(crate) enum Then {
    /// Remove the container with this number.
    RemoveContainer { index: u32, request: u64 },
    /// Let go of the volume.
    EndWrite { volume: String, request: u64 },
    /// The volume is mounted, or is not; at boot nobody asked.
    EndMount {
        volume: String,
        request: Option<u64>,
    },
    /// Forget the volume.
    RemoveVolume { volume: String, request: u64 },
    /// Send what comes through the pipe as the stream.
    Send {
        stream: u64,
        from: OwnedFd,
        request: u64,
    },
}

/// What an answered job leaves to do.
#[derive(Debug)]
pub(crate) struct Answered {
    pub(crate) then: Then,
    pub(crate) result: Result<Answer, String>,
}

/// The child's means to answer.
#[derive(Debug)]
pub(crate) struct Reporter(OwnedFd);

impl Reporter {
    /// Answers; nothing else can be said after it.
    pub(crate) fn answer(self, result: Result<Answer, Error>) {
        let result = result.map_err(|error| error.to_string());
        let text = serde_json::to_vec(&result).unwrap_or_default();
        // A pipe that was just made has room for it.
        let _ = rustix::io::write(&self.0, &text);
    }
}

impl Jobs {
    /// Forks `work`, which may use `descriptors` and no others: those very ones, not copies.
    ///
    /// # Errors
    /// The kernel refuses a pipe or a process.
    pub(crate) fn start(
        &mut self,
        subject: Subject,
        then: Then,
        descriptors: &[BorrowedFd<'_>],
        poller: &Poller,
        work: impl FnOnce(Reporter),
    ) -> Result<(), Error> {
        let index = self.0.vacant();
        let start = || -> rustix::io::Result<(Pid, Watched)> {
            let (report, reporter) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
            rustix::io::ioctl_fionbio(&report, true)?;
            let mut report = Watched::new(report, Source::Job(index));
            report.watch(poller, Some(EventFlags::IN))?;
            match sys::fork(NewNamespaces::default(), None)? {
                Some(pid) => Ok((pid, report)),
                None => {
                    let kept = descriptors.iter().copied().chain([reporter.as_fd()]);
                    if sys::close_all_but(&kept.collect::<Vec<_>>()).is_ok() {
                        work(Reporter(reporter));
                    }
                    std::process::exit(0)
                }
            }
        };
        let (pid, report) = start().context(|| "start a job".into())?;
        self.0.insert(Job {
            pid,
            subject,
            report: Some(report),
            received: Vec::new(),
            then: Some(then),
        });
        Ok(())
    }

    /// Hears the job `index`; `Some` when it has answered.
    pub(crate) fn turn(&mut self, index: u32, poller: &Poller) -> Option<Answered> {
        let job = self.0.get_mut(index)?;
        let report = job.report.as_ref()?;
        let mut buffer = [0; 1024];
        loop {
            match rustix::io::read(report, &mut buffer) {
                Ok(read @ 1..) => job.received.extend_from_slice(&buffer[..read]),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return None,
                Ok(0) | Err(_) => break,
            }
        }
        if let Some(report) = job.report.take() {
            report.close(poller);
        }
        let silent = |_| Err("the process that was to do it ended without an answer".to_owned());
        let received = std::mem::take(&mut job.received);
        Some(Answered {
            result: serde_json::from_slice(&received).unwrap_or_else(silent),
            then: job.then.take()?,
        })
    }

    /// The job whose process is `pid`.
    pub(crate) fn find(&self, pid: Pid) -> Option<u32> {
        self.0.find(|job| job.pid == pid)
    }

    /// Forgets a job that has ended and was heard.
    pub(crate) fn end(&mut self, index: u32) {
        self.0.take(index);
    }

    /// Whether a job works on `subject`.
    pub(crate) fn work_on(&self, subject: Subject) -> bool {
        self.0.find(|job| job.subject == subject).is_some()
    }
}
