//! `cube ps`: the pods that run here, and their containers.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Args;

use super::failure::Failure;
use super::images::{json, print};
use super::pod_net::sweep;
use crate::client::{ApiError, base_directory, detached};
use crate::pod::api::body::{ContainerState, PodStatus};

/// List the pods that run here, with their containers.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cube ps
  cube ps --json | jq -r '.[].id'")]
pub(crate) struct PsArgs {
    /// Print what the pods' APIs say, as JSON.
    #[arg(long)]
    json: bool,

    /// Print names only.
    #[arg(long, short, conflicts_with = "json")]
    quiet: bool,
}

/// Runs `cube ps`.
pub(crate) fn run(arguments: &PsArgs) -> Result<ExitCode, Failure> {
    let base = base_directory().map_err(Failure::new)?;
    sweep(&base);
    let mut pods: Vec<PodStatus> = Vec::new();
    for pod in detached::pods(&base).map_err(Failure::new)? {
        match pod.get("/v1/pod") {
            Ok(status) => pods.push(status),
            // It ended since the directory was listed.
            Err(ApiError::NoPod(_) | ApiError::Io(_)) => {}
            Err(error) => return Err(Failure::new(error)),
        }
    }
    let text = if arguments.json {
        json(&pods)
    } else if arguments.quiet {
        pods.iter().map(|pod| format!("{}\n", pod.id)).collect()
    } else {
        table(&pods)
    };
    Ok(print(&text))
}

fn table(pods: &[PodStatus]) -> String {
    let mut rows = vec![["POD", "CONTAINER", "STATE", "SINCE"].map(str::to_owned)];
    for pod in pods {
        if pod.containers.is_empty() {
            let created = pod.created_at.clone();
            rows.push([
                pod.id.clone(),
                "-".to_owned(),
                pod.state.clone(),
                second(&created),
            ]);
        }
        for container in &pod.containers {
            let since = [&container.finished_at, &container.started_at];
            let since = since.into_iter().flatten().next();
            let state = match (container.state, &container.exit) {
                (ContainerState::Exited, Some(exit)) => format!("exited ({})", exit.exit_code),
                (state, _) => format!("{state:?}").to_lowercase(),
            };
            rows.push([
                pod.id.clone(),
                container.id.clone(),
                state,
                second(since.unwrap_or(&container.created_at)),
            ]);
        }
    }
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: Vec<usize> = (0..3).map(|column| width(column).unwrap_or(0)).collect();
    let line = |row: &[String; 4]| {
        let [pod, container, state, since] = row;
        let (p, c, s) = (widths[0], widths[1], widths[2]);
        format!("{pod:p$}  {container:c$}  {state:s$}  {since}\n")
    };
    rows.iter().map(line).collect()
}

/// A time to the second.
fn second(time: &str) -> String {
    let whole = time.split('.').next().unwrap_or(time);
    format!("{}Z", whole.trim_end_matches('Z'))
}
