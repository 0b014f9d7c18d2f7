//! What a run of the harness leaves: `report.json` with every sample, the tables in the terminal, and the comparison
//! of two reports. The page and its charts are `page`.
#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::fs;

use serde::Serialize;
use serde_json::Value;

use super::chart::number;
use super::density::Crowd;
use super::peers::Machine;
use super::plan::{Rounds, Row};
use super::stats::{Summary, Verdict, compare};

/// A figure that tables and charts show. Smaller is better for all of them.
#[derive(Debug, Clone, Copy)]
pub struct Figure {
    /// Its name in the report.
    pub key: &'static str,
    /// Its name for people.
    pub title: &'static str,
    /// Its unit; empty for counts.
    pub unit: &'static str,
}

const fn figure(key: &'static str, title: &'static str, unit: &'static str) -> Figure {
    Figure { key, title, unit }
}

/// The figures shown, in order: a table each.
pub const SHOWN: [&[Figure]; 4] = [
    &[
        figure("vmm_start_ms", "VMM start", "ms"),
        figure("boot_to_init_ms", "Boot to init", "ms"),
        figure("cold_start_ms", "Cold start", "ms"),
        figure("exits_total", "KVM exits to init", ""),
        figure("syscalls", "System calls to first KVM_RUN", ""),
    ],
    &[
        figure("overhead_pss_mib", "Overhead, PSS", "MiB"),
        figure("overhead_rss_mib", "Overhead, RSS", "MiB"),
        figure("guest_touched_mib", "Guest touched", "MiB"),
        figure("cgroup_mib", "cgroup memory.current", "MiB"),
        figure("container_kib", "A further container, RSS", "KiB"),
        figure("threads", "Threads", ""),
        figure("binary_mib", "Binary", "MiB"),
    ],
    &[
        figure("disk_read_ms", "Read 64 MiB of a disk", "ms"),
        figure("layer_write_ms", "Write 64 MiB to a layer", "ms"),
        figure("stdout_ms", "32 MiB of output", "ms"),
        figure("echo_ms_per_gib", "Stream there and back, per GiB", "ms"),
        figure("echo_growth_kib", "RSS grown by it", "KiB"),
        figure("echo_exits_per_mib", "KVM exits for it, per MiB", ""),
    ],
    &[
        figure("net_to_ms_per_gib", "Network, to guest, per GiB", "ms"),
        figure("net_to_cpu_ms_per_gib", "CPU to guest, per GiB", "ms"),
        figure("net_to_exits_per_mib", "Exits to guest, per MiB", ""),
        figure("net_from_ms_per_gib", "Network, from guest, per GiB", "ms"),
        figure("net_from_cpu_ms_per_gib", "CPU from guest, per GiB", "ms"),
        figure("net_from_exits_per_mib", "Exits from guest, per MiB", ""),
        figure("net_ping_ms", "Ping", "ms"),
    ],
];

/// What every output from the testbed says.
pub const EMULATED: &str =
    "Measured with emulated KVM (the testbed): times are ratios to cube-vmm, never absolute.";

/// One run of the harness.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Where it ran.
    pub host: Host,
    /// How often each contender ran.
    pub rounds: Rounds,
    /// What was booted.
    pub machines: Vec<Machine>,
    /// What came of it.
    pub rows: Vec<Row>,
    /// Many at once.
    pub crowds: Vec<Crowd>,
}

/// The machine that it ran on.
#[derive(Debug, Clone, Serialize)]
pub struct Host {
    /// Model name of the first processor.
    pub processor: String,
    /// Number of processors.
    pub processors: usize,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Kernel release.
    pub kernel: String,
    /// Whether KVM is emulated here: absolute times say nothing then, and only ratios are shown.
    pub emulated: bool,
    /// The version of Cube.
    pub cube: &'static str,
    /// The commit that it was built from, if whoever ran it said so.
    pub commit: Option<String>,
}

