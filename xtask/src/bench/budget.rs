//! `resources/budget.toml` held against the reports of `cube bench`.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::error::{Doing, Error, Result};

/// Two reports: of this machine, and of the place where guests boot (the same, or the testbed).
#[derive(Debug)]
pub(crate) struct Measured {
    native: Value,
    guests: Value,
}

/// Where a promised number is found.
#[derive(Debug, Clone, Copy)]
enum Source {
    /// A figure of a row of the native report.
    Native(&'static str, &'static str),
    /// A figure of a row of the guests' report.
    Guests(&'static str, &'static str),
    /// The same figure of two rows, divided.
    Ratio(bool, &'static str, [&'static str; 2]),
    /// Two figures of one row of the guests' report, divided.
    Within(&'static str, [&'static str; 2]),
}

use Source::{Guests, Native, Ratio, Within};

/// Which promises are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    /// Every one.
    All,
    /// Those that hold on any machine, with any build.
    Anywhere,
}

/// The rows of both monitors, each without anything above it.
const MONITORS: [&str; 2] = ["cube-vmm", "firecracker"];
const OTHER: &str = "firecracker, other kernel";
/// The pod process with its API, without the command that started it.
const POD: &str = "cube pod run";

/// One promised number.
struct Promise {
    /// `section.key` in the file.
    name: &'static str,
    source: Source,
    scope: Scope,
}

/// One that needs a quiet machine, a peer or a release build.
const fn here(name: &'static str, source: Source) -> Promise {
    let scope = Scope::All;
    Promise {
        name,
        source,
        scope,
    }
}

/// One that holds wherever Cube runs.
const fn anywhere(name: &'static str, source: Source) -> Promise {
    let scope = Scope::Anywhere;
    Promise {
        name,
        source,
        scope,
    }
}

/// Every promise. A key that is in the file and not here is an error.
const PROMISES: &[Promise] = &[
    here("vmm_start.milliseconds", Native("cube-vmm", "vmm_start_ms")),
    here(
        "vmm_start.ratio_to_floor",
        Ratio(true, "vmm_start_ms", ["cube-vmm", "cube-bench-floor"]),
    ),
    here(
        "vmm_start.ratio_to_firecracker",
        Ratio(true, "vmm_start_ms", MONITORS),
    ),
    anywhere("vmm_start.system_calls", Native("cube-vmm", "syscalls")),
    here(
        "boot_to_init.ratio_to_firecracker",
        Ratio(false, "boot_to_init_ms", MONITORS),
    ),
    here(
        "boot_to_init.ratio_to_firecracker_ci_guest",
        Ratio(false, "boot_to_init_ms", ["cube-vmm", OTHER]),
    ),
    here("overhead.pss_mib", Guests(POD, "overhead_pss_mib")),
    here(
        "overhead.ratio_to_firecracker",
        Ratio(false, "overhead_pss_mib", [POD, "firecracker"]),
    ),
    anywhere("overhead.threads", Guests(POD, "threads")),
    here("overhead.binary_mib", Native("cube-vmm", "binary_mib")),
    anywhere("guest.touched_mib", Guests(POD, "guest_touched_mib")),
    anywhere("guest.exits_until_hello", Guests("cube run", "hello_exits")),
    anywhere(
        "guest.exits_console_off_to_on",
        Within("cube run", ["hello_exits", "hello_console_exits"]),
    ),
    anywhere("pod.idle_mib", Guests(POD, "cgroup_mib")),
    anywhere("pod.container_kib", Guests(POD, "container_kib")),
    here(
        "streams.ratio_to_firecracker",
        Ratio(false, "echo_ms_per_gib", [POD, "firecracker"]),
    ),
    here("streams.growth_kib", Guests(POD, "echo_growth_kib")),
    here(
        "network.time_to_guest",
        Ratio(false, "net_to_ms_per_gib", MONITORS),
    ),
    here(
        "network.time_from_guest",
        Ratio(false, "net_from_ms_per_gib", MONITORS),
    ),
    here(
        "network.cpu_to_guest",
        Ratio(false, "net_to_cpu_ms_per_gib", MONITORS),
    ),
    here(
        "network.cpu_from_guest",
        Ratio(false, "net_from_cpu_ms_per_gib", MONITORS),
    ),
    anywhere("reached.overhead_pss_mib", Guests(POD, "overhead_pss_mib")),
];

impl Measured {
    /// Reads both reports.
    pub(crate) fn read(native: &Path, guests: &Path) -> Result<Self> {
        let read = |directory: &Path| {
            let path = directory.join("report.json");
            let text = fs::read(&path).doing("read", &path)?;
            serde_json::from_slice(&text)
                .map_err(|error| Error::Said(format!("{}: {error}", path.display())))
        };
        Ok(Self {
            native: read(native)?,
            guests: read(guests)?,
        })
    }

    fn value(&self, source: Source) -> Option<f64> {
        match source {
            Native(row, figure) => median(&self.native, row, figure),
            Guests(row, figure) => median(&self.guests, row, figure),
            Ratio(native, figure, [ours, theirs]) => {
                let report = if native { &self.native } else { &self.guests };
                Some(median(report, ours, figure)? / median(report, theirs, figure)?)
            }
            Within(row, [above, below]) => {
                Some(median(&self.guests, row, above)? / median(&self.guests, row, below)?)
            }
        }
    }
}

