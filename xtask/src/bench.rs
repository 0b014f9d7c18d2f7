//! `cargo xtask bench`: `cube bench` with everything that it needs, and the promises of `resources/budget.toml` held
//! against what it measured.
//!
//! VMM start is measured natively, with a tiny kernel that any KVM runs. Guests boot natively where KVM runs them, else
//! in the testbed, whose times are good for ratios alone.
#![forbid(unsafe_code)]

mod budget;

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use clap::Args;

use crate::cache::Cache;
use crate::error::{Doing, Error, Result};
use crate::steps::{Outcome, Steps};
use crate::testbed::{self, Job, Limits, Outer};
use crate::{apt, binaries, demo, doctor, image, kernel, net_root, run, setup, test};

use budget::{Measured, Scope};

/// The command line with which Firecracker's own boot-time benchmark boots its CI guest.
const OTHER_COMMAND_LINE: &str = "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.nopnp \
                                  i8042.dumbkbd swiotlb=noforce cryptomgr.notests";
/// When the watchdog ends the testbed with the benchmarks in it.
const TIMEOUT: Duration = Duration::from_secs(40 * 60);

/// Processors of the testbed.
const CPUS: u8 = 2;
/// The same with `--net`: the vCPU, the thread of the VMM that serves the device and iperf3 are at work at once, and with
/// fewer processors than that it counts which of them the kernel lets share one, not which VMM serves the guest.
const CPUS_NET: u8 = 4;

/// Options of `cargo xtask bench`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cargo xtask bench                                   every VMM in PATH, charts in target/bench
  cargo xtask bench --vmm firecracker=/opt/firecracker
  cargo xtask bench --other-kernel ci-guest           a second kernel beside the slim one
  cargo xtask bench --at-once 1,10,50 --fill 1024     many at once
  cargo xtask bench --net                             throughput and latency of the network too
  cargo xtask bench --streams 1024 --testbed-rounds 1  what goes through an exec and comes back
  cargo xtask bench --budget                          hold resources/budget.toml against this machine")]
pub(crate) struct Options {
    /// Hold every promised number that can be measured here against resources/budget.toml; fail if one is broken
    #[arg(long)]
    budget: bool,
    /// Counted runs of each VMM natively
    #[arg(long, default_value_t = 20)]
    rounds: u32,
    /// Counted runs of each VMM in the testbed
    #[arg(long, default_value_t = 5)]
    testbed_rounds: u32,
    /// A VMM that is not in PATH, as NAME=FILE
    #[arg(long = "vmm", value_name = "NAME=FILE")]
    vmms: Vec<String>,
    /// Measure only these VMMs, and pods
    #[arg(long, value_name = "NAME,…")]
    only: Option<String>,
    /// Seconds after which a guest that does not run is given up; it is not run again
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..))]
    deadline: u64,
    /// A second kernel: the name of a file in guest/kernel, without `.config`
    #[arg(long, value_name = "NAME")]
    other_kernel: Option<String>,
    /// Also measure the throughput of disks and streams
    #[arg(long)]
    throughput: bool,
    /// Also send that many MiB through an exec and back, and through the vsock sockets of VMMs
    #[arg(long, value_name = "MIB")]
    streams: Option<u32>,
    /// Also start that many at once
    #[arg(long, value_name = "N,…")]
    at_once: Option<String>,
    /// Also start idle ones until they take that much memory, in MiB
    #[arg(long, value_name = "MIB")]
    fill: Option<u32>,
    /// Also measure the network: throughput in both directions, processor time, round trips; a testbed has four
    /// processors then in place of two
    #[arg(long)]
    net: bool,
    /// Seconds of load in each direction
    #[arg(long, value_name = "SECONDS", default_value_t = 12, requires = "net")]
    net_seconds: u32,
    /// Directory for the reports; `native` and `testbed` are made in it
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
}

