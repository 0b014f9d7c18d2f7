//! The supervisor: machine, agent and API in one poll loop, on `main` of the pod process.
//!
//! ```text
//!             ┌── machine: its end, a device's failure, signals
//!  poll ──────┼── session: the agent's events and replies, new streams      one owner of everything,
//!             ├── channels: bytes between processes and clients             no thread, no lock
//!             └── server: requests of the API
//! ```
//!
//! The pod process is the source of truth: whoever started it may die, unless the pod was given a lifetime,
//! with which it ends. The pod's directory is locked for as long as the process lives and removed at its end.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use cube_guest::{Answer, HostRequest, PodSpec, VolumeSpec};
use rustix::event::{PollFlags, Timespec};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::api::body::{BootStage, ContainerState, PodStatus};
use super::api::server::{Call, ConnectionId, Limits, Server};
use super::channel::{Channel, PIECE};
use super::container::{Container, Exec, now};
use super::event_log::{EventKind, EventLog};
use super::feed::Feed;
use super::interfaces::Interfaces;
use super::listen::Ports;
use super::machinery::{self, Machinery};
use super::pending::Pending;
use super::ready::Ready;
use super::session::{Session, SessionEvent};
use super::upload::Upload;
use super::volume::Volume;
use crate::vmm::command::Attendant;
use crate::vmm::exit::{End, StopCause};
use crate::vmm::files;
use crate::vmm::machine::Running;
use crate::vmm::signals::StopSignals;

/// Name of the API's socket in the pod directory.
pub const API_SOCKET: &str = "api.sock";
/// Name of the vsock device's host socket in the pod directory.
pub const VSOCK_SOCKET: &str = "vsock.sock";
/// Beyond its grace period a guest has so long to power off.
const POWER_OFF: Duration = Duration::from_secs(5);

/// What the pod process is told of its pod, beside the machine. JSON.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PodFile {
    /// Name of the pod.
    pub id: String,
    /// Its directory, which this process owns from now on.
    pub directory: PathBuf,
    /// Inherited descriptor that holds the directory's lock.
    pub lock_fd: i32,
    /// Inherited descriptor that listens on [`API_SOCKET`]: clients can connect before the pod serves.
    pub api_fd: i32,
    /// Inherited descriptor that holds the lock of the pod's network: what made it is undone by the next command
    /// after this process.
    #[serde(default)]
    pub network_lock_fd: Option<i32>,
    /// What the guest runs: the same as in its initramfs.
    pub guest: PodSpec,
    /// Of each container in `guest`: the slots of its disks, and its log.
    pub containers: BTreeMap<String, FirstContainer>,
    /// Of each volume in `guest` that is on a disk: the disk's slot.
    #[serde(default)]
    pub volume_slots: BTreeMap<String, u16>,
}

/// A container that starts with the pod.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FirstContainer {
    /// Slots of its disks.
    pub slots: Vec<u16>,
    /// Where its output goes; absent: it has no log, and its output waits in the guest for a client.
    #[serde(default)]
    pub log_path: Option<PathBuf>,
    /// Whether its standard input ends with its first client.
    #[serde(default)]
    pub stdin_once: bool,
}

/// A pod, supervised.
pub(crate) struct Supervisor {
    pub(super) id: String,
    pub(super) directory: PathBuf,
    pub(super) server: Server,
    pub(super) session: Session,
    pub(super) containers: BTreeMap<String, Container>,
    pub(super) execs: BTreeMap<String, Exec>,
    /// Forwarded ports, and files being read.
    pub(super) streams: Vec<Channel>,
    /// Sets of files on their way into volumes.
    pub(super) uploads: Vec<Upload>,
    pub(super) volumes: BTreeMap<String, Volume>,
    pub(super) addresses: Vec<IpAddr>,
    pub(super) interfaces: Interfaces,
    pub(super) events: EventLog,
    pub(super) pending: Pending,
    pub(super) feeds: BTreeMap<ConnectionId, Feed>,
    pub(super) agent_version: Option<String>,
    /// When a guest that was asked to stop is ended.
    pub(super) stop_by: Option<Instant>,
    pub(super) stop_waiters: Vec<ConnectionId>,
    /// Counts disks and execs: no name is used twice.
    pub(super) serial: u64,
    guest_ports: Ports,
    created_at: String,
    /// Why the pod cannot go on.
    broken: Option<String>,
    /// What every stream is copied through.
    buffer: Box<[u8]>,
    /// The pod ends when nobody holds the other end of this.
    lifetime: Option<OwnedFd>,
    /// Of the pod's directory, and of its network.
    _locks: Vec<OwnedFd>,
}

