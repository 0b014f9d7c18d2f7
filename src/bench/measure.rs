//! One run of one program, from outside: start it, wait for the guest's marker on its standard output, look at the
//! process, end it.
#![forbid(unsafe_code)]

use std::io::{self, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process_group, pidfd_open, waitid,
};

use super::cgroup::Group;
use super::payload::{ABSENT, MARKER};

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
    /// Nothing happened until the deadline.
    #[error("its guest did not run within {:.1} s", .0.as_secs_f64())]
    Hung(Duration),
    /// The process could not be looked at.
    #[error("could not read its memory map: {0}")]
    Look(#[source] io::Error),
    /// It ended by itself, as it was to, but badly.
    #[error("failed ({status}){}", last_words(.output))]
    Failed {
        /// Its exit status.
        status: String,
        /// What it printed on standard error.
        output: String,
    },
    /// It runs, but did not do what it was to do.
    #[error("did not end its work within {:.1} s", .0.as_secs_f64())]
    Lingered(Duration),
    /// It runs, and did not do what it was started for.
    #[error("{0}")]
    Odd(String),
}

/// The last line. crosvm says why it ends, and then, as a mere note, that it does: such a line counts only where there is
/// no other.
fn last_words(output: &str) -> String {
    let lines = || output.lines().rev().filter(|line| !line.trim().is_empty());
    lines()
        .find(|line| !line.contains(" INFO "))
        .or_else(|| lines().next())
        .map_or_else(String::new, |line| {
            let line: String = line.chars().filter(|c| !c.is_control()).take(160).collect();
            format!(": {line}")
        })
}

/// What a guest said, and when.
#[derive(Debug, Clone, Copy)]
struct Said {
    at: Instant,
    /// Not the marker: it lacks what it was to use.
    absent: bool,
}

/// A process that was started. It and whatever it forked end when this is dropped.
#[derive(Debug)]
pub struct Launched {
    child: Child,
    began: Instant,
    marker: mpsc::Receiver<Said>,
    words: Option<JoinHandle<String>>,
    /// Reaped: its process id is somebody else's by now.
    ended: bool,
}

/// A process whose guest has said that it runs.
#[derive(Debug)]
pub struct Running {
    launched: Launched,
    /// From just before the process was made to the marker.
    pub elapsed: Duration,
    /// When the last marker came.
    pub at: Instant,
}

impl Running {
    /// The process id.
    pub fn pid(&self) -> u32 {
        self.launched.child.id()
    }

    /// Waits for the next marker, at most `deadline`; gives the time since the one before, or none if the guest says
    /// that it lacks what it was to use.
    ///
    /// # Errors
    /// No marker comes.
    pub fn next(&mut self, deadline: Duration) -> Result<Option<Duration>, RunError> {
        let said = self.launched.marker.recv_timeout(deadline);
        let Said { at, absent } = said.map_err(|_| RunError::Lingered(deadline))?;
        let took = at - self.at;
        self.at = at;
        Ok((!absent).then_some(took))
    }

    /// Ends it; gives what it said on standard error.
    pub fn stop(mut self) -> String {
        self.launched.end();
        self.launched.words()
    }

    /// Waits for its own, good end, at most `deadline`; gives what it said on standard error.
    ///
    /// # Errors
    /// It does not end, or ends badly.
    pub fn finish(self, deadline: Duration) -> Result<String, RunError> {
        self.launched.finish(deadline)
    }
}

fn said(status: io::Result<ExitStatus>) -> String {
    status.map_or_else(|error| error.to_string(), |status| status.to_string())
}

/// Whether that process, which is not reaped yet, ends before the deadline.
pub(super) fn ends_within(process: Pid, deadline: Duration) -> io::Result<bool> {
    let end = pidfd_open(process, PidfdFlags::empty())?;
    let timeout = Timespec::try_from(deadline).map_err(io::Error::other)?;
    let mut fds = [PollFd::new(&end, PollFlags::IN)];
    Ok(poll(&mut fds, Some(&timeout))? > 0)
}

