//! The child's half of a start: from fork to `execve`, in a container that it makes or that there is.
//!
//! It tells the agent how it went through the report pipe, which is close-on-exec: one byte just before
//! `execve`, and then either end of file (the program runs) or a JSON failure.
#![forbid(unsafe_code)]

use std::ffi::CString;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use cube_guest::{Mark, ProcessSpec, SecuritySpec};
use rustix::fs::{CWD, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use rustix::process::DumpableBehavior;
use rustix::thread::ThreadNameSpaceType;
use serde::{Deserialize, Serialize};

use super::capabilities::{self, Sets};
use super::rootfs::{self, Root};
use super::user::{self, Identity};
use super::{environment, limits, path, seccomp};
use crate::error::{Context, Error};
use crate::port::Port;
use crate::stdio::ChildStdio;
use crate::sys;

/// Exit status for a container that failed before its program was even looked for, as Docker's.
pub(crate) const CANNOT_START: u8 = 125;
/// The report's byte that says that `execve` comes next.
const READY: u8 = b'!';
/// The longest `/etc/passwd` or `/etc/group` read, in bytes.
const MAX_DATABASE: u64 = 4 << 20;

/// What the child needs; made by the agent before the fork.
pub(crate) struct Plan<'a> {
    pub(crate) process: &'a ProcessSpec,
    pub(crate) security: &'a SecuritySpec,
    pub(crate) oom_score_adj: Option<i16>,
    pub(crate) place: Place<'a>,
    pub(crate) stdio: ChildStdio,
    pub(crate) report: OwnedFd,
    /// To mark the start on; only the pod's first container.
    pub(crate) port: Option<&'a Port>,
}

/// Where the process is going to be.
pub(crate) enum Place<'a> {
    /// In a container that it makes.
    New(Root<'a>),
    /// In the container of the process behind this pidfd.
    Beside(OwnedFd),
}

impl Plan<'_> {
    /// The descriptors that the child takes over.
    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let mut kept = vec![self.report.as_fd()];
        kept.push(match &self.place {
            Place::New(root) => root.devpts.as_fd(),
            Place::Beside(process) => process.as_fd(),
        });
        match &self.stdio {
            ChildStdio::Pipes(ends) => kept.extend(ends.iter().flatten().map(AsFd::as_fd)),
            ChildStdio::Terminal(slave) => kept.push(slave.as_fd()),
        }
        kept.extend(self.port.and_then(Port::descriptor));
        kept
    }
}

/// What the child said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Report {
    /// The program was executed, or the child ended while it was.
    Executed,
    /// It could not be; status and sentence.
    Failed { code: u8, reason: String },
    /// The child ended without a word.
    Silent,
}

#[derive(Debug, Serialize, Deserialize)]
struct Failure {
    code: u8,
    reason: String,
}

impl Report {
    /// Parses everything that came through the pipe.
    pub(crate) fn parse(bytes: &[u8]) -> Self {
        let (ready, failure) = match bytes.split_first() {
            Some((&READY, rest)) => (true, rest),
            _ => (false, bytes),
        };
        match serde_json::from_slice::<Failure>(failure) {
            Ok(Failure { code, reason }) => Self::Failed { code, reason },
            Err(_) if ready => Self::Executed,
            Err(_) => Self::Silent,
        }
    }
}

/// The child: becomes the program or says why not, and ends.
pub(crate) fn run(plan: Plan<'_>) -> ! {
    let (process, port) = (plan.process, plan.port);
    let report = plan.report.try_clone();
    let (code, reason) = match report.context(|| "copy a descriptor".into()) {
        Ok(report) => match prepare(plan, &report) {
            Ok(program) => program.execute(process, &report, port),
            Err(error) => fail(&report, CANNOT_START, error.to_string()),
        },
        Err(error) => (CANNOT_START, error.to_string()),
    };
    crate::error::log_error(&reason);
    std::process::exit(code.into());
}

fn fail(report: &OwnedFd, code: u8, reason: String) -> (u8, String) {
    let failure = Failure { code, reason };
    let text = serde_json::to_vec(&failure).unwrap_or_default();
    // A pipe that was just made has room for it.
    let _ = rustix::io::write(report, &text);
    (failure.code, failure.reason)
}

/// A program that only needs to be executed.
struct Program {
    argv: Vec<CString>,
    env: Vec<CString>,
}

