//! One container: how the agent starts it, and what it knows of it until it is removed.
//!
//! ```text
//! agent                                        child (PID 1 of the container's namespaces)
//! disks, volumes, cgroup, streams
//! clone3 ───────────────────────────────────▶ root, mounts, streams, user, filter, capabilities
//! Live  ◀── report pipe ─────────────────────┤ execve
//! Ended ◀── SIGCHLD
//!   └── its cgroup and its mount namespace stay until it is removed
//! ```
//! The UTS, IPC and network namespaces are the agent's: they are the pod's.
#![forbid(unsafe_code)]

mod capabilities;
pub(crate) mod cgroup;
mod child;
mod environment;
pub(crate) mod exec;
mod limits;
mod mounts;
mod path;
pub(crate) mod pid_namespace;
mod process;
pub(crate) mod rootfs;
pub(crate) mod seccomp;
mod user;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use cube_guest::{ContainerSpec, ExitStatus, MountSource, PidNamespace, ProcessSpec, SecuritySpec};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, Signal, WaitStatus};

use crate::disks::{self, Disks, Use};
use crate::error::{Context, Error, log_error};
use crate::events::{Poller, Source};
use crate::port::Port;
use crate::stdio::{Streams, make_devpts};
use crate::volumes::Volumes;
use cgroup::{Awaited, Cgroup};
use child::Child;
use mounts::{Device, Wanted};
use pid_namespace::{PidNamespaces, Where};
use process::{Place, Plan};
use rootfs::{Layers, Root};

/// Longest container id, in bytes: its cgroup's name fits a file name.
const MAX_ID: usize = 200;
/// Where mount namespaces are held. A mount, so that no fork of the agent holds them by a descriptor.
pub(crate) const NAMESPACES: &str = "/run/namespace";

/// What starting a process needs of the pod.
pub(crate) struct Pod<'a> {
    pub(crate) disks: &'a mut Disks,
    pub(crate) volumes: &'a mut Volumes,
    pub(crate) streams: &'a mut Streams,
    pub(crate) namespaces: &'a mut PidNamespaces,
    pub(crate) poller: &'a Poller,
    pub(crate) port: &'a Port,
}

/// A container that was asked for.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) id: String,
    /// The pod ends with the last of these.
    pub(crate) is_essential: bool,
    /// It was asked to be frozen.
    pub(crate) is_paused: bool,
    /// A request waits for its cgroup.
    pub(crate) awaited: Option<(Awaited, u64)>,
    /// It is being removed.
    pub(crate) is_leaving: bool,
    /// Its first process; absent: it ended or never was.
    first: Option<Child>,
    /// Absent: it could not be started.
    made: Option<Made>,
}

/// What a container has from its start until it is removed.
#[derive(Debug)]
pub(crate) struct Made {
    pub(crate) cgroup: Cgroup,
    /// Where its mount namespace is held.
    pub(crate) namespace: String,
    /// Where its writable disk is mounted.
    pub(crate) writable: Option<String>,
    security: SecuritySpec,
    pid_namespace: PidNamespace,
    oom_score_adj: Option<i16>,
    devpts: OwnedFd,
}

impl Container {
    /// Starts a container as far as its process; `index` is what its events are called. `is_first`: its
    /// start is marked for the VMM.
    ///
    /// Its streams are dialled in any case, so that the host sees their end.
    ///
    /// # Errors
    /// What the agent's half of the start ran into; the child's half is in the report. What it took of
    /// disks and volumes is [`user`]'s to release.
    pub(crate) fn start(
        spec: &ContainerSpec,
        index: u32,
        is_first: bool,
        pod: &mut Pod<'_>,
    ) -> Result<Self, Error> {
        let devpts = make_devpts()?;
        let stdio = &spec.process.stdio;
        let (stdio, terminal) = pod.streams.open(stdio, devpts.as_fd(), pod.poller)?;
        let kept = devpts.try_clone().context(|| "copy a descriptor".into())?;
        let root = root(spec, devpts, terminal.is_some(), pod)?;
        let made = Made {
            cgroup: Cgroup::create(&spec.id, &spec.resources, index, pod.poller)?,
            namespace: format!("{NAMESPACES}/{index}"),
            writable: root.layers.writable.clone(),
            security: spec.security.clone(),
            pid_namespace: spec.pid_namespace,
            oom_score_adj: spec.process.oom_score_adj,
            devpts: kept,
        };
        let start = |report, reporter| {
            let plan = Plan {
                process: &spec.process,
                security: &spec.security,
                oom_score_adj: spec.process.oom_score_adj,
                place: Place::New(root),
                stdio,
                report: reporter,
                port: is_first.then_some(pod.port),
            };
            let pid = made.fork(spec, plan, pod.namespaces)?;
            Child::new(pid, terminal, report, Source::Report(index), pod.poller)
                .and_then(|child| hold_namespace(pid, &made.namespace).map(|()| child))
                .inspect_err(|_| _ = rustix::process::kill_process(pid, Signal::KILL))
        };
        let pipe = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
            .context(|| "make a container's report pipe".into());
        match pipe.and_then(|(report, reporter)| start(report, reporter)) {
            Ok(first) => Ok(Self {
                first: Some(first),
                made: Some(made),
                ..Self::not_started(&spec.id)
            }),
            Err(error) => {
                made.cgroup.remove(pod.poller);
                Err(error)
            }
        }
    }

