//! What is run, in which order, and what comes of it.
//!
//! Contenders take turns (A B C A B C …), so that a machine whose speed drifts drifts for all of them. The
//! first turns warm up and are not counted.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io::{self, PipeReader, PipeWriter, Read};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

use super::background;
use super::cgroup::Group;
use super::exits;
use super::footprint;
use super::measure::{self, RunError, Running};
use super::peers::{FLOOR_ORDERS, Kind, Machine, Peer};
use super::pod::PodCommand;
use super::syscalls;

/// How often each contender is run, and how long it may take.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Rounds {
    /// Turns that are not counted.
    pub warm_up: u32,
    /// Turns that are.
    pub counted: u32,
    /// After how long one that has not started its guest is given up.
    #[serde(skip)]
    pub deadline: Duration,
}

/// Every figure of one contender: name of the figure to its samples.
pub type Figures = BTreeMap<String, Vec<f64>>;

/// What takes turns. There are a dozen at most.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant, reason = "a dozen values in all")]
pub enum Contender {
    /// A VMM with the machines that it boots.
    Vmm {
        /// The VMM.
        peer: Peer,
        /// The tiny kernel: VMM start.
        tiny: Option<Machine>,
        /// A kernel with an init that writes the marker: boot to init, and the footprint after it.
        linux: Option<Machine>,
        /// The same with a disk, which the init reads.
        disk: Option<Machine>,
    },
    /// `cube run`: a pod with a container.
    Pod(PodCommand),
    /// `cube pod run`: the same, without the command that started it.
    Background(PodCommand),
    /// Nothing that could be run.
    Missing,
}

/// One contender's row.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Its name in tables and charts, the same from run to run.
    pub name: String,
    /// The program's first line about its version; empty if it is missing.
    pub version: String,
    /// What was measured.
    pub figures: Figures,
    /// Why it stopped being measured, if it did.
    pub failure: Option<String>,
    /// What is run.
    #[serde(skip)]
    pub contender: Contender,
}

/// Lets every row that is still measured take its turn, so many rounds, with `progress` after each. Of `turn` the outer
/// error is ours, and the inner one the VMM's.
pub(super) fn take_turns(
    rows: &mut [Row],
    rounds: u32,
    progress: &mut dyn FnMut(),
    turn: impl Fn(&Row) -> io::Result<Result<Figures, String>>,
) -> io::Result<()> {
    for _ in 0..rounds {
        for row in &mut *rows {
            if row.failure.is_none() {
                match turn(row)? {
                    Ok(taken) => row.add(taken),
                    Err(sentence) => row.failure = Some(sentence),
                }
            }
            progress();
        }
    }
    Ok(())
}

/// Runs everything. `progress` is called after each turn.
///
/// # Errors
/// Files for the contenders could not be written.
pub fn run(
    rows: &mut [Row],
    rounds: Rounds,
    directory: &Path,
    progress: &mut dyn FnMut(),
) -> io::Result<()> {
    for row in &mut *rows {
        row.prepare(rounds, directory)?;
    }
    for round in 0..rounds.warm_up + rounds.counted {
        for row in &mut *rows {
            if row.failure.is_none() {
                row.take_turn(round >= rounds.warm_up, rounds.deadline, directory)?;
            }
            progress();
        }
    }
    Ok(())
}

impl Row {
    /// A row without figures.
    pub fn new(name: String, contender: Contender) -> Self {
        let version = match &contender {
            Contender::Vmm { peer, .. } => peer.version.clone(),
            _ => String::new(),
        };
        Self {
            name,
            version,
            figures: Figures::new(),
            failure: None,
            contender,
        }
    }

    /// A row that says that a program is not there.
    pub fn missing(name: &str) -> Self {
        let mut row = Self::new(name.to_owned(), Contender::Missing);
        row.failure = Some("not found in PATH, nor named with --vmm".to_owned());
        row
    }

