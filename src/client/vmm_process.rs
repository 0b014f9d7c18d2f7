//! `cube-vmm` as a child process: its specification, its inherited descriptors, its end.
//!
//! One `unsafe` block: the closure that runs in the child between fork and exec.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, PipeWriter, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::FdFlags;
use rustix::process::{Pid, PidfdFlags, Signal};

use super::capture::Capture;
use super::install::NamedFile;
use crate::vmm::spec::{FileSource, MachineSpec};
use crate::vmm::timeline::now;

/// How much of the end of `cube-vmm`'s messages is kept, in bytes.
const KEEP_MESSAGES: usize = 16 << 10;
/// How much of its timeline is kept, in bytes.
const KEEP_TIMELINE: usize = 64 << 10;

/// What glibc's allocator is told in a pod process (mallopt(3), environment variables), which every start of
/// `cube-vmm` should tell it.
///
/// - Blocks of so many bytes or more go back to the system when they are freed. glibc raises its first value, which is this
///   one, to the largest block that was freed, and then keeps such blocks: a set of files that was pushed once would
///   cost the pod its size for ever.
/// - One heap for all threads. Few of them allocate, none often, and each heap costs four system calls and some pages at the
///   start of its thread.
pub(crate) const ALLOCATOR: [(&str, &str); 2] = [
    ("MALLOC_MMAP_THRESHOLD_", "131072"),
    ("MALLOC_ARENA_MAX", "1"),
];

/// `cube-vmm` cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The program cannot be executed.
    #[error("cannot start {}: {source}", path.display())]
    Spawn {
        /// The binary.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
    /// The host is out of something.
    #[error("cannot prepare the machine's descriptors: {0}")]
    Descriptors(#[from] io::Error),
    /// The specification cannot be written as JSON.
    #[error("cannot write the machine's specification: {0}")]
    Spec(#[from] serde_json::Error),
}

/// How the machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineEnd {
    /// The process's exit status.
    pub status: ExitStatus,
    /// What `cube-vmm` said last, printable; files have their names.
    pub message: String,
    /// Whether this side ended it.
    pub killed_here: bool,
}

impl MachineEnd {
    /// A sentence for a person.
    pub fn sentence(&self) -> String {
        if !self.message.is_empty() {
            return self.message.clone();
        }
        match (self.status.signal(), self.status.code()) {
            (Some(signal), _) => format!("cube-vmm was killed by signal {signal}"),
            (None, Some(0)) => "the machine powered off".to_owned(),
            (None, code) => format!("cube-vmm ended with status {}", code.unwrap_or_default()),
        }
    }
}

/// Files that the child inherits: the specification refers to them by number, people by path.
#[derive(Debug, Default)]
pub(crate) struct Inherited {
    files: Vec<NamedFile>,
}

impl Inherited {
    /// Passes `file` on; returns how the specification refers to it.
    pub(crate) fn pass(&mut self, file: NamedFile) -> FileSource {
        FileSource::Fd(self.pass_fd(file))
    }

    /// Passes `file` on; returns its number.
    pub(crate) fn pass_fd(&mut self, file: NamedFile) -> RawFd {
        let fd = file.file.as_raw_fd();
        self.files.push(file);
        fd
    }

    fn names(&self) -> Vec<(RawFd, PathBuf)> {
        self.files
            .iter()
            .map(|named| (named.file.as_raw_fd(), named.path.clone()))
            .collect()
    }
}

/// What a pod process is started with.
pub(crate) struct Launch<'a> {
    /// The binary.
    pub(crate) program: &'a Path,
    /// The machine.
    pub(crate) spec: &'a MachineSpec,
    /// The pod, as JSON.
    pub(crate) pod: &'a [u8],
    /// Files that the machine refers to.
    pub(crate) inherited: Inherited,
    /// Descriptors that the pod refers to.
    pub(crate) others: &'a [RawFd],
}

/// A command that is being put together: what its descriptors refer to lives until it was spawned.
struct Launching {
    command: Command,
    passed: Vec<RawFd>,
    names: Vec<(RawFd, PathBuf)>,
    program: PathBuf,
    _files: (Inherited, [File; 2]),
}

