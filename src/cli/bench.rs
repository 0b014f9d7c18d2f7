//! `cube bench`: start-up time and memory footprint, VMM against VMM.
#![forbid(unsafe_code)]

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::failure::{FAILURE, Failure};
use crate::bench::payload::tiny_kernel;
use crate::bench::peers::{Init, Kind, Machine, Peer, find};
use crate::bench::plan::{Machines, Rounds, Row, run};
use crate::bench::report::{Change, Host, Report};
use crate::bench::stats::Verdict;
use crate::vmm::boot::{cmdline, initramfs};

/// Measure start-up time and memory footprint, VMM against VMM.
///
/// Every VMM found in PATH or named with --vmm boots the same kernel and initramfs with the same vCPUs
/// and memory, in turn. Without --kernel only the VMMs themselves are measured, with a tiny kernel.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cube bench
  cube bench --kernel vmlinux --init bench-init --output report
  cube bench --vmm firecracker=/opt/firecracker/firecracker --rounds 30
  cube bench --compare report/report.json

Exit status: 0; 1 if nothing could be measured or, with --compare, if something got worse.")]
pub(crate) struct BenchArgs {
    /// Kernel that all VMMs boot: an uncompressed ELF with a PVH note.
    #[arg(long, value_name = "FILE", env = "CUBE_KERNEL", requires = "init")]
    kernel: Option<PathBuf>,
    /// Static program that is /init and writes the marker (built from this repository: bench-init).
    #[arg(long, value_name = "FILE", env = "CUBE_BENCH_INIT")]
    init: Option<PathBuf>,
    /// A VMM that is not in PATH, as NAME=FILE.
    #[arg(long = "vmm", value_name = "NAME=FILE", value_parser = named_vmm)]
    vmms: Vec<(String, PathBuf)>,
    /// Counted runs of each VMM.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// vCPUs of the guest.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=32))]
    cpus: u8,
    /// Guest memory in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 128)]
    memory: u32,
    /// Directory for report.json, report.html and the charts.
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// An earlier report.json to compare with.
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,
    /// Relative change of a median that is worth reporting.
    #[arg(long, default_value_t = 0.05)]
    threshold: f64,
    /// Say that KVM is emulated here (the testbed): only ratios of times are shown.
    #[arg(long, env = "CUBE_TESTBED")]
    emulated: bool,
    /// Print the report as JSON instead of a table.
    #[arg(long)]
    json: bool,
}

fn named_vmm(text: &str) -> Result<(String, PathBuf), String> {
    let known = || Kind::ALL.map(Kind::program).join(", ");
    match text.split_once('=') {
        Some((name, path)) if Kind::ALL.iter().any(|kind| kind.program() == name) => {
            Ok((name.to_owned(), path.into()))
        }
        _ => Err(format!("expected NAME=FILE with one of {}", known())),
    }
}

/// Runs the harness.
pub(crate) fn bench(arguments: &BenchArgs) -> Result<u8, Failure> {
    let old = arguments.compare.as_deref().map(read_report).transpose()?;
    let peers = peers(arguments)?;
    let directory = tempfile::tempdir().map_err(Failure::new)?;
    let machines = machines(arguments, directory.path())?;
    let rounds = Rounds {
        warm_up: 1,
        counted: arguments.rounds,
    };
    let bar = progress(peers.len() as u64 * u64::from(rounds.warm_up + rounds.counted));
    let rows = run(&peers, &machines, rounds, directory.path(), &mut || {
        bar.inc(1)
    });
    bar.finish_and_clear();
    let rows = rows.map_err(Failure::new)?;
    let failed = rows.iter().all(|row| row.failure.is_some());
    let host = Host::this(arguments.emulated);
    let report = Report {
        host,
        rounds,
        machines,
        rows,
    };
    print(arguments, &report).map_err(Failure::new)?;
    if let Some(output) = &arguments.output {
        report.write(output).map_err(|error| {
            Failure::new(format_args!(
                "cannot write the report to {}: {error}",
                output.display()
            ))
        })?;
    }
    let changes = old
        .map(|old| report.compare(&old, arguments.threshold))
        .unwrap_or_default();
    print_changes(&changes).map_err(Failure::new)?;
    let worse = changes
        .iter()
        .any(|change| change.verdict == Verdict::Worse);
    Ok(if failed || worse { FAILURE } else { 0 })
}

