//! The tests with real guests: directly where KVM runs them, else in the testbed.
//!
//! The testbed is an emulator under an emulator, and now and then one of its machines dies of itself, the outer one
//! too. So what had not ended when it died goes on in a new one, and a test that failed gets a second try. One that
//! passes then is named; one that does not has failed. On a real KVM nothing is run twice.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
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

/// No test is silent for so long, on a busy machine either.
const SILENCE: Duration = Duration::from_secs(6 * 60);
/// Testbeds in which one suite is run, at most.
const MAX_BOOTS: u8 = 6;

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
    let mut suite = Suite::new(names);
    for boots in 1..=MAX_BOOTS {
        let (status, verdicts) = boot(outer, parts, test, &suite.left)?;
        suite.take(verdicts);
        if suite.left.is_empty() {
            if suite.failed.is_empty() && !matches!(status, 0 | DIED) {
                return Err(Error::Said(format!(
                    "the suite ended with status {status} and without a failed test"
                )));
            }
            break;
        }
        suite.hung = suite.hung.saturating_add(u8::from(status == TIMED_OUT));
        if boots == MAX_BOOTS || suite.hung == 2 {
            println!(
                "no further testbed; not run to their ends: {}",
                joined(&suite.left)
            );
            break;
        }
        println!("once more, in a new testbed: {}", joined(&suite.left));
    }
    if !suite.flaky.is_empty() {
        println!("passed at the second try only: {}", joined(&suite.flaky));
    }
    Ok(suite.counts())
}

/// What is known of the tests.
struct Suite {
    all: usize,
    /// To be run, or run once more.
    left: BTreeSet<String>,
    /// Failed once.
    failed: BTreeSet<String>,
    /// Failed once, and passed then.
    flaky: BTreeSet<String>,
    /// Failed twice.
    lost: usize,
    /// Testbeds that the watchdog ended.
    hung: u8,
}

impl Suite {
    fn new(left: BTreeSet<String>) -> Self {
        Self {
            all: left.len(),
            left,
            failed: BTreeSet::new(),
            flaky: BTreeSet::new(),
            lost: 0,
            hung: 0,
        }
    }

    fn take(&mut self, verdicts: BTreeMap<String, bool>) {
        for (name, passed) in verdicts {
            let again = self.failed.contains(&name);
            if passed || again {
                self.left.remove(&name);
            }
            match (passed, again) {
                (true, true) => _ = self.flaky.insert(name),
                (true, false) => {}
                (false, true) => self.lost = self.lost.saturating_add(1),
                (false, false) => _ = self.failed.insert(name),
            }
        }
    }

    fn counts(&self) -> Counts {
        let failed = self.lost.saturating_add(self.left.len());
        Counts::new(self.all.saturating_sub(failed), failed)
    }
}

/// One boot of the testbed for these tests: its exit status, and whether those that ended passed.
fn boot(
    outer: &Outer,
    parts: &Parts,
    test: &Path,
    names: &BTreeSet<String>,
) -> Result<(u8, BTreeMap<String, bool>)> {
    let limits = Limits {
        timeout: SUITE_TIMEOUT,
        silence: Some(SILENCE),
        memory_mib: 6144,
        cpus: 2,
    };
    let watched = Verdicts::default();
    let job = job(parts, test, names)?;
    let status = testbed::exec(outer, &limits, &job, watched.clone())?;
    Ok((status, watched.so_far()))
}

/// Runs one test alone, once, with what it says shown and `variable` set: whether it passed. `timeout` is for the
/// testbed.
pub(crate) fn alone(
    parts: &Parts,
    name: &str,
    (variable, value): (&str, String),
    timeout: Duration,
) -> Result<bool> {
    let test = binaries::end_to_end_test()?;
    let Some(outer) = &parts.outer else {
        let scratch = tempfile::tempdir().doing("create a directory in", &std::env::temp_dir())?;
        let mut command = Command::new(&test);
        command
            .args(["--exact", "--nocapture", name])
            .current_dir(binaries::root())
            .envs(parts.variables())
            .env(variable, value)
            .env("TMPDIR", scratch.path());
        return Ok(counted(&mut command)? == Counts::new(1, 0));
    };
    let limits = Limits {
        timeout,
        // What it says goes to standard error, and it is the other that the silence is of.
        silence: None,
        memory_mib: 6144,
        cpus: 2,
    };
    let watched = Verdicts::default();
    let words = [name, "--nocapture"].map(str::to_owned);
    let job = job(parts, &test, &words.into())?.variable(variable, value);
    match testbed::exec(outer, &limits, &job, watched.clone())? {
        0 => Ok(watched.so_far().get(name) == Some(&true)),
        DIED => Err(Error::Said(
            "the testbed died before the test had ended: run it again".into(),
        )),
        _ => Ok(false),
    }
}