    /// What is measured once: the size of the program, its system calls until the guest runs, and the floor's
    /// fastest order.
    fn prepare(&mut self, rounds: Rounds, directory: &Path) -> io::Result<()> {
        let Contender::Vmm {
            peer,
            tiny: Some(tiny),
            ..
        } = &mut self.contender
        else {
            return Ok(());
        };
        if peer.kind == Kind::Floor {
            peer.order = fastest_order(peer, tiny, rounds.deadline, directory)?;
        }
        let size = peer.path.metadata()?.len();
        record(
            &mut self.figures,
            "binary_mib",
            size as f64 / f64::from(1 << 20),
        );
        let command = peer.command(tiny, directory)?;
        if let Some(calls) = syscalls::until_first_run(&command, directory, rounds.deadline)? {
            record(&mut self.figures, "syscalls", calls as f64);
        }
        Ok(())
    }

    fn add(&mut self, taken: Figures) {
        for (figure, samples) in taken {
            self.figures.entry(figure).or_default().extend(samples);
        }
    }

    fn take_turn(&mut self, counted: bool, deadline: Duration, directory: &Path) -> io::Result<()> {
        let mut taken = Figures::new();
        let outcome = match &self.contender {
            Contender::Vmm {
                peer,
                tiny,
                linux,
                disk,
            } => {
                let turn = Turn {
                    peer,
                    deadline,
                    directory,
                    taken: &mut taken,
                };
                turn.measure(tiny.as_ref(), linux.as_ref(), disk.as_ref())?
            }
            Contender::Pod(pod) => pod.measure(deadline, directory, &mut taken),
            Contender::Background(pod) => background::measure(pod, deadline, directory, &mut taken),
            Contender::Missing => Ok(()),
        };
        if let Err(error) = outcome {
            self.failure = Some(error.to_string());
        }
        if counted {
            self.add(taken);
        }
        Ok(())
    }
}

/// The order of calls whose best of three runs is fastest; none if it does not run.
fn fastest_order(
    floor: &Peer,
    tiny: &Machine,
    deadline: Duration,
    directory: &Path,
) -> io::Result<Option<&'static str>> {
    let mut best: Option<(Duration, &'static str)> = None;
    for _ in 0..3 {
        for order in FLOOR_ORDERS {
            let tried = Peer {
                order: Some(order),
                ..floor.clone()
            };
            let command = tried.command(tiny, directory)?;
            let Ok(running) = measure::start(command, directory, deadline, None) else {
                continue;
            };
            if best.is_none_or(|(time, _)| running.elapsed < time) {
                best = Some((running.elapsed, order));
            }
        }
    }
    Ok(best.map(|(_, order)| order))
}

struct Turn<'a> {
    peer: &'a Peer,
    deadline: Duration,
    directory: &'a Path,
    taken: &'a mut Figures,
}

