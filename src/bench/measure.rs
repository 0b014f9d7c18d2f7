//! One run of one VMM, from outside: spawn it, wait for the guest's marker on its serial port, look at
//! the process, end it.
#![forbid(unsafe_code)]

use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

use super::payload::MARKER;

/// What a VMM that does not get there is given before it is one row that says so.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// Why a run gave no figure.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The program could not be started.
    #[error("could not start it: {0}")]
    Spawn(#[source] io::Error),
    /// The program ended before its guest said anything.
    #[error("ended before its guest ran ({status}){}", last_words(.output))]
    Ended {
        /// Its exit status.
        status: String,
        /// What it printed on standard error.
        output: String,
    },
    /// Nothing happened for [`DEADLINE`].
    #[error("its guest did not run within {} s", DEADLINE.as_secs())]
    Hung,
    /// The process could not be looked at.
    #[error("could not read its memory map: {0}")]
    Look(#[source] io::Error),
}

fn last_words(output: &str) -> String {
    output
        .lines()
        .rev()
        .find(|line| !line.trim().is_empty())
        .map_or_else(String::new, |line| {
            let line: String = line.chars().filter(|c| !c.is_control()).take(160).collect();
            format!(": {line}")
        })
}

/// A VMM whose guest has said that it runs. Ended when dropped.
pub struct Running {
    child: Child,
    /// From just before the process was made to the marker.
    pub elapsed: Duration,
}

impl Running {
    /// The process id of the VMM.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// Ends a VMM and whatever it forked: it leads a process group of its own.
fn end(child: &mut Child) {
    if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        let _ = kill_process_group(group, Signal::KILL);
    }
    let _ = child.wait();
}

/// Starts `command` and waits for the marker.
///
/// # Errors
/// See [`RunError`].
pub fn start(mut command: Command, directory: &Path) -> Result<Running, RunError> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    command.current_dir(directory);
    let began = Instant::now();
    let mut child = command.spawn().map_err(RunError::Spawn)?;
    let (sender, receiver) = mpsc::channel();
    let stdout = child.stdout.take();
    // The reader goes on after the marker, so that a VMM that prints more never blocks on a full pipe.
    thread::spawn(move || {
        if let Some(stdout) = stdout {
            drain(stdout, Some(&sender));
        }
    });
    let stderr = child.stderr.take();
    let words = thread::spawn(move || stderr.map(|stderr| drain(stderr, None)).unwrap_or_default());
    match receiver.recv_timeout(DEADLINE) {
        Ok(at) => Ok(Running {
            child,
            elapsed: at - began,
        }),
        Err(mpsc::RecvTimeoutError::Timeout) => {
            end(&mut child);
            Err(RunError::Hung)
        }
        Err(mpsc::RecvTimeoutError::Disconnected) => {
            let status = child
                .wait()
                .map_or_else(|e| e.to_string(), |status| status.to_string());
            let output = words.join().unwrap_or_default();
            Err(RunError::Ended { status, output })
        }
    }
}

/// Reads to the end; tells `marker` when the marker's byte went by. Returns the first 64 KiB as text.
fn drain(mut from: impl Read, marker: Option<&mpsc::Sender<Instant>>) -> String {
    let mut kept = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let bytes = &buffer[..count];
        if let (Some(sender), true) = (marker, bytes.contains(&MARKER)) {
            let _ = sender.send(Instant::now());
        }
        if kept.len() < 65_536 {
            kept.extend_from_slice(bytes);
        }
    }
    String::from_utf8_lossy(&kept).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_fake_vmm_is_timed_to_its_marker_and_ended() {
        let here = Path::new("/");
        let running = start(shell("printf 'noise\\007'; exec sleep 1000"), here).expect("it runs");
        let pid = running.pid();
        assert!(Path::new(&format!("/proc/{pid}")).exists());
        drop(running);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn a_vmm_that_dies_is_reported_with_its_last_words() {
        let error = start(shell("echo 'no such kernel' >&2; exit 3"), Path::new("/")).err();
        let text = error.expect("it failed").to_string();
        assert!(
            text.contains("exit status: 3") && text.contains("no such kernel"),
            "{text}"
        );
    }
}
