//! A pod that outlives the command that started it: its process owns its directory and serves its API.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::io::BufRead;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use super::api::{ApiError, PodApi};
use super::pod::{PodError, PodRequest};
use super::prepare::{FirstOptions, Prepared};
use super::run_dir::{RunDirError, living};
use super::vmm_process::{Messages, start_detached};
use crate::pod::event_log::{EventKind, PodEventRecord};
use crate::pod::supervisor::API_SOCKET;

/// A pod that was started and may not be ready.
#[derive(Debug)]
pub struct Detached {
    api: PodApi,
    containers: usize,
    messages: Messages,
}

/// What a pod in the background has beside its machine and its guest.
#[derive(Debug, Default)]
pub struct DetachedOptions {
    /// Where the logs go; absent: the pod's own directory, and they go with it.
    pub log_directory: Option<PathBuf>,
    /// The containers whose standard input ends with its first client.
    pub stdin_once: BTreeSet<String>,
    /// The lock of its network: its process holds it for as long as it lives.
    pub network_lock: Option<OwnedFd>,
}

/// It did not become a running pod.
#[derive(Debug, thiserror::Error)]
pub enum DetachedError {
    /// It could not be started.
    #[error(transparent)]
    Start(#[from] PodError),
    /// Its API failed.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// It ended at once.
    #[error("{0}")]
    Ended(String),
}

impl Detached {
    /// Starts a pod whose `request.disks` are two for each container of `request.guest`, in order, and then those of
    /// its volumes.
    ///
    /// # Errors
    /// Anything on the host's side; nothing is left behind.
    pub fn start(
        base: &Path,
        request: PodRequest,
        options: DetachedOptions,
    ) -> Result<Self, PodError> {
        let containers = request.guest.containers.len();
        let DetachedOptions {
            log_directory,
            stdin_once,
            network_lock,
        } = options;
        let first = |directory: &Path, id: &str| FirstOptions {
            log_path: Some(
                log_directory
                    .as_deref()
                    .unwrap_or(directory)
                    .join(format!("{id}.log")),
            ),
            stdin_once: stdin_once.contains(id),
        };
        let mut prepared = Prepared::new(base, request, network_lock, first)?;
        let spec = &mut prepared.spec;
        spec.spare_slots = crate::vmm::layout::MAX_SLOTS
            .saturating_sub(spec.slots())
            .try_into()
            .unwrap_or(0);
        let (messages, directory, api) = prepared.launch(start_detached)?;
        // From here on the directory is the process's.
        directory.hand_over();
        Ok(Self {
            api,
            containers,
            messages,
        })
    }

    /// Waits until the agent is ready and every first container has started, or ended.
    ///
    /// # Errors
    /// The pod ended before; its own sentence says why.
    pub fn wait_ready(self) -> Result<PodApi, DetachedError> {
        match self.follow_start() {
            Ok(true) => Ok(self.api),
            // A pod process that dies takes its socket with it.
            Ok(false) | Err(ApiError::NoPod(_) | ApiError::Io(_)) => {
                Err(DetachedError::Ended(self.messages.at_the_end()))
            }
            Err(error) => Err(error.into()),
        }
    }

    fn follow_start(&self) -> Result<bool, ApiError> {
        let events = self.api.follow("/v1/events?follow=1")?;
        let (mut ready, mut begun) = (false, BTreeSet::new());
        for line in events.lines() {
            let event: PodEventRecord = serde_json::from_str(&line?)?;
            match (event.kind, event.container) {
                (EventKind::Ready, _) => ready = true,
                (EventKind::Started | EventKind::Exited, Some(container)) => {
                    begun.insert(container);
                }
                _ => {}
            }
            if ready && begun.len() == self.containers {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// The APIs of the pods that live under `base`. One whose start has not come to that is left out.
///
/// # Errors
/// The directory cannot be read.
pub fn pods(base: &Path) -> Result<Vec<PodApi>, RunDirError> {
    let names = living(base)?;
    let served = names
        .iter()
        .filter(|name| base.join(name).join(API_SOCKET).exists());
    Ok(served.map(|name| PodApi::of(base, name)).collect())
}