fn median(report: &Value, row: &str, figure: &str) -> Option<f64> {
    let rows = report["rows"].as_array()?;
    let samples =
        rows.iter().find(|candidate| candidate["name"] == row)?["figures"][figure].as_array()?;
    let mut samples: Vec<f64> = samples.iter().filter_map(Value::as_f64).collect();
    samples.sort_by(f64::total_cmp);
    let middle = samples.len().checked_sub(1)?;
    Some(f64::midpoint(
        samples[middle / 2],
        samples[middle.div_ceil(2)],
    ))
}

/// Promise, measured, margin, a line each; and whether all are kept that could be measured.
pub(crate) fn hold(promises: &str, measured: &Measured, scope: Scope) -> Result<(String, bool)> {
    type Sections = BTreeMap<String, BTreeMap<String, f64>>;
    let sections: Sections = toml::from_str(promises)
        .map_err(|error| Error::Said(format!("resources/budget.toml: {error}")))?;
    let mut text = format!(
        "{:<46} {:>10} {:>10} {:>8}\n",
        "promise (at most)", "promised", "measured", "margin"
    );
    let mut kept = true;
    for (section, keys) in &sections {
        for (key, limit) in keys {
            let name = format!("{section}.{key}");
            let Some(promise) = PROMISES.iter().find(|promise| promise.name == name) else {
                return Err(Error::Said(format!(
                    "resources/budget.toml promises {name}, which nothing measures"
                )));
            };
            if scope == Scope::Anywhere && promise.scope != scope {
                continue;
            }
            // Writing to a string cannot fail.
            let _ = match measured.value(promise.source) {
                Some(value) => {
                    kept &= value <= *limit;
                    let margin = (limit - value) / limit * 100.0;
                    let broken = if value <= *limit { "" } else { "  BROKEN" };
                    writeln!(
                        text,
                        "{name:<46} {limit:>10.2} {value:>10.2} {margin:>6.0} %{broken}"
                    )
                }
                None => {
                    // A peer may be missing here. What holds anywhere can be measured anywhere.
                    kept &= scope == Scope::All;
                    writeln!(text, "{name:<46} {limit:>10.2} {:>10}", "not here")
                }
            };
        }
    }
    Ok((text, kept))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::Scope::{All, Anywhere};
    use super::*;

    fn measured() -> Measured {
        let row = |name: &str, figures: Value| json!({"name": name, "figures": figures});
        Measured {
            native: json!({"rows": [
                row("cube-bench-floor", json!({"vmm_start_ms": [4.0]})),
                row("cube-vmm", json!({"vmm_start_ms": [4.0, 5.0, 9.0, 5.0], "syscalls": [100.0]})),
            ]}),
            guests: json!({"rows": [row("cube run", json!({"hello_exits": [10.0], "hello_console_exits": [40.0]}))]}),
        }
    }

    #[test]
    fn a_kept_promise_has_a_margin_and_a_broken_one_says_so() {
        let (text, kept) = hold(
            "[vmm_start]\nratio_to_floor = 1.25\nsystem_calls = 200\n",
            &measured(),
            All,
        )
        .unwrap();
        assert!(
            kept && text.contains("1.25       1.25      0 %") && text.contains("50 %"),
            "{text}"
        );
        let (text, kept) = hold("[vmm_start]\nratio_to_floor = 1.2\n", &measured(), All).unwrap();
        assert!(!kept && text.contains("BROKEN"), "{text}");
        let (text, kept) =
            hold("[guest]\nexits_console_off_to_on = 0.5\n", &measured(), All).unwrap();
        assert!(kept && text.contains("0.25"), "{text}");
    }

    #[test]
    fn what_is_not_measured_here_is_said_and_an_unknown_promise_is_an_error() {
        let (text, kept) = hold("[overhead]\npss_mib = 4\n", &measured(), All).unwrap();
        assert!(kept && text.contains("not here"), "{text}");
        assert!(
            hold("[overhead]\nnonsense = 4\n", &measured(), All)
                .unwrap_err()
                .to_string()
                .contains("overhead.nonsense")
        );
    }

    #[test]
    fn what_depends_on_the_machine_is_held_only_when_all_is() {
        let promises = "[vmm_start]\nratio_to_floor = 0.1\nsystem_calls = 200\n";
        let (text, kept) = hold(promises, &measured(), Anywhere).unwrap();
        assert!(
            kept && text.contains("system_calls") && !text.contains("floor"),
            "{text}"
        );
        assert!(!hold(promises, &measured(), All).unwrap().1);
        for broken in ["[vmm_start]\nsystem_calls = 99\n", "[pod]\nidle_mib = 25\n"] {
            assert!(!hold(broken, &measured(), Anywhere).unwrap().1, "{broken}");
        }
    }

    #[test]
    fn every_number_of_the_file_is_measured_by_something() {
        let file =
            fs::read_to_string(crate::binaries::root().join("resources/budget.toml")).unwrap();
        hold(&file, &measured(), All).unwrap();
    }
}