/// Makes the supervisor of the pod that `file` describes: its sockets are there when this returns. With a
/// `lifetime`, the pod ends when nobody holds the other end of that.
///
/// # Errors
/// A sentence for a person.
pub fn open(file: File, lifetime: Option<OwnedFd>) -> Result<Box<dyn Attendant>, String> {
    Ok(Box::new(Supervisor::of(file, lifetime)?))
}

fn read(file: File) -> Result<PodFile, String> {
    let mut text = Vec::new();
    { file }
        .read_to_end(&mut text)
        .map_err(|error| format!("cannot read its description: {error}"))?;
    // Not the parser's whole sentence: it may quote a value.
    serde_json::from_slice(&text)
        .map_err(|e| format!("its description is malformed at column {}", e.column()))
}

impl Supervisor {
    /// The supervisor of the pod that `file` describes, with what that says it inherits.
    pub(super) fn of(file: File, lifetime: Option<OwnedFd>) -> Result<Self, String> {
        let pod = read(file)?;
        let locks = std::iter::once(pod.lock_fd).chain(pod.network_lock_fd);
        let locks: io::Result<Vec<OwnedFd>> = locks.map(files::inherited).collect();
        let locks = locks.map_err(|error| format!("cannot take its locks: {error}"))?;
        let api = files::inherited(pod.api_fd)
            .and_then(|fd| Server::new(UnixListener::from(fd), Limits::default()))
            .map_err(|error| format!("cannot take its API's socket: {error}"))?;
        let mut supervisor = Self::new(pod, locks, api)?;
        supervisor.lifetime = lifetime;
        Ok(supervisor)
    }

    /// The supervisor, listening.
    pub(crate) fn new(pod: PodFile, locks: Vec<OwnedFd>, server: Server) -> Result<Self, String> {
        let guest_ports =
            Ports::bind(&pod.directory.join(VSOCK_SOCKET)).map_err(|error| error.to_string())?;
        let mut containers = BTreeMap::new();
        for spec in &pod.guest.containers {
            let first = pod.containers.get(&spec.id);
            let first = first.ok_or_else(|| format!("container {} has no disks", spec.id))?;
            let (path, slots) = (first.log_path.clone(), first.slots.clone());
            let mut container = Container::new(spec.clone(), path, slots, first.stdin_once)
                .map_err(|error| format!("cannot open the log of {}: {error}", spec.id))?;
            container.state = ContainerState::Starting;
            containers.insert(spec.id.clone(), container);
        }
        let volumes = pod.guest.volumes.iter();
        let slot = |spec: &VolumeSpec| pod.volume_slots.get(&spec.name).copied();
        let volumes = volumes.map(|spec| (spec.name.clone(), Volume::of_the_pod(spec, slot(spec))));
        let interfaces = pod.guest.network.iter().flat_map(|n| &n.interfaces);
        let addresses = interfaces.flat_map(|interface| &interface.addresses);
        Ok(Self {
            volumes: volumes.collect(),
            addresses: addresses.map(|cidr| cidr.address).collect(),
            session: Session::new(&pod.guest),
            id: pod.id,
            directory: pod.directory,
            server,
            containers,
            execs: BTreeMap::new(),
            streams: Vec::new(),
            uploads: Vec::new(),
            interfaces: Interfaces::default(),
            events: EventLog::default(),
            pending: Pending::default(),
            feeds: BTreeMap::new(),
            agent_version: None,
            stop_by: None,
            stop_waiters: Vec::new(),
            serial: 0,
            guest_ports,
            created_at: now(),
            broken: None,
            buffer: vec![0; PIECE].into(),
            lifetime: None,
            _locks: locks,
        })
    }

