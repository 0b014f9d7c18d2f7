//! When what happened: the stages of a machine's life on the host's CLOCK_MONOTONIC.
//!
//! With a file, each stage is written to it as one line of JSON at once:
//! `{"stage":"kernel_started","monotonic_ns":123}`; the stages at which exits are counted carry
//! `"exits":{"exits":…}` as well, see [`crate::vmm::stats`]. Any thread may record. A guest cannot make it
//! grow: each stage is recorded once.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::sync::{Mutex, PoisonError};

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// A point in a machine's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Whoever started `cube-vmm` was about to: told with `--started-at`.
    Exec,
    /// `main` runs.
    VmmStarted,
    /// The spec is read and found good.
    SpecRead,
    /// The VM and its memory exist.
    VmCreated,
    /// The kernel, the initramfs and the boot tables are in guest memory.
    KernelLoaded,
    /// The first vCPU is about to run its first instruction.
    KernelStarted,
    /// `Mark::InitStarted`.
    InitStarted,
    /// `Mark::AgentReady`.
    AgentReady,
    /// `Mark::ContainerStarted`.
    ContainerStarted,
    /// The machine ended, for whatever reason.
    Ended,
}

/// One line of the timeline.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// What happened.
    pub stage: Stage,
    /// When, in nanoseconds of CLOCK_MONOTONIC.
    pub monotonic_ns: u64,
    /// Exits of all vCPUs until then, by reason; empty if they were not counted.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub exits: BTreeMap<String, u64>,
}

/// The stages so far.
pub struct Timeline {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    entries: Vec<Entry>,
    output: Option<File>,
}

/// Nanoseconds of CLOCK_MONOTONIC.
pub fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    let (seconds, nanoseconds) = (time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs());
    seconds
        .saturating_mul(1_000_000_000)
        .saturating_add(nanoseconds)
}

impl Timeline {
    /// An empty timeline; `output` gets a line for each stage.
    pub fn new(output: Option<File>) -> Self {
        Self {
            state: Mutex::new(State {
                output,
                ..State::default()
            }),
        }
    }

    /// Records a stage that is reached now.
    pub fn record(&self, stage: Stage) {
        self.record_at(stage, now(), BTreeMap::new);
    }

    /// Records a stage that was reached at `monotonic_ns`, unless it was recorded before; `exits` is only
    /// asked if it was not.
    pub fn record_at(
        &self,
        stage: Stage,
        monotonic_ns: u64,
        exits: impl FnOnce() -> BTreeMap<String, u64>,
    ) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.entries.iter().any(|entry| entry.stage == stage) {
            return;
        }
        let entry = Entry {
            stage,
            monotonic_ns,
            exits: exits(),
        };
        if let Some(output) = &mut state.output
            && let Ok(mut line) = serde_json::to_vec(&entry)
        {
            line.push(b'\n');
            // Nobody reads any more: the machine goes on all the same.
            if output.write_all(&line).is_err() {
                state.output = None;
            }
        }
        state.entries.push(entry);
    }

    /// What was recorded, in the order of recording.
    pub fn entries(&self) -> Vec<Entry> {
        self.state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .entries
            .clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Seek};

    #[test]
    fn each_stage_is_written_once_as_a_line() {
        let mut file = tempfile::tempfile().unwrap();
        let timeline = Timeline::new(Some(file.try_clone().unwrap()));
        timeline.record(Stage::VmmStarted);
        timeline.record_at(Stage::AgentReady, 7, || {
            BTreeMap::from([("exits".into(), 3)])
        });
        timeline.record(Stage::AgentReady);
        file.rewind().unwrap();
        let lines: Vec<String> = BufReader::new(file).lines().map(Result::unwrap).collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(
            lines[1],
            r#"{"stage":"agent_ready","monotonic_ns":7,"exits":{"exits":3}}"#
        );
        let parsed: Vec<Entry> = lines
            .iter()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        assert_eq!(parsed, timeline.entries());
    }

    #[test]
    fn a_reader_that_went_away_is_forgotten() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        drop(reader);
        let timeline = Timeline::new(Some(writer.into()));
        timeline.record(Stage::VmmStarted);
        timeline.record(Stage::Ended);
        assert_eq!(timeline.entries().len(), 2);
    }
}