impl Launching {
    fn new(launch: Launch<'_>) -> Result<Self, VmmError> {
        let spec = memory_file(&serde_json::to_vec(launch.spec)?)?;
        let pod = memory_file(launch.pod)?;
        let names = launch.inherited.names();
        let mut passed: Vec<RawFd> = names.iter().map(|(fd, _)| *fd).collect();
        passed.extend(launch.others);
        let mut command = Command::new(launch.program);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.envs(ALLOCATOR);
        let mut launching = Self {
            command,
            passed,
            names,
            program: launch.program.to_owned(),
            _files: (launch.inherited, [spec, pod]),
        };
        let [spec, pod] = launching._files.1.each_ref().map(File::as_raw_fd);
        launching.pass("--spec-fd", spec);
        launching.pass("--pod-fd", pod);
        Ok(launching)
    }

    fn pass(&mut self, option: &str, fd: RawFd) {
        self.command.args([option, &fd.to_string()]);
        self.passed.push(fd);
    }

    /// Starts it, in a session of its own if so wanted. The command is gone then, with what it held for the child.
    fn spawn(mut self, new_session: bool) -> Result<(Child, Vec<(RawFd, PathBuf)>), VmmError> {
        inherit(&mut self.command, self.passed, new_session);
        let child = self.command.spawn().map_err(|source| VmmError::Spawn {
            path: self.program,
            source,
        })?;
        Ok((child, self.names))
    }
}

/// The child process. Dropping it kills it.
#[derive(Debug)]
pub(crate) struct VmmProcess {
    child: Child,
    pidfd: OwnedFd,
    messages: Capture,
    timeline: Option<Capture>,
    /// `cube-vmm` ends when this is closed, by whatever end of this process.
    _lifetime: PipeWriter,
    names: Vec<(RawFd, PathBuf)>,
    killed_here: bool,
    end: Option<MachineEnd>,
}

impl VmmProcess {
    /// Starts it. It ends with this process.
    pub(crate) fn start(launch: Launch<'_>, with_timeline: bool) -> Result<Self, VmmError> {
        let (messages, message_writer) = io::pipe()?;
        let (lifetime_reader, lifetime) = io::pipe()?;
        let mut launching = Launching::new(launch)?;
        let command = &mut launching.command;
        // The terminal's signals are this side's to forward.
        command.stderr(message_writer).process_group(0);
        launching.pass("--lifetime-fd", lifetime_reader.as_raw_fd());
        let timeline = with_timeline.then(io::pipe).transpose()?;
        if let Some((_, writer)) = &timeline {
            launching.pass("--timeline-fd", writer.as_raw_fd());
            launching.command.arg("--count-exits");
        }
        let (child, names) = launching.spawn(false)?;
        let timeline = timeline.map(|(reader, _)| Capture::new(reader, KEEP_TIMELINE));
        let pid = Pid::from_child(&child);
        Ok(Self {
            child,
            pidfd: rustix::process::pidfd_open(pid, PidfdFlags::empty())
                .map_err(io::Error::from)?,
            messages: Capture::new(messages, KEEP_MESSAGES)?,
            timeline: timeline.transpose()?,
            _lifetime: lifetime,
            names,
            killed_here: false,
            end: None,
        })
    }

    /// Descriptors to poll for reading.
    pub(crate) fn interests(&self) -> Vec<BorrowedFd<'_>> {
        use std::os::fd::AsFd;
        let process = self.end.is_none().then(|| self.pidfd.as_fd());
        let timeline = self.timeline.as_ref().and_then(Capture::interest);
        let pipes = [self.messages.interest(), timeline];
        process
            .into_iter()
            .chain(pipes.into_iter().flatten())
            .collect()
    }

    /// Takes what it said; returns its end, once it has come.
    pub(crate) fn turn(&mut self) -> io::Result<Option<&MachineEnd>> {
        self.hear();
        if self.end.is_none()
            && let Some(status) = self.child.try_wait()?
        {
            self.hear();
            self.end = Some(MachineEnd {
                status,
                message: with_names(&printable(&self.messages.text()), &self.names),
                killed_here: self.killed_here,
            });
        }
        Ok(self.end.as_ref())
    }

    fn hear(&mut self) {
        self.messages.turn();
        if let Some(timeline) = &mut self.timeline {
            timeline.turn();
        }
    }

    /// Ends it now. Its end is reported as usual.
    pub(crate) fn kill(&mut self) {
        if self.end.is_none() {
            self.killed_here = true;
            // It fails only if the process has ended.
            let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
        }
    }

    /// The timeline as far as it was written; empty if none was asked for.
    pub(crate) fn timeline(&self) -> String {
        self.timeline.as_ref().map_or(String::new(), Capture::text)
    }
}