fn prepare(plan: Plan<'_>, report: &OwnedFd) -> Result<Program, Error> {
    let (process, security) = (plan.process, plan.security);
    isolate(&plan, report)?;
    if let Some(value) = plan.oom_score_adj {
        // Before the agent's /proc is out of reach.
        std::fs::write("/proc/self/oom_score_adj", value.to_string())
            .context(|| format!("set oom_score_adj to {value}"))?;
    }
    let is_terminal = matches!(plan.stdio, ChildStdio::Terminal(_));
    let streams = match plan.stdio {
        ChildStdio::Pipes(ends) => ends,
        ChildStdio::Terminal(slave) => {
            rustix::process::ioctl_tiocsctty(&slave).context(|| "take the terminal".into())?;
            let copy = || slave.try_clone().context(|| "copy the terminal".into());
            [Some(copy()?), Some(copy()?), Some(slave)]
        }
    };
    match &plan.place {
        Place::New(root) => {
            sys::unshare_cgroup().context(|| "make a cgroup namespace".into())?;
            rootfs::enter(root)?;
        }
        Place::Beside(other) => enter_container(other)?,
    }
    let mut identity = identify(&process.user)?;
    identity.join(&process.additional_gids);
    connect(&streams, &identity)?;
    drop(streams);
    enter_directory(&process.cwd)?;
    if let Place::New(root) = &plan.place
        && root.layers.read_only
    {
        rootfs::seal()?;
    }
    let hostname = rustix::system::uname().nodename().to_bytes().to_vec();
    let env = environment::complete(&process.env, &identity.home, &hostname, is_terminal);
    let program = Program {
        argv: strings(process.argv.iter().map(|s| s.as_bytes()), "argument")?,
        env: strings(env.iter().map(|s| &**s), "environment variable")?,
    };
    limits::set(&process.rlimits)?;
    drop_privileges(process, security, &identity)?;
    sys::close_on_exec().context(|| "close the agent's descriptors".into())?;
    sys::set_signal_mask(false).context(|| "unblock signals".into())?;
    Ok(program)
}

/// Leaves the agent: nothing of it may be reached through this process, which others in the container
/// can see before it is their like.
fn isolate(plan: &Plan<'_>, report: &OwnedFd) -> Result<(), Error> {
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .context(|| "hide the agent's memory".into())?;
    let mut kept = plan.descriptors();
    kept.push(report.as_fd());
    sys::close_all_but(&kept).context(|| "close the agent's descriptors".into())?;
    rustix::process::setsid().context(|| "start a session".into())?;
    Ok(())
}

/// Joins the container of another process; this one is in its PID namespace and cgroup already.
fn enter_container(other: &OwnedFd) -> Result<(), Error> {
    let namespaces = ThreadNameSpaceType::MOUNT | ThreadNameSpaceType::CONTROL_GROUP;
    rustix::thread::move_into_thread_name_spaces(other.as_fd(), namespaces)
        .context(|| "enter the container's namespaces".into())
}

/// Becomes the user with the capabilities asked for, under the filters. A filter that does not allow what
/// is left to do here stops the start: without no_new_privs that is `capset` and `prctl`, with it nothing.
fn drop_privileges(
    process: &ProcessSpec,
    security: &SecuritySpec,
    identity: &Identity,
) -> Result<(), Error> {
    let sets = Sets::resolve(
        process.capabilities.as_ref(),
        security.privileged,
        identity.uid == 0,
    )?;
    sets.bound()?;
    become_user(identity)?;
    capabilities::keep_in_force()?;
    if process.no_new_privileges {
        sets.limit()?;
        rustix::thread::set_no_new_privs(true).context(|| "set no_new_privs".into())?;
        return seccomp::install(security);
    }
    seccomp::install(security)?;
    sets.limit()
}

impl Program {
    /// Executes the first candidate that can be; returns only if none can.
    fn execute(
        &self,
        process: &ProcessSpec,
        report: &OwnedFd,
        port: Option<&Port>,
    ) -> (u8, String) {
        let name = &process.argv[0];
        let search = environment::path(&process.env);
        if let Some(port) = port {
            port.mark(Mark::ContainerStarted);
        }
        let _ = rustix::io::write(report, &[READY]);
        let mut tried = Vec::new();
        for file in path::candidates(name, search) {
            let Ok(executable) = CString::new(&*file) else {
                continue;
            };
            let error = sys::execute(&executable, &self.argv, &self.env);
            tried.push((file, error));
            if !path::try_next(error) {
                break;
            }
        }
        let exists = |file: &str| rustix::fs::stat(file).is_ok();
        let (code, reason) = path::verdict(name, search, &tried, exists);
        fail(report, code, reason)
    }
}

