//! `cube stop`: ends pods.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Args;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::failure::Failure;
use super::pod_net::sweep;
use crate::client::{ApiError, PodApi, base_directory};
use crate::pod::api::body::{PodStatus, Stop};

/// End pods: SIGTERM to their containers, SIGKILL after a time, and the machine goes.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cube stop web
  cube stop --time 0 $(cube ps -q)    at once, all")]
pub(crate) struct StopArgs {
    /// Seconds between SIGTERM and SIGKILL.
    #[arg(long, short, default_value_t = 10, value_name = "SECONDS",
          value_parser = clap::value_parser!(u32).range(0..=4_000_000))]
    time: u32,

    /// The pods.
    #[arg(required = true, value_name = "POD")]
    pods: Vec<String>,
}

/// Runs `cube stop`.
pub(crate) fn run(arguments: &StopArgs) -> Result<ExitCode, Failure> {
    let base = base_directory().map_err(Failure::new)?;
    let grace_ms = arguments.time.saturating_mul(1000);
    let mut result = Ok(ExitCode::SUCCESS);
    for pod in &arguments.pods {
        let stopped = stop(&PodApi::of(&base, pod), grace_ms);
        result = result.and_then(|status| stopped.map_err(Failure::new).map(|()| status));
    }
    // Their networks are undone, and those of pods that went before.
    sweep(&base);
    result
}

/// Ends a pod and waits until its process has gone: only then its locks are free.
fn stop(api: &PodApi, grace_ms: u32) -> Result<(), ApiError> {
    let process = api.get::<PodStatus>("/v1/pod").map(|status| {
        // Opened before the pod is stopped, so the number is not another process's yet.
        let pid = Pid::from_raw(status.pid.cast_signed())?;
        pidfd_open(pid, PidfdFlags::empty()).ok()
    })?;
    match api.call::<serde_json::Value>("POST", "/v1/pod/stop", &Stop { grace_ms }) {
        // It ended without a word: gone is what was asked for.
        Ok(_) | Err(ApiError::Io(_)) => {}
        Err(error) => return Err(error),
    }
    if let Some(process) = process {
        poll(&mut [PollFd::new(&process, PollFlags::IN)], None).map_err(std::io::Error::from)?;
    }
    Ok(())
}