    /// A container that never had a process.
    pub(crate) fn not_started(id: &str) -> Self {
        Self {
            id: id.to_owned(),
            is_essential: false,
            is_paused: false,
            awaited: None,
            is_leaving: false,
            first: None,
            made: None,
        }
    }

    /// Whether it has, or may yet have, a process.
    pub(crate) fn is_live(&self) -> bool {
        self.first.is_some()
    }

    /// Whether `pid` is its first process.
    pub(crate) fn is(&self, pid: Pid) -> bool {
        self.first.as_ref().is_some_and(|first| first.pid() == pid)
    }

    /// What it has, if it was started.
    ///
    /// # Errors
    /// It was not.
    pub(crate) fn made(&self) -> Result<&Made, Error> {
        let refused = || Error::Refused(format!("the container `{}` was not started", self.id));
        self.made.as_ref().ok_or_else(refused)
    }

    /// Its first process and what it has, while it is live.
    ///
    /// # Errors
    /// It has ended.
    pub(crate) fn running(&self) -> Result<(&Child, &Made), Error> {
        match (&self.first, &self.made) {
            (Some(first), Some(made)) => Ok((first, made)),
            _ => Err(Error::Refused(format!(
                "the container `{}` has ended",
                self.id
            ))),
        }
    }

    /// Sends `signal` to its first process, or to all.
    ///
    /// # Errors
    /// It has ended.
    pub(crate) fn signal(&self, signal: Signal, all: bool) -> Result<(), Error> {
        let (first, made) = self.running()?;
        match all {
            true if signal == Signal::KILL => made.cgroup.kill(),
            true => made.cgroup.signal(signal),
            false => first
                .signal(signal)
                .context(|| format!("signal the container `{}`", self.id)),
        }
    }

    /// Reads the child's report. Returns whether the program was just executed.
    pub(crate) fn hear(&mut self, poller: &Poller) -> bool {
        let first = self.first.as_mut();
        first.is_some_and(|first| first.hear(poller))
    }

    /// Whether the OOM killer has ended a process of it since this was last asked, and whether ever.
    pub(crate) fn oom_killed(&mut self) -> (bool, bool) {
        let made = self.made.as_mut();
        made.map_or((false, false), |made| made.cgroup.oom_killed())
    }

    /// Its first process ended as `status`: ends the others and says how it ended. Everything that it
    /// reported must have been heard.
    pub(crate) fn end(&mut self, status: WaitStatus, oom: bool, poller: &Poller) -> ExitStatus {
        if let Some(made) = &self.made
            && made.pid_namespace == PidNamespace::Pod
            && let Err(error) = made.cgroup.kill()
        {
            log_error(&error.to_string());
        }
        match self.first.take() {
            Some(first) => first.end(status, oom, poller),
            None => not_started("it was not running".into()),
        }
    }

    /// Lets go of everything that is not a disk or a volume.
    pub(crate) fn remove(self, poller: &Poller) {
        if let Some((awaited, _)) = self.awaited {
            awaited.close(poller);
        }
        if let Some(made) = self.made {
            release_namespace(&made.namespace);
            made.cgroup.remove(poller);
        }
    }
}

