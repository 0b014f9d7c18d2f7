//! Many at once: how long N that start together take, and how many fit.
#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::cgroup::Group;
use super::measure::{self, Launched, RunError, Running};
use super::peers::Kind;
use super::plan::{Contender, Row};
use super::stats::quantile;

/// N that were started together.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Batch {
    /// How many.
    pub pods: u32,
    /// Start of each, from the start of the first, to its marker; sorted, in milliseconds.
    pub ready_ms: Vec<f64>,
    /// From the first start to the last marker, in milliseconds.
    pub all_ready_ms: f64,
    /// How long it took to end them all, in milliseconds.
    pub stop_ms: f64,
}

/// Memory with that many idle ones resident.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Resident {
    /// How many.
    pub pods: u32,
    /// What they take together, the kernel's memory included, in MiB.
    pub mib: f64,
}

/// What one contender did.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Crowd {
    /// The row's name.
    pub name: String,
    /// Starts, by number.
    pub batches: Vec<Batch>,
    /// The density curve, from none to as many as fit.
    pub resident: Vec<Resident>,
    /// Where the memory was read: `cgroup` or `host`.
    pub memory_of: &'static str,
    /// Why it was not measured to the end, if so.
    pub failure: Option<String>,
}

/// What to measure.
#[derive(Debug, Clone)]
pub struct Sizes {
    /// Numbers to start at once.
    pub at_once: Vec<u32>,
    /// Memory to fill with idle ones, in MiB; none: not measured.
    pub limit_mib: Option<u32>,
    /// After how long one that has not started is given up.
    pub deadline: Duration,
}

impl Batch {
    /// The time to ready of the share `q` (0.5: the median), in milliseconds.
    pub fn ready(&self, q: f64) -> f64 {
        quantile(&self.ready_ms, q).unwrap_or(f64::NAN)
    }

    /// Starts per second.
    pub fn per_second(&self) -> f64 {
        f64::from(self.pods) * 1e3 / self.all_ready_ms
    }
}

impl Crowd {
    /// What one more costs in MiB: the slope from the first to the last.
    pub fn mib_per_pod(&self) -> Option<f64> {
        let (first, last) = (self.resident.first()?, self.resident.last()?);
        let pods = last.pods.checked_sub(first.pods).filter(|pods| *pods > 0)?;
        Some((last.mib - first.mib) / f64::from(pods))
    }
}

/// Measures one contender; none if it has no guest that idles.
///
/// # Errors
/// Files could not be written.
pub fn measure(row: &Row, sizes: &Sizes, directory: &Path) -> io::Result<Option<Crowd>> {
    if row.failure.is_some() || !idles(&row.contender) {
        return Ok(None);
    }
    let mut crowd = Crowd {
        name: row.name.clone(),
        ..Crowd::default()
    };
    let mut next = |number: u32| {
        // Each in a directory of its own: a VMM's files have the same names.
        let place = directory.join(number.to_string());
        fs::create_dir_all(&place)?;
        command(&row.contender, &place)
    };
    for pods in &sizes.at_once {
        match at_once(*pods, &mut next, directory, sizes.deadline)? {
            Ok(batch) => crowd.batches.push(batch),
            Err(error) => {
                crowd.failure = Some(format!("{pods} at once: {error}"));
                return Ok(Some(crowd));
            }
        }
    }
    if let Some(limit) = sizes.limit_mib {
        fill(&mut crowd, limit, &mut next, directory, sizes.deadline)?;
    }
    Ok(Some(crowd))
}

/// Whether it has a guest that idles after its marker.
fn idles(contender: &Contender) -> bool {
    match contender {
        Contender::Vmm { peer, linux, .. } => linux.is_some() && peer.kind != Kind::Floor,
        Contender::Pod(_) => true,
        // Its pods are those of `cube run`, and end with no process of ours.
        Contender::Background(_) | Contender::Missing => false,
    }
}

fn command(contender: &Contender, place: &Path) -> io::Result<Command> {
    match contender {
        Contender::Vmm {
            peer,
            linux: Some(linux),
            ..
        } => peer.command(linux, place),
        Contender::Pod(pod) => Ok(pod.idle()),
        _ => Err(io::Error::other("it has no guest that idles")),
    }
}

type Next<'a> = &'a mut dyn FnMut(u32) -> io::Result<Command>;

