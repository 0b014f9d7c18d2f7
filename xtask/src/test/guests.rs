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
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use super::count::Counts;
use super::{Parts, counted};
use crate::error::{Doing, Error, Result};
use crate::testbed::{self, DIED, Job, Limits, Outer, TIMED_OUT};
use crate::{binaries, run};

/// Testbeds at a time, a processor and a guest in each.
const LANES: usize = 2;

/// Tests that one testbed runs, at most: with one that dies no more is lost.
const MAX_SHARE: usize = 17;

/// And at least, if there are so many: a new one takes seconds.
const MIN_SHARE: usize = 6;

/// When the watchdog ends a testbed.
const SHARE_TIMEOUT: Duration = Duration::from_secs(20 * 60);

/// No test of a whole run is silent for so long, on a busy machine either.
const SILENCE: Duration = Duration::from_secs(4 * 60);

/// Bytes of a line that are shown in one piece.
const MAX_LINE: usize = 4096;

/// Testbeds that end before their tests do: after so many there is no further one.
const MAX_ENDED_EARLY: usize = 8;

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
        // Who chooses tests may choose one that is silent for long, and watches it.
        Some(outer) => in_testbed(
            outer,
            parts,
            &test,
            names,
            filter.is_none().then_some(SILENCE),
        ),
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
    silence: Option<Duration>,
) -> Result<Counts> {
    let suite = Mutex::new(Suite::new(names));
    let lane = || -> Result<()> {
        loop {
            // Not in a `while let`, which would hold the lock for as long as the testbed runs.
            let Some(share) = locked(&suite).next_share() else {
                return Ok(());
            };
            let ran = boot(outer, parts, test, &share, silence)?;
            locked(&suite).take(share, ran)?;
        }
    };
    thread::scope(|scope| {
        let lanes: Vec<_> = (0..LANES).map(|_| scope.spawn(lane)).collect();
        let mut ends = lanes.into_iter().map(|lane| lane.join());
        ends.try_for_each(|end| end.unwrap_or_else(|_| Err(Error::Said("a lane panicked".into()))))
    })?;
    let suite = suite.into_inner().unwrap_or_else(PoisonError::into_inner);
    suite.tell();
    Ok(suite.counts())
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is known of the tests.
struct Suite {
    all: usize,
    /// To be run, or run once more; no lane has them.
    left: BTreeSet<String>,
    /// Failed once.
    failed: BTreeSet<String>,
    /// Failed once, and passed then.
    flaky: BTreeSet<String>,
    /// Failed twice.
    lost: usize,
    /// Testbeds that ended before their tests did.
    ended_early: usize,
}

/// How one testbed ended: its status, and whether those tests passed that ended.
type Ran = (u8, BTreeMap<String, bool>);

impl Suite {
    fn new(left: BTreeSet<String>) -> Self {
        Self {
            all: left.len(),
            left,
            failed: BTreeSet::new(),
            flaky: BTreeSet::new(),
            lost: 0,
            ended_early: 0,
        }
    }

    /// Tests for a lane that has none: fewer towards the end, so that the lanes end together. None when there are none,
    /// or when too many testbeds have ended early.
    fn next_share(&mut self) -> Option<BTreeSet<String>> {
        if self.left.is_empty() || self.ended_early > MAX_ENDED_EARLY {
            return None;
        }
        let fair = self.left.len().div_ceil(LANES).clamp(MIN_SHARE, MAX_SHARE);
        let rest = self.left.iter().nth(fair).cloned();
        let rest = rest.map_or_else(BTreeSet::new, |first| self.left.split_off(&first));
        Some(std::mem::replace(&mut self.left, rest))
    }

    /// What came of a share.
    fn take(&mut self, share: BTreeSet<String>, (status, verdicts): Ran) -> Result<()> {
        let mut again = share;
        let failed = verdicts.values().any(|passed| !passed);
        for (name, passed) in verdicts {
            again.remove(&name);
            match (passed, self.failed.contains(&name)) {
                (true, true) => _ = self.flaky.insert(name),
                (true, false) => {}
                (false, true) => self.lost = self.lost.saturating_add(1),
                (false, false) => {
                    self.left.insert(name.clone());
                    self.failed.insert(name);
                }
            }
        }
        if again.is_empty() {
            return match status {
                0 | DIED | TIMED_OUT => Ok(()),
                _ if failed => Ok(()),
                _ => Err(Error::Said(format!(
                    "tests ended with status {status}, and none of them has failed"
                ))),
            };
        }
        println!("once more, in a new testbed: {}", joined(&again));
        self.ended_early = self.ended_early.saturating_add(1);
        self.left.extend(again);
        Ok(())
    }

    /// Says what the counts do not.
    fn tell(&self) {
        if !self.left.is_empty() {
            println!(
                "no further testbed; not run to their ends: {}",
                joined(&self.left)
            );
        }
        if !self.flaky.is_empty() {
            println!("passed at the second try only: {}", joined(&self.flaky));
        }
    }

    fn counts(&self) -> Counts {
        let failed = self.lost.saturating_add(self.left.len());
        Counts::new(self.all.saturating_sub(failed), failed)
    }
}

/// One boot of the testbed for these tests.
fn boot(
    outer: &Outer,
    parts: &Parts,
    test: &Path,
    names: &BTreeSet<String>,
    silence: Option<Duration>,
) -> Result<Ran> {
    let watched = Verdicts::default();
    let job = job(parts, test, names)?;
    let limits = limits(SHARE_TIMEOUT, silence);
    let status = testbed::exec(outer, &limits, &job, watched.clone())?;
    Ok((status, finished(&watched)?))
}

fn finished(watched: &Verdicts) -> Result<BTreeMap<String, bool>> {
    let verdicts = watched.finish();
    verdicts.doing("write to", Path::new("standard output"))
}

fn limits(timeout: Duration, silence: Option<Duration>) -> Limits {
    Limits {
        timeout,
        silence,
        memory_mib: 6144,
        // With more, guests on several of its processors at a time, the outer machine dies, or hangs, in most runs.
        cpus: 1,
    }
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
    let watched = Verdicts::default();
    let words = [name, "--nocapture"].map(str::to_owned);
    let job = job(parts, &test, &words.into())?.variable(variable, value);
    // What it says goes to standard error, and it is the other that the silence is of.
    match testbed::exec(outer, &limits(timeout, None), &job, watched.clone())? {
        0 => Ok(finished(&watched)?.get(name) == Some(&true)),
        DIED => Err(Error::Said(
            "the testbed died before the test had ended: run it again".into(),
        )),
        _ => Ok(false),
    }
}

fn job(parts: &Parts, test: &Path, names: &BTreeSet<String>) -> Result<Job> {
    let mut words: Vec<OsString> = vec![test.into(), "--exact".into()];
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

/// A stream to standard output, a line at a time, that notes on the way which tests pass, and which do not.
#[derive(Debug, Clone, Default)]
struct Verdicts(Arc<Mutex<Heard>>);

#[derive(Debug, Default)]
struct Heard {
    /// The line that is not at its end yet; another lane's may be shown before it is.
    line: Vec<u8>,
    verdicts: BTreeMap<String, bool>,
}

impl Verdicts {
    /// What there is when the stream has ended.
    fn finish(&self) -> io::Result<BTreeMap<String, bool>> {
        let heard = &mut *locked(&self.0);
        if !heard.line.is_empty() {
            heard.line.push(b'\n');
            heard.show(&mut io::stdout())?;
        }
        Ok(std::mem::take(&mut heard.verdicts))
    }

    /// Takes bytes as they come, in pieces of lines, and shows the lines.
    fn scan(&self, bytes: &[u8], mut shown: impl Write) -> io::Result<()> {
        let heard = &mut *locked(&self.0);
        for &byte in bytes {
            heard.line.push(byte);
            if byte == b'\n' || heard.line.len() == MAX_LINE {
                heard.show(&mut shown)?;
            }
        }
        Ok(())
    }
}

impl Heard {
    fn show(&mut self, shown: &mut impl Write) -> io::Result<()> {
        self.verdicts
            .extend(verdict(String::from_utf8_lossy(&self.line).trim_end()));
        shown.write_all(&self.line)?;
        self.line.clear();
        Ok(())
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
        self.scan(bytes, io::stdout())?;
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
        let (watched, mut shown) = (Verdicts::default(), Vec::new());
        for piece in pieces {
            watched.scan(piece.as_bytes(), &mut shown).unwrap();
            assert!(shown.is_empty() || shown.ends_with(b"\n"), "half a line");
        }
        watched.finish().unwrap()
    }

    #[test]
    fn tests_are_listed() {
        let listed = names("ends::panic: test\nends::reset: test\n\n2 tests, 0 benchmarks\n");
        assert_eq!(joined(&listed), "ends::panic, ends::reset");
    }

    #[test]
    fn a_test_that_fails_twice_has_failed_and_one_that_did_not_end_is_run_again() {
        let mut suite = suite(&["a", "b", "c", "d"]);
        let mut run = |status, pieces: &[&str]| {
            let share = std::mem::take(&mut suite.left);
            suite.take(share, (status, heard(pieces))).unwrap();
            joined(&suite.left)
        };
        let first = [
            "running 4 tests\ntest a .",
            ".. ok\ntest b ... FAILED\ntest c ... FAILED\n",
            "test d has been running for over 60 seconds\ntest d ... o",
        ];
        assert_eq!(run(DIED, &first), "b, c, d");
        assert_eq!(run(DIED, &["test d ... ok\n"]), "b, c");
        assert_eq!(run(101, &["test b ... ok\ntest c ... FAILED\n"]), "");
        assert_eq!(joined(&suite.flaky), "b");
        assert_eq!(suite.counts(), Counts::new(3, 1));
    }

    #[test]
    fn shares_are_of_all_tests_and_smaller_towards_the_end() {
        let names: Vec<String> = (10..50).map(|n| n.to_string()).collect();
        let mut suite = suite(&names.iter().map(String::as_str).collect::<Vec<_>>());
        let shares: Vec<_> = std::iter::from_fn(|| suite.next_share()).collect();
        let sizes: Vec<usize> = shares.iter().map(BTreeSet::len).collect();
        assert_eq!(sizes, [17, 12, 6, 5]);
        assert_eq!(shares.into_iter().flatten().collect::<Vec<_>>(), names);
    }

    #[test]
    fn what_never_ended_has_failed_and_is_not_tried_for_ever() {
        let mut suite = suite(&["a"]);
        let mut boots = 0;
        while let Some(share) = suite.next_share() {
            suite.take(share, (DIED, BTreeMap::new())).unwrap();
            boots += 1;
        }
        assert_eq!(
            (boots, suite.counts()),
            (MAX_ENDED_EARLY + 1, Counts::new(0, 1))
        );
    }
}
