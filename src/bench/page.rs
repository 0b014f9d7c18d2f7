//! The report as a page with its charts.
#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::Path;

use super::chart::{self, Bar, Heading, Line, Stack, escape};
use super::plan::Row;
use super::report::{EMULATED, Figure, Report, SHOWN};

/// The stages of `cube-vmm` and of `cube run`, in order, with the name of what ends there.
const STAGES: [(&str, &str); 13] = [
    ("at_image_resolved_ms", "image"),
    ("at_machine_spawned_ms", "pod directory"),
    ("at_vmm_started_ms", "process start"),
    ("at_spec_read_ms", "spec"),
    ("at_vm_created_ms", "VM"),
    ("at_kernel_loaded_ms", "kernel load"),
    ("at_kernel_started_ms", "vCPU"),
    ("at_init_started_ms", "kernel"),
    ("at_agent_ready_ms", "init"),
    ("at_container_started_ms", "container"),
    ("vmm_start_ms", "VMM start"),
    ("boot_to_init_ms", "kernel"),
    ("cold_start_ms", "container"),
];

impl Report {
    /// Writes `report.json`, `report.html` and the charts (SVG) into `directory`.
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
        for (name, svg) in self.charts() {
            fs::write(directory.join(format!("{name}.svg")), &svg)?;
            let _ = writeln!(figures, "<figure>{svg}</figure>");
        }
        fs::write(directory.join("report.html"), self.page(&figures))
    }

    /// Every chart with its file's name.
    fn charts(&self) -> Vec<(String, String)> {
        let mut charts = Vec::new();
        for figure in SHOWN
            .into_iter()
            .flatten()
            .filter(|figure| self.has(figure.key))
        {
            charts.push((figure.key.to_owned(), self.bars(figure)));
        }
        let stacks: Vec<Stack> = self.rows.iter().filter_map(|row| self.stack(row)).collect();
        if !stacks.is_empty() {
            let unit = if self.host.emulated {
                "share of cube-vmm's"
            } else {
                "ms"
            };
            charts.push((
                "timeline".to_owned(),
                chart::stacks(self.heading("Where a start's time goes", unit), &stacks),
            ));
        }
        let lines: Vec<Line> = self
            .crowds
            .iter()
            .filter(|crowd| !crowd.resident.is_empty())
            .map(|crowd| Line {
                label: crowd.name.clone(),
                points: crowd
                    .resident
                    .iter()
                    .map(|at| (f64::from(at.pods), at.mib))
                    .collect(),
                ours: crowd.name == "cube-vmm",
            })
            .collect();
        if !lines.is_empty() {
            let heading = self.heading("Memory of idle pods, kernel memory included", "MiB");
            charts.push(("density".to_owned(), chart::curves(heading, &lines)));
        }
        charts
    }

    fn heading<'a>(&self, title: &'a str, unit: &'a str) -> Heading<'a> {
        Heading {
            title,
            unit,
            note: if self.host.emulated {
                EMULATED
            } else {
                "Smaller is better."
            },
        }
    }

    fn bars(&self, figure: &Figure) -> String {
        let divisor = self.divisor(figure.key);
        let bar = |row: &Row| {
            let summary = row.summary(figure.key)?;
            Some(Bar {
                label: row.name.clone(),
                value: summary.median / divisor,
                low: summary.p25 / divisor,
                high: summary.p75 / divisor,
                // The floor is nobody's.
                ours: row.name.starts_with("cube-vmm") || row.name == "cube run",
            })
        };
        let bars: Vec<Bar> = self.rows.iter().filter_map(bar).collect();
        chart::bars(self.heading(figure.title, self.unit(figure)), &bars)
    }

    /// The medians of a row's stages as distances from one to the next. A VMM that is seen from outside alone has two.
    fn stack(&self, row: &Row) -> Option<Stack> {
        let base = self.divisor("boot_to_init_ms");
        let inside = row.figures.contains_key("at_vmm_started_ms");
        let mut at: Vec<(f64, &str)> = STAGES
            .iter()
            .filter_map(|(key, name)| {
                if inside && *key == "vmm_start_ms" {
                    return None;
                }
                Some((row.summary(key)?.median, *name))
            })
            .collect();
        at.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut before = 0.0;
        let mut stages: Vec<(String, f64)> = Vec::new();
        for (end, name) in at {
            let length = (end - before) / base;
            before = end;
            match stages.iter_mut().find(|(known, _)| known == name) {
                Some((_, known)) => *known += length,
                None => stages.push((name.to_owned(), length)),
            }
        }
        (stages.len() > 1).then(|| Stack {
            label: row.name.clone(),
            stages,
        })
    }

    fn page(&self, figures: &str) -> String {
        let versions: String = self
            .rows
            .iter()
            .map(|row| {
                let said = row.failure.as_deref().unwrap_or(&row.version);
                format!("<li>{}</li>\n", escape(&format!("{}: {said}", row.name)))
            })
            .collect();
        let note = if self.host.emulated {
            format!("<p><strong>{EMULATED}</strong></p>")
        } else {
            String::new()
        };
        let host = &self.host;
        format!(
            "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<title>Cube: VMM against VMM</title>\n\
             <style>body{{font:16px system-ui,sans-serif;max-width:54rem;margin:2rem auto;padding:0 1rem}}\
             figure{{margin:1.5rem 0}}svg{{max-width:100%;height:auto}}pre{{overflow-x:auto}}</style>\n\
             <h1>VMM against VMM</h1>\n{note}\n{figures}\n<h2>All figures (medians)</h2>\n<pre>{table}</pre>\n\
             <h2>How it was measured</h2>\n<p>{rounds} counted runs of each in turn (A B C A B C …) after {warm} to warm \
             up, the same vCPUs and memory for all. Bars are medians; the line across a bar's end spans the middle half \
             of the samples. Smaller is better. Overhead is everything of the process that is not guest memory.</p>\n\
             <p>{processor}, {processors} processors, {memory} MiB, Linux {kernel}. Cube {cube}{commit}.</p>\n\
             <ul>\n{versions}</ul>\n</html>\n",
            table = escape(&self.table()),
            rounds = self.rounds.counted,
            warm = self.rounds.warm_up,
            processor = escape(&host.processor),
            processors = host.processors,
            memory = host.memory_mib,
            kernel = escape(&host.kernel),
            cube = host.cube,
            commit = host
                .commit
                .as_deref()
                .map(|id| escape(&format!(", commit {id}")))
                .unwrap_or_default(),
        )
    }
}

