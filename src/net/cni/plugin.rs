//! A plug-in's process: configuration on standard input, a result or an error on standard output, a deadline.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, PipeReader, Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use serde::Deserialize;
use serde_json::Value;

use super::config::NetworkConfig;
use super::{CniError, Plugins};

/// The most that a plug-in may print, in bytes, on each of its outputs.
const OUTPUT: usize = 1 << 20;

/// The most of its output that an error quotes, in characters.
const EXCERPT: usize = 300;

/// How an error says that plug-in and configuration are of different versions (CNI error code 1).
pub(super) const INCOMPATIBLE: &str = "(code 1)";

/// What is asked of a plug-in.
pub(super) struct Invocation<'a> {
    pub(super) command: &'static str,
    pub(super) plugin: &'a str,
    pub(super) network: &'a NetworkConfig,
    /// Further variables of its environment.
    pub(super) variables: Vec<(&'static str, OsString)>,
}

impl Invocation<'_> {
    fn fault(&self, fault: impl Into<String>) -> CniError {
        CniError::Plugin {
            plugin: self.plugin.to_owned(),
            command: self.command,
            network: self.network.name.clone(),
            fault: fault.into(),
        }
    }
}

/// Runs a plug-in to its end and returns what it printed.
pub(super) fn run(
    plugins: &Plugins,
    invocation: &Invocation<'_>,
    config: &Value,
) -> Result<Vec<u8>, CniError> {
    let path = std::env::join_paths(&plugins.path).unwrap_or_default();
    let Some(program) = plugins.find(invocation.plugin) else {
        return Err(plugins.missing(invocation.command, invocation.plugin, invocation.network));
    };
    let mut command = Command::new(&program);
    command
        .env("CNI_COMMAND", invocation.command)
        .env("CNI_PATH", &path)
        .envs(
            invocation
                .variables
                .iter()
                .map(|(name, value)| (name, value)),
        )
        // With the processes that it starts, so that all can be ended.
        .process_group(0);
    let end = Running::start(command, config).and_then(|running| running.wait(plugins));
    match end.map_err(|error| invocation.fault(format!("{}: {error}", program.display())))? {
        End::Late => {
            let seconds = plugins.deadline.as_secs_f64();
            Err(invocation.fault(format!("it did not end within {seconds} s and was killed")))
        }
        End::Endless => Err(invocation.fault("it printed more than 1 MiB and was killed")),
        End::Status(status, output, _) if status.success() => Ok(output),
        End::Status(status, output, messages) => {
            Err(invocation.fault(failure(status, &output, &messages)))
        }
    }
}

/// `{"code":…,"msg":…,"details":…}`, as a plug-in that fails prints it.
#[derive(Deserialize)]
struct Failure {
    code: u32,
    msg: String,
    #[serde(default)]
    details: String,
}

fn failure(status: ExitStatus, output: &[u8], messages: &[u8]) -> String {
    match serde_json::from_slice(output) {
        Ok(Failure { code, msg, details }) if details.is_empty() => format!("{msg} (code {code})"),
        Ok(Failure { code, msg, details }) => format!("{msg}: {details} (code {code})"),
        Err(_) => {
            let end = match (status.code(), status.signal()) {
                (Some(code), _) => format!("ended with status {code}"),
                (None, signal) => format!("was killed by signal {}", signal.unwrap_or_default()),
            };
            let said = if output.is_empty() { messages } else { output };
            format!("it {end} and printed no error object: {}", excerpt(said))
        }
    }
}

/// The beginning of what a plug-in printed, fit for a message.
pub(super) fn excerpt(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let text = text.trim();
    let short: String = text.chars().take(EXCERPT).collect();
    let more = if short.len() < text.len() { "…" } else { "" };
    format!("`{}{more}`", short.escape_debug())
}

enum End {
    Status(ExitStatus, Vec<u8>, Vec<u8>),
    Late,
    Endless,
}

struct Running {
    child: Child,
    output: PipeReader,
    messages: PipeReader,
}

impl Running {
    fn start(mut command: Command, config: &Value) -> io::Result<Self> {
        // A file, so that nobody has to write while the plug-in reads.
        let mut input = File::from(memfd_create("cni-config", MemfdFlags::CLOEXEC)?);
        input.write_all(config.to_string().as_bytes())?;
        input.rewind()?;
        let (output, output_writer) = io::pipe()?;
        let (messages, message_writer) = io::pipe()?;
        for pipe in [&output, &messages] {
            rustix::io::ioctl_fionbio(pipe, true)?;
        }
        command
            .stdin(Stdio::from(input))
            .stdout(output_writer)
            .stderr(message_writer);
        Ok(Self {
            child: command.spawn()?,
            output,
            messages,
        })
    }

    fn wait(mut self, plugins: &Plugins) -> io::Result<End> {
        let pid = Pid::from_child(&self.child);
        let end = self.read_until_end(pid, plugins);
        // Also what it started and left behind; there is nothing if it ended well.
        let _ = kill_process_group(pid, Signal::KILL);
        let status = self.child.wait()?;
        Ok(match end? {
            End::Status(_, output, messages) => End::Status(status, output, messages),
            end => end,
        })
    }

    fn read_until_end(&mut self, pid: Pid, plugins: &Plugins) -> io::Result<End> {
        let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
        let deadline = Instant::now() + plugins.deadline;
        let (mut output, mut messages) = (Vec::new(), Vec::new());
        let (mut output_open, mut messages_open) = (true, true);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
            let mut fds = vec![PollFd::new(&pidfd, PollFlags::IN)];
            let pipes = [(&self.output, output_open), (&self.messages, messages_open)];
            let open = pipes.iter().filter(|(_, open)| *open);
            fds.extend(open.map(|(pipe, _)| PollFd::from_borrowed_fd(pipe.as_fd(), PollFlags::IN)));
            if poll(&mut fds, Some(&timeout))? == 0 {
                return Ok(End::Late);
            }
            let ended = !fds.first().is_none_or(|fd| fd.revents().is_empty());
            output_open = output_open && drain(&mut self.output, &mut output)?;
            messages_open = messages_open && drain(&mut self.messages, &mut messages)?;
            if output.len() > OUTPUT || messages.len() > OUTPUT {
                return Ok(End::Endless);
            }
            if ended {
                return Ok(End::Status(ExitStatus::default(), output, messages));
            }
        }
    }
}

/// Reads what is there, up to a little more than is allowed; whether there may be more later.
fn drain(pipe: &mut PipeReader, into: &mut Vec<u8>) -> io::Result<bool> {
    let mut buffer = [0; 16 << 10];
    while into.len() <= OUTPUT {
        match pipe.read(&mut buffer) {
            Ok(0) => return Ok(false),
            Ok(length) => into.extend_from_slice(&buffer[..length]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}
