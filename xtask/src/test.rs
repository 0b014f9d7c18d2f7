//! `cargo xtask test`: the set-up, every check, every test; those with real guests directly where KVM runs them, else all
//! in the testbed, two at a time.
#![forbid(unsafe_code)]

mod count;
pub(crate) mod guests;

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use clap::Args;

use crate::error::{Doing, Error, Result};
use crate::steps::{Outcome, Steps, human};
use crate::testbed::{self, Outer};
use crate::{apt, bench, binaries, demo, doctor, image, kernel, run, setup};

use count::Counts;

/// The integration test that boots guests. It runs only with `CUBE_E2E` set, which only this file does.
const END_TO_END: &str = "e2e";

/// Options of `cargo xtask test`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cargo xtask test                    everything, as CI does
  cargo xtask test --filter vsock     only tests whose names contain `vsock`; no format check, no clippy
  cargo xtask test --native           only what needs no guest")]
pub(crate) struct Options {
    /// Run only the tests whose names contain this, and skip the checks of the source
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// Leave out the tests with real guests
    #[arg(long)]
    native: bool,
}

/// What guests are made of; the end-to-end tests find it in their environment.
pub(crate) struct Parts {
    cube: PathBuf,
    kernel: PathBuf,
    init: PathBuf,
    image: PathBuf,
    large_image: PathBuf,
    /// Absent: KVM here runs guests.
    outer: Option<Outer>,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let direct = doctor::kvm_runs_linux();
    let checks = if options.filter.is_none() { 2 } else { 0 };
    let guests = if options.native {
        0
    } else {
        6 + usize::from(!direct) + 2 * usize::from(options.filter.is_none())
    };
    let mut steps = Steps::new(2 + checks + guests);
    setup::install(&mut steps)?;
    let parts = if options.native {
        None
    } else {
        Some(Parts::make(&mut steps, direct)?)
    };
    if options.filter.is_none() {
        sources(&mut steps)?;
    }
    let filter = options.filter.as_deref();
    let mut total = steps.step("tests", || native(filter).map(noted))?;
    if let Some(parts) = parts {
        total += steps.step("tests with real guests", || {
            eprintln!("{}", place(direct));
            guests::run(&parts, filter).map(noted)
        })?;
        if options.filter.is_none() {
            steps.step("demo", || {
                Ok((tried(&parts, || demo(&parts))?, Outcome::Done))
            })?;
            total += steps.step("promises", || tried(&parts, || promises(&parts)).map(noted))?;
        }
    }
    println!("all steps took {}", human(steps.elapsed()));
    println!("total: {total}");
    Ok(if total.good() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Where guests run, in one line.
pub(crate) fn place(direct: bool) -> &'static str {
    if direct {
        "  guests run directly on this machine's /dev/kvm"
    } else {
        "  this machine's /dev/kvm cannot run Linux guests: they run in the testbed (QEMU with emulated SVM; slow)"
    }
}

fn noted(counts: Counts) -> (Counts, Outcome) {
    let note = Outcome::Note(counts.to_string());
    (counts, note)
}

impl Parts {
    pub(crate) fn make(steps: &mut Steps, direct: bool) -> Result<Self> {
        let kernel = kernel::step(steps, "cube")?;
        let outer = if direct {
            None
        } else {
            Some(testbed::step(steps)?)
        };
        let init = binaries::init(steps)?;
        let cube = binaries::host(steps, binaries::Profile::Dev)?.join("cube");
        let image = image::step(steps, image::Name::Busybox)?;
        let large_image = image::step(steps, image::Name::DebianTest)?;
        Ok(Self {
            cube,
            kernel,
            init,
            image,
            large_image,
            outer,
        })
    }