    /// Has less patience with streams that do not come.
    #[cfg(test)]
    pub(crate) fn set_stream_patience(&mut self, patience: Duration) {
        self.session.stream_patience = patience;
    }

    /// Descriptors to poll, level-triggered.
    pub(crate) fn interests(&self) -> Vec<(BorrowedFd<'_>, PollFlags)> {
        let mut interests = self.server.interests();
        if self.broken.is_none() {
            interests.extend(self.session.interests());
        }
        let ports = self.guest_ports.interests();
        interests.extend(ports.map(|fd| (fd, PollFlags::IN)));
        for channel in self.channels() {
            channel.interests(&mut interests);
        }
        interests.extend(self.uploads.iter().filter_map(Upload::interest));
        interests.extend(self.lifetime.iter().map(|fd| (fd.as_fd(), PollFlags::IN)));
        interests
    }

    /// Whether the command with which the pod was to end has ended.
    fn is_orphaned(&self, ready: &Ready) -> bool {
        let lifetime = self.lifetime.as_ref();
        lifetime.is_some_and(|fd| ready.has(fd) && files::is_closed(fd))
    }

    fn channels(&self) -> impl Iterator<Item = &Channel> {
        let containers = self.containers.values().flat_map(|c| &c.channels);
        let execs = self.execs.values().flat_map(|e| &e.channels);
        containers.chain(execs).chain(&self.streams)
    }

    /// Does what is ready. Returns the pod's end, if it has come.
    pub(crate) fn turn(
        &mut self,
        machine: &dyn Machinery,
        ready: &Ready,
    ) -> io::Result<Option<End>> {
        self.guest_ports.turn(&mut self.session, ready)?;
        self.turn_session(machine, ready);
        for call in self.server.turn(ready)? {
            match call {
                Call::Request(connection, request) => self.serve(connection, &request, machine),
                Call::Gone(connection) => self.forget_client(connection),
            }
        }
        self.turn_channels(machine, ready);
        self.answer_waiters();
        self.turn_feeds();
        if let Some(error) = &self.broken {
            return Ok(Some(End::Pod(error.clone())));
        }
        if self.is_orphaned(ready) {
            return Ok(Some(End::Stopped(StopCause::LifetimeEnded)));
        }
        let late = self.stop_by.is_some_and(|by| by <= Instant::now());
        Ok(late.then_some(End::Stopped(StopCause::Signal(libc::SIGTERM))))
    }

    /// Nobody waits on `connection` any more.
    fn forget_client(&mut self, connection: ConnectionId) {
        self.feeds.remove(&connection);
        let containers = self.containers.values_mut().map(|c| &mut c.waiters);
        let execs = self.execs.values_mut().map(|e| &mut e.waiters);
        let stop = std::iter::once(&mut self.stop_waiters);
        for waiters in containers.chain(execs).chain(stop) {
            waiters.retain(|waiter| *waiter != connection);
        }
    }

    fn turn_session(&mut self, machine: &dyn Machinery, ready: &Ready) {
        if self.broken.is_some() {
            return;
        }
        let mut events = Vec::new();
        let result = self.session.turn(ready, &mut events);
        for event in events {
            self.take(event, machine);
        }
        if let Err(error) = result {
            self.broken.get_or_insert(error.to_string());
        }
    }

