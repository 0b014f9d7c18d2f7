//! `cube exec`: a further process in a container of a running pod.
#![forbid(unsafe_code)]

use std::io::{self, IsTerminal};

use clap::Args;
use cube_guest::{ProcessSpec, TerminalSize};

use super::failure::Failure;
use super::logs::container;
use super::relay::{OnSignal, Process, Streams};
use super::signals::Signals;
use super::stdio::Relays;
use super::terminal::{self, RawMode};
use crate::client::{PodApi, base_directory};
use crate::pod::api::body::{CreateExec, ExecCreated};

/// Run a command in a container of a running pod.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cube exec web -- ls /
  cube exec -it web -- sh                  a shell on this terminal
  tar c . | cube exec -i web -- tar x      standard input passed on

Exit status: that of the command; 128 + N if signal N killed it; 126 or 127 if it cannot be executed or found;
1 if Cube failed, 2 if the arguments are wrong.")]
pub(crate) struct ExecArgs {
    /// Pass standard input on.
    #[arg(long, short)]
    interactive: bool,

    /// Give the command a terminal.
    #[arg(long, short)]
    tty: bool,

    /// Set a variable. May be given many times.
    #[arg(long, short, value_name = "NAME=VALUE")]
    env: Vec<String>,

    /// Working directory.
    #[arg(long, short, value_name = "DIR", default_value = "")]
    workdir: String,

    /// User, and group: names or numbers.
    #[arg(long, short, value_name = "USER[:GROUP]", default_value = "")]
    user: String,

    /// The container; may be left out if the pod has one only.
    #[arg(long, short, value_name = "NAME")]
    container: Option<String>,

    /// The pod.
    pod: String,

    /// Command and arguments.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Runs `cube exec`.
pub(crate) fn run(arguments: ExecArgs) -> Result<u8, Failure> {
    if arguments.interactive && arguments.tty && !io::stdin().is_terminal() {
        return Err(Failure::usage(
            "-i with -t needs a terminal as standard input: leave -t out to pass a pipe or file on",
        ));
    }
    let base = base_directory().map_err(Failure::new)?;
    let api = PodApi::of(&base, &arguments.pod);
    let container = container(&api, arguments.container.as_deref())?;
    let (interactive, tty) = (arguments.interactive, arguments.tty);
    let body = CreateExec {
        process: ProcessSpec {
            argv: arguments.command,
            env: arguments.env,
            cwd: arguments.workdir,
            user: arguments.user,
            ..ProcessSpec::default()
        },
        stdin: interactive && !tty,
        terminal: tty.then(|| {
            terminal::size().unwrap_or(TerminalSize {
                rows: 24,
                columns: 80,
            })
        }),
    };
    let mut signals = Signals::catch().map_err(Failure::new)?;
    let path = format!("/v1/containers/{container}/execs");
    let ExecCreated { exec } = api.call("POST", &path, &body).map_err(Failure::new)?;
    let process = Process {
        api: &api,
        path: format!("/v1/execs/{exec}"),
    };
    let relays = Relays::new().map_err(Failure::new)?;
    let raw = (interactive && tty).then(RawMode::enter).transpose();
    let raw = raw.map_err(Failure::new)?;
    let outputs = process.attach(&relays, Streams { tty, interactive })?;
    let result = process.relay(&relays, &mut signals, OnSignal::Forward, outputs);
    drop(raw);
    result?;
    process.status()
}
