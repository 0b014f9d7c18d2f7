//! The command `cube-vmm`: reads its arguments and the spec, runs the machine, and turns its end into an
//! exit status. Runs on `main`.
#![forbid(unsafe_code)]

mod arguments;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::process::ExitCode;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};

use crate::vmm::exit::{End, StopCause, console_tail};
use crate::vmm::files;
use crate::vmm::machine::{Machine, MachineError, Running};
use crate::vmm::signals::StopSignals;
use crate::vmm::spec::{HostLimits, MachineSpec, SpecError, ValidSpec};
use crate::vmm::thread::{self, Role};
use crate::vmm::timeline::{Stage, Timeline, now};

use arguments::{Action, Arguments, Source};

/// Status for a failure of the host.
const FAILURE: u8 = 1;
/// Status for wrong arguments or a wrong spec.
const USAGE: u8 = 2;
/// A spec larger than this is a mistake; it holds the pod's environment and paths, not data.
const MAX_SPEC: u64 = 16 << 20;
/// More than most specs have, in bytes.
const USUAL_SPEC: usize = 16 << 10;

/// Why no machine ran.
#[derive(Debug, thiserror::Error)]
enum CommandError {
    #[error("{0}; `cube-vmm --help` shows the arguments")]
    Arguments(#[from] arguments::ArgumentError),
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error("the machine spec is larger than {MAX_SPEC} bytes")]
    SpecTooLarge,
    #[error("cannot read the machine spec from {0}: {1}")]
    ReadSpec(String, io::Error),
    #[error("cannot take over {0} {1}: {2}")]
    Inherited(&'static str, RawFd, io::Error),
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error("cannot serve the pod: {0}")]
    Pod(String),
    #[error("cannot wait for events: {0}")]
    Events(#[source] io::Error),
}

impl CommandError {
    fn status(&self) -> u8 {
        match self {
            Self::Arguments(_) | Self::Spec(_) | Self::SpecTooLarge => USAGE,
            _ => FAILURE,
        }
    }
}

/// What `main` does while the machine runs, if it is to do more than to wait for the end.
pub trait Attendant {
    /// Attends to `machine` until there is a reason to stop it: an end that it reported, or one returned.
    ///
    /// # Errors
    /// The host cannot go on.
    fn attend(&mut self, machine: &Running, signals: &StopSignals) -> io::Result<End>;

    /// The machine has ended: the last thing that happens.
    fn ended(self: Box<Self>, end: &End);
}

/// Makes the attendant out of the descriptor given with `--pod-fd`, before the machine is built; it watches the one
/// given with `--lifetime-fd`.
pub type Attend = fn(File, Option<OwnedFd>) -> Result<Box<dyn Attendant>, String>;

/// Runs the command and returns its exit status (see [`crate::vmm::exit`]).
pub fn main(arguments: impl Iterator<Item = std::ffi::OsString>, attend: Attend) -> ExitCode {
    let started = now();
    match arguments::parse(arguments)
        .map_err(CommandError::from)
        .and_then(|a| act(a, started, attend))
    {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            complain(&error.to_string());
            ExitCode::from(error.status())
        }
    }
}

/// A sentence on standard error; nobody is there to hear that it cannot be written.
fn complain(sentence: &str) {
    let _ = io::stderr().write_all(format!("cube-vmm: {sentence}\n").as_bytes());
}

fn act(action: Action, started: u64, attend: Attend) -> Result<u8, CommandError> {
    match action {
        Action::Print(text) => {
            // Whoever asked for the text has gone.
            let _ = io::stdout().write_all(text.as_bytes());
            Ok(0)
        }
        Action::Run(arguments) => run(*arguments, started, attend),
    }
}

