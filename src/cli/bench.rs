//! `cube bench`: start-up time and memory footprint, VMM against VMM.
#![forbid(unsafe_code)]

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::failure::{FAILURE, Failure};
use crate::bench::density::{self, Crowd, Sizes};
use crate::bench::measure::DEADLINE;
use crate::bench::network::NetBench;
use crate::bench::payload::tiny_kernel;
use crate::bench::peers::{Init, Kind, Machine, Peer, find};
use crate::bench::plan::{Contender, Rounds, Row, run};
use crate::bench::pod::PodCommand;
use crate::bench::report::{Change, Host, Report};
use crate::bench::stats::Verdict;
use crate::bench::streams::StreamBench;
use crate::vmm::boot::{cmdline, initramfs};

/// Size of the disk that is read.
const DISK_MIB: u32 = 64;

/// Measure start-up time and memory footprint, VMM against VMM.
///
/// Every VMM found in PATH or named with --vmm boots the same kernel and initramfs with the same vCPUs
/// and memory, in turn. Without --kernel only the VMMs themselves are measured, with a tiny kernel. The row
/// cube-bench-floor is a bare program that makes the same VM: no VMM starts faster.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cube bench
  cube bench --kernel vmlinux --init bench-init --output report
  cube bench --vmm firecracker=/opt/firecracker/firecracker --rounds 30
  cube bench --kernel vmlinux --init bench-init --image busybox --at-once 1,10,50 --fill 1024
  cube bench --kernel vmlinux --init bench-init --image busybox --streams 1024 --rounds 1
  cube bench --compare report/report.json

Exit status: 0; 1 if nothing could be measured or, with --compare, if something got worse.")]
pub(crate) struct BenchArgs {
    /// Kernel that all VMMs boot: an uncompressed ELF with a PVH note.
    #[arg(long, value_name = "FILE", env = "CUBE_KERNEL", requires = "init")]
    kernel: Option<PathBuf>,
    /// Static program that is /init and writes the marker (built from this repository: bench-init).
    #[arg(long, value_name = "FILE", env = "CUBE_BENCH_INIT")]
    init: Option<PathBuf>,
    /// A second kernel that all VMMs boot as well, each in a row of its own.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    other_kernel: Option<PathBuf>,
    /// Its command line.
    #[arg(
        long,
        value_name = "TEXT",
        requires = "other_kernel",
        allow_hyphen_values = true
    )]
    other_command_line: Option<String>,
    /// An image in the store that has a shell: `cube run` is a row, and starts pods of it.
    #[arg(long, value_name = "NAME")]
    image: Option<String>,
    /// Also measure the throughput: of a disk, with --image of a container's writable layer and output.
    #[arg(long, requires = "kernel")]
    throughput: bool,
    /// Also send that many MiB through an exec's `cat` and back, with --image, and through the vsock socket of each VMM
    /// that has one of Firecracker's kind.
    #[arg(long, value_name = "MIB", requires = "kernel", value_parser = clap::value_parser!(u32).range(1..))]
    streams: Option<u32>,
    /// Also measure the network of guests with --kernel and this root file system (made by `cargo xtask bench --net`).
    /// As root: a tap is made in a network namespace.
    #[arg(long, value_name = "FILE", requires = "kernel")]
    net_root: Option<PathBuf>,
    /// Seconds of load in each direction.
    #[arg(long, value_name = "SECONDS", default_value_t = 12, requires = "net_root", value_parser = clap::value_parser!(u32).range(1..=600))]
    net_seconds: u32,
    /// Also start that many at once, each with --kernel or --image.
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=1000))]
    at_once: Vec<u32>,
    /// Also start idle ones until they take that much memory, in MiB.
    #[arg(long, value_name = "MIB")]
    fill: Option<u32>,
    /// Seconds after which a guest that does not run is given up.
    #[arg(long, value_name = "SECONDS", default_value_t = DEADLINE.as_secs(), value_parser = clap::value_parser!(u64).range(1..))]
    deadline: u64,
    /// A VMM that is not in PATH, as NAME=FILE.
    #[arg(long = "vmm", value_name = "NAME=FILE", value_parser = named_vmm)]
    vmms: Vec<(Kind, PathBuf)>,
    /// Measure only these VMMs; pods of --image are measured all the same.
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', value_parser = known_vmm)]
    only: Vec<Kind>,
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
    /// The commit that is measured, for the report.
    #[arg(long, value_name = "ID", env = "CUBE_COMMIT")]
    commit: Option<String>,
    /// Print the report as JSON instead of a table.
    #[arg(long)]
    json: bool,
}

fn known_vmm(name: &str) -> Result<Kind, String> {
    let mut kinds = Kind::ALL.into_iter();
    let known = || Kind::ALL.map(Kind::program).join(", ");
    kinds
        .find(|kind| kind.program() == name)
        .ok_or_else(|| format!("expected one of {}", known()))
}

