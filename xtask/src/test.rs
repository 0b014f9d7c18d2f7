//! `cargo xtask test`: the set-up, every check, every test; those with real guests directly where KVM runs them, else all
//! in one boot of the testbed.
#![forbid(unsafe_code)]

mod count;

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use clap::Args;

use crate::error::{Doing, Error, Result};
use crate::steps::{Outcome, Steps, human};
use crate::testbed::{self, DIED, Job, Limits, Outer, TIMED_OUT};
use crate::{binaries, demo, doctor, image, kernel, run, setup};

use count::{Counted, Counts};

/// The integration test that boots guests. It runs only with `CUBE_E2E` set, which only this file does.
const END_TO_END: &str = "e2e";
/// When the watchdog ends the testbed with the whole suite in it.
const SUITE_TIMEOUT: Duration = Duration::from_secs(20 * 60);

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
struct Parts {
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
        6 + usize::from(!direct) + usize::from(options.filter.is_none())
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
            end_to_end(&parts, filter).map(noted)
        })?;
        if options.filter.is_none() {
            steps.step("demo", || Ok((demo(&parts)?, Outcome::Done)))?;
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
    fn make(steps: &mut Steps, direct: bool) -> Result<Self> {
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

/// The tests with real guests, in one run.
fn end_to_end(parts: &Parts, filter: Option<&str>) -> Result<Counts> {
    let test = binaries::end_to_end_test()?;
    if let Some(text) = filter {
        let list = run::captured(Command::new(&test).args(["--list", "--format=terse", text]))?;
        if list.trim().is_empty() {
            return Ok(Counts::default());
        }
    }
    let mut words: Vec<OsString> = vec![test.into(), "--test-threads=2".into()];
    words.extend(filter.map(Into::into));
    match &parts.outer {
        Some(outer) => in_testbed(outer, parts, &words),
        None => directly(parts, &words),
    }
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

fn directly(parts: &Parts, words: &[OsString]) -> Result<Counts> {
    // The tests keep their image store in TMPDIR: a new one each run, as in the testbed.
    let scratch = tempfile::tempdir().doing("create a directory in", &std::env::temp_dir())?;
    let mut command = Command::new(words.first().ok_or_else(empty)?);
    command
        .args(words.get(1..).unwrap_or_default())
        .current_dir(binaries::root());
    command
        .envs(parts.variables())
        .env("TMPDIR", scratch.path());
    counted(&mut command)
}

fn in_testbed(outer: &Outer, parts: &Parts, words: &[OsString]) -> Result<Counts> {
    let mut job = Job::new(words)?.directory(binaries::root());
    for (name, value) in parts.variables() {
        job = job.variable(name, value);
    }
    let limits = Limits {
        timeout: SUITE_TIMEOUT,
        memory_mib: 6144,
        cpus: 2,
    };
    let counted = Counted::default();
    let status = testbed::exec(outer, &limits, &job, counted.clone())?;
    let counts = counted.counts();
    match status {
        TIMED_OUT => Err(Error::Said(
            "the suite hung in the testbed: the watchdog ended it".into(),
        )),
        DIED => Err(Error::Said("the testbed died under the suite".into())),
        status if status != 0 && counts.good() => Err(Error::Said(format!(
            "the suite ended with status {status} and without a failed test"
        ))),
        _ => Ok(counts),
    }
}

fn empty() -> Error {
    Error::Said("there is no command to run".into())
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