impl Turn<'_> {
    /// The outer error is ours, the inner one the VMM's.
    fn measure(
        mut self,
        tiny: Option<&Machine>,
        linux: Option<&Machine>,
        disk: Option<&Machine>,
    ) -> io::Result<Result<(), RunError>> {
        if let Some(tiny) = tiny {
            let command = self.peer.command(tiny, self.directory)?;
            match measure::start(command, self.directory, self.deadline, None) {
                Ok(running) => record(self.taken, "vmm_start_ms", milliseconds(&running)),
                Err(error) => return Ok(Err(error)),
            }
        }
        if self.peer.kind == Kind::Floor {
            return Ok(Ok(()));
        }
        if let Some(Err(error)) = linux.map(|linux| self.boot(linux)).transpose()? {
            return Ok(Err(error));
        }
        disk.map_or(Ok(Ok(())), |disk| self.read_disk(disk))
    }

    /// How long the guest takes to read its disk. A kernel that does not find it is no fault of the VMM's.
    fn read_disk(&mut self, machine: &Machine) -> io::Result<Result<(), RunError>> {
        let command = self.peer.command(machine, self.directory)?;
        let read = measure::start(command, self.directory, self.deadline, None)
            .and_then(|mut running| running.next(self.deadline));
        Ok(read.map(|took| {
            if let Some(took) = took {
                record(self.taken, "disk_read_ms", took.as_secs_f64() * 1e3);
            }
        }))
    }

    fn boot(&mut self, linux: &Machine) -> io::Result<Result<(), RunError>> {
        let mut command = self.peer.command(linux, self.directory)?;
        let started = clock_gettime(ClockId::Monotonic);
        let started_ns = started.tv_sec as u64 * 1_000_000_000 + started.tv_nsec as u64;
        let account = match self.peer.kind {
            Kind::CubeVmm => Some(Account::ask(&mut command, started_ns)?),
            _ => None,
        };
        let group = Group::create();
        let running = match measure::start(command, self.directory, self.deadline, group.as_ref()) {
            Ok(running) => running,
            Err(error) => return Ok(Err(error)),
        };
        record(self.taken, "boot_to_init_ms", milliseconds(&running));
        let looked = look(running.pid(), linux.memory_mib, group.as_ref(), self.taken);
        drop(running);
        if let Some(account) = account {
            self.stages(&account.read()?, started_ns);
        }
        Ok(looked.map_err(RunError::Look))
    }

    /// `cube-vmm`'s timeline, one stage a line of JSON, as distances from the start.
    fn stages(&mut self, words: &str, started_ns: u64) {
        use crate::vmm::timeline::Entry;
        let entries = words
            .lines()
            .filter_map(|line| serde_json::from_str::<Entry>(line).ok());
        for entry in entries.filter(|entry| entry.monotonic_ns > started_ns) {
            if let Ok(serde_json::Value::String(stage)) = serde_json::to_value(entry.stage) {
                let at = (entry.monotonic_ns - started_ns) as f64 / 1e6;
                record(self.taken, &format!("at_{stage}_ms"), at);
            }
        }
    }
}

/// `cube-vmm`'s own account of its stages, beside what is seen from outside.
struct Account {
    reader: PipeReader,
    writer: PipeWriter,
}

impl Account {
    /// Has `command` write it to a pipe.
    fn ask(command: &mut Command, started_ns: u64) -> io::Result<Self> {
        let (reader, writer) = io::pipe()?;
        fcntl_setfd(&writer, FdFlags::empty())?;
        let fd = writer.as_raw_fd().to_string();
        command.args([
            "--timeline-fd",
            &fd,
            "--started-at",
            &started_ns.to_string(),
        ]);
        Ok(Self { reader, writer })
    }

    /// All of it, once its writer has ended: a few lines, which a pipe holds until then.
    fn read(self) -> io::Result<String> {
        let Self { mut reader, writer } = self;
        drop(writer);
        let mut text = String::new();
        reader.read_to_string(&mut text)?;
        Ok(text)
    }
}

/// Adds a sample.
pub(super) fn record(taken: &mut Figures, name: &str, value: f64) {
    taken.entry(name.to_owned()).or_default().push(value);
}

/// From the start to the marker.
pub(super) fn milliseconds(running: &Running) -> f64 {
    running.elapsed.as_secs_f64() * 1e3
}

/// What the VMM `pid` and its guest take, and why the guest was left until now.
pub(super) fn look(
    pid: u32,
    memory_mib: u32,
    group: Option<&Group>,
    taken: &mut Figures,
) -> io::Result<()> {
    let memory = footprint::of_process(pid, memory_mib)?;
    let mib = |kib: u64| kib as f64 / 1024.0;
    record(taken, "overhead_pss_mib", mib(memory.overhead_pss_kib));
    record(taken, "overhead_rss_mib", mib(memory.overhead_rss_kib));
    record(taken, "guest_touched_mib", mib(memory.guest_touched_kib));
    record(taken, "threads", memory.threads as f64);
    if let Some(group) = group {
        record(taken, "cgroup_mib", mib(group.memory()? / 1024));
    }
    for (reason, count) in exits::of_process(pid) {
        record(taken, &format!("exits_{reason}"), count as f64);
    }
    Ok(())
}