fn read_report(path: &Path) -> Result<serde_json::Value, Failure> {
    let fault = |error: &dyn std::fmt::Display| {
        Failure::usage(format_args!(
            "cannot compare with {}: {error}",
            path.display()
        ))
    };
    let bytes = fs::read(path).map_err(|error| fault(&error))?;
    serde_json::from_slice(&bytes).map_err(|error| fault(&error))
}

fn peers(arguments: &BenchArgs) -> Result<Vec<Peer>, Failure> {
    let mut peers = Vec::new();
    for kind in Kind::ALL {
        let named = arguments
            .vmms
            .iter()
            .find(|(name, _)| name == kind.program());
        let Some(path) = named
            .map(|(_, path)| path.clone())
            .or_else(|| find(kind.program()))
        else {
            continue;
        };
        peers.push(kind.at(path.clone()).map_err(|error| {
            Failure::new(format_args!("cannot execute {}: {error}", path.display()))
        })?);
    }
    if peers.is_empty() {
        return Err(Failure::new(
            "no VMM found: none is in PATH and none is named with --vmm",
        ));
    }
    Ok(peers)
}

fn machines(arguments: &BenchArgs, directory: &Path) -> Result<Machines, Failure> {
    let kernel = directory.join("tiny.elf");
    fs::write(&kernel, tiny_kernel()).map_err(Failure::new)?;
    let tiny = Machine {
        kernel,
        init: None,
        command_line: format!("{} {}", cmdline::ALWAYS, cmdline::SILENT),
        cpus: arguments.cpus,
        memory_mib: arguments.memory,
    };
    let linux = match (&arguments.kernel, &arguments.init) {
        (Some(kernel), Some(init)) => {
            let init = init_of(init, directory)?;
            Some(Machine {
                kernel: kernel.clone(),
                init: Some(init),
                ..tiny.clone()
            })
        }
        _ => None,
    };
    Ok(Machines { tiny, linux })
}

fn init_of(binary: &Path, directory: &Path) -> Result<Init, Failure> {
    let content = fs::read(binary).map_err(|error| {
        Failure::usage(format_args!(
            "cannot read the init {}: {error}",
            binary.display()
        ))
    })?;
    let archive = directory.join("initramfs.cpio");
    fs::write(&archive, initramfs::archive_of(&content)).map_err(Failure::new)?;
    let binary = fs::canonicalize(binary).map_err(Failure::new)?;
    Ok(Init {
        binary,
        initramfs: archive,
    })
}

fn progress(runs: u64) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} runs, {eta} left");
    ProgressBar::new(runs).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn print(arguments: &BenchArgs, report: &Report) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if arguments.json {
        serde_json::to_writer_pretty(&mut out, report)?;
        return writeln!(out);
    }
    let missing: Vec<&str> = Kind::ALL
        .iter()
        .map(|kind| kind.program())
        .filter(|name| !report.rows.iter().any(|row: &Row| row.peer.name == *name))
        .collect();
    write!(out, "{}", report.table())?;
    if !missing.is_empty() {
        writeln!(out, "Not found: {}.", missing.join(", "))?;
    }
    Ok(())
}

fn print_changes(changes: &[Change]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    for change in changes {
        let verdict = match change.verdict {
            Verdict::Better => "better",
            Verdict::Worse => "WORSE",
            Verdict::Noise => "noise",
        };
        let Change {
            vmm,
            figure,
            before,
            after,
            ..
        } = change;
        writeln!(
            out,
            "{verdict:<7} {vmm:<20} {figure:<20} {before:.2} -> {after:.2}"
        )?;
    }
    Ok(())
}