fn job(parts: &Parts, test: &Path, names: &BTreeSet<String>) -> Result<Job> {
    let mut words: Vec<OsString> = vec![test.into(), "--exact".into()];
    // One at a time: with two guests on its two processors the outer machine dies, or hangs, in most runs.
    words.push("--test-threads=1".into());
    words.extend(names.iter().map(Into::into));
    let mut job = Job::new(&words)?.directory(binaries::root());
    for (name, value) in parts.variables() {
        job = job.variable(name, value);
    }
    Ok(job)
}

fn joined(names: &BTreeSet<String>) -> String {
    let names: Vec<_> = names.iter().map(String::as_str).collect();
    names.join(", ")
}

/// A stream to standard output that notes on the way which tests pass, and which do not.
#[derive(Debug, Clone, Default)]
struct Verdicts(Arc<Mutex<Heard>>);

#[derive(Debug, Default)]
struct Heard {
    /// The line that is not at its end yet.
    line: Vec<u8>,
    verdicts: BTreeMap<String, bool>,
}

impl Verdicts {
    fn so_far(&self) -> BTreeMap<String, bool> {
        let guard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        guard.verdicts.clone()
    }

    /// Looks at each line; it may come in pieces.
    fn scan(&self, bytes: &[u8]) {
        let mut guard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Heard { line, verdicts } = &mut *guard;
        for &byte in bytes {
            if byte == b'\n' {
                verdicts.extend(verdict(&String::from_utf8_lossy(line)));
                line.clear();
            } else if line.len() < 4096 {
                line.push(byte);
            }
        }
    }
}

/// libtest's line for a test: `test ends::a_guest_that_panics ... ok`.
fn verdict(line: &str) -> Option<(String, bool)> {
    let (name, verdict) = line.strip_prefix("test ")?.split_once(" ... ")?;
    match verdict {
        "ok" => Some((name.to_owned(), true)),
        "FAILED" => Some((name.to_owned(), false)),
        _ => None,
    }
}

impl Write for Verdicts {
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

    fn suite(names: &[&str]) -> Suite {
        Suite::new(names.iter().map(|&name| name.to_owned()).collect())
    }

    fn heard(pieces: &[&str]) -> BTreeMap<String, bool> {
        let watched = Verdicts::default();
        pieces
            .iter()
            .for_each(|piece| watched.scan(piece.as_bytes()));
        watched.so_far()
    }

    #[test]
    fn tests_are_listed() {
        let listed = names("ends::panic: test\nends::reset: test\n\n2 tests, 0 benchmarks\n");
        assert_eq!(joined(&listed), "ends::panic, ends::reset");
    }

    #[test]
    fn a_test_that_fails_twice_has_failed_and_one_that_did_not_end_is_run_again() {
        let mut suite = suite(&["a", "b", "c", "d"]);
        suite.take(heard(&[
            "running 4 tests\ntest a .",
            ".. ok\ntest b ... FAILED\ntest c ... FAILED\n",
            "test d has been running for over 60 seconds\ntest d ... ok",
        ]));
        assert_eq!(joined(&suite.left), "b, c, d");
        suite.take(heard(&["test d ... ok\n"]));
        assert_eq!(joined(&suite.left), "b, c");
        suite.take(heard(&["test b ... ok\ntest c ... FAILED\n"]));
        assert_eq!((suite.left.len(), joined(&suite.flaky)), (0, "b".into()));
        assert_eq!(suite.counts(), Counts::new(3, 1));
    }

    #[test]
    fn what_never_ended_has_failed() {
        assert_eq!(suite(&["a"]).counts(), Counts::new(0, 1));
    }
}
