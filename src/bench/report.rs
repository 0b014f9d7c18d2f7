//! What a run of the harness leaves: `report.json` with every sample, `report.html` with the charts, a
//! table in the terminal; and the comparison of two reports.
#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use super::chart;
use super::plan::{Machines, Rounds, Row};
use super::stats::{Summary, Verdict, compare};

/// A figure that tables and charts show.
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

/// The figures shown, in order.
pub const SHOWN: &[Figure] = &[
    figure("vmm_start_ms", "VMM start", "ms"),
    figure("boot_to_init_ms", "Boot to init", "ms"),
    figure("overhead_pss_mib", "VMM overhead (PSS)", "MiB"),
    figure("guest_touched_mib", "Guest memory touched", "MiB"),
    figure("exits_total", "KVM exits to init", ""),
    figure("threads", "Threads", ""),
];

/// One run of the harness.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Where it ran.
    pub host: Host,
    /// How often each VMM ran.
    pub rounds: Rounds,
    /// What was booted.
    pub machines: Machines,
    /// What came of it.
    pub rows: Vec<Row>,
}

/// The machine that it ran on.
#[derive(Debug, Clone, Serialize)]
pub struct Host {
    /// Model name of the first processor.
    pub processor: String,
    /// Number of processors.
    pub processors: usize,
    /// Kernel release.
    pub kernel: String,
    /// Whether KVM is emulated here: absolute times say nothing then, and only ratios are shown.
    pub emulated: bool,
    /// The version of Cube.
    pub cube: &'static str,
}

impl Host {
    /// This machine. `emulated`: whether it is the testbed.
    pub fn this(emulated: bool) -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpuinfo
            .lines()
            .find_map(|line| line.strip_prefix("model name"));
        let processor = model
            .and_then(|line| line.split_once(':'))
            .map_or("unknown", |(_, m)| m.trim());
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Self {
            processor: processor.to_owned(),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: kernel.trim().to_owned(),
            emulated,
            cube: env!("CARGO_PKG_VERSION"),
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
    /// The table for a terminal: medians, and for times on an emulated host the ratio to the first row.
    pub fn table(&self) -> String {
        let mut lines = vec![self.header()];
        lines.extend(self.rows.iter().map(|row| self.line(row)));
        let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max();
        let widths: Vec<usize> = (0..lines[0].len()).map(|c| width(c).unwrap_or(0)).collect();
        let mut text = String::new();
        for line in &lines {
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
        for row in &self.rows {
            if let Some(failure) = &row.failure {
                let _ = writeln!(text, "{}: {failure}", row.peer.name);
            }
        }
        if self.host.emulated {
            text.push_str("KVM is emulated here: times are shown as ratios to the first row.\n");
        }
        text
    }

    fn shown(&self) -> impl Iterator<Item = &'static Figure> {
        SHOWN.iter().filter(|figure| {
            self.rows
                .iter()
                .any(|row| row.figures.contains_key(figure.key))
        })
    }

    fn header(&self) -> Vec<String> {
        let title = |figure: &Figure| match self.unit(figure) {
            "" => figure.title.to_owned(),
            unit => format!("{} ({unit})", figure.title),
        };
        std::iter::once("VMM".to_owned())
            .chain(self.shown().map(title))
            .collect()
    }

    fn unit(&self, figure: &Figure) -> &'static str {
        if self.is_ratio(figure.key) {
            "ratio"
        } else {
            figure.unit
        }
    }

    /// Whether a figure may be shown only as a ratio to the first row.
    fn is_ratio(&self, key: &str) -> bool {
        self.host.emulated && key.ends_with("_ms")
    }

    /// What a figure's values are divided by before they are shown.
    fn divisor(&self, key: &str) -> f64 {
        let base = || self.rows.iter().find_map(|row| row.summary(key));
        if self.is_ratio(key) {
            base().map_or(1.0, |base| base.median)
        } else {
            1.0
        }
    }

    fn line(&self, row: &Row) -> Vec<String> {
        let cell = |figure: &Figure| {
            let value = row.summary(figure.key);
            value.map_or_else(
                || "–".to_owned(),
                |v| number(v.median / self.divisor(figure.key)),
            )
        };
        std::iter::once(row.peer.name.clone())
            .chain(self.shown().map(cell))
            .collect()
    }