    fn take(&mut self, event: SessionEvent, machine: &dyn Machinery) {
        match event {
            SessionEvent::Ready { version } => {
                self.agent_version = Some(version);
                self.events.push(EventKind::Ready, None, None);
            }
            SessionEvent::Started { container } => {
                if let Some(known) = self.containers.get_mut(&container) {
                    known.started();
                    let kind = match known.restarts {
                        0 => EventKind::Started,
                        _ => EventKind::Restarted,
                    };
                    self.events.push(kind, Some(&container), None);
                }
            }
            SessionEvent::OomKilled { container } => {
                if let Some(known) = self.containers.get_mut(&container) {
                    known.oom_killed();
                    self.events
                        .push(EventKind::OomKilled, Some(&container), None);
                }
            }
            SessionEvent::Exited { container, status } => {
                if let Some(known) = self.containers.get_mut(&container) {
                    known.exited(&status);
                    let code = known.exit.as_ref().map(|exit| exit.exit_code);
                    self.events.push(EventKind::Exited, Some(&container), code);
                }
            }
            SessionEvent::ExecExited { exec, status } => {
                if let Some(exec) = self.execs.get_mut(&exec) {
                    exec.exited(&status);
                }
            }
            SessionEvent::Stream { token, stream } => self.take_stream(token, stream),
            SessionEvent::Reply { id, result } => self.replied(id, result, machine),
            SessionEvent::Failed { reason } => {
                self.broken = Some(format!("the guest could not set the pod up: {reason}"));
            }
            SessionEvent::Closed => {}
        }
    }

    fn take_stream(&mut self, token: u64, stream: UnixStream) {
        if let Some(upload) = self.uploads.iter_mut().find(|u| u.token() == token) {
            // One that cannot be served is closed; the guest then says what it misses.
            let _ = upload.connect(stream);
            return;
        }
        let containers = self.containers.values_mut().flat_map(|c| &mut c.channels);
        let execs = self.execs.values_mut().flat_map(|e| &mut e.channels);
        let mut channels = containers.chain(execs).chain(&mut self.streams);
        if let Some(channel) = channels.find(|channel| channel.token() == token)
            && channel.connect(stream).is_err()
        {
            channel.end();
        }
    }

    fn replied(&mut self, id: u64, result: Result<Answer, String>, machine: &dyn Machinery) {
        if let Some((then, result)) = self.pending.replied(id, result) {
            self.go_on(then, result, machine);
        }
    }

    fn turn_channels(&mut self, machine: &dyn Machinery, ready: &Ready) {
        let buffer = &mut self.buffer;
        for container in self.containers.values_mut() {
            container.turn(ready, buffer);
        }
        let execs = self.execs.values_mut().flat_map(|exec| &mut exec.channels);
        for channel in execs.chain(&mut self.streams) {
            // Without a log nothing of it can fail.
            let _ = channel.turn(ready, buffer, None);
            if machine.takes_streams() {
                channel.pass_on();
            }
        }
        self.streams.retain(|channel| !channel.is_over());
        for upload in &mut self.uploads {
            upload.turn(ready);
        }
    }

    /// Tells whoever waits for an end that has come.
    pub(super) fn answer_waiters(&mut self) {
        let mut answers = Vec::new();
        for container in self.containers.values_mut() {
            if !container.waiters.is_empty()
                && let Some(exit) = container.end()
            {
                let waiters = std::mem::take(&mut container.waiters);
                answers.extend(waiters.into_iter().map(|waiter| (waiter, exit.clone())));
            }
        }
        self.execs.retain(|_, exec| {
            let Some(exit) = exec.end().filter(|_| !exec.waiters.is_empty()) else {
                return true;
            };
            let waiters = std::mem::take(&mut exec.waiters);
            answers.extend(waiters.into_iter().map(|waiter| (waiter, exit.clone())));
            // The status was told; what clients have not read yet, their sockets hold.
            false
        });
        for (connection, exit) in answers {
            self.server.respond(connection, 200, Some(&json!(exit)));
        }
    }

    fn turn_feeds(&mut self) {
        let mut done = Vec::new();
        for (connection, feed) in &mut self.feeds {
            let container = feed.container().map(|id| self.containers.get(id));
            let grew = container.flatten().is_some_and(|known| known.log_grew);
            let ended = container
                .is_some_and(|known| known.is_none_or(|container| container.end().is_some()));
            while feed.is_awake(&self.events, grew, ended) && self.server.is_drained(*connection) {
                let piece = feed.next(&self.events, ended);
                self.server.send(*connection, &piece.bytes);
                if piece.last {
                    done.push(*connection);
                }
                if !piece.more {
                    break;
                }
            }
        }
        for connection in done {
            self.feeds.remove(&connection);
            self.server.finish(connection);
        }
        for container in self.containers.values_mut() {
            container.log_grew = false;
        }
    }