impl Drop for VmmProcess {
    fn drop(&mut self) {
        self.kill();
        if self.end.is_none() {
            let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
            let _ = rustix::event::poll(&mut fds, None);
            let _ = self.child.wait();
        }
    }
}

/// Starts a process that outlives this one. Returns what it says: a file in memory, because nobody is sure to be there
/// to read a pipe.
pub(crate) fn start_detached(launch: Launch<'_>) -> Result<Messages, VmmError> {
    let file = memory_file(&[])?;
    let mut launching = Launching::new(launch)?;
    launching.command.stderr(file.try_clone()?);
    launching.command.args(["--started-at", &now().to_string()]);
    let (child, names) = launching.spawn(true)?;
    Ok(Messages { file, names, child })
}

/// What a detached process said.
#[derive(Debug)]
pub(crate) struct Messages {
    file: File,
    names: Vec<(RawFd, PathBuf)>,
    child: Child,
}

impl Messages {
    /// All of it, printable, once the process has ended: for one whose API was seen to close.
    pub(crate) fn at_the_end(mut self) -> String {
        // It cannot be waited for only if it was waited for.
        let _ = self.child.wait();
        let mut bytes = Vec::new();
        let read = io::Seek::rewind(&mut self.file).and_then(|()| {
            let limit = KEEP_MESSAGES as u64;
            io::Read::read_to_end(&mut io::Read::take(&mut self.file, limit), &mut bytes)
        });
        match read {
            Ok(_) => with_names(&printable(&String::from_utf8_lossy(&bytes)), &self.names),
            Err(error) => format!("cube-vmm ended; its messages cannot be read: {error}"),
        }
    }
}

/// A sealed-off file in memory with `content`, positioned at its start.
fn memory_file(content: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create("cube-spec", MemfdFlags::CLOEXEC)?);
    file.write_all(content)?;
    io::Seek::rewind(&mut file)?;
    Ok(file)
}

/// Lets `descriptors` through exec, in a session of its own if so wanted: in the child alone, so that no other child of this process gets them.
fn inherit(command: &mut Command, descriptors: Vec<RawFd>, new_session: bool) {
    let in_child = move || {
        if new_session {
            rustix::process::setsid()?;
        }
        for descriptor in &descriptors {
            // SAFETY: `Launching` and its callers hold the files open until after the spawn, and the child
            // has a copy of its descriptor table.
            let borrowed = unsafe { BorrowedFd::borrow_raw(*descriptor) };
            rustix::io::fcntl_setfd(borrowed, FdFlags::empty())?;
        }
        Ok(())
    };
    // SAFETY: the closure makes system calls only: it allocates nothing and takes no lock, which is what
    // the time between fork and exec requires.
    unsafe { command.pre_exec(in_child) };
}

/// The text without control characters other than line ends, without the program's name in front.
fn printable(text: &str) -> String {
    let text: String = text
        .chars()
        .map(|c| match c {
            '\n' => '\n',
            c if c.is_control() => '\u{fffd}',
            c => c,
        })
        .collect();
    let text = text.trim();
    text.strip_prefix("cube-vmm: ").unwrap_or(text).to_owned()
}

/// `cube-vmm` knows inherited files by number only: says their paths instead.
fn with_names(text: &str, names: &[(RawFd, PathBuf)]) -> String {
    let mut pieces = text.split("/proc/self/fd/");
    let mut named = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        let digits = piece.bytes().take_while(u8::is_ascii_digit).count();
        let (number, rest) = piece.split_at(digits);
        let name = names.iter().find(|(fd, _)| number.parse() == Ok(*fd));
        match name {
            Some((_, path)) => named.push_str(&path.display().to_string()),
            None => named.push_str(&format!("/proc/self/fd/{number}")),
        }
        named.push_str(rest);
    }
    named
}

#[cfg(test)]
mod tests;
