//! `cube attach`: this terminal becomes that of a container that runs.
#![forbid(unsafe_code)]

use std::io::{self, IsTerminal};

use clap::Args;

use super::failure::Failure;
use super::logs::container;
use super::relay::{OnSignal, Over, Process, Streams};
use super::signals::Signals;
use super::stdio::Relays;
use super::terminal::{self, RawMode};
use crate::client::{PodApi, base_directory};
use crate::pod::api::body::ContainerStatus;

/// Show what a running container writes from now on, until it ends.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cube attach web
  cube attach -i web main        standard input passed on

Ctrl-C ends this command and not the container. On a container's terminal with -i every key is the
container's; Ctrl-P Ctrl-Q leaves it.

Exit status: that of the container; 0 if it was left by the keys, 128 + N if signal N ended this command;
1 if Cube failed, 2 if the arguments are wrong.")]
pub(crate) struct AttachArgs {
    /// Pass standard input on.
    #[arg(long, short)]
    interactive: bool,

    /// The pod.
    pod: String,

    /// The container; may be left out if the pod has one only.
    container: Option<String>,
}

/// Runs `cube attach`.
pub(crate) fn run(arguments: &AttachArgs) -> Result<u8, Failure> {
    let base = base_directory().map_err(Failure::new)?;
    let api = PodApi::of(&base, &arguments.pod);
    let name = container(&api, arguments.container.as_deref())?;
    let path = format!("/v1/containers/{name}");
    let status: ContainerStatus = api.get(&path).map_err(Failure::new)?;
    let (tty, interactive) = (status.terminal, arguments.interactive);
    if interactive && tty && !io::stdin().is_terminal() {
        return Err(Failure::usage(
            "the container has a terminal: -i needs one as standard input too",
        ));
    }
    let mut signals = Signals::catch().map_err(Failure::new)?;
    let mut relays = Relays::new().map_err(Failure::new)?;
    if interactive && tty {
        relays.leave_by_keys();
    }
    let process = Process { api: &api, path };
    let raw = (interactive && tty).then(RawMode::enter).transpose();
    let raw = raw.map_err(Failure::new)?;
    let outputs = process.attach(&relays, Streams { tty, interactive })?;
    if tty && let Some(size) = terminal::size() {
        let resize = format!("{}/resize", process.path);
        // Refused only if the container has ended meanwhile.
        let _: Result<(), _> = api.call("POST", &resize, &size);
    }
    let over = process.relay(&relays, &mut signals, OnSignal::Leave, outputs);
    drop(raw);
    match over? {
        Over::Ended => process.status(),
        Over::Left(None) => Ok(0),
        Over::Left(Some(signal)) => Ok(128 | signal),
    }
}