fn run(arguments: Arguments, started: u64, attend: Attend) -> Result<u8, CommandError> {
    // Inherited descriptors first: later ones of ours may get any number that is free.
    let inherited = |what, fd: Option<RawFd>| -> Result<Option<OwnedFd>, CommandError> {
        fd.map(|fd| files::inherited(fd).map_err(|e| CommandError::Inherited(what, fd, e)))
            .transpose()
    };
    let output = inherited("--timeline-fd", arguments.timeline_fd)?.map(File::from);
    let lifetime = inherited("--lifetime-fd", arguments.lifetime_fd)?;
    let pod = inherited("--pod-fd", arguments.pod_fd)?.map(File::from);
    let spec_text = read_spec(&arguments.spec)?;
    let timeline = Arc::new(Timeline::new(output));
    if let Some(exec) = arguments.started_at {
        timeline.record_at(Stage::Exec, exec, Default::default);
    }
    timeline.record_at(Stage::VmmStarted, started, Default::default);
    let spec = MachineSpec::from_json(&spec_text)?.validate(HostLimits::of_this_host())?;
    let spec = Arc::new(spec);
    drop(spec_text);
    timeline.record(Stage::SpecRead);
    if arguments.check {
        return Ok(0);
    }
    let signals = StopSignals::new().map_err(CommandError::Events)?;
    let (attendant, lifetime) = match pod {
        Some(pod) => (
            Some(attend(pod, lifetime).map_err(CommandError::Pod)?),
            None,
        ),
        None => (None, lifetime),
    };
    let machine = Machine::build(&spec, &timeline, arguments.count_exits)?;
    thread::begin(Role::Main).map_err(CommandError::Events)?;
    let running = machine.start()?;
    let Some(mut attendant) = attendant else {
        let cause = wait(&running, &signals, lifetime.as_ref());
        let end = running.stop(cause.unwrap_or_else(|error| End::Device(error.to_string())));
        return Ok(explain(&end, &spec));
    };
    let cause = attendant.attend(&running, &signals);
    let end = running.stop(cause.unwrap_or_else(|error| End::Device(error.to_string())));
    let status = explain(&end, &spec);
    attendant.ended(&end);
    Ok(status)
}

fn read_spec(source: &Source) -> Result<Vec<u8>, CommandError> {
    let (name, opened) = match source {
        Source::Fd(fd) => (
            format!("descriptor {fd}"),
            files::inherited(*fd).map(File::from),
        ),
        Source::File(path) => (path.display().to_string(), File::open(path)),
        Source::StandardInput => {
            let copy = io::stdin().as_fd().try_clone_to_owned();
            ("standard input".to_owned(), copy.map(File::from))
        }
    };
    let failed = |error| CommandError::ReadSpec(name.clone(), error);
    // Most specs fit: one read, and one that finds the end.
    let mut text = Vec::with_capacity(USUAL_SPEC);
    opened
        .map_err(failed)?
        .take(MAX_SPEC + 1)
        .read_to_end(&mut text)
        .map_err(failed)?;
    if text.len() as u64 > MAX_SPEC {
        return Err(CommandError::SpecTooLarge);
    }
    Ok(text)
}

/// Waits until there is a reason to stop. An end that the machine reported itself takes precedence over
/// what is returned here.
fn wait(
    running: &Running,
    signals: &StopSignals,
    lifetime: Option<&OwnedFd>,
) -> Result<End, CommandError> {
    let lifetime_fd = lifetime.map_or(running.ended(), AsFd::as_fd);
    let failure_fd = running.device_failure().unwrap_or(running.ended());
    let watched = [running.ended(), signals.as_fd(), lifetime_fd, failure_fd];
    loop {
        let mut fds = watched.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(CommandError::Events(error.into())),
            Ok(_) => (),
        }
        let [ended, signal, parent, failure] = fds.map(|fd| !fd.revents().is_empty());
        if failure {
            running.check_devices();
        }
        if let Some(end) = running.end() {
            return Ok(end);
        }
        if let Some(number) = signal.then(|| signals.next()).flatten() {
            return Ok(End::Stopped(StopCause::Signal(number)));
        }
        if parent && lifetime.is_some_and(files::is_closed) {
            return Ok(End::Stopped(StopCause::LifetimeEnded));
        }
        debug_assert!(!ended, "an end was signalled but not reported");
    }
}

fn explain(end: &End, spec: &ValidSpec) -> u8 {
    if *end != End::PowerOff {
        complain(&end.to_string());
    }
    if let (true, Some(console)) = (end.is_guest_failure(), &spec.console) {
        let tail = console_tail(console);
        if !tail.is_empty() {
            let _ = write!(io::stderr(), "the last lines of its console:\n{tail}");
        }
    }
    end.status()
}