    /// As the API shows it.
    pub(super) fn status(&self, machine: &dyn Machinery) -> PodStatus {
        let state = match (self.stop_by, &self.agent_version) {
            (Some(_), _) => "stopping",
            (None, Some(_)) => "ready",
            (None, None) => "starting",
        };
        PodStatus {
            id: self.id.clone(),
            state: state.to_owned(),
            created_at: self.created_at.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            agent_version: self.agent_version.clone(),
            pid: std::process::id(),
            addresses: self.addresses.clone(),
            timeline: BootStage::of(&machine.timeline()),
            containers: self.containers.values().map(Container::status).collect(),
        }
    }

    /// Asks the guest to end; the machine is ended if it does not.
    pub(super) fn stop(&mut self, grace_ms: u32) {
        self.events.push(EventKind::Stopping, None, None);
        let asked = self.session.request(HostRequest::Shutdown { grace_ms });
        let patience = match asked {
            Ok(_) => Duration::from_millis(grace_ms.into()) + POWER_OFF,
            // No agent, no grace.
            Err(_) => Duration::ZERO,
        };
        let by = Instant::now() + patience;
        self.stop_by = Some(self.stop_by.map_or(by, |before| before.min(by)));
    }

    fn timeout(&self) -> Option<Timespec> {
        let streams = self.session.deadline().filter(|_| self.broken.is_none());
        let deadlines = [self.server.deadline(), self.stop_by, streams];
        let next = deadlines.into_iter().flatten().min()?;
        // A feed whose file grew between the turn and the poll is turned by what made it grow.
        Timespec::try_from(next.saturating_duration_since(Instant::now())).ok()
    }

    /// Sleeps until something is ready: of what this polls, or of `more`.
    pub(crate) fn wait(&self, more: &[BorrowedFd<'_>]) -> io::Result<Ready> {
        let mut interests = self.interests();
        interests.extend(more.iter().map(|fd| (*fd, PollFlags::IN)));
        Ok(Ready::wait(interests, self.timeout().as_ref())?)
    }

    fn remove_directory(&self) {
        // What cannot be removed now is swept by the next command.
        let _ = fs::remove_dir_all(&self.directory);
    }

    /// Takes what the guest said before its end, and what clients have asked: nothing more will come. A pod that ends
    /// with its command keeps what that is slow to take, and the status that follows it.
    fn drain(&mut self) {
        let until = Instant::now() + POWER_OFF;
        loop {
            let keeps = self.lifetime.is_some() && self.channels().any(Channel::is_owed);
            let at_once = Timespec::default();
            let patience = (!keeps).then_some(&at_once);
            let ready = Ready::wait(self.interests(), patience).unwrap_or_default();
            let over = !keeps && (ready.is_empty() || until <= Instant::now());
            // The end is known: another that a turn finds is none.
            if over || self.is_orphaned(&ready) || self.turn(&machinery::Ended, &ready).is_err() {
                break;
            }
        }
        self.answer_waiters();
    }
}

impl Attendant for Supervisor {
    fn attend(&mut self, machine: &Running, signals: &StopSignals) -> io::Result<End> {
        loop {
            let failure = machine.device_failure().unwrap_or(machine.ended());
            let ready = self.wait(&[machine.ended(), signals.as_fd(), failure])?;
            if ready.has(&failure) {
                machine.check_devices();
            }
            let end = self.turn(machine, &ready)?;
            if let Some(end) = machine.end().or(end) {
                return Ok(end);
            }
            if ready.has(signals)
                && let Some(number) = signals.next()
            {
                if self.stop_by.is_some() {
                    return Ok(End::Stopped(StopCause::Signal(number)));
                }
                self.stop(10_000);
            }
        }
    }

    fn ended(mut self: Box<Self>, end: &End) {
        self.drain();
        self.events.end(end.to_string());
        self.turn_feeds();
        self.remove_directory();
        let body = json!({ "ended": end.to_string() });
        for connection in std::mem::take(&mut self.stop_waiters) {
            self.server.respond(connection, 200, Some(&body));
        }
        self.server.close();
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.remove_directory();
    }
}
