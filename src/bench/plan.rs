//! What is run, in which order, and what comes of it.
//!
//! VMMs take turns (A B C A B C …), so that a machine whose speed drifts drifts for all of them. The
//! first turns warm up and are not counted.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use serde::Serialize;

use super::exits;
use super::footprint;
use super::measure::{self, RunError, Running};
use super::peers::{Machine, Peer};

/// How often each VMM is run.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Rounds {
    /// Turns that are not counted.
    pub warm_up: u32,
    /// Turns that are.
    pub counted: u32,
}

/// Every figure of one VMM: name of the figure to its samples.
pub type Figures = BTreeMap<String, Vec<f64>>;

/// One VMM's row.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The VMM.
    pub peer: Peer,
    /// What was measured.
    pub figures: Figures,
    /// Why it stopped being measured, if it did.
    pub failure: Option<String>,
}

/// The two machines that every VMM boots.
#[derive(Debug, Clone, Serialize)]
pub struct Machines {
    /// The tiny kernel: VMM start.
    pub tiny: Machine,
    /// A real kernel with an init that writes the marker: boot to init, and the footprint after it.
    pub linux: Option<Machine>,
}

/// Runs everything. `progress` is called after each run.
///
/// # Errors
/// Files for the VMMs could not be written.
pub fn run(
    peers: &[Peer],
    machines: &Machines,
    rounds: Rounds,
    directory: &Path,
    progress: &mut dyn FnMut(),
) -> io::Result<Vec<Row>> {
    let row = |peer: &Peer| Row {
        peer: peer.clone(),
        figures: Figures::new(),
        failure: None,
    };
    let mut rows: Vec<Row> = peers.iter().map(row).collect();
    for round in 0..rounds.warm_up + rounds.counted {
        for row in &mut rows {
            if row.failure.is_none() {
                let counted = round >= rounds.warm_up;
                row.take_turn(machines, counted, directory)?;
            }
            progress();
        }
    }
    Ok(rows)
}

impl Row {
    fn take_turn(
        &mut self,
        machines: &Machines,
        counted: bool,
        directory: &Path,
    ) -> io::Result<()> {
        let mut taken = Figures::new();
        let outcome = self.measure(machines, directory, &mut taken)?;
        if let Err(error) = outcome {
            self.failure = Some(error.to_string());
        }
        if counted {
            for (name, samples) in taken {
                self.figures.entry(name).or_default().extend(samples);
            }
        }
        Ok(())
    }

    /// The outer error is ours, the inner one the VMM's.
    fn measure(
        &self,
        machines: &Machines,
        directory: &Path,
        taken: &mut Figures,
    ) -> io::Result<Result<(), RunError>> {
        let tiny = self.peer.command(&machines.tiny, directory)?;
        match measure::start(tiny, directory) {
            Ok(running) => record(taken, "vmm_start_ms", milliseconds(&running)),
            Err(error) => return Ok(Err(error)),
        }
        let Some(linux) = &machines.linux else {
            return Ok(Ok(()));
        };
        match measure::start(self.peer.command(linux, directory)?, directory) {
            Ok(running) => {
                record(taken, "boot_to_init_ms", milliseconds(&running));
                Ok(look(&running, linux, taken).map_err(RunError::Look))
            }
            Err(error) => Ok(Err(error)),
        }
    }
}

fn record(taken: &mut Figures, name: &str, value: f64) {
    taken.entry(name.to_owned()).or_default().push(value);
}

fn milliseconds(running: &Running) -> f64 {
    running.elapsed.as_secs_f64() * 1e3
}

fn look(running: &Running, machine: &Machine, taken: &mut Figures) -> io::Result<()> {
    let memory = footprint::of_process(running.pid(), machine.memory_mib)?;
    let mib = |kib: u64| kib as f64 / 1024.0;
    record(taken, "overhead_pss_mib", mib(memory.overhead_pss_kib));
    record(taken, "overhead_rss_mib", mib(memory.overhead_rss_kib));
    record(taken, "guest_touched_mib", mib(memory.guest_touched_kib));
    record(taken, "threads", memory.threads as f64);
    for (reason, count) in exits::of_process(running.pid()) {
        record(taken, &format!("exits_{reason}"), count as f64);
    }
    Ok(())
}