fn named_vmm(text: &str) -> Result<(Kind, PathBuf), String> {
    let (name, path) = text.split_once('=').ok_or("expected NAME=FILE")?;
    Ok((known_vmm(name)?, path.into()))
}

/// Runs the harness.
pub(crate) fn bench(arguments: &BenchArgs) -> Result<u8, Failure> {
    let old = arguments.compare.as_deref().map(read_report).transpose()?;
    let directory = tempfile::tempdir().map_err(Failure::new)?;
    let machines = Machines::make(arguments, directory.path())?;
    let mut rows = rows(arguments, &machines)?;
    let rounds = Rounds {
        warm_up: 1,
        counted: arguments.rounds,
        deadline: Duration::from_secs(arguments.deadline),
    };
    let bar = progress(rows.len() as u64 * u64::from(rounds.warm_up + rounds.counted));
    let ran = run(&mut rows, rounds, directory.path(), &mut || bar.inc(1));
    bar.finish_and_clear();
    ran.map_err(Failure::new)?;
    network(arguments, &mut rows, directory.path())?;
    streams(arguments, &machines, &mut rows, directory.path())?;
    let crowds = crowds(arguments, &rows, directory.path())?;
    let failed = rows.iter().all(|row| row.figures.is_empty());
    let report = Report {
        host: Host::this(arguments.emulated, arguments.commit.clone()),
        rounds,
        machines: machines.list(),
        rows,
        crowds,
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
    print_changes(arguments, &changes).map_err(Failure::new)?;
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

/// Every VMM known, with what it boots; who is not there has a row that says so.
fn rows(arguments: &BenchArgs, machines: &Machines) -> Result<Vec<Row>, Failure> {
    let (mut rows, mut others) = (Vec::new(), Vec::new());
    let chosen = |kind: &Kind| arguments.only.is_empty() || arguments.only.contains(kind);
    for kind in Kind::ALL.into_iter().filter(chosen) {
        let name = kind.program();
        let Some(peer) = peer(arguments, kind)? else {
            rows.push(Row::missing(name));
            continue;
        };
        if let Some(other) = machines.other.as_ref().filter(|_| kind != Kind::Floor) {
            let contender = Contender::Vmm {
                peer: peer.clone(),
                tiny: None,
                linux: Some(other.clone()),
                disk: None,
            };
            others.push(Row::new(format!("{name}, {}", other.name), contender));
        }
        let contender = Contender::Vmm {
            peer,
            tiny: Some(machines.tiny.clone()),
            linux: machines.linux.clone(),
            disk: machines.disk.clone(),
        };
        rows.push(Row::new(name.to_owned(), contender));
    }
    if let Some(image) = &arguments.image {
        let cube = std::env::current_exe().map_err(Failure::new)?;
        let pod = PodCommand {
            cube,
            image: image.clone(),
            memory_mib: arguments.memory,
            throughput: arguments.throughput,
        };
        rows.push(Row::new("cube run".to_owned(), Contender::Pod(pod.clone())));
        let background = Contender::Background(pod);
        rows.push(Row::new("cube pod run".to_owned(), background));
    }
    rows.append(&mut others);
    Ok(rows)
}

/// The VMM of that kind: where it is named, else where it is found. One that is named must run.
fn peer(arguments: &BenchArgs, kind: Kind) -> Result<Option<Peer>, Failure> {
    let named = arguments.vmms.iter().find(|(named, _)| *named == kind);
    let Some(path) = named
        .map(|(_, path)| path.clone())
        .or_else(|| find(kind.program()))
    else {
        return Ok(None);
    };
    let path = fs::canonicalize(&path).unwrap_or(path);
    let peer = kind.at(path.clone());
    peer.map(Some)
        .map_err(|error| Failure::new(format_args!("cannot execute {}: {error}", path.display())))
}

/// The network, where that was asked for.
fn network(arguments: &BenchArgs, rows: &mut [Row], directory: &Path) -> Result<(), Failure> {
    let (Some(kernel), Some(root)) = (&arguments.kernel, &arguments.net_root) else {
        return Ok(());
    };
    let bench = NetBench {
        kernel: absolute(kernel)?,
        root: absolute(root)?,
        cpus: arguments.cpus,
        memory_mib: arguments.memory,
        seconds: arguments.net_seconds,
        deadline: Duration::from_secs(arguments.deadline),
    };
    let bar = progress(rows.len() as u64 * u64::from(arguments.rounds));
    let ran = bench.run(rows, arguments.rounds, directory, &mut || bar.inc(1));
    bar.finish_and_clear();
    ran.map_err(Failure::new)
}

/// Streams, where that was asked for.
fn streams(
    arguments: &BenchArgs,
    machines: &Machines,
    rows: &mut [Row],
    directory: &Path,
) -> Result<(), Failure> {
    let (Some(mib), Some(linux)) = (arguments.streams, &machines.linux) else {
        return Ok(());
    };
    let bench = StreamBench {
        machine: Machine {
            name: "linux with a vsock".to_owned(),
            vsock: true,
            command_line: format!("{} bench_vsock=1", linux.command_line),
            ..linux.clone()
        },
        mib,
        deadline: Duration::from_secs(arguments.deadline),
    };
    let bar = progress(rows.len() as u64 * u64::from(arguments.rounds));
    let ran = bench.run(rows, arguments.rounds, directory, &mut || bar.inc(1));
    bar.finish_and_clear();
    ran.map_err(Failure::new)
}

/// Many at once, where that was asked for.
fn crowds(arguments: &BenchArgs, rows: &[Row], directory: &Path) -> Result<Vec<Crowd>, Failure> {
    if arguments.at_once.is_empty() && arguments.fill.is_none() {
        return Ok(Vec::new());
    }
    let sizes = Sizes {
        at_once: arguments.at_once.clone(),
        limit_mib: arguments.fill,
        deadline: Duration::from_secs(arguments.deadline),
    };
    let bar = progress(rows.len() as u64);
    let mut crowds = Vec::new();
    for row in rows {
        bar.set_message(row.name.clone());
        crowds.extend(density::measure(row, &sizes, directory).map_err(Failure::new)?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(crowds)
}

/// What is booted.
struct Machines {
    tiny: Machine,
    linux: Option<Machine>,
    disk: Option<Machine>,
    other: Option<Machine>,
}

impl Machines {
    fn make(arguments: &BenchArgs, directory: &Path) -> Result<Self, Failure> {
        let kernel = directory.join("tiny.elf");
        fs::write(&kernel, tiny_kernel()).map_err(Failure::new)?;
        let tiny = Machine {
            name: "tiny".to_owned(),
            kernel,
            init: None,
            disk: None,
            vsock: false,
            command_line: format!("{} {}", cmdline::ALWAYS, cmdline::SILENT),
            cpus: arguments.cpus,
            memory_mib: arguments.memory,
        };
        let (Some(kernel), Some(init)) = (&arguments.kernel, &arguments.init) else {
            return Ok(Self {
                tiny,
                linux: None,
                disk: None,
                other: None,
            });
        };
        let init = Some(init_of(init, directory)?);
        let linux = Machine {
            name: "linux".to_owned(),
            kernel: absolute(kernel)?,
            init,
            ..tiny.clone()
        };
        let other = arguments.other_kernel.as_deref().map(|kernel| {
            let own = arguments.other_command_line.clone();
            Ok(Machine {
                name: "other kernel".to_owned(),
                kernel: absolute(kernel)?,
                command_line: own.unwrap_or_else(|| linux.command_line.clone()),
                ..linux.clone()
            })
        });
        let other = other.transpose()?;
        let disk = match arguments.throughput {
            true => Some(with_disk(&linux, directory).map_err(Failure::new)?),
            false => None,
        };
        Ok(Self {
            tiny,
            linux: Some(linux),
            disk,
            other,
        })
    }

    fn list(&self) -> Vec<Machine> {
        let more = [&self.linux, &self.disk, &self.other].into_iter().flatten();
        std::iter::once(&self.tiny).chain(more).cloned().collect()
    }
}

/// That machine with a disk of [`DISK_MIB`], which the host has in its page cache.
fn with_disk(linux: &Machine, directory: &Path) -> io::Result<Machine> {
    let disk = directory.join("disk.img");
    let block: Vec<u8> = (0..1 << 20).map(|n: u32| (n % 251) as u8).collect();
    let mut file = fs::File::create(&disk)?;
    for _ in 0..DISK_MIB {
        file.write_all(&block)?;
    }
    Ok(Machine {
        name: "linux with a disk".to_owned(),
        disk: Some(disk),
        command_line: format!("{} bench_io=1", linux.command_line),
        ..linux.clone()
    })
}

/// VMMs run in a directory of their own.
fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    fs::canonicalize(path)
        .map_err(|error| Failure::usage(format_args!("cannot read {}: {error}", path.display())))
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
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len}, {eta} left {msg}");
    ProgressBar::new(runs).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn print(arguments: &BenchArgs, report: &Report) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if arguments.json {
        serde_json::to_writer_pretty(&mut out, report)?;
        return writeln!(out);
    }
    write!(out, "{}", report.table())
}

/// Where JSON was asked for, standard output is that alone.
fn print_changes(arguments: &BenchArgs, changes: &[Change]) -> io::Result<()> {
    let mut out: Box<dyn Write> = if arguments.json {
        Box::new(io::stderr())
    } else {
        Box::new(io::stdout())
    };
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
