//! `cargo xtask setup`: the packages that building and testing need.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Args;

use crate::error::Result;
use crate::steps::{Outcome, Steps};
use crate::{apt, doctor};

/// Options of `cargo xtask setup`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cargo xtask setup           install what is missing (as root), or list it and fail
  cargo xtask setup --list    list what is missing, install nothing")]
pub(crate) struct Options {
    /// Only list what is missing, one package a line
    #[arg(long)]
    list: bool,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    if options.list {
        for name in apt::missing(&packages())? {
            println!("{name}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    install(&mut Steps::new(1))?;
    Ok(ExitCode::SUCCESS)
}

/// The step that installs what is missing.
pub(crate) fn install(steps: &mut Steps) -> Result<()> {
    steps.step("packages", || {
        let installed = apt::ensure(&packages())?;
        let note = Outcome::Note("nothing missing".into());
        Ok(((), if installed { Outcome::Done } else { note }))
    })
}

/// What this machine needs; the testbed's only where KVM cannot run a guest.
fn packages() -> Vec<&'static [&'static str]> {
    let mut lists = vec![
        apt::BUILD,
        apt::KERNEL,
        apt::IMAGES,
        apt::NETWORKS,
        apt::NFS,
    ];
    if !doctor::kvm_runs_linux() {
        lists.push(apt::TESTBED);
    }
    lists
}