impl Launched {
    /// Waits for the marker, as long as `deadline` after the start.
    ///
    /// # Errors
    /// See [`RunError`].
    pub fn wait(mut self, deadline: Duration) -> Result<Running, RunError> {
        let left = deadline.saturating_sub(self.began.elapsed());
        match self.marker.recv_timeout(left) {
            Ok(Said { at, .. }) => Ok(Running {
                elapsed: at - self.began,
                at,
                launched: self,
            }),
            Err(mpsc::RecvTimeoutError::Timeout) => Err(RunError::Hung(deadline)),
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                let status = said(self.end_after_itself());
                let output = self.words();
                Err(RunError::Ended { status, output })
            }
        }
    }

    /// Waits for its own, good end, at most `deadline`; gives what it said on standard error.
    ///
    /// # Errors
    /// It does not end, or ends badly.
    pub fn finish(mut self, deadline: Duration) -> Result<String, RunError> {
        let ends = ends_within(Pid::from_child(&self.child), deadline);
        match ends.map_err(|error| RunError::Odd(format!("cannot wait for its end: {error}"))) {
            Ok(true) => {}
            Ok(false) => return Err(RunError::Lingered(deadline)),
            Err(error) => return Err(error),
        }
        let status = self.end_after_itself();
        let output = self.words();
        if status.as_ref().is_ok_and(ExitStatus::success) {
            return Ok(output);
        }
        let status = said(status);
        Err(RunError::Failed { status, output })
    }

    fn end(&mut self) {
        if !self.ended {
            self.kill();
            let _ = self.child.wait();
            self.ended = true;
        }
    }

    /// Waits for its own end, then ends what it left behind, which may hold its pipes. Its process id is its group's,
    /// and stays so until it is reaped.
    fn end_after_itself(&mut self) -> io::Result<ExitStatus> {
        let pid = Pid::from_child(&self.child);
        let _ = waitid(
            WaitId::Pid(pid),
            WaitIdOptions::EXITED | WaitIdOptions::NOWAIT,
        );
        self.kill();
        self.ended = true;
        self.child.wait()
    }

    /// It leads a process group of its own.
    fn kill(&mut self) {
        if !self.ended {
            let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        }
    }

    fn words(&mut self) -> String {
        self.words
            .take()
            .and_then(|words| words.join().ok())
            .unwrap_or_default()
    }
}

impl Drop for Launched {
    fn drop(&mut self) {
        self.end();
    }
}

/// Starts `command`, in `group` if there is one.
///
/// # Errors
/// It could not be started.
pub fn launch(
    mut command: Command,
    directory: &Path,
    group: Option<&Group>,
) -> Result<Launched, RunError> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .current_dir(directory);
    let began = Instant::now();
    let mut child = match group {
        Some(group) => group.spawn(&mut command),
        None => command.spawn(),
    }
    .map_err(RunError::Spawn)?;
    let (sender, marker) = mpsc::channel();
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    // The readers go on after the marker, so that a program that prints more never blocks on a full pipe.
    thread::spawn(move || stdout.map(|stdout| drain(stdout, Some(&sender))));
    let words = thread::spawn(move || stderr.map(|stderr| drain(stderr, None)).unwrap_or_default());
    Ok(Launched {
        child,
        began,
        marker,
        words: Some(words),
        ended: false,
    })
}

/// Starts `command` and waits for the marker.
///
/// # Errors
/// See [`RunError`].
pub fn start(
    command: Command,
    directory: &Path,
    deadline: Duration,
    group: Option<&Group>,
) -> Result<Running, RunError> {
    launch(command, directory, group)?.wait(deadline)
}

/// Ends all of them together.
pub fn stop_all(mut running: Vec<Running>) {
    for one in &mut running {
        one.launched.kill();
    }
    drop(running);
}