/// What `cube bench` is given.
pub(crate) struct Parts<'a> {
    /// Where `cube` and `cube-vmm` are.
    pub(crate) binaries: PathBuf,
    /// The guest's kernel.
    pub(crate) kernel: PathBuf,
    /// Another, to compare with.
    pub(crate) other_kernel: Option<PathBuf>,
    /// `cube-init`, with the benchmarks' init beside it.
    pub(crate) cube_init: PathBuf,
    /// The root file system of the network benchmark, if that was asked for.
    pub(crate) net_root: Option<PathBuf>,
    /// A store with the demo's image.
    pub(crate) store: PathBuf,
    /// Absent: KVM here runs guests.
    pub(crate) outer: Option<&'a Outer>,
    /// Where the reports go.
    pub(crate) output: PathBuf,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let direct = doctor::kvm_runs_linux();
    let mut steps = Steps::new(
        8 + usize::from(!direct)
            + usize::from(options.other_kernel.is_some())
            + usize::from(options.net),
    );
    setup::install(&mut steps)?;
    steps.step("benchmark tools", || {
        let mut wanted = vec![apt::BENCH];
        wanted.extend(options.net.then_some(apt::BENCH_NET));
        Ok(((), Outcome::from(!apt::ensure(&wanted)?)))
    })?;
    let output = match &options.output {
        Some(output) => output.clone(),
        None => binaries::Metadata::read()?.target_directory.join("bench"),
    };
    fs::create_dir_all(&output).doing("create", &output)?;
    let binaries = as_installed(&binaries::host(&mut steps, binaries::Profile::Release)?)?;
    let outer = if direct {
        None
    } else {
        Some(testbed::step(&mut steps)?)
    };
    let parts = Parts {
        kernel: kernel::step(&mut steps, "cube")?,
        other_kernel: options
            .other_kernel
            .as_deref()
            .map(|name| kernel::step(&mut steps, name))
            .transpose()?,
        outer: outer.as_ref(),
        cube_init: binaries::init(&mut steps)?,
        net_root: options
            .net
            .then(|| net_root::step(&mut steps))
            .transpose()?,
        store: {
            let layout = image::step(&mut steps, image::Name::Busybox)?;
            let store = Cache::of_user()?.root().join("demo-store");
            demo::import(&binaries.join("cube"), &layout, &store)?;
            store
        },
        binaries,
        output: output.canonicalize().doing("find", &output)?,
    };
    let measured = steps.step("measure", || Ok((parts.measure(options)?, Outcome::Done)))?;
    if !options.budget {
        println!("reports: {}", parts.output.display());
        return Ok(ExitCode::SUCCESS);
    }
    Ok(if hold(&measured, Scope::All)? {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Copies the programs, as who installs them does, and as peers come too: the page cache holds a copy in larger pieces than
/// what a linker wrote here and there, and a start of `cube-vmm` is then a tenth shorter. Gives their directory.
fn as_installed(built: &Path) -> Result<PathBuf> {
    let directory = built.join("installed");
    fs::create_dir_all(&directory).doing("create", &directory)?;
    for program in ["cube", "cube-vmm", "cube-bench-floor"] {
        let (from, to) = (built.join(program), directory.join(program));
        // Another file, so that one that still runs is no obstacle.
        match fs::remove_file(&to) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).doing("remove", &to);
            }
            _ => fs::copy(&from, &to).doing("copy", &from)?,
        };
    }
    Ok(directory)
}

/// Shows promise, measured and margin; whether all are kept that could be measured.
fn hold(measured: &Measured, scope: Scope) -> Result<bool> {
    let path = binaries::root().join("resources/budget.toml");
    let promises = fs::read_to_string(&path).doing("read", &path)?;
    let (table, kept) = budget::hold(&promises, measured, scope)?;
    print!("{table}");
    Ok(kept)
}

/// Holds the promises that are the program's alone: bytes and counts, the same on any machine and, as far as it
/// matters, in any build. One round each, no peers, no second kernel: it takes a minute.
pub(crate) fn bytes_and_counts(parts: &Parts<'_>) -> Result<bool> {
    let options = Options {
        budget: true,
        rounds: 1,
        testbed_rounds: 1,
        vmms: Vec::new(),
        only: Some("cube-vmm".to_owned()),
        deadline: 120,
        other_kernel: None,
        throughput: false,
        streams: None,
        at_once: None,
        fill: None,
        output: None,
        net: false,
        net_seconds: 0,
    };
    hold(&parts.measure(&options)?, Scope::Anywhere)
}