impl Made {
    /// Forks the first process.
    fn fork(
        &self,
        spec: &ContainerSpec,
        plan: Plan<'_>,
        namespaces: &mut PidNamespaces,
    ) -> Result<Pid, Error> {
        let place = match spec.pid_namespace {
            PidNamespace::Container => Where::New,
            PidNamespace::Pod => Where::Pod,
        };
        let forked = namespaces.fork(place, true, self.cgroup.directory());
        match forked.context(|| format!("fork the container `{}`", spec.id))? {
            Some(pid) => Ok(pid),
            None => process::run(plan),
        }
    }
}

/// Who a container is to disks and volumes.
pub(crate) fn user(id: &str) -> String {
    format!("the container `{id}`")
}

/// Keeps the mount namespace of `pid` beyond its end, by a mount. A process that has ended by now, and is not
/// reaped yet, has none any more: how it ended is in its report and its status.
fn hold_namespace(pid: Pid, place: &str) -> Result<(), Error> {
    let context = || "hold a container's mount namespace".into();
    File::create(place).context(context)?;
    match rustix::mount::mount_bind(format!("/proc/{}/ns/mnt", pid.as_raw_nonzero()), place) {
        Err(Errno::NOENT) => Ok(()),
        held => held.context(context),
    }
}

/// Lets go of a mount namespace: with it go its mounts. It may have gone before.
pub(crate) fn release_namespace(place: &str) {
    let _ = rustix::mount::unmount(place, UnmountFlags::empty());
    let _ = rustix::fs::unlink(place);
}

/// Checks what cannot be left to the kernel's errors.
///
/// # Errors
/// A sentence that names the field.
pub(crate) fn validate(spec: &ContainerSpec) -> Result<(), Error> {
    is_file_name("container id", &spec.id)?;
    has_program("container", &spec.id, &spec.process)?;
    mounts::validate(&spec.mounts, &spec.devices)
}

/// Whether `name` can be a file's.
///
/// # Errors
/// It cannot: a sentence with `what` it is.
pub(crate) fn is_file_name(what: &str, name: &str) -> Result<(), Error> {
    let is_file_name = !matches!(name, "" | "." | "..")
        && name.len() <= MAX_ID
        && name
            .bytes()
            .all(|byte| byte.is_ascii_graphic() && byte != b'/');
    if is_file_name {
        return Ok(());
    }
    Err(Error::Refused(format!(
        "the {what} `{}` is not a file name of 1 to {MAX_ID} printable ASCII characters",
        name.escape_debug()
    )))
}

fn has_program(what: &str, id: &str, process: &ProcessSpec) -> Result<(), Error> {
    if process.argv.is_empty() {
        return Err(Error::Refused(format!(
            "the {what} `{id}` has no program to run: argv is empty"
        )));
    }
    Ok(())
}

/// The status of a process that the agent could not start.
pub(crate) fn not_started(reason: String) -> ExitStatus {
    ExitStatus::NotStarted {
        code: process::CANNOT_START,
        reason,
    }
}

/// Finds what the root is made of.
fn root<'a>(
    spec: &'a ContainerSpec,
    devpts: OwnedFd,
    has_terminal: bool,
    pod: &mut Pod<'_>,
) -> Result<Root<'a>, Error> {
    let user = user(&spec.id);
    let mut claim = |serial: &str, wanted: Use| pod.disks.claim(serial, wanted, &user);
    let layers = Layers {
        image: disks::directory(&claim(&spec.rootfs.image, Use::Image)?),
        writable: match &spec.rootfs.writable {
            Some(serial) => Some(disks::directory(&claim(serial, Use::Writable)?)),
            None => None,
        },
        read_only: spec.rootfs.read_only,
    };
    let mut devices = Vec::new();
    for device in &spec.devices {
        let name = claim(&device.serial, Use::Device)?;
        devices.push(Device { spec: device, name });
    }
    let mut mounts = Vec::new();
    for mount in &spec.mounts {
        let volume = match &mount.source {
            MountSource::Volume { volume, .. } => Some(pod.volumes.claim(volume, &user)?),
            MountSource::Tmpfs { .. } => None,
        };
        mounts.push(Wanted {
            spec: mount,
            volume,
        });
    }
    Ok(Root {
        layers,
        mounts,
        devices,
        security: &spec.security,
        devpts,
        has_terminal,
    })
}