/// Reads to the end; tells `marker` when the marker's byte went by. Returns the first 64 KiB as text.
fn drain(mut from: impl Read, marker: Option<&mpsc::Sender<Said>>) -> String {
    let mut kept = Vec::new();
    let mut buffer = vec![0; 65_536];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let bytes = &buffer[..count];
        let at = Instant::now();
        for byte in bytes.iter().filter(|byte| [MARKER, ABSENT].contains(byte)) {
            let absent = *byte == ABSENT;
            // Nobody waits any more.
            let _ = marker.map(|sender| sender.send(Said { at, absent }));
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
        let running = start(
            shell("printf 'noise\\007'; exec sleep 1000"),
            here,
            DEADLINE,
            None,
        )
        .expect("it runs");
        let pid = running.pid();
        assert!(Path::new(&format!("/proc/{pid}")).exists());
        drop(running);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn a_vmm_that_hangs_is_ended_and_says_so() {
        let deadline = Duration::from_millis(50);
        let error =
            start(shell("exec sleep 1000"), Path::new("/"), deadline, None).expect_err("it hangs");
        assert_eq!(error.to_string(), "its guest did not run within 0.1 s");
    }

    #[test]
    fn what_a_vmm_said_is_there_after_its_end() {
        let script = "echo stages >&2; printf '\\007'; exec sleep 1000";
        let running = start(shell(script), Path::new("/"), DEADLINE, None).expect("it runs");
        assert_eq!(running.stop(), "stages\n");
    }

    #[test]
    fn markers_are_timed_one_after_the_other() {
        let script = "printf '\\007'; sleep 0.2; printf '\\007\\025'; exec sleep 1000";
        let before = Instant::now();
        let mut running = start(shell(script), Path::new("/"), DEADLINE, None).expect("it runs");
        let took = running.next(DEADLINE).expect("it says so");
        assert!(took.is_some_and(|took| took <= before.elapsed()));
        assert_eq!(running.next(DEADLINE).expect("it says so"), None);
        let silent = running.next(Duration::from_millis(50));
        silent.expect_err("it says no more");
    }

    #[test]
    fn one_that_is_to_end_by_itself_is_waited_for_and_not_for_ever() {
        let here = Path::new("/");
        let run = |script: &str| start(shell(script), here, DEADLINE, None).expect("it runs");
        let said = run("printf '\\007'; echo stages >&2").finish(DEADLINE);
        assert_eq!(said.expect("a good end"), "stages\n");
        let failed = run("printf '\\007'; echo no >&2; exit 4").finish(DEADLINE);
        let text = failed.expect_err("a bad end").to_string();
        assert!(
            text.contains("exit status: 4") && text.contains("no"),
            "{text}"
        );
        let deadline = Duration::from_millis(50);
        let lingers = run("printf '\\007'; exec sleep 1000").finish(deadline);
        let text = lingers.expect_err("it goes on").to_string();
        assert_eq!(text, "did not end its work within 0.1 s");
    }

    #[test]
    fn last_words_are_the_reason_and_not_the_note_after_it() {
        let crosvm = "[14:10 ERROR crosvm] arg parsing failed: Unrecognized argument: --x\n\n\
                      [14:10 INFO  crosvm] invalid argument\n";
        let words = last_words(crosvm);
        assert!(words.ends_with("Unrecognized argument: --x"), "{words}");
        assert_eq!(last_words("a INFO b\n\n"), ": a INFO b");
        assert_eq!(last_words("\n"), "");
    }

    #[test]
    fn a_vmm_that_dies_is_reported_with_its_last_words() {
        let error = start(
            shell("echo 'no such kernel' >&2; exit 3"),
            Path::new("/"),
            DEADLINE,
            None,
        )
        .err();
        let text = error.expect("it failed").to_string();
        assert!(
            text.contains("exit status: 3") && text.contains("no such kernel"),
            "{text}"
        );
    }
}