    /// Writes `report.json`, `report.html` and a chart per figure (SVG) into `directory`.
    ///
    /// # Errors
    /// A file could not be written.
    pub fn write(&self, directory: &Path) -> io::Result<()> {
        fs::create_dir_all(directory)?;
        fs::write(
            directory.join("report.json"),
            serde_json::to_vec_pretty(self)?,
        )?;
        let mut figures = String::new();
        for figure in self.shown() {
            let svg = self.chart(figure);
            fs::write(directory.join(format!("{}.svg", figure.key)), &svg)?;
            let _ = writeln!(figures, "<figure>{svg}</figure>");
        }
        fs::write(directory.join("report.html"), self.page(&figures))
    }

    fn chart(&self, figure: &Figure) -> String {
        let divisor = self.divisor(figure.key);
        let bar = |row: &Row| {
            let summary = row.summary(figure.key)?;
            Some(chart::Bar {
                label: row.peer.name.clone(),
                value: summary.median / divisor,
                low: summary.p25 / divisor,
                high: summary.p75 / divisor,
                ours: row.peer.name == "cube-vmm",
            })
        };
        let bars: Vec<chart::Bar> = self.rows.iter().filter_map(bar).collect();
        let unit = match self.unit(figure) {
            "ratio" => "times the first row",
            unit => unit,
        };
        chart::bars(figure.title, unit, &bars)
    }

    fn page(&self, figures: &str) -> String {
        let versions: String = self
            .rows
            .iter()
            .map(|row| {
                let text = format!("{}: {}", row.peer.name, row.peer.version);
                format!("<li>{}</li>\n", chart::escape(&text))
            })
            .collect();
        let note = if self.host.emulated {
            "<p>KVM was emulated: times are ratios to the first row.</p>"
        } else {
            ""
        };
        format!(
            "<!doctype html>\n<meta charset=\"utf-8\">\n<title>Cube: VMM against VMM</title>\n\
             <style>body{{font:16px system-ui,sans-serif;max-width:50rem;margin:2rem auto;padding:0 1rem}}\
             figure{{margin:1.5rem 0}}pre{{overflow-x:auto}}</style>\n\
             <h1>VMM against VMM</h1>\n{note}\n{figures}\n<h2>All figures (medians)</h2>\n<pre>{table}</pre>\n\
             <h2>How it was measured</h2>\n<p>{rounds} counted runs of each VMM in turn after {warm} to warm up, \
             the same kernel, initramfs, vCPUs and memory for all. Bars are medians; the line across a bar's \
             end spans the middle half of the samples. Smaller is better.</p>\n\
             <p>{processor}, {processors} processors, Linux {kernel}.</p>\n<ul>\n{versions}</ul>\n",
            table = chart::escape(&self.table()),
            rounds = self.rounds.counted,
            warm = self.rounds.warm_up,
            processor = chart::escape(&self.host.processor),
            processors = self.host.processors,
            kernel = chart::escape(&self.host.kernel),
        )
    }

    /// Compares each figure of each VMM with those of an earlier `report.json`.
    pub fn compare(&self, old: &Value, threshold: f64) -> Vec<Change> {
        let mut changes = Vec::new();
        for row in &self.rows {
            for (figure, samples) in &row.figures {
                let Some(before) = old_samples(old, &row.peer.name, figure) else {
                    continue;
                };
                let (Some(was), Some(is)) = (Summary::of(&before), Summary::of(samples)) else {
                    continue;
                };
                changes.push(Change {
                    vmm: row.peer.name.clone(),
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

fn old_samples(old: &Value, vmm: &str, figure: &str) -> Option<Vec<f64>> {
    let rows = old.get("rows")?.as_array()?;
    let row = rows.iter().find(|row| row["peer"]["name"] == vmm)?;
    row["figures"]
        .get(figure)?
        .as_array()?
        .iter()
        .map(Value::as_f64)
        .collect()
}

/// Three significant digits, no exponent.
fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 || v == v.trunc() => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}
