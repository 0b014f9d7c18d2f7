//! A pod that lives: its directory, its process, and the session with its agent.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use cube_guest::network::MacAddress;
use cube_guest::{HostRequest, POD_SPEC_PATH, PodSpec};
use rustix::event::PollFlags;

use super::install::{Install, NamedFile};
use super::run_dir::{RunDir, RunDirError};
use super::vmm_process::{Inherited, MachineEnd, VmmError, VmmProcess};
use crate::pod::{ListenError, Ports, Session, SessionError, SessionEvent, new_token};
use crate::vmm::spec::{
    DiskPart, DiskSpec, InitramfsFile, InitramfsSpec, MachineSpec, NetSpec, RateLimit, VsockSpec,
};

/// The guest's vsock context id. It names the guest within its own machine only.
const GUEST_CID: u32 = 3;
/// Name of the vsock device's host socket in the pod directory.
const VSOCK_SOCKET: &str = "vsock.sock";

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
    /// Its sockets.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Its process.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// The session with its agent.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// What the guest is to run cannot be written as JSON.
    #[error("cannot write the pod's specification: {0}")]
    Spec(#[from] serde_json::Error),
    /// The host is out of something.
    #[error("cannot serve the pod: {0}")]
    Io(#[from] io::Error),
}

/// What happens to a pod.
#[derive(Debug)]
pub enum PodEvent {
    /// The agent's session.
    Session(SessionEvent),
    /// The session broke; the machine was told to end.
    Broken(SessionError),
    /// The machine ended; the last event.
    Ended(MachineEnd),
}

/// A pod. Dropping it ends it and removes its directory.
#[derive(Debug)]
pub struct Pod {
    // Dropped in this order: the process before the directory it works in.
    process: VmmProcess,
    ports: Ports,
    session: Session,
    session_over: bool,
    ended: bool,
    _directory: RunDir,
}

impl Pod {
    /// Starts a pod under `base` ([`super::base_directory`]). The pod dies with this process.
    ///
    /// # Errors
    /// Anything on the host's side; nothing is left behind.
    pub fn start(base: &Path, request: PodRequest) -> Result<Self, PodError> {
        let directory = RunDir::create(base, &request.id)?;
        let vsock = directory.path().join(VSOCK_SOCKET);
        // The guest dials once, so the sockets are there first.
        let ports = Ports::bind(&vsock)?;
        let session = Session::new(&request.guest);
        let mut inherited = Inherited::default();
        let program = request.install.vmm.clone();
        let timeline = request.timeline;
        let spec = machine_spec(request, vsock, &mut inherited)?;
        Ok(Self {
            process: VmmProcess::start(&program, &spec, inherited, timeline)?,
            ports,
            session,
            session_over: false,
            ended: false,
            _directory: directory,
        })
    }

    /// Descriptors to poll, level-triggered.
    pub fn interests(&self) -> Vec<(BorrowedFd<'_>, PollFlags)> {
        let mut interests = if self.session_over {
            Vec::new()
        } else {
            self.session.interests()
        };
        let ports = self.ports.interests();
        let readable = self.process.interests().into_iter().chain(ports);
        interests.extend(readable.map(|fd| (fd, PollFlags::IN)));
        interests
    }

    /// Does what is ready; pushes what happened, in order.
    ///
    /// # Errors
    /// The host cannot serve the pod.
    pub fn turn(&mut self, events: &mut Vec<PodEvent>) -> Result<(), PodError> {
        // Before the sockets: once the process is gone they hold all that will ever come.
        let end = self.process.turn()?.cloned();
        self.ports.turn(&mut self.session)?;
        self.turn_session(events);
        if let Some(end) = end.filter(|_| !self.ended) {
            // Nobody speaks any more, but what was said may take several turns to read.
            while !self.session_over && self.session_has_input()? {
                self.ports.turn(&mut self.session)?;
                self.turn_session(events);
            }
            self.ended = true;
            events.push(PodEvent::Ended(end));
        }
        Ok(())
    }

    fn turn_session(&mut self, events: &mut Vec<PodEvent>) {
        if self.session_over {
            return;
        }
        let mut session_events = Vec::new();
        let result = self.session.turn(&mut session_events);
        self.session_over =
            result.is_err() || matches!(session_events.last(), Some(SessionEvent::Closed));
        events.extend(session_events.into_iter().map(PodEvent::Session));
        if let Err(error) = result {
            events.push(PodEvent::Broken(error));
        }
    }

    fn session_has_input(&self) -> io::Result<bool> {
        let interests = self.session.interests();
        let ports = self.ports.interests();
        let readable = interests.iter().map(|(fd, _)| fd).chain(&ports);
        let mut fds: Vec<_> = readable
            .map(|fd| rustix::event::PollFd::from_borrowed_fd(*fd, PollFlags::IN))
            .collect();
        let now = rustix::event::Timespec::default();
        Ok(rustix::event::poll(&mut fds, Some(&now))? > 0)
    }

    /// Asks the agent for something; its reply carries the id returned.
    ///
    /// # Errors
    /// The session is not ready, or the guest does not read.
    pub fn request(&mut self, request: HostRequest) -> Result<u64, SessionError> {
        self.session.request(request)
    }

    /// Requests that the agent has not answered.
    pub fn unanswered(&self) -> usize {
        self.session.unanswered()
    }

    /// Ends the machine at once; [`PodEvent::Ended`] follows.
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

pub(super) fn machine_spec(
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