#[cfg(test)]
mod tests {
    use crate::bench::report::tests::report;

    #[test]
    fn the_report_is_written_with_a_chart_for_each_figure_the_timeline_and_the_curve() {
        let directory = tempfile::tempdir().expect("a directory");
        report(false)
            .write(directory.path())
            .expect("it is written");
        let mut names: Vec<String> = std::fs::read_dir(directory.path())
            .expect("a list")
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        let expected = [
            "boot_to_init_ms.svg",
            "density.svg",
            "net_to_ms_per_gib.svg",
            "overhead_pss_mib.svg",
            "report.html",
            "report.json",
            "timeline.svg",
            "vmm_start_ms.svg",
        ];
        assert_eq!(names, expected);
        let page = std::fs::read_to_string(directory.path().join("report.html")).expect("a page");
        assert_eq!(page.matches("<figure><svg").count(), 6);
        assert!(page.contains("commit abc") && page.contains("crosvm: not found"));
    }

    #[test]
    fn every_output_of_the_testbed_says_so() {
        let directory = tempfile::tempdir().expect("a directory");
        report(true).write(directory.path()).expect("it is written");
        for entry in std::fs::read_dir(directory.path())
            .expect("a list")
            .flatten()
        {
            let text = std::fs::read_to_string(entry.path()).expect("text");
            assert!(text.contains("emulated"), "{:?}", entry.file_name());
        }
    }

    #[test]
    fn a_row_seen_from_inside_has_its_own_stages_and_the_others_two() {
        let report = report(false);
        let names = |index: usize| report.stack(&report.rows[index]).expect("stages").stages;
        let ours = [("process start", 1.0), ("vCPU", 4.0), ("kernel", 95.0)];
        assert_eq!(
            names(0),
            ours.map(|(name, length)| (name.to_owned(), length))
        );
        assert_eq!(
            names(1),
            [("VMM start", 10.0), ("kernel", 240.0)]
                .map(|(name, length)| (name.to_owned(), length))
        );
        assert!(report.stack(&report.rows[2]).is_none());
    }
}
