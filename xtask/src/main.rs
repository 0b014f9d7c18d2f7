//! Development tasks, run as `cargo xtask COMMAND`: set the machine up, build the slim kernel, run commands and tests
//! in machines that can boot Linux guests, and show the result.
//!
//! One file per subcommand; the words they share are [`cache`] (built once, found by content hash), [`steps`] and
//! [`progress`] (what the user sees), [`apt`] (packages), [`run`] (child processes).
#![deny(unsafe_code)]

mod apt;
mod bench;
mod binaries;
mod cache;
mod demo;
mod doctor;
mod error;
mod image;
mod kernel;
mod net_root;
mod probe;
mod progress;
mod run;
mod setup;
mod soak;
mod steps;
mod test;
mod testbed;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::error::Error;

/// Cube's development tasks.
#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    disable_version_flag = true
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Set up, build, and run a container from an OCI image in a microVM, with the boot's timeline
    Demo(demo::Options),
    /// Set up, build, check and run every test, those with real guests too
    Test(test::Options),
    /// Make and remove containers in one pod for long: nothing may grow
    Soak(soak::Options),
    /// Measure start-up time and memory, VMM against VMM, or hold the promised numbers against this machine
    Bench(bench::Options),
    /// Install what building and testing need (as root), or list it
    Setup(setup::Options),
    /// Build the slim guest kernel, or find it in the cache
    Kernel(kernel::Options),
    /// Say, by trying, whether this machine can run guests, what is missing and what to do
    Doctor(doctor::Options),
    /// Run a command in a machine that has a complete /dev/kvm, with this machine's files
    Testbed(testbed::Options),
    /// Make an OCI image for tests from Debian packages, or find it in the cache
    Image(image::Options),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Demo(options) => demo::run(&options),
        Command::Test(options) => test::run(&options),
        Command::Soak(options) => soak::run(&options),
        Command::Bench(options) => bench::run(&options),
        Command::Setup(options) => setup::run(&options),
        Command::Kernel(options) => kernel::run(&options),
        Command::Doctor(options) => doctor::run(&options),
        Command::Testbed(options) => testbed::run(&options),
        Command::Image(options) => image::run(&options),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => report(&error),
    }
}

fn report(error: &Error) -> ExitCode {
    eprintln!("error: {error}");
    ExitCode::FAILURE
}
