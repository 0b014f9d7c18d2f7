//! `cargo xtask soak`: thousands of containers made, started, awaited and removed in one pod, after which its process and
//! `cube-init` hold no more memory and no more descriptors than before.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;

use crate::error::Result;
use crate::steps::{Outcome, Steps, human};
use crate::test::{Parts, guests, place};
use crate::{doctor, setup};

/// The test of the suite that does the same for 300 cycles.
const TEST: &str = "cycles::many_cycles_of_containers_leave_nothing_in_the_pod";
/// What a cycle takes at most, in the testbed on a busy machine; it is 0.3 s on a quiet one.
const CYCLE: Duration = Duration::from_secs(2);
/// The same for everything before the first.
const START: Duration = Duration::from_secs(5 * 60);

/// Options of `cargo xtask soak`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cargo xtask soak                  3,000 cycles: a quarter of an hour in the testbed
  cargo xtask soak --cycles 20000")]
pub(crate) struct Options {
    /// How often a container is created, started, awaited and removed
    #[arg(long, value_name = "N", default_value_t = 3000, value_parser = clap::value_parser!(u32).range(1..))]
    cycles: u32,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let direct = doctor::kvm_runs_linux();
    let mut steps = Steps::new(7 + usize::from(!direct));
    setup::install(&mut steps)?;
    let parts = Parts::make(&mut steps, direct)?;
    let cycles = ("CUBE_E2E_CYCLES", options.cycles.to_string());
    let timeout = START.saturating_add(CYCLE.saturating_mul(options.cycles));
    let held = steps.step(&format!("{} cycles", options.cycles), || {
        eprintln!("{}", place(direct));
        let held = guests::alone(&parts, TEST, cycles, timeout)?;
        Ok((held, Outcome::Done))
    })?;
    println!("all steps took {}", human(steps.elapsed()));
    if !held {
        println!("the soak FAILED: what grew is said above");
        return Ok(ExitCode::FAILURE);
    }
    println!("after {} cycles nothing had grown", options.cycles);
    Ok(ExitCode::SUCCESS)
}
