//! `cube rm`: forgets containers that have ended.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::failure::Failure;
use super::pod_net::sweep;
use crate::client::{ApiError, PodApi, base_directory};
use crate::pod::api::body::{ContainerState, Exit, Kill, PodStatus};

/// SIGKILL (signal(7)).
const KILL: u8 = 9;

/// Remove containers that have ended from a pod: their disks go, their logs stay.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cube rm web                 every container that has ended
  cube rm web job
  cube rm --force web job     also if it runs
  cube stop web               ends the pod itself, which leaves nothing to remove")]
pub(crate) struct RmArgs {
    /// Kill those named that run.
    #[arg(long, short, requires = "containers")]
    force: bool,

    /// The pod.
    pod: String,

    /// The containers; without any, all that have ended.
    containers: Vec<String>,
}

/// Runs `cube rm`.
pub(crate) fn run(arguments: &RmArgs) -> Result<ExitCode, Failure> {
    let base = base_directory().map_err(Failure::new)?;
    sweep(&base);
    let api = PodApi::of(&base, &arguments.pod);
    let mut containers = arguments.containers.clone();
    if containers.is_empty() {
        let pod: PodStatus = api.get("/v1/pod").map_err(Failure::new)?;
        let ended = |state| state == ContainerState::Exited;
        let ended = pod.containers.into_iter().filter(|c| ended(c.state));
        containers.extend(ended.map(|container| container.id));
    }
    for container in containers {
        let removed = remove(&api, &container, arguments.force);
        removed.map_err(|error| Failure::new(format!("{container}: {error}")))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn remove(api: &PodApi, container: &str, force: bool) -> Result<(), ApiError> {
    let path = format!("/v1/containers/{container}");
    if force {
        let kill = Kill {
            signal: KILL,
            all: true,
        };
        match api.call::<()>("POST", &format!("{path}/kill"), &kill) {
            Ok(()) => drop(api.get::<Exit>(&format!("{path}/wait"))?),
            // It does not run.
            Err(ApiError::Refused { status: 409, .. }) => {}
            Err(error) => return Err(error),
        }
    }
    api.call("DELETE", &path, &json!({}))
}
