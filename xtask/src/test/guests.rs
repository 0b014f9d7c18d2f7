//! The tests with real guests: directly where KVM runs them, else in the testbed.
//!
//! The testbed is an emulator under an emulator, and now and then one of its machines dies of itself. So what did
//! not pass in its first boot gets one more, in a new one, a test at a time. A test that passes then is named; one
//! that does not has failed. On a real KVM nothing is run twice.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io::{self, Write};
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::count::Counts;
use super::{Parts, counted};
use crate::error::{Doing, Error, Result};
use crate::testbed::{self, DIED, Job, Limits, Outer, TIMED_OUT};
use crate::{binaries, run};

/// When the watchdog ends the testbed with the whole suite in it.
const SUITE_TIMEOUT: Duration = Duration::from_secs(30 * 60);

/// Runs those whose names contain `filter`.
pub(super) fn run(parts: &Parts, filter: Option<&str>) -> Result<Counts> {
    let test = binaries::end_to_end_test()?;
    let mut list = Command::new(&test);
    let listed = run::captured(list.args(["--list", "--format=terse"]).args(filter))?;
    let names = names(&listed);
    if names.is_empty() {
        return Ok(Counts::default());
    }
    match &parts.outer {
        Some(outer) => in_testbed(outer, parts, &test, names),
        None => directly(parts, &test, filter),
    }
}

/// What `--list --format=terse` says: `ends::a_guest_that_panics: test`.
fn names(listed: &str) -> BTreeSet<String> {
    let name = |line: &str| Some(line.strip_suffix(": test")?.to_owned());
    listed.lines().filter_map(name).collect()
}

fn directly(parts: &Parts, test: &Path, filter: Option<&str>) -> Result<Counts> {
    // The tests keep their image store in TMPDIR: a new one each run, as in the testbed.
    let scratch = tempfile::tempdir().doing("create a directory in", &std::env::temp_dir())?;
    let mut command = Command::new(test);
    command
        .arg("--test-threads=2")
        .args(filter)
        .current_dir(binaries::root())
        .envs(parts.variables())
        .env("TMPDIR", scratch.path());
    counted(&mut command)
}

fn in_testbed(
    outer: &Outer,
    parts: &Parts,
    test: &Path,
    names: BTreeSet<String>,
) -> Result<Counts> {
    let all = names.len();
    let (status, passed) = boot(outer, parts, test, &names, 2)?;
    let left: BTreeSet<_> = names.difference(&passed).cloned().collect();
    if left.is_empty() {
        return match status {
            0 => Ok(Counts::new(all, 0)),
            status => Err(Error::Said(format!(
                "the suite ended with status {status} and without a failed test"
            ))),
        };
    }
    println!("once more, in a new testbed: {}", joined(&left));
    let (status, passed) = boot(outer, parts, test, &left, 1)?;
    let flaky: BTreeSet<_> = left.intersection(&passed).cloned().collect();
    let failed: BTreeSet<_> = left.difference(&passed).cloned().collect();
    if !flaky.is_empty() {
        println!("passed in the second testbed only: {}", joined(&flaky));
    }
    match status {
        TIMED_OUT => println!("the watchdog ended the second testbed too"),
        DIED => println!("the second testbed died too"),
        _ => {}
    }
    if !failed.is_empty() {
        println!("failed in both testbeds: {}", joined(&failed));
    }
    Ok(Counts::new(all.saturating_sub(failed.len()), failed.len()))
}

/// One boot of the testbed for these tests: its exit status, and those that passed.
fn boot(
    outer: &Outer,
    parts: &Parts,
    test: &Path,
    names: &BTreeSet<String>,
    threads: u8,
) -> Result<(u8, BTreeSet<String>)> {
    let mut words: Vec<OsString> = vec![test.into(), "--exact".into()];
    words.push(format!("--test-threads={threads}").into());
    words.extend(names.iter().map(Into::into));
    let mut job = Job::new(&words)?.directory(binaries::root());
    for (name, value) in parts.variables() {
        job = job.variable(name, value);
    }
    let limits = Limits {
        timeout: SUITE_TIMEOUT,
        memory_mib: 6144,
        cpus: 2,
    };
    let watched = Passed::default();
    let status = testbed::exec(outer, &limits, &job, watched.clone())?;
    Ok((status, watched.names()))
}

fn joined(names: &BTreeSet<String>) -> String {
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    names.join(", ")
}

/// A stream to standard output that notes the tests that pass on the way.
#[derive(Debug, Clone, Default)]
struct Passed(Arc<Mutex<(Vec<u8>, BTreeSet<String>)>>);

impl Passed {
    fn names(&self) -> BTreeSet<String> {
        let guard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        guard.1.clone()
    }

    /// Looks at each line; it may come in pieces.
    fn scan(&self, bytes: &[u8]) {
        let mut guard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (line, names) = &mut *guard;
        for &byte in bytes {
            if byte == b'\n' {
                names.extend(passed(&String::from_utf8_lossy(line)));
                line.clear();
            } else if line.len() < 4096 {
                line.push(byte);
            }
        }
    }
}

/// libtest's line for a test that passed: `test ends::a_guest_that_panics ... ok`.
fn passed(line: &str) -> Option<String> {
    let name = line.strip_prefix("test ")?.strip_suffix(" ... ok")?;
    Some(name.to_owned())
}

impl Write for Passed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.scan(bytes);
        io::stdout().write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_are_listed_and_those_that_pass_are_noted() {
        let listed = names("ends::panic: test\nends::reset: test\n\n2 tests, 0 benchmarks\n");
        assert_eq!(joined(&listed), "ends::panic, ends::reset");
        let watched = Passed::default();
        for piece in [
            "running 2 tests\ntest ends::pa",
            "nic ... ok\ntest ends::reset ... FAILED\n",
            "test result: FAILED. 1 passed; 1 failed\ntest ends::last ... ok",
        ] {
            watched.scan(piece.as_bytes());
        }
        assert_eq!(joined(&watched.names()), "ends::panic");
    }
}
