//! Where the time of a start goes: stages of `cube`, `cube-vmm` and the guest on one clock, the host's
//! CLOCK_MONOTONIC, counted from the beginning of `cube`'s main function.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt::Write;

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// Columns of the bars.
const BAR_WIDTH: u64 = 32;

/// A stage that was reached; also a line of `cube-vmm`'s timeline.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Stage {
    stage: String,
    monotonic_ns: u64,
    /// Exits of all vCPUs until then, by reason, where they were counted.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    exits: BTreeMap<String, u64>,
}

/// The stages so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Timeline {
    origin: u64,
    stages: Vec<Stage>,
}

/// How it is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum TimelineFormat {
    /// A table with bars.
    Table,
    /// One line of JSON.
    Json,
}

/// Nanoseconds of CLOCK_MONOTONIC.
pub(crate) fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    let (seconds, nanoseconds) = (time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs());
    seconds
        .saturating_mul(1_000_000_000)
        .saturating_add(nanoseconds)
}

impl Timeline {
    /// A timeline that begins at `origin`, in nanoseconds of CLOCK_MONOTONIC.
    pub(crate) fn new(origin: u64) -> Self {
        let mut timeline = Self {
            origin,
            stages: Vec::new(),
        };
        timeline.mark_at("cube started", origin);
        timeline
    }

    /// Notes a stage that is reached now.
    pub(crate) fn mark(&mut self, stage: &str) {
        self.mark_at(stage, now());
    }

    fn mark_at(&mut self, stage: &str, monotonic_ns: u64) {
        self.stages.push(Stage {
            stage: stage.to_owned(),
            monotonic_ns,
            exits: BTreeMap::new(),
        });
    }

    /// Adds the machine's stages: `cube-vmm`'s lines of JSON. What is not one is left out.
    pub(crate) fn add_machine(&mut self, lines: &str) {
        let stages = lines
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok());
        self.stages.extend(stages.map(|stage: Stage| Stage {
            stage: stage.stage.replace('_', " "),
            ..stage
        }));
        self.stages.sort_by_key(|stage| stage.monotonic_ns);
    }

    /// The stages for a person or a program, with a line end.
    pub(crate) fn render(&self, format: TimelineFormat) -> String {
        match format {
            TimelineFormat::Table => self.table(),
            TimelineFormat::Json => self.json(),
        }
    }

    fn since_origin(&self, stage: &Stage) -> u64 {
        stage.monotonic_ns.saturating_sub(self.origin)
    }

    fn table(&self) -> String {
        let mut text = String::from("    at ms   took ms  stage\n");
        let end = self.stages.last().map_or(0, |last| self.since_origin(last));
        let scale = |ns: u64| (ns.saturating_mul(BAR_WIDTH) / end.max(1)) as usize;
        let mut before = 0;
        for stage in &self.stages {
            let at = self.since_origin(stage);
            let bar = "█".repeat(scale(at) - scale(before));
            let exits = stage.exits.get("exits");
            let exits = exits.map_or(String::new(), |n| format!("  {n} exits"));
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "{:>9.1} {:>9.1}  {:<18} {}{bar}{exits}",
                millis(at),
                millis(at - before),
                stage.stage,
                " ".repeat(scale(before)),
            );
            before = at;
        }
        text
    }

    fn json(&self) -> String {
        #[derive(Serialize)]
        struct Line<'a> {
            stage: &'a str,
            ms: f64,
            #[serde(skip_serializing_if = "BTreeMap::is_empty")]
            exits: &'a BTreeMap<String, u64>,
        }
        let stages: Vec<Line<'_>> = self
            .stages
            .iter()
            .map(|stage| Line {
                stage: &stage.stage,
                ms: millis(self.since_origin(stage)),
                exits: &stage.exits,
            })
            .collect();
        format!("{}\n", serde_json::json!({ "timeline": stages }))
    }
}

fn millis(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timeline() -> Timeline {
        let mut timeline = Timeline::new(1_000_000);
        timeline.mark_at("container exited", 9_000_000);
        timeline.add_machine(
            "{\"stage\":\"vmm_started\",\"monotonic_ns\":2000000}\nnoise\n\
             {\"stage\":\"agent_ready\",\"monotonic_ns\":5000000,\"exits\":{\"exits\":42}}\n",
        );
        timeline
    }

    #[test]
    fn the_stages_of_all_are_in_order_on_one_clock() {
        let expected = "    at ms   took ms  stage
      0.0       0.0  cube started       \n      1.0       1.0  vmm started        ████
      4.0       3.0  agent ready            ████████████  42 exits
      8.0       4.0  container exited                   ████████████████
";
        assert_eq!(timeline().render(TimelineFormat::Table), expected);
    }

    #[test]
    fn the_json_has_the_same() {
        let text = timeline().render(TimelineFormat::Json);
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(text.lines().count(), 1);
        assert_eq!(json["timeline"][2]["stage"], "agent ready");
        assert_eq!(json["timeline"][2]["ms"], 4.0);
        assert_eq!(json["timeline"][2]["exits"]["exits"], 42);
    }
}