impl Host {
    /// This machine. `emulated`: whether it is the testbed.
    pub fn this(emulated: bool, commit: Option<String>) -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpuinfo
            .lines()
            .find_map(|line| line.strip_prefix("model name"));
        let processor = model
            .and_then(|line| line.split_once(':'))
            .map_or("unknown", |(_, m)| m.trim());
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let total = meminfo
            .lines()
            .find_map(|line| line.strip_prefix("MemTotal:"));
        let kib: u64 = total
            .and_then(|t| t.split_whitespace().next()?.parse().ok())
            .unwrap_or(0);
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Self {
            processor: processor.to_owned(),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            memory_mib: kib / 1024,
            kernel: kernel.trim().to_owned(),
            emulated,
            cube: env!("CARGO_PKG_VERSION"),
            commit,
        }
    }
}

impl Row {
    /// The summary of one figure.
    pub fn summary(&self, figure: &str) -> Option<Summary> {
        Summary::of(self.figures.get(figure)?)
    }
}

impl Report {
    /// The tables for a terminal: medians, and for times on an emulated host the ratios to `cube-vmm`.
    pub fn table(&self) -> String {
        let mut text = String::new();
        for figures in SHOWN {
            let figures: Vec<&Figure> = figures
                .iter()
                .filter(|figure| self.has(figure.key))
                .collect();
            let rows = || {
                self.rows
                    .iter()
                    .filter(|row| figures.iter().any(|f| row.figures.contains_key(f.key)))
            };
            if rows().next().is_none() {
                continue;
            }
            let title = |figure: &&Figure| match self.unit(figure) {
                "" => figure.title.to_owned(),
                unit => format!("{} ({unit})", figure.title),
            };
            let mut lines = vec![
                std::iter::once(String::new())
                    .chain(figures.iter().map(title))
                    .collect(),
            ];
            lines.extend(rows().map(|row| self.line(row, &figures)));
            text.push_str(&aligned(&lines));
            text.push('\n');
        }
        text.push_str(&self.crowd_table());
        for row in &self.rows {
            if let Some(failure) = &row.failure {
                let _ = writeln!(text, "{}: {failure}", row.name);
            }
        }
        if self.host.emulated {
            let _ = writeln!(text, "{EMULATED}");
        }
        text
    }

    fn crowd_table(&self) -> String {
        let time = if self.host.emulated {
            "x cube-vmm"
        } else {
            "ms"
        };
        let words = [
            "",
            "at once",
            "ready p50",
            "p95",
            "p99",
            "per second",
            "stop all",
        ];
        let mut lines = vec![
            words
                .map(|word| match word {
                    "ready p50" | "p95" | "p99" | "stop all" => format!("{word} ({time})"),
                    word => word.to_owned(),
                })
                .to_vec(),
        ];
        for (crowd, batch) in self
            .crowds
            .iter()
            .flat_map(|crowd| crowd.batches.iter().map(move |b| (crowd, b)))
        {
            let base = self
                .crowds
                .iter()
                .find(|c| c.name == "cube-vmm")
                .unwrap_or(crowd);
            let base = base
                .batches
                .iter()
                .find(|other| other.pods == batch.pods)
                .filter(|_| self.host.emulated);
            let ratio = |value: f64, of: &dyn Fn(&super::density::Batch) -> f64| {
                number(value / base.map_or(1.0, of))
            };
            lines.push(vec![
                crowd.name.clone(),
                batch.pods.to_string(),
                ratio(batch.ready(0.5), &|b| b.ready(0.5)),
                ratio(batch.ready(0.95), &|b| b.ready(0.95)),
                ratio(batch.ready(0.99), &|b| b.ready(0.99)),
                ratio(batch.per_second(), &super::density::Batch::per_second),
                ratio(batch.stop_ms, &|b| b.stop_ms),
            ]);
        }
        let mut text = if lines.len() > 1 {
            aligned(&lines) + "\n"
        } else {
            String::new()
        };
        for crowd in &self.crowds {
            if let (Some(mib), Some(last)) = (crowd.mib_per_pod(), crowd.resident.last()) {
                let (name, pods, of) = (&crowd.name, last.pods, crowd.memory_of);
                let _ = writeln!(
                    text,
                    "{name}: {pods} idle in {} MiB, {} MiB each (memory of the {of})",
                    number(last.mib),
                    number(mib)
                );
            }
            if let Some(failure) = &crowd.failure {
                let _ = writeln!(text, "{}, {failure}", crowd.name);
            }
        }
        text
    }

