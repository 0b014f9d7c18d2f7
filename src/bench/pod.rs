//! A pod measured as a user starts it: `cube run`.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde::Deserialize;

use super::cgroup::Group;
use super::measure::{self, RunError};
use super::plan::{Figures, look, record};

/// Writes the marker when it runs, then idles.
const IDLE: &str = "printf '\\007'; exec sleep 1000000";

/// Writes the marker and ends.
const ONCE: &str = "printf '\\007'";

/// Writes a file of 64 MiB to the writable layer, all the way, and then 32 MiB to standard output.
const WORK: &str = "printf '\\007'; dd if=/dev/zero of=/bench bs=1M count=64 conv=fsync 2> /dev/null; printf '\\007'; \
                    dd if=/dev/zero bs=1M count=32 2> /dev/null; printf '\\007'";

/// `cube run` with an image whose container has a shell.
#[derive(Debug, Clone)]
pub struct PodCommand {
    /// The program `cube`.
    pub cube: PathBuf,
    /// The image's name in the store.
    pub image: String,
    /// Memory of the pod's machine in MiB.
    pub memory_mib: u32,
    /// Whether to measure its disk and its streams too.
    pub throughput: bool,
}

/// One stage of `cube run --timeline=json`.
#[derive(Debug, Deserialize)]
struct Stage {
    stage: String,
    ms: f64,
    #[serde(default)]
    exits: BTreeMap<String, u64>,
}

#[derive(Debug, Deserialize)]
struct Timeline {
    timeline: Vec<Stage>,
}

impl PodCommand {
    /// The command that starts an idle container, which writes the marker.
    pub fn idle(&self) -> Command {
        self.command(&[], IDLE)
    }

    fn command(&self, options: &[&str], script: &str) -> Command {
        let mut command = Command::new(&self.cube);
        command.arg("run").args(options);
        command.args([
            "--memory",
            &format!("{}M", self.memory_mib),
            &self.image,
            "--",
            "sh",
            "-c",
            script,
        ]);
        command
    }

    /// One cold start to its end, and one idle pod to look at.
    pub(super) fn measure(
        &self,
        deadline: Duration,
        directory: &Path,
        taken: &mut Figures,
    ) -> Result<(), RunError> {
        for stage in self.start(&[], deadline, directory)? {
            match stage.stage.as_str() {
                "container started" => record(taken, "cold_start_ms", stage.ms),
                "agent ready" => exits(&stage, "hello", taken),
                _ => {}
            }
            record(
                taken,
                &format!("at_{}_ms", stage.stage.replace(' ', "_")),
                stage.ms,
            );
        }
        for stage in self.start(&["--console", "console"], deadline, directory)? {
            if stage.stage == "agent ready" {
                exits(&stage, "hello_console", taken);
            }
        }
        if self.throughput {
            let command = self.command(&[], WORK);
            let mut running = measure::start(command, directory, deadline, None)?;
            for name in ["layer_write_ms", "stdout_ms"] {
                let took = running.next(deadline)?.unwrap_or_default();
                record(taken, name, took.as_secs_f64() * 1e3);
            }
            running.finish(deadline)?;
        }
        let group = Group::create();
        let running = measure::start(self.idle(), directory, deadline, group.as_ref())?;
        let vmm = child_named("cube-vmm", running.pid())
            .ok_or_else(|| RunError::Odd("`cube run` has no child `cube-vmm`".to_owned()))?;
        look(vmm, self.memory_mib, group.as_ref(), taken).map_err(RunError::Look)
    }

    /// The stages of a pod whose container ends at once.
    fn start(
        &self,
        options: &[&str],
        deadline: Duration,
        directory: &Path,
    ) -> Result<Vec<Stage>, RunError> {
        let options = [&["--timeline=json"], options].concat();
        let command = self.command(&options, ONCE);
        let words = measure::start(command, directory, deadline, None)?.finish(deadline)?;
        let mut lines = words.lines();
        let timeline = lines.find_map(|line| serde_json::from_str::<Timeline>(line).ok());
        timeline
            .map(|timeline| timeline.timeline)
            .ok_or_else(|| RunError::Odd("`cube run` printed no timeline".to_owned()))
    }
}

fn exits(stage: &Stage, prefix: &str, taken: &mut Figures) {
    for (reason, count) in &stage.exits {
        record(taken, &format!("{prefix}_{reason}"), *count as f64);
    }
}

/// A child of `parent` that runs a program of that name, found in `/proc` (proc_pid_stat(5): the parent is the second
/// field after the name, which is in parentheses).
fn child_named(name: &str, parent: u32) -> Option<u32> {
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let mut ids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    ids.find(|id| {
        let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
        is_child(&stat, name, parent)
    })
}

fn is_child(stat: &str, name: &str, parent: u32) -> bool {
    let Some((head, tail)) = stat.rsplit_once(')') else {
        return false;
    };
    let comm = head.split_once('(').map(|(_, comm)| comm);
    comm == Some(name) && tail.split_whitespace().nth(1) == Some(parent.to_string().as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_is_known_by_its_name_and_its_parent() {
        let stat = "812 (cube-vmm) S 77 812 812 0 -1 4194304 1 0";
        assert!(is_child(stat, "cube-vmm", 77));
        assert!(!is_child(stat, "cube-vmm", 812));
        assert!(!is_child(stat, "cube", 77));
        assert!(is_child("9 (a) b) S 1 9", "a) b", 1));
        assert!(!is_child("", "cube-vmm", 1));
    }
}
