//! The command line: one command per file. Nothing here is used by the other parts.
//!
//! - [`main`] parses, dispatches, and turns a failure into a sentence and an exit status.
//! - `run` makes a request of the options; `stay` stays with the pod until its container has ended.
//! - `exec` and `attach` are `relay` with a process of a pod that runs.

mod asked;
mod attach;
mod bench;
mod completions;
mod exec;
mod failure;
mod image_disks;
mod images;
mod import;
mod logs;
mod net;
mod net_interfaces;
mod pod;
mod pod_net;
mod pod_spec;
mod pod_volumes;
mod port_forward;
mod process;
mod ps;
mod relay;
mod rm;
mod rmi;
mod run;
mod signals;
mod size;
mod stats;
mod stay;
mod stdio;
mod stop;
mod terminal;
mod timeline;

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use failure::{Failure, STATUS_HELP};

/// Run containers, each pod in a microVM of its own.
#[derive(Debug, Parser)]
#[command(name = "cube", version, propagate_version = true, after_help = format!("\
Examples:
  cube import ./busybox.oci.tar
  cube run busybox -- echo hello
  cube images

{STATUS_HELP}"))]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(Box<run::RunArgs>),
    Pod(Box<pod::PodArgs>),
    Ps(ps::PsArgs),
    Exec(Box<exec::ExecArgs>),
    Attach(attach::AttachArgs),
    Logs(logs::LogsArgs),
    Stats(stats::StatsArgs),
    PortForward(port_forward::PortForwardArgs),
    Rm(rm::RmArgs),
    Stop(stop::StopArgs),
    Images(images::Args),
    Import(import::Args),
    Rmi(rmi::Args),
    Net(net::NetCommand),
    Bench(Box<bench::BenchArgs>),
    Completions(completions::CompletionsArgs),
    /// Print the version.
    Version,
}

/// The program `cube`: parses the arguments of this process and does what they say.
pub fn main() -> ExitCode {
    let origin = timeline::now();
    let arguments = match Cli::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version asked for are no errors; the rest is usage. A closed pipe is neither.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() {
                failure::USAGE
            } else {
                0
            });
        }
    };
    match dispatch(arguments.command, origin) {
        Ok(status) => status,
        Err(failure) => {
            report(&failure);
            ExitCode::from(failure.status)
        }
    }
}

fn dispatch(command: Command, origin: u64) -> Result<ExitCode, Failure> {
    match command {
        Command::Run(arguments) => run::run(*arguments, origin).map(ExitCode::from),
        Command::Pod(arguments) => pod::run(*arguments),
        Command::Ps(arguments) => ps::run(&arguments),
        Command::Exec(arguments) => exec::run(*arguments).map(ExitCode::from),
        Command::Attach(arguments) => attach::run(&arguments).map(ExitCode::from),
        Command::Logs(arguments) => logs::run(&arguments),
        Command::Stats(arguments) => stats::run(&arguments),
        Command::PortForward(arguments) => port_forward::run(&arguments),
        Command::Rm(arguments) => rm::run(&arguments),
        Command::Stop(arguments) => stop::run(&arguments),
        Command::Images(arguments) => images::run(arguments).map_err(Failure::new),
        Command::Import(arguments) => import::run(arguments).map_err(Failure::new),
        Command::Rmi(arguments) => rmi::run(arguments).map_err(Failure::new),
        Command::Net(command) => net::run(command),
        Command::Bench(arguments) => bench::bench(&arguments).map(ExitCode::from),
        Command::Completions(arguments) => Ok(completions::completions(&arguments)),
        Command::Version => Ok(images::print(concat!(
            "cube ",
            env!("CARGO_PKG_VERSION"),
            "\n"
        ))),
    }
}

fn report(failure: &Failure) {
    if failure.sentence.is_empty() {
        return;
    }
    let (red, plain) = if io::stderr().is_terminal() {
        ("\x1b[1;31m", "\x1b[0m")
    } else {
        ("", "")
    };
    // Nobody is left to tell that standard error is closed.
    let _ = writeln!(io::stderr(), "{red}cube:{plain} {}", failure.sentence);
}
