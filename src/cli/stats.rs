//! `cube stats`: what pods and their containers use.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use cube_guest::stats::Usage;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;

use super::failure::Failure;
use super::images::{json, print, size};
use super::signals::{Arrived, Signals};
use crate::client::{ApiError, PodApi, base_directory, detached};
use crate::pod::api::body::Stats;

/// Between two looks.
const PERIOD: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};
/// To the upper left corner, and clear from there on (ECMA-48, CUP and ED).
const HOME: &str = "\x1b[H\x1b[J";

/// Show what pods and their containers use: every second on a terminal, once elsewhere.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cube stats
  cube stats --once web
  cube stats --json web | jq '.[0].stats.vmm.pss'

A pod's first row is all of it. CPU is in hundredths of one CPU since the look before; MEMORY is the working
set; LAYER is what the writable layer holds; VMM is what the pod's process costs beside the guest's memory.")]
pub(crate) struct StatsArgs {
    /// Look once.
    #[arg(long)]
    once: bool,

    /// Print once what the pods' APIs say, as JSON.
    #[arg(long, conflicts_with = "once")]
    json: bool,

    /// The pods; without any, all.
    #[arg(value_name = "POD")]
    pods: Vec<String>,
}

/// What a pod said.
#[derive(Debug, Serialize)]
struct Sample {
    pod: String,
    stats: Stats,
    #[serde(skip)]
    at: Option<Instant>,
}

/// CPU time in microseconds, and when it was read.
type Times = BTreeMap<(String, String), (u64, Instant)>;

