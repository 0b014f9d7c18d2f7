//! `cargo xtask testbed -- CMD…`: a command in a machine whose `/dev/kvm` can run Linux guests.
//!
//! ```text
//!  this machine                              outer machine (QEMU, emulated AMD SVM)
//!  /            ── 9p, read-only ──────────▶ / (a tmpfs on top takes the writes)
//!  job script   ── 9p ─────────────────────▶ /run/cube-testbed/job, run by tests/testbed/init
//!  exit status  ◀─ 9p ────────────────────── /run/cube-testbed/status
//!  --out DIR    ◀─ 9p ────────────────────── /run/cube-testbed/out   ($CUBE_TESTBED_OUT)
//!  stdout       ◀─ file ◀─ virtio-serial ─── the job's standard output
//!  stderr       ◀─ file ◀─ virtio-serial ─── the job's standard error
//! ```
//! The streams go through files, which [`follow`] copies as they grow: a file is never full, so that QEMU has taken
//! every byte before it ends.
#![forbid(unsafe_code)]

mod follow;
mod initramfs;
mod job;
mod machine;
mod qemu;

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use crate::apt;
use crate::cache::Cache;
use crate::error::Result;
use crate::steps::{Outcome, Steps};

pub(crate) use initramfs::Outer;
pub(crate) use job::Job;
pub(crate) use machine::Limits;

/// Exit status of a command that the watchdog ended.
pub(crate) const TIMED_OUT: u8 = 124;
/// Exit status when the outer machine ended without the command's.
pub(crate) const DIED: u8 = 125;

/// Options of `cargo xtask testbed`.
#[derive(Debug, Args)]
#[command(
    after_help = "The command sees this machine's files; what it writes is gone afterwards, except below
$CUBE_TESTBED_OUT (see --out). Its working directory and the variables PATH, HOME, USER, LANG,
CUBE_*, CARGO_*, RUST*, XDG_* are those of here. Its exit status is the testbed's; 124: it took too
long; 125: the outer machine died.

Examples:
  cargo xtask testbed -- ls -l /dev/kvm
  cargo xtask testbed --timeout 60 -- target/x86_64-unknown-linux-gnu/debug/cube run ./image -- uname -a
  cargo xtask testbed --out results -- sh -c 'dmesg > $CUBE_TESTBED_OUT/dmesg'"
)]
pub(crate) struct Options {
    /// End the machine after so many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    timeout: u64,
    /// Memory of the outer machine in MiB
    #[arg(long, value_name = "MIB", default_value_t = 4096)]
    memory: u32,
    /// Processors of the outer machine
    #[arg(long, value_name = "N", default_value_t = 2)]
    cpus: u8,
    /// Directory that receives what the command leaves in $CUBE_TESTBED_OUT; made if absent
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, value_name = "CMD")]
    command: Vec<OsString>,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    apt::ensure(&[apt::TESTBED])?;
    let outer = Outer::find_or_make(&Cache::of_user()?)?.0;
    let limits = Limits {
        timeout: Duration::from_secs(options.timeout),
        silence: None,
        memory_mib: options.memory,
        cpus: options.cpus,
    };
    let mut job = Job::new(&options.command)?;
    if let Some(directory) = &options.out {
        job = job.out(directory)?;
    }
    Ok(ExitCode::from(exec(
        &outer,
        &limits,
        &job,
        std::io::stdout(),
    )?))
}

/// The step that makes the outer machine ready.
pub(crate) fn step(steps: &mut Steps) -> Result<Outer> {
    steps.step("testbed machine", || {
        apt::ensure(&[apt::TESTBED])?;
        let (outer, cached) = Outer::find_or_make(&Cache::of_user()?)?;
        Ok((outer, Outcome::from(cached)))
    })
}

/// Runs a job in the outer machine and gives its exit status, or [`TIMED_OUT`], or [`DIED`]. Its standard output goes to
/// `sink`, its standard error to this process's.
pub(crate) fn exec(
    outer: &Outer,
    limits: &Limits,
    job: &Job,
    sink: impl Write + Send + 'static,
) -> Result<u8> {
    machine::run(outer, limits, job, sink)
}
