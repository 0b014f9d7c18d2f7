//! `cargo xtask doctor`: what this machine can do, what is missing, and what to do about it.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::OnceLock;

use clap::Args;
use serde::Serialize;

use crate::cache::Cache;
use crate::error::Result;
use crate::probe::{Verdict, try_kvm};
use crate::{apt, kernel, run};

/// Free space that a first run of everything takes, roughly.
const WANTED_BYTES: u64 = 12 << 30;

/// Options of `cargo xtask doctor`.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit status: 0 guests can run here (directly or in the testbed), 1 they cannot.

Examples:
  cargo xtask doctor
  cargo xtask doctor --json | jq .guests"
)]
pub(crate) struct Options {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Where guests run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Guests {
    /// On this machine's KVM.
    Direct,
    /// In the testbed.
    Testbed,
    /// Nowhere yet.
    Nowhere,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    ok: bool,
    detail: String,
    /// What to do; absent: nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

#[derive(Debug, Serialize)]
struct Report {
    guests: Guests,
    checks: Vec<Check>,
}

/// Whether Linux guests run on this machine's KVM; tried once.
pub(crate) fn kvm_runs_linux() -> bool {
    static VERDICT: OnceLock<bool> = OnceLock::new();
    *VERDICT.get_or_init(|| try_kvm() == Verdict::RunsLinux)
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let report = examine()?;
    if options.json {
        println!("{}", serde_json::json!(report));
    } else {
        print!("{}", table(&report));
    }
    Ok(if report.guests == Guests::Nowhere {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn examine() -> Result<Report> {
    let verdict = try_kvm();
    let testbed = packages("testbed packages", apt::TESTBED)?;
    let guests = match (&verdict, testbed.ok) {
        (Verdict::RunsLinux, _) => Guests::Direct,
        (_, true) => Guests::Testbed,
        (_, false) => Guests::Nowhere,
    };
    let mut checks = vec![kvm(verdict)];
    if guests != Guests::Direct {
        checks.push(testbed);
    }
    checks.extend([
        packages("build packages", apt::BUILD)?,
        packages("kernel packages", apt::KERNEL)?,
        packages("image packages", apt::IMAGES)?,
        static_libc(),
        space()?,
        nextest(),
    ]);
    Ok(Report { guests, checks })
}

fn kvm(verdict: Verdict) -> Check {
    let name = "/dev/kvm";
    match verdict {
        Verdict::RunsLinux => Check {
            name,
            ok: true,
            detail: "runs Linux guests (tried an exception in 64-bit mode)".into(),
            remedy: None,
        },
        Verdict::TooWeak(why) => Check {
            name,
            ok: false,
            detail: why,
            remedy: Some("nothing to do: `demo` and `test` run guests in the testbed".into()),
        },
        Verdict::Unusable(why) => Check {
            name,
            ok: false,
            detail: why,
            remedy: Some("or use the testbed, which needs no /dev/kvm".into()),
        },
    }
}

fn packages(name: &'static str, list: &[&str]) -> Result<Check> {
    let missing = apt::missing(&[list])?;
    let ok = missing.is_empty();
    Ok(Check {
        name,
        ok,
        detail: if ok {
            "installed".into()
        } else {
            format!("missing: {}", missing.join(" "))
        },
        remedy: (!ok).then(|| "run `cargo xtask setup` as root".into()),
    })
}

fn static_libc() -> Check {
    let mut cc = Command::new("cc");
    let found = run::captured(cc.arg("-print-file-name=libc.a")).unwrap_or_default();
    // Where it finds none, the compiler prints the bare name.
    let path = Path::new(found.trim())
        .canonicalize()
        .unwrap_or_else(|_| PathBuf::from("libc.a"));
    let ok = path.is_absolute() && path.is_file();
    Check {
        name: "static C library",
        ok,
        detail: if ok {
            path.display().to_string()
        } else {
            "the C compiler finds no libc.a".into()
        },
        remedy: (!ok).then(|| "cube-init is linked with it: install libc6-dev".into()),
    }
}

fn space() -> Result<Check> {
    let cache = Cache::of_user()?;
    // The directory may not exist yet: its nearest ancestor that does is on the same file system.
    let existing = cache
        .root()
        .ancestors()
        .find(|path| path.exists())
        .unwrap_or(Path::new("/"));
    let free = kernel::free_bytes(existing)?;
    let ok = free >= WANTED_BYTES;
    Ok(Check {
        name: "disk space",
        ok,
        detail: format!("{} GiB free in {}", free >> 30, existing.display()),
        remedy: (!ok).then(|| {
            format!(
                "free {} GiB, or set XDG_CACHE_HOME to a larger disk",
                WANTED_BYTES >> 30
            )
        }),
    })
}

fn nextest() -> Check {
    let found = run::captured(Command::new("cargo").args(["nextest", "--version"])).ok();
    let version = found
        .as_deref()
        .and_then(|text| text.lines().next())
        .map(str::to_owned);
    Check {
        name: "cargo-nextest",
        ok: version.is_some(),
        detail: version.unwrap_or_else(|| "not installed; `cargo test` does instead".into()),
        remedy: None,
    }
}

fn table(report: &Report) -> String {
    let guests = match report.guests {
        Guests::Direct => "guests run directly on this machine's KVM",
        Guests::Testbed => "guests run in the testbed (QEMU with emulated SVM), by themselves",
        Guests::Nowhere => "guests cannot run here yet",
    };
    let mut text = format!("{guests}\n\n");
    for check in &report.checks {
        let mark = if check.ok { "ok" } else { "--" };
        text += &format!("{mark}  {:<17} {}\n", check.name, check.detail);
        if let Some(remedy) = &check.remedy {
            text += &format!("{:22}→ {remedy}\n", "");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_says_what_is_wrong_and_what_to_do() {
        let report = Report {
            guests: Guests::Testbed,
            checks: vec![
                kvm(Verdict::TooWeak("no iretq".into())),
                Check {
                    name: "disk space",
                    ok: true,
                    detail: "9 GiB".into(),
                    remedy: None,
                },
            ],
        };
        let text = table(&report);
        assert!(
            text.contains("--  /dev/kvm") && text.contains("no iretq"),
            "{text}"
        );
        assert!(
            text.contains("→ nothing to do") && text.contains("ok  disk space"),
            "{text}"
        );
        let json = serde_json::json!(report);
        assert_eq!(json["guests"], "testbed");
        assert_eq!(json["checks"][1].get("remedy"), None);
    }
}