/// Who the container runs as, by its own files.
fn identify(asked: &str) -> Result<Identity, Error> {
    let (passwd, group) = (read_database("/etc/passwd")?, read_database("/etc/group")?);
    user::resolve(asked, &passwd, &group).map_err(|error| Error::Refused(error.to_string()))
}

/// Reads a regular file of the image, which may have put anything there; empty if it is absent.
fn read_database(path: &str) -> Result<Vec<u8>, Error> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(file) => file,
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(Vec::new()),
        Err(error) => return Err(error).context(|| format!("open the image's {path}")),
    };
    let what = rustix::fs::fstat(&file).context(|| format!("look at the image's {path}"))?;
    if FileType::from_raw_mode(what.st_mode) != FileType::RegularFile {
        return Err(Error::Refused(format!(
            "the image's {path} is not a regular file"
        )));
    }
    let mut bytes = Vec::new();
    let read = std::fs::File::from(file)
        .take(MAX_DATABASE + 1)
        .read_to_end(&mut bytes);
    read.context(|| format!("read the image's {path}"))?;
    if bytes.len() as u64 > MAX_DATABASE {
        return Err(Error::Refused(format!(
            "the image's {path} is longer than {MAX_DATABASE} bytes"
        )));
    }
    Ok(bytes)
}

/// Makes `streams` the standard ones, owned by the container's user so that it can open `/dev/stdout`.
fn connect(streams: &[Option<OwnedFd>; 3], identity: &Identity) -> Result<(), Error> {
    let connect = || {
        let null = rustix::fs::openat(
            CWD,
            "/dev/null",
            OFlags::RDWR | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        for stream in streams.iter().flatten() {
            rustix::fs::fchown(stream, Some(Uid::from_raw(identity.uid)), None)?;
        }
        let [stdin, stdout, stderr] = streams
            .each_ref()
            .map(|stream| stream.as_ref().unwrap_or(&null));
        rustix::stdio::dup2_stdin(stdin)?;
        rustix::stdio::dup2_stdout(stdout)?;
        rustix::stdio::dup2_stderr(stderr)
    };
    connect().context(|| "connect the standard streams".into())
}

/// Enters the working directory, made if it is absent.
fn enter_directory(asked: &str) -> Result<(), Error> {
    let path = match asked {
        "" => "/".to_owned(),
        asked => format!("/{}", asked.trim_start_matches('/')),
    };
    let enter = || match rustix::process::chdir(&*path) {
        Err(Errno::NOENT) => {
            std::fs::create_dir_all(&path)?;
            Ok(rustix::process::chdir(&*path)?)
        }
        entered => Ok(entered?),
    };
    enter()
        .map_err(|error: std::io::Error| error)
        .context(|| format!("enter the working directory {path}"))
}

fn become_user(identity: &Identity) -> Result<(), Error> {
    let become_it = || {
        let groups: Vec<Gid> = identity.groups.iter().copied().map(Gid::from_raw).collect();
        rustix::thread::set_keep_capabilities(true)?;
        rustix::thread::set_thread_groups(&groups)?;
        rustix::thread::set_thread_gid(Gid::from_raw(identity.gid))?;
        rustix::thread::set_thread_uid(Uid::from_raw(identity.uid))?;
        rustix::thread::set_keep_capabilities(false)
    };
    become_it().context(|| format!("become the user {}:{}", identity.uid, identity.gid))
}

fn strings<'a>(bytes: impl Iterator<Item = &'a [u8]>, what: &str) -> Result<Vec<CString>, Error> {
    // The sentence does not quote it: it may be secret.
    bytes
        .map(|bytes| {
            CString::new(bytes)
                .map_err(|_| Error::Refused(format!("an {what} contains a NUL byte")))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_told_from_its_absence() {
        assert_eq!(Report::parse(b""), Report::Silent);
        assert_eq!(Report::parse(b"!"), Report::Executed);
        let failed = Report::Failed {
            code: 127,
            reason: "no".into(),
        };
        assert_eq!(Report::parse(br#"!{"code":127,"reason":"no"}"#), failed);
        assert_eq!(Report::parse(br#"{"code":127,"reason":"no"}"#), failed);
    }

    #[test]
    fn a_database_that_is_not_a_file_is_refused_and_does_not_block() {
        let directory = std::env::temp_dir().join(format!("cube-init-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let fifo = directory.join("passwd");
        rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::RWXU, 0).unwrap();
        let refused = read_database(fifo.to_str().unwrap())
            .unwrap_err()
            .to_string();
        assert!(refused.contains("is not a regular file"), "{refused}");
        assert!(read_database("/dev/zero").is_err());
        assert!(read_database("/nonexistent/passwd").unwrap().is_empty());
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
