//! `cube stop`: ends pods.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Args;

use super::failure::Failure;
use crate::client::{ApiError, PodApi, base_directory};
use crate::pod::api::body::Stop;

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
    for pod in &arguments.pods {
        let api = PodApi::of(&base, pod);
        match api.call::<serde_json::Value>("POST", "/v1/pod/stop", &Stop { grace_ms }) {
            // It ended without a word: gone is what was asked for.
            Ok(_) | Err(ApiError::Io(_)) => {}
            Err(error) => return Err(Failure::new(error)),
        }
    }
    Ok(ExitCode::SUCCESS)
}