/// Starts `pods` together, waits for all, ends them.
fn at_once(
    pods: u32,
    next: Next<'_>,
    directory: &Path,
    deadline: Duration,
) -> io::Result<Result<Batch, RunError>> {
    let commands: Vec<Command> = (0..pods).map(next).collect::<io::Result<_>>()?;
    let began = Instant::now();
    let launched: Result<Vec<Launched>, RunError> = commands
        .into_iter()
        .map(|command| measure::launch(command, directory, None))
        .collect();
    let running: Result<Vec<Running>, RunError> =
        launched.and_then(|all| all.into_iter().map(|one| one.wait(deadline)).collect());
    let running = match running {
        Ok(running) => running,
        Err(error) => return Ok(Err(error)),
    };
    let since = |running: &Running| running.at.duration_since(began).as_secs_f64() * 1e3;
    let mut ready_ms: Vec<f64> = running.iter().map(since).collect();
    ready_ms.sort_by(f64::total_cmp);
    let all_ready_ms = ready_ms.last().copied().unwrap_or_default();
    let stopping = Instant::now();
    measure::stop_all(running);
    let stop_ms = stopping.elapsed().as_secs_f64() * 1e3;
    Ok(Ok(Batch {
        pods,
        ready_ms,
        all_ready_ms,
        stop_ms,
    }))
}

/// More than any limit gives: a contender that costs nothing is not believed.
const MOST: u32 = 4096;

/// Starts one after the other until they take `limit_mib`.
fn fill(
    crowd: &mut Crowd,
    limit_mib: u32,
    next: Next<'_>,
    directory: &Path,
    deadline: Duration,
) -> io::Result<()> {
    let group = Group::create();
    crowd.memory_of = if group.is_some() { "cgroup" } else { "host" };
    let idle = available()?;
    let used = || -> io::Result<f64> {
        let bytes = match &group {
            Some(group) => group.memory()?,
            None => idle.saturating_sub(available()?),
        };
        Ok(bytes as f64 / f64::from(1 << 20))
    };
    // The first pays for what all share.
    let mut running = Vec::new();
    for pods in 1..=MOST {
        match measure::start(next(pods)?, directory, deadline, group.as_ref()) {
            Ok(one) => running.push(one),
            Err(error) => {
                crowd.failure = Some(format!("the {pods}. idle one: {error}"));
                break;
            }
        }
        let mib = used()?;
        crowd.resident.push(Resident { pods, mib });
        if mib >= f64::from(limit_mib) {
            break;
        }
    }
    measure::stop_all(running);
    Ok(())
}

/// What the host could still give, in bytes.
fn available() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.map(|kib| kib * 1024)
        .ok_or_else(|| io::Error::other("/proc/meminfo has no MemAvailable"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> impl FnMut(u32) -> io::Result<Command> {
        move |_| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            Ok(command)
        }
    }

    const DEADLINE: Duration = Duration::from_secs(60);

    #[test]
    fn all_of_a_batch_run_at_the_same_time_and_are_ended() {
        // Each is ready only when all three have started.
        let directory = tempfile::tempdir().expect("a directory");
        let script =
            "touch $$; until [ $(ls | wc -l) = 3 ]; do :; done; printf '\\007'; exec sleep 1000";
        let batch =
            at_once(3, &mut shell(script), directory.path(), DEADLINE).expect("it is tried");
        let batch = batch.expect("they run");
        assert_eq!((batch.pods, batch.ready_ms.len()), (3, 3));
        assert_eq!(batch.ready(1.0), batch.all_ready_ms);
        for entry in fs::read_dir(directory.path()).expect("a list").flatten() {
            assert!(
                !Path::new("/proc").join(entry.file_name()).exists(),
                "it was ended"
            );
        }
    }

    #[test]
    fn one_that_fails_fails_the_batch() {
        let directory = tempfile::tempdir().expect("a directory");
        let script = "mkdir one || { echo full >&2; exit 1; }; printf '\\007'; exec sleep 1000";
        let batch =
            at_once(2, &mut shell(script), directory.path(), DEADLINE).expect("it is tried");
        assert!(
            batch
                .expect_err("the second fails")
                .to_string()
                .contains("full")
        );
    }

    #[test]
    fn the_cost_of_one_is_the_slope() {
        let at = |pods, mib| Resident { pods, mib };
        let mut crowd = Crowd {
            resident: vec![at(1, 30.0), at(2, 45.0), at(3, 60.0)],
            ..Crowd::default()
        };
        assert_eq!(crowd.mib_per_pod(), Some(15.0));
        crowd.resident.truncate(1);
        assert_eq!(crowd.mib_per_pod(), None);
    }

    #[test]
    fn filling_stops_where_one_fails_and_says_so() {
        let directory = tempfile::tempdir().expect("a directory");
        let script = "[ $(ls | wc -l) -lt 2 ] || exit 9; touch $$; printf '\\007'; exec sleep 1000";
        let mut crowd = Crowd::default();
        fill(
            &mut crowd,
            u32::MAX,
            &mut shell(script),
            directory.path(),
            DEADLINE,
        )
        .expect("it is tried");
        assert_eq!(crowd.resident.len(), 2);
        assert!(
            crowd
                .failure
                .expect("a sentence")
                .starts_with("the 3. idle one: ended")
        );
    }
}
