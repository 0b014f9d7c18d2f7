//! A pod that is about to be started: its directory, its API's socket, and what its process is told.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use cube_guest::{POD_SPEC_PATH, VolumeSource, VolumeSpec};

use super::api::PodApi;
use super::host_cpuid;
use super::pod::{PodError, PodLink, PodNet, PodRequest};
use super::run_dir::RunDir;
use super::vmm_process::{Inherited, Launch, VmmError};
use crate::pod::supervisor::{API_SOCKET, FirstContainer, PodFile, VSOCK_SOCKET};
use crate::vmm::spec::{
    DiskPart, DiskSpec, InitramfsFile, InitramfsSpec, MachineSpec, NetSpec, RateLimit, VsockSpec,
};

/// The guest's vsock context id. It names the guest within its own machine only.
const GUEST_CID: u32 = 3;

/// What a first container has beside what the guest is told of it.
#[derive(Debug, Default)]
pub(super) struct FirstOptions {
    /// Its log; absent: none.
    pub(super) log_path: Option<PathBuf>,
    /// Whether its standard input ends with its first client.
    pub(super) stdin_once: bool,
}

/// A pod before its process.
#[derive(Debug)]
pub(super) struct Prepared {
    /// The pod's directory.
    pub(super) directory: RunDir,
    /// Its machine.
    pub(super) spec: MachineSpec,
    /// Its API, which takes connections and answers none yet.
    pub(super) api: PodApi,
    program: PathBuf,
    pod: PodFile,
    inherited: Inherited,
    listener: UnixListener,
    lock: File,
    network_lock: Option<OwnedFd>,
}

impl Prepared {
    /// Makes the directory under `base` and listens. `request.disks` are two for each container of
    /// `request.guest`, in order; `options` says more of each, of which it is told the directory and the name.
    pub(super) fn new(
        base: &Path,
        request: PodRequest,
        network_lock: Option<OwnedFd>,
        options: impl Fn(&Path, &str) -> FirstOptions,
    ) -> Result<Self, PodError> {
        let directory = RunDir::create(base, &request.id)?;
        let path = directory.path().to_owned();
        let socket = path.join(API_SOCKET);
        let listener = UnixListener::bind(&socket).map_err(|source| PodError::Listen {
            path: socket,
            source,
        })?;
        let lock = directory.lock_copy()?;
        let containers = (0_u16..).zip(&request.guest.containers);
        let containers = containers.map(|(index, container)| {
            let FirstOptions {
                log_path,
                stdin_once,
            } = options(&path, &container.id);
            let first = FirstContainer {
                slots: vec![index * 2, index * 2 + 1],
                log_path,
                stdin_once,
            };
            (container.id.clone(), first)
        });
        let pod = PodFile {
            id: request.id.clone(),
            directory: path.clone(),
            lock_fd: lock.as_raw_fd(),
            api_fd: listener.as_raw_fd(),
            network_lock_fd: network_lock.as_ref().map(AsRawFd::as_raw_fd),
            containers: containers.collect(),
            volume_slots: volume_slots(&request),
            guest: request.guest.clone(),
        };
        let api = PodApi::of(base, &request.id);
        let program = request.install.vmm.clone();
        let mut inherited = Inherited::default();
        let mut spec = machine_spec(request, path.join(VSOCK_SOCKET), &mut inherited)?;
        spec.cpuid = host_cpuid::kept(base).map(|file| inherited.pass(file));
        Ok(Self {
            directory,
            spec,
            api,
            program,
            pod,
            inherited,
            listener,
            lock,
            network_lock,
        })
    }

    /// Starts the process by `start`. From then on it alone listens: a client sees its end.
    pub(super) fn launch<T>(
        self,
        start: impl FnOnce(Launch<'_>) -> Result<T, VmmError>,
    ) -> Result<(T, RunDir, PodApi), PodError> {
        let mut others: Vec<RawFd> = vec![self.lock.as_raw_fd(), self.listener.as_raw_fd()];
        others.extend(self.pod.network_lock_fd);
        let started = start(Launch {
            program: &self.program,
            spec: &self.spec,
            pod: &serde_json::to_vec(&self.pod)?,
            inherited: self.inherited,
            others: &others,
        })?;
        drop((self.lock, self.listener, self.network_lock));
        Ok((started, self.directory, self.api))
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

fn machine_spec(
    request: PodRequest,
    vsock: PathBuf,
    inherited: &mut Inherited,
) -> Result<MachineSpec, PodError> {
    let pod_file = InitramfsFile {
        path: POD_SPEC_PATH.trim_start_matches('/').to_owned(),
        content: serde_json::to_string(&request.guest)?,
    };
    let disks = request.disks.into_iter().map(|disk| DiskSpec {
        serial: disk.serial,
        parts: disk
            .parts
            .into_iter()
            .map(|(file, size)| DiskPart {
                file: inherited.pass(file),
                size,
            })
            .collect(),
        read_only: disk.read_only,
    });
    let disks = disks.collect();
    let nets = request.nets.into_iter();
    let nets = nets.map(|net| net_spec(net, inherited)).collect();
    Ok(MachineSpec {
        kernel: inherited.pass(request.install.kernel),
        initramfs: Some(InitramfsSpec {
            init: inherited.pass(request.install.init),
            files: vec![pod_file],
        }),
        command_line: String::new(),
        cpus: request.cpus,
        cpuid: None,
        memory_mib: request.memory_mib,
        disks,
        nets,
        vsock: Some(VsockSpec {
            cid: GUEST_CID,
            path: vsock,
        }),
        rng: true,
        huge_pages: false,
        spare_slots: 0,
        console: request.console,
    })
}

fn net_spec(net: PodNet, inherited: &mut Inherited) -> NetSpec {
    let (queues, socket) = match net.link {
        PodLink::Tap(queues) => (queues, None),
        PodLink::VhostUser(socket) => (Vec::new(), Some(socket)),
    };
    let queues = queues.into_iter().map(|queue| inherited.pass_fd(queue));
    NetSpec {
        name: net.name,
        tap_fds: queues.collect(),
        socket,
        mac: net.mac,
        mtu: net.mtu,
        check_source: net.check_source,
        receive_limit: RateLimit::default(),
        transmit_limit: RateLimit::default(),
    }
}