    /// Whether any row has that figure.
    pub(super) fn has(&self, key: &str) -> bool {
        self.rows.iter().any(|row| row.figures.contains_key(key))
    }

    /// The unit that a figure is shown in.
    pub(super) fn unit(&self, figure: &Figure) -> &'static str {
        if self.is_ratio(figure.key) {
            "x cube-vmm"
        } else {
            figure.unit
        }
    }

    /// Whether a figure may be shown only as a ratio.
    fn is_ratio(&self, key: &str) -> bool {
        self.host.emulated && key.split('_').any(|word| word == "ms")
    }

    /// What a figure's values are divided by before they are shown.
    pub(super) fn divisor(&self, key: &str) -> f64 {
        let base = || {
            let ours = self
                .rows
                .iter()
                .find(|row| row.name == "cube-vmm")
                .and_then(|row| row.summary(key));
            ours.or_else(|| self.rows.iter().find_map(|row| row.summary(key)))
        };
        if self.is_ratio(key) {
            base().map_or(1.0, |base| base.median)
        } else {
            1.0
        }
    }

    fn line(&self, row: &Row, figures: &[&Figure]) -> Vec<String> {
        let cell = |figure: &&Figure| {
            let value = row.summary(figure.key);
            value.map_or_else(
                || "–".to_owned(),
                |v| number(v.median / self.divisor(figure.key)),
            )
        };
        std::iter::once(row.name.clone())
            .chain(figures.iter().map(cell))
            .collect()
    }

    /// Compares each figure of each contender with those of an earlier `report.json`. The figures of one report are
    /// many, so chance must be excluded for each the more surely.
    pub fn compare(&self, old: &Value, threshold: f64) -> Vec<Change> {
        let mut changes = Vec::new();
        for row in &self.rows {
            for (figure, samples) in &row.figures {
                let Some(before) = old_samples(old, &row.name, figure) else {
                    continue;
                };
                let (Some(was), Some(is)) = (Summary::of(&before), Summary::of(samples)) else {
                    continue;
                };
                changes.push(Change {
                    vmm: row.name.clone(),
                    figure: figure.clone(),
                    before: was.median,
                    after: is.median,
                    verdict: compare(&before, samples, threshold),
                });
            }
        }
        changes
    }
}

/// One figure in two reports.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Change {
    /// Whose.
    pub vmm: String,
    /// Which.
    pub figure: String,
    /// Median in the earlier report.
    pub before: f64,
    /// Median now.
    pub after: f64,
    /// What to make of it.
    pub verdict: Verdict,
}

fn old_samples(old: &Value, name: &str, figure: &str) -> Option<Vec<f64>> {
    let rows = old.get("rows")?.as_array()?;
    let row = rows.iter().find(|row| row["name"] == name)?;
    row["figures"]
        .get(figure)?
        .as_array()?
        .iter()
        .map(Value::as_f64)
        .collect()
}

