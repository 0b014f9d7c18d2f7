//! A pod that ends with the command that started it: its process, and its directory.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use cube_guest::PodSpec;
use cube_guest::network::MacAddress;

use super::api::{ApiError, PodApi};
use super::install::{Install, NamedFile};
use super::prepare::{FirstOptions, Prepared};
use super::run_dir::{RunDir, RunDirError};
use super::vmm_process::{MachineEnd, VmmError, VmmProcess};
use crate::pod::new_token;

/// A disk of the pod.
#[derive(Debug)]
pub struct PodDisk {
    /// The virtio-blk serial by which the guest knows it.
    pub serial: String,
    /// Files laid end to end, with the size each must have.
    pub parts: Vec<(NamedFile, Option<u64>)>,
    /// Whether writes are refused.
    pub read_only: bool,
}

/// The host's side of a network interface.
#[derive(Debug)]
pub enum PodLink {
    /// The queues of a tap, with a virtio header of 12 bytes.
    Tap(Vec<NamedFile>),
    /// The socket of a vhost-user backend.
    VhostUser(PathBuf),
}

/// A network interface of the pod.
#[derive(Debug)]
pub struct PodNet {
    /// What messages call it, such as `eth0`.
    pub name: String,
    /// Where its frames go.
    pub link: PodLink,
    /// The guest's address on it.
    pub mac: MacAddress,
    /// MTU in bytes.
    pub mtu: u16,
    /// Whether frames of the guest with another source address are dropped.
    pub check_source: bool,
}

/// What to start.
#[derive(Debug)]
pub struct PodRequest {
    /// Name of the pod: a valid file name.
    pub id: String,
    /// Kernel, init and VMM.
    pub install: Install,
    /// Number of vCPUs.
    pub cpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Disks, in order.
    pub disks: Vec<PodDisk>,
    /// Network interfaces, in order.
    pub nets: Vec<PodNet>,
    /// What the guest runs.
    pub guest: PodSpec,
    /// Whether `cube-vmm` notes its stages ([`Pod::timeline`]).
    pub timeline: bool,
    /// File that receives what the guest's kernel says on its console; absent: it has none.
    pub console: Option<PathBuf>,
}

/// A pod cannot be started or served.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// Its directory.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// Its API's socket.
    #[error("cannot listen on {}: {source}", path.display())]
    Listen {
        /// The socket.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
    /// Its process.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// Its API cannot be asked.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// What the guest is to run cannot be written as JSON.
    #[error("cannot write the pod's specification: {0}")]
    Spec(#[from] serde_json::Error),
    /// The host is out of something.
    #[error("cannot serve the pod: {0}")]
    Io(#[from] io::Error),
}

/// A pod. Dropping it ends it and removes its directory.
#[derive(Debug)]
pub struct Pod {
    // Dropped in this order: the process before the directory it works in.
    process: VmmProcess,
    api: PodApi,
    /// The process removes it too, but not one that is killed.
    _directory: RunDir,
}

impl Pod {
    /// Starts a pod under `base` ([`super::base_directory`]), whose `request.disks` are two for each container of
    /// `request.guest`, in order. It dies with this process. Its containers have no log: their output waits for
    /// clients of its API. What `ask` asks of that without waiting, before there is a process, is what the process
    /// hears first: whoever is attached so misses nothing, however late this process is scheduled again.
    ///
    /// # Errors
    /// Anything on the host's side; nothing is left behind.
    pub fn start<T>(
        base: &Path,
        request: PodRequest,
        ask: impl FnOnce(&PodApi) -> Result<T, ApiError>,
    ) -> Result<(Self, T), PodError> {
        let timeline = request.timeline;
        let options = |_: &Path, _: &str| FirstOptions {
            log_path: None,
            stdin_once: true,
        };
        let prepared = Prepared::new(base, request, None, options)?;
        let asked = ask(&prepared.api)?;
        let (process, _directory, api) =
            prepared.launch(|launch| VmmProcess::start(launch, timeline))?;
        let pod = Self {
            process,
            api,
            _directory,
        };
        Ok((pod, asked))
    }

    /// Its API.
    pub fn api(&self) -> &PodApi {
        &self.api
    }

    /// Descriptors to poll for reading, level-triggered.
    pub fn interests(&self) -> Vec<BorrowedFd<'_>> {
        self.process.interests()
    }

    /// Takes what its process said; returns how the machine ended, once it has.
    ///
    /// # Errors
    /// The process cannot be waited for.
    pub fn turn(&mut self) -> io::Result<Option<&MachineEnd>> {
        self.process.turn()
    }

    /// Ends the machine at once; its end is reported as usual.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// The machine's stages as `cube-vmm` wrote them so far.
    pub fn timeline(&self) -> String {
        self.process.timeline()
    }
}

/// Draws a name for a pod: twelve hexadecimal digits.
///
/// # Errors
/// The kernel's random source is not available.
pub fn new_id() -> io::Result<String> {
    Ok(format!("{:016x}", new_token()?)[..12].to_owned())
}