impl Parts<'_> {
    fn measure(&self, options: &Options) -> Result<Measured> {
        eprintln!("{}", test::place(self.outer.is_none()));
        let native = self.output.join("native");
        let mut words = Self::words(options, options.rounds);
        let mut command = Command::new(self.binaries.join("cube"));
        if self.outer.is_none() {
            words.extend(self.guest_words(options));
            command.envs(self.guest_variables());
        }
        words.extend(["--output".into(), native.clone().into()]);
        command.args(&words).current_dir(binaries::root());
        // Cargo's, for what it runs: the loader of every VMM would search a dozen directories more.
        command.env_remove("LD_LIBRARY_PATH");
        if let Some(commit) = commit() {
            command.env("CUBE_COMMIT", commit);
        }
        run::shown(&mut command)?;
        let guests = match self.outer {
            None => native.clone(),
            Some(outer) => self.in_testbed(outer, options)?,
        };
        // A promise is a number: whoever holds one needs no pictures.
        if !options.budget {
            render(&native)?;
            render(&guests)?;
        }
        Measured::read(&native, &guests)
    }

    fn in_testbed(&self, outer: &Outer, options: &Options) -> Result<PathBuf> {
        let out = self.output.join("testbed");
        let mut words = vec![self.binaries.join("cube").into()];
        words.extend(Self::words(options, options.testbed_rounds));
        words.extend(self.guest_words(options));
        words.extend(["--emulated", "--output", "/run/cube-testbed/out"].map(Into::into));
        let mut job = Job::new(&words)?.directory(binaries::root()).out(&out)?;
        for (name, value) in self.guest_variables() {
            job = job.variable(name, value);
        }
        if let Some(commit) = commit() {
            job = job.variable("CUBE_COMMIT", commit);
        }
        let limits = Limits {
            timeout: TIMEOUT,
            silence: None,
            memory_mib: 6144,
            cpus: if options.net { CPUS_NET } else { CPUS },
        };
        match testbed::exec(outer, &limits, &job, std::io::stdout())? {
            0 => Ok(out),
            status => Err(Error::Said(format!(
                "`cube bench` in the testbed ended with status {status}"
            ))),
        }
    }

    fn words(options: &Options, rounds: u32) -> Vec<OsString> {
        let deadline = options.deadline.to_string();
        let mut words: Vec<OsString> = ["bench", "--rounds", &rounds.to_string()]
            .map(Into::into)
            .into();
        words.extend(["--deadline".into(), deadline.into()]);
        if let Some(only) = &options.only {
            words.extend(["--only".into(), only.into()]);
        }
        words.extend(
            options
                .vmms
                .iter()
                .flat_map(|vmm| ["--vmm".into(), vmm.into()]),
        );
        words
    }

    /// What needs a KVM that runs Linux.
    fn guest_words(&self, options: &Options) -> Vec<OsString> {
        let init = self.cube_init.with_file_name("bench-init");
        let mut words: Vec<OsString> = vec![
            "--kernel".into(),
            self.kernel.clone().into(),
            "--init".into(),
            init.into(),
        ];
        words.extend(["--image".into(), demo::IMAGE.into()]);
        if let Some(other) = &self.other_kernel {
            words.extend([
                "--other-kernel".into(),
                other.into(),
                "--other-command-line".into(),
            ]);
            words.push(OTHER_COMMAND_LINE.into());
        }
        if let Some(root) = &self.net_root {
            let seconds = options.net_seconds.to_string();
            words.extend(["--net-root".into(), root.into()]);
            words.extend(["--net-seconds".into(), seconds.into()]);
        }
        if options.throughput {
            words.push("--throughput".into());
        }
        if let Some(mib) = options.streams {
            words.extend(["--streams".into(), mib.to_string().into()]);
        }
        if let Some(numbers) = &options.at_once {
            words.extend(["--at-once".into(), numbers.into()]);
        }
        if let Some(mib) = options.fill {
            words.extend(["--fill".into(), mib.to_string().into()]);
        }
        words
    }

    /// For `cube run`; without a network, which the VMMs beside it have none of either.
    fn guest_variables(&self) -> [(&'static str, OsString); 4] {
        [
            ("CUBE_NET", "none".into()),
            ("CUBE_KERNEL", self.kernel.clone().into()),
            ("CUBE_INIT", self.cube_init.clone().into()),
            ("CUBE_STORE", self.store.clone().into()),
        ]
    }
}

/// The commit of the work tree, if it is one.
fn commit() -> Option<String> {
    let mut git = Command::new("git");
    git.args(["describe", "--always", "--dirty", "--abbrev=12"])
        .current_dir(binaries::root());
    run::captured(&mut git)
        .ok()
        .map(|text| text.trim().to_owned())
}

/// Each chart as PNG beside its SVG.
fn render(directory: &Path) -> Result<()> {
    for entry in fs::read_dir(directory).doing("read", directory)? {
        let svg = entry.doing("read", directory)?.path();
        if svg.extension().is_some_and(|extension| extension == "svg") {
            let mut convert = Command::new("rsvg-convert");
            convert
                .args(["--zoom", "2", "--output"])
                .arg(svg.with_extension("png"))
                .arg(&svg);
            run::captured(&mut convert)?;
        }
    }
    Ok(())
}