/// Runs `cube stats`.
pub(crate) fn run(arguments: &StatsArgs) -> Result<ExitCode, Failure> {
    if arguments.json {
        return Ok(print(&json(&look(arguments)?)));
    }
    let mut before = Times::new();
    if arguments.once || !io::stdout().is_terminal() {
        return Ok(print(&table(&look(arguments)?, &mut before)));
    }
    let mut signals = Signals::catch().map_err(Failure::new)?;
    loop {
        let text = table(&look(arguments)?, &mut before);
        let mut output = io::stdout().lock();
        let shown = write!(output, "{HOME}{text}").and_then(|()| output.flush());
        shown.map_err(Failure::new)?;
        drop(output);
        let mut fds = [PollFd::from_borrowed_fd(signals.interest(), PollFlags::IN)];
        // A signal that interrupts it is seen next.
        let _ = poll(&mut fds, Some(&PERIOD));
        let ending = |arrived| matches!(arrived, Arrived::Forward(_));
        if signals.arrived().into_iter().any(ending) {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

fn look(arguments: &StatsArgs) -> Result<Vec<Sample>, Failure> {
    let base = base_directory().map_err(Failure::new)?;
    let named = !arguments.pods.is_empty();
    let pods = match named {
        true => {
            let pods = arguments.pods.iter();
            pods.map(|pod| PodApi::of(&base, pod)).collect()
        }
        false => detached::pods(&base).map_err(Failure::new)?,
    };
    let mut samples = Vec::new();
    for pod in pods {
        match pod.get("/v1/stats") {
            Ok(stats) => samples.push(Sample {
                pod: pod.id().to_owned(),
                stats,
                at: Some(Instant::now()),
            }),
            // It ended since the directory was listed, or its agent is not ready yet.
            Err(ApiError::NoPod(_) | ApiError::Io(_)) if !named => {}
            Err(ApiError::Refused { status: 503, .. }) if !named => {}
            Err(error) => return Err(Failure::new(error)),
        }
    }
    Ok(samples)
}

const HEADING: [&str; 12] = [
    "POD",
    "CONTAINER",
    "CPU",
    "TIME",
    "MEMORY",
    "RSS",
    "PIDS",
    "LAYER",
    "READ",
    "WRITTEN",
    "NETWORK",
    "VMM",
];

fn table(samples: &[Sample], before: &mut Times) -> String {
    let mut rows = vec![HEADING.map(str::to_owned)];
    let mut now = Times::new();
    for sample in samples {
        let guest = &sample.stats.guest;
        let mut row = |container: &str, usage: &Usage| {
            let key = (sample.pod.clone(), container.to_owned());
            let at = sample.at.unwrap_or_else(Instant::now);
            let cpu = before.get(&key).and_then(|last| share(*last, usage, at));
            now.insert(key, (usage.cpu_us, at));
            of_usage(&sample.pod, container, usage, cpu)
        };
        let mut whole = row("-", &guest.usage);
        let sum = |of: fn(&cube_guest::stats::InterfaceStats) -> u64| {
            size(guest.interfaces.iter().map(of).sum())
        };
        if !guest.interfaces.is_empty() {
            let (received, sent) = (sum(|i| i.received_bytes), sum(|i| i.sent_bytes));
            whole[10] = format!("{received} / {sent}");
        }
        whole[11] = sample.stats.vmm.map_or("-".to_owned(), |vmm| size(vmm.pss));
        rows.push(whole);
        for container in &guest.containers {
            let mut of_it = row(&container.id, &container.usage);
            let used = container.writable.as_ref().map(|fs| size(fs.used_bytes));
            of_it[7] = used.unwrap_or_else(|| "-".to_owned());
            rows.push(of_it);
        }
    }
    *before = now;
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: Vec<usize> = (0..HEADING.len()).map(|c| width(c).unwrap_or(0)).collect();
    let line = |row: &[String; 12]| {
        let cells = row.iter().zip(&widths);
        let cells: Vec<String> = cells
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

fn of_usage(pod: &str, container: &str, usage: &Usage, cpu: Option<f64>) -> [String; 12] {
    let none = || "-".to_owned();
    [
        pod.to_owned(),
        container.to_owned(),
        cpu.map_or_else(none, |cpu| format!("{cpu:.1}%")),
        format!("{:.2}s", usage.cpu_us as f64 / 1e6),
        size(usage.working_set),
        size(usage.rss),
        usage.pids.to_string(),
        none(),
        size(usage.read_bytes),
        size(usage.written_bytes),
        none(),
        none(),
    ]
}

/// Hundredths of one CPU since `last`; none: it is another container of that name, or no time has passed.
fn share(last: (u64, Instant), usage: &Usage, at: Instant) -> Option<f64> {
    let used = usage.cpu_us.checked_sub(last.0)? as f64;
    let passed = at.checked_duration_since(last.1)?.as_micros() as f64;
    (passed > 0.0).then(|| 100.0 * used / passed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::api::body::VmmMemory;
    use cube_guest::stats::{ContainerStats, FileSystemStats, InterfaceStats, PodStats};
    use std::time::Duration;

    fn sample(at: Instant, cpu_us: u64) -> Sample {
        let usage = Usage {
            cpu_us,
            working_set: 3 << 20,
            pids: 2,
            ..Usage::default()
        };
        let container = ContainerStats {
            id: "main".to_owned(),
            usage: usage.clone(),
            writable: Some(FileSystemStats {
                used_bytes: 5 << 20,
                ..FileSystemStats::default()
            }),
        };
        Sample {
            pod: "web".to_owned(),
            at: Some(at),
            stats: Stats {
                guest: PodStats {
                    usage,
                    interfaces: vec![InterfaceStats {
                        received_bytes: 1024,
                        sent_bytes: 2048,
                        ..InterfaceStats::default()
                    }],
                    containers: vec![container],
                    ..PodStats::default()
                },
                vmm: Some(VmmMemory {
                    pss: 2 << 20,
                    ..VmmMemory::default()
                }),
            },
        }
    }

    #[test]
    fn the_second_look_knows_the_share_of_a_cpu() {
        let (mut before, start) = (Times::new(), Instant::now());
        let first = table(&[sample(start, 1_000_000)], &mut before);
        assert!(!first.contains('%') && first.contains("1.00s"), "{first}");
        let later = start + Duration::from_secs(2);
        let second = table(&[sample(later, 1_500_000)], &mut before);
        let lines: Vec<&str> = second.lines().collect();
        assert!(lines[1].contains("25.0%") && lines[1].contains("1.0 KiB / 2.0 KiB"));
        assert!(lines[1].ends_with("2.0 MiB"), "{second}");
        assert!(lines[2].contains("main") && lines[2].contains("5.0 MiB"));
        // Another container of the name, whose time is less.
        let third = table(&[sample(later, 10)], &mut before);
        assert!(!third.contains('%'), "{third}");
    }
}