/// Columns as wide as their widest cell: the first to the left, the others to the right.
fn aligned(lines: &[Vec<String>]) -> String {
    let columns = lines.first().map_or(0, Vec::len);
    let width = |column: usize| {
        lines
            .iter()
            .filter_map(|line| line.get(column))
            .map(|cell| cell.chars().count())
            .max()
    };
    let widths: Vec<usize> = (0..columns)
        .map(|column| width(column).unwrap_or(0))
        .collect();
    let mut text = String::new();
    for line in lines {
        for (column, (cell, width)) in line.iter().zip(&widths).enumerate() {
            let width = *width;
            let _ = if column == 0 {
                write!(text, "{cell:<width$}")
            } else {
                write!(text, "  {cell:>width$}")
            };
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    text
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::bench::density::{Batch, Resident};
    use crate::bench::plan::Contender;

    fn row(name: &str, figures: &[(&str, &[f64])]) -> Row {
        let mut row = Row::new(name.to_owned(), Contender::Missing);
        row.figures = figures
            .iter()
            .map(|(key, samples)| ((*key).to_owned(), samples.to_vec()))
            .collect();
        row
    }

    /// Two VMMs, one missing, one crowd.
    pub(in crate::bench) fn report(emulated: bool) -> Report {
        let rounds = Rounds {
            warm_up: 1,
            counted: 3,
            deadline: std::time::Duration::ZERO,
        };
        let ours: &[(&str, &[f64])] = &[
            ("vmm_start_ms", &[4.0, 5.0, 6.0]),
            ("boot_to_init_ms", &[100.0]),
            ("overhead_pss_mib", &[2.5]),
            ("at_vmm_started_ms", &[1.0]),
            ("at_kernel_started_ms", &[5.0]),
            ("net_to_ms_per_gib", &[300.0]),
        ];
        let theirs: &[(&str, &[f64])] = &[
            ("vmm_start_ms", &[10.0]),
            ("boot_to_init_ms", &[250.0]),
            ("net_to_ms_per_gib", &[375.0]),
        ];
        let mut rows = vec![row("cube-vmm", ours), row("firecracker", theirs)];
        rows.push(Row::missing("crosvm"));
        let batch = Batch {
            pods: 2,
            ready_ms: vec![10.0, 30.0],
            all_ready_ms: 40.0,
            stop_ms: 1.5,
        };
        let resident = vec![
            Resident { pods: 1, mib: 20.0 },
            Resident { pods: 2, mib: 32.0 },
        ];
        let crowd = Crowd {
            name: "cube-vmm".to_owned(),
            batches: vec![batch],
            resident,
            memory_of: "cgroup",
            failure: None,
        };
        Report {
            host: Host::this(emulated, Some("abc".to_owned())),
            rounds,
            machines: Vec::new(),
            rows,
            crowds: vec![crowd],
        }
    }

    #[test]
    fn the_table_has_medians_and_a_line_for_who_is_missing() {
        let table = report(false).table();
        let line = |start: &str| {
            table
                .lines()
                .find(|line| line.starts_with(start))
                .expect("a line")
                .to_owned()
        };
        assert_eq!(
            line("cube-vmm ").split_whitespace().collect::<Vec<_>>(),
            ["cube-vmm", "5", "100"]
        );
        assert!(line("crosvm: ").contains("not found in PATH"), "{table}");
        assert!(table.contains("2 idle in 32 MiB, 12 MiB each"), "{table}");
        assert!(table.contains("50"), "pods per second: {table}");
    }

    #[test]
    fn from_the_testbed_times_are_ratios_and_bytes_are_bytes() {
        let table = report(true).table();
        let line = |start: &str| {
            table
                .lines()
                .find(|line| line.starts_with(start))
                .expect("a line")
                .to_owned()
        };
        assert_eq!(
            line("firecracker ").split_whitespace().collect::<Vec<_>>(),
            ["firecracker", "2", "2.50"]
        );
        assert!(
            table.contains("emulated KVM") && !table.contains("(ms)"),
            "{table}"
        );
        assert!(table.contains("2.50"), "{table}");
        // Of times per GiB too.
        assert!(table.contains("1.25"), "{table}");
    }

    #[test]
    fn a_report_compares_with_itself_as_noise() {
        let report = report(false);
        let old = serde_json::to_value(&report).expect("JSON");
        let changes = report.compare(&old, 0.05);
        assert_eq!(changes.len(), 9);
        assert!(
            changes
                .iter()
                .all(|change| change.verdict == Verdict::Noise),
            "{changes:?}"
        );
    }
}