    fn variables(&self) -> [(&'static str, OsString); 5] {
        [
            ("CUBE_E2E", "1".into()),
            ("CUBE_KERNEL", self.kernel.clone().into()),
            ("CUBE_INIT", self.init.clone().into()),
            ("CUBE_TEST_IMAGE", self.image.clone().into()),
            ("CUBE_TEST_IMAGE_LARGE", self.large_image.clone().into()),
        ]
    }
}

/// Format and lints.
fn sources(steps: &mut Steps) -> Result<()> {
    steps.step("format", || {
        run::shown(binaries::cargo().args(["fmt", "--all", "--check"]))?;
        Ok(((), Outcome::Done))
    })?;
    steps.step("clippy", || {
        let lints = [
            "clippy",
            "--workspace",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ];
        run::shown(binaries::cargo().args(lints))?;
        Ok(((), Outcome::Done))
    })
}

/// Every test that needs no guest, by nextest if it is here.
fn native(filter: Option<&str>) -> Result<Counts> {
    let has_nextest = run::captured(binaries::cargo().args(["nextest", "--version"])).is_ok();
    let mut command = binaries::cargo();
    if has_nextest {
        command.args([
            "nextest",
            "run",
            "--workspace",
            "--no-fail-fast",
            "--no-tests",
            "pass",
        ]);
        command.args(["-E", &format!("not binary({END_TO_END})")]);
        command.args(filter);
    } else {
        command.args(["test", "--workspace", "--no-fail-fast", "--lib", "--bins"]);
        let metadata = binaries::Metadata::read()?;
        for name in metadata
            .tests()
            .into_iter()
            .filter(|name| *name != END_TO_END)
        {
            command.args(["--test", name]);
        }
        command.args(filter);
    }
    counted(&mut command)
}

/// What `cargo xtask demo` shows, with the binaries just tested.
fn demo(parts: &Parts) -> Result<()> {
    let store = tempfile::tempdir().doing("create a directory in", &std::env::temp_dir())?;
    demo::import(&parts.cube, &parts.image, store.path())?;
    let shown = demo::Parts {
        cube: &parts.cube,
        kernel: &parts.kernel,
        init: &parts.init,
        store: store.path(),
    };
    match demo::show(&shown, parts.outer.as_ref(), &[])? {
        ExitCode::SUCCESS => Ok(()),
        status => Err(Error::Said(format!(
            "the demo's container failed: {status:?}"
        ))),
    }
}

/// Does it, in the testbed up to three times: its machines die now and then ([`guests`]).
fn tried<T>(parts: &Parts, action: impl Fn() -> Result<T>) -> Result<T> {
    let tries = if parts.outer.is_some() { 3 } else { 1 };
    for _ in 1..tries {
        match action() {
            Ok(done) => return Ok(done),
            Err(error) => eprintln!("once more, in a new testbed: {error}"),
        }
    }
    action()
}

/// The promised numbers that hold anywhere, held as one test.
fn promises(parts: &Parts) -> Result<Counts> {
    apt::ensure(&[apt::BENCH])?;
    let scratch = tempfile::tempdir().doing("create a directory in", &std::env::temp_dir())?;
    let store = scratch.path().join("store");
    demo::import(&parts.cube, &parts.image, &store)?;
    let binaries = parts.cube.parent().map(Path::to_owned).unwrap_or_default();
    let measured = bench::Parts {
        net_root: None,
        binaries,
        kernel: parts.kernel.clone(),
        other_kernel: None,
        cube_init: parts.init.clone(),
        store,
        outer: parts.outer.as_ref(),
        output: scratch.path().to_owned(),
    };
    Ok(match bench::bytes_and_counts(&measured)? {
        true => Counts::new(1, 0),
        false => Counts::new(0, 1),
    })
}

/// Runs tests, shows their output, counts. Failed tests are counted, other failures are errors.
fn counted(command: &mut Command) -> Result<Counts> {
    let mut counts = Counts::default();
    let mut stdout = std::io::stdout().lock();
    let ended = run::each_line(command, |line| {
        let _ = writeln!(stdout, "{line}");
        counts += Counts::of_line(line);
    });
    match ended {
        Err(error) if counts.good() => Err(error),
        _ => Ok(counts),
    }
}
