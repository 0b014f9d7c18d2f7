//! A pod that outlives the command that started it: its process owns its directory and serves its API.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::io::BufRead;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use cube_guest::{VolumeSource, VolumeSpec};

use super::api::{ApiError, PodApi};
use super::pod::{PodError, PodRequest, machine_spec};
use super::run_dir::{RunDir, RunDirError, living};
use super::vmm_process::{Inherited, Messages, start_detached};
use crate::pod::event_log::{EventKind, PodEventRecord};
use crate::pod::supervisor::{API_SOCKET, FirstContainer, PodFile, VSOCK_SOCKET};

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
        let directory = RunDir::create(base, &request.id)?;
        let path = directory.path().to_owned();
        let log_directory = options.log_directory.as_ref().unwrap_or(&path);
        let listener = UnixListener::bind(path.join(API_SOCKET))?;
        let containers = &request.guest.containers;
        let first = (0_u16..).zip(containers).map(|(index, container)| {
            let first = FirstContainer {
                slots: vec![index * 2, index * 2 + 1],
                log_path: log_directory.join(format!("{}.log", container.id)),
                stdin_once: options.stdin_once.contains(&container.id),
            };
            (container.id.clone(), first)
        });
        let first: BTreeMap<String, FirstContainer> = first.collect();
        let volume_slots = volume_slots(&request);
        let lock = directory.lock_copy()?;
        let pod = PodFile {
            id: request.id.clone(),
            directory: path.clone(),
            lock_fd: lock.as_raw_fd(),
            api_fd: listener.as_raw_fd(),
            network_lock_fd: options.network_lock.as_ref().map(AsRawFd::as_raw_fd),
            guest: request.guest.clone(),
            containers: first,
            volume_slots,
        };
        let api = PodApi::of(base, &request.id);
        let containers = request.guest.containers.len();
        let program = request.install.vmm.clone();
        let mut inherited = Inherited::default();
        let mut spec = machine_spec(request, path.join(VSOCK_SOCKET), &mut inherited)?;
        spec.spare_slots = crate::vmm::layout::MAX_SLOTS
            .saturating_sub(spec.slots())
            .try_into()
            .unwrap_or(0);
        let mut others = vec![lock.as_raw_fd(), listener.as_raw_fd()];
        others.extend(pod.network_lock_fd);
        let pod = serde_json::to_vec(&pod)?;
        let messages = start_detached(&program, &spec, &pod, inherited, &others)?;
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

/// The slot of each volume that is on a disk: a disk's place among the disks.
fn volume_slots(request: &PodRequest) -> BTreeMap<String, u16> {
    let serials: BTreeMap<&str, u16> = (request.disks.iter().zip(0..))
        .map(|(disk, slot)| (disk.serial.as_str(), slot))
        .collect();
    let of = |volume: &VolumeSpec| match &volume.source {
        VolumeSource::Disk { serial, .. } => {
            Some((volume.name.clone(), *serials.get(serial.as_str())?))
        }
        _ => None,
    };
    request.guest.volumes.iter().filter_map(of).collect()
}

/// The APIs of the pods that live under `base`. A pod of `cube run` has none and is left out.
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
