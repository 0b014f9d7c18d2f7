//! A further process in a running container.
#![forbid(unsafe_code)]

use std::os::fd::AsFd;

use cube_guest::ProcessSpec;
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, PidfdFlags};

use super::child::Child;
use super::pid_namespace::Where;
use super::process::{self, Place, Plan};
use super::{Container, Pod, has_program, is_file_name};
use crate::error::{Context, Error};
use crate::events::Source;

/// The process.
#[derive(Debug)]
pub(crate) struct Exec {
    pub(crate) id: String,
    pub(crate) child: Child,
}

/// Checks what cannot be left to the kernel's errors.
///
/// # Errors
/// A sentence that names the field.
pub(crate) fn validate(id: &str, process: &ProcessSpec) -> Result<(), Error> {
    is_file_name("exec id", id)?;
    has_program("exec", id, process)
}

impl Exec {
    /// Starts `process` in `container`, which runs, as far as its fork; `index` is what its events are
    /// called. Its streams are dialled in any case, so that the host sees their end.
    ///
    /// # Errors
    /// What the agent's half of the start ran into; the child's half is in the report.
    pub(crate) fn start(
        id: &str,
        process: &ProcessSpec,
        container: &Container,
        index: u32,
        pod: &mut Pod<'_>,
    ) -> Result<Self, Error> {
        let (first, made) = container.running()?;
        let devpts = made.devpts.as_fd();
        let (stdio, terminal) = pod.streams.open(&process.stdio, devpts, pod.poller)?;
        let pidfd = rustix::process::pidfd_open(first.pid(), PidfdFlags::empty())
            .context(|| "open the container's first process".into())?;
        let (report, reporter) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
            .context(|| "make an exec's report pipe".into())?;
        let beside = pidfd.try_clone().context(|| "copy a descriptor".into())?;
        let plan = Plan {
            process,
            security: &made.security,
            oom_score_adj: process.oom_score_adj.or(made.oom_score_adj),
            place: Place::Beside(pidfd),
            stdio,
            report: reporter,
            port: None,
        };
        let place = Where::Of(beside.as_fd());
        let forked = pod.namespaces.fork(place, false, made.cgroup.directory());
        let pid: Pid = match forked.context(|| format!("fork the exec `{id}`"))? {
            Some(pid) => pid,
            None => process::run(plan),
        };
        drop(plan);
        let child = Child::new(pid, terminal, report, Source::ExecReport(index), pod.poller)?;
        Ok(Self {
            id: id.to_owned(),
            child,
        })
    }
}
