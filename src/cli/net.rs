//! `cube net`: the networks of pods.
#![forbid(unsafe_code)]

use std::fmt::Write;
use std::process::ExitCode;

use clap::Subcommand;
use serde::Serialize;

use super::failure::Failure;
use super::images::print;
use super::net_interfaces::{self, AttachArgs, DetachArgs};
use super::pod_net::networks;
use crate::client::base_directory;
use crate::net::cni::result::AddResult;
use crate::net::{Networks, Record};

/// Arguments of `cube net`.
#[derive(Debug, clap::Args)]
#[command(about = "Look at the networks of pods, attach and detach interfaces")]
pub(crate) struct NetCommand {
    #[command(subcommand)]
    command: NetSubcommand,
}

#[derive(Debug, Subcommand)]
enum NetSubcommand {
    Ls(LsArgs),
    Attach(Box<AttachArgs>),
    Detach(DetachArgs),
}

/// Arguments of `cube net ls`.
#[derive(Debug, clap::Args)]
#[command(
    about = "List the networks of pods",
    after_help = "\
Examples:
  cube net ls
  cube net ls --check      ask the CNI plug-ins whether each network is as they made it
  cube net ls --json

What a pod that was killed has left is removed first, as by every command that makes a network."
)]
struct LsArgs {
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
    /// Ask the plug-ins (CHECK) whether each network is as they made it
    #[arg(long)]
    check: bool,
}

/// A pod's network in JSON output.
#[derive(Debug, Serialize)]
struct Row {
    pod: String,
    network: String,
    interface: String,
    addresses: Vec<String>,
    namespace: String,
    /// `up`, `being made`, `left behind`; or what CHECK found.
    state: String,
}

pub(crate) fn run(command: NetCommand) -> Result<ExitCode, Failure> {
    match command.command {
        NetSubcommand::Ls(arguments) => list(&arguments),
        NetSubcommand::Attach(arguments) => net_interfaces::attach(*arguments),
        NetSubcommand::Detach(arguments) => net_interfaces::detach(&arguments),
    }
}

fn list(arguments: &LsArgs) -> Result<ExitCode, Failure> {
    let networks = networks(&base_directory().map_err(Failure::new)?);
    if let Err(error) = networks.sweep() {
        eprintln!("cube: {error}");
    }
    let listed = networks.list().map_err(Failure::new)?;
    let rows = listed
        .into_iter()
        .map(|(record, lives)| row(&networks, record, lives, arguments.check));
    let rows: Vec<Row> = rows.collect();
    let text = if arguments.json {
        let mut json = serde_json::to_string_pretty(&rows).map_err(Failure::new)?;
        json.push('\n');
        json
    } else {
        table(&rows)
    };
    Ok(print(&text))
}

fn row(networks: &Networks, record: Record, lives: bool, check: bool) -> Row {
    let result = record
        .result
        .as_ref()
        .and_then(|result| AddResult::parse(result).ok());
    let addresses = result
        .map(|result| result.addresses(&record.interface))
        .unwrap_or_default();
    let state = match (lives, record.complete) {
        (false, _) => "left behind".to_owned(),
        (true, false) => "being made".to_owned(),
        (true, true) if check => match networks.check(&record) {
            Ok(()) => "checked".to_owned(),
            Err(error) => error.to_string(),
        },
        (true, true) => "up".to_owned(),
    };
    Row {
        network: record
            .config
            .get("name")
            .and_then(|name| name.as_str())
            .unwrap_or_default()
            .to_owned(),
        pod: record.pod,
        interface: record.interface,
        addresses: addresses.iter().map(ToString::to_string).collect(),
        namespace: record.namespace,
        state,
    }
}

fn table(rows: &[Row]) -> String {
    let mut text = String::new();
    let mut line = |cells: [&str; 5]| {
        let [pod, network, interface, addresses, state] = cells;
        // A String takes everything.
        let _ = writeln!(
            text,
            "{pod:<14}{network:<14}{interface:<11}{addresses:<42}{state}"
        );
    };
    line(["POD", "NETWORK", "INTERFACE", "ADDRESSES", "STATE"]);
    for row in rows {
        let addresses = row.addresses.join(", ");
        line([
            &row.pod,
            &row.network,
            &row.interface,
            &addresses,
            &row.state,
        ]);
    }
    text
}
