//! What each route of the API does.
#![forbid(unsafe_code)]

use cube_guest::{Answer, ContainerSpec, HostRequest, ProcessId, Resources, RootFs, TerminalSize};
use serde_json::{Value, json};

use super::api::body::{
    ContainerState, CreateContainer, CreateExec, DiskFile, ExecCreated, Kill, Stop,
};
use super::api::http::{Refusal, Request};
use super::api::routes::{self, Route};
use super::api::server::ConnectionId;
use super::channel::{Channel, Kind};
use super::container::{Container, Exec, stdio};
use super::event_log::EventKind;
use super::feed::{Feed, LogFeed};
use super::pairing::new_token;
use super::pending::Then;
use super::supervisor::{DiskSlots, Supervisor};
use crate::vmm::spec::{DiskPart, DiskSpec, FileSource};

/// Containers that a pod has at one time, those that have ended included.
const MAX_CONTAINERS: usize = 64;
/// Execs that a pod has at one time, those that nobody waited for included.
const MAX_EXECS: usize = 256;
/// Clients attached to one stream.
const MAX_CLIENTS_INPUT: &str = "a client is attached to this stream already";

/// What is sent at once; `None`: the answer comes later.
type Served = Result<Option<(u16, Value)>, Refusal>;

fn unknown(what: &str) -> Refusal {
    Refusal::new(404, format!("the pod has no such {what}"))
}

fn conflict(sentence: impl Into<String>) -> Refusal {
    Refusal::new(409, sentence)
}

/// A name that is a file name too, and that no path can hide in.
fn check_id(id: &str) -> Result<(), Refusal> {
    let good = id.starts_with(|c: char| c.is_ascii_alphanumeric())
        && id.len() <= 63
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    let sentence =
        "a name has 1 to 63 letters, digits, `-`, `_`, `.` and begins with one of the first two";
    good.then_some(())
        .ok_or_else(|| Refusal::field("id", sentence))
}

fn stream_kind(name: &str) -> Result<Kind, Refusal> {
    let kinds = [Kind::Stdin, Kind::Stdout, Kind::Stderr, Kind::Tty];
    kinds
        .into_iter()
        .find(|kind| kind.name() == name)
        .ok_or_else(|| Refusal::new(404, "a stream is stdin, stdout, stderr or tty"))
}

impl Supervisor {
    /// Serves a request: answers it, or notes who waits for the answer.
    pub(crate) fn serve(
        &mut self,
        connection: ConnectionId,
        request: &Request,
        disks: &dyn DiskSlots,
    ) {
        let served = routes::find(&request.method, &request.path)
            .and_then(|(route, segments)| self.route(connection, request, disks, route, &segments));
        match served {
            Ok(Some((204, _))) => self.server.respond(connection, 204, None),
            Ok(Some((status, body))) => self.server.respond(connection, status, Some(&body)),
            Ok(None) => {}
            Err(refusal) => self.server.refuse(connection, &refusal),
        }
    }

    fn route(
        &mut self,
        connection: ConnectionId,
        request: &Request,
        disks: &dyn DiskSlots,
        route: Route,
        segments: &[String],
    ) -> Served {
        let name = segments.first().map_or("", String::as_str);
        let container = || ProcessId::Container(name.to_owned());
        let exec = || ProcessId::Exec(name.to_owned());
        match route {
            Route::Pod => Ok(Some((200, json!(self.status())))),
            Route::Stop => {
                let Stop { grace_ms } = request.json()?;
                self.stop(grace_ms);
                self.stop_waiters.push(connection);
                Ok(None)
            }
            Route::Stats => self.ask(vec![HostRequest::Stats], Then::Stats(connection)),
            Route::Events => self.follow_events(connection, request),
            Route::List => Ok(Some((200, json!(self.status().containers)))),
            Route::Create => self.create(connection, request.json()?, disks),
            Route::Status => Ok(Some((200, json!(self.container(name)?.status())))),
            Route::Remove => self.remove(connection, name),
            Route::Start => self.start(connection, name),
            Route::Kill => self.kill(connection, container(), request),
            Route::Wait => {
                self.container(name)?.waiters.push(connection);
                Ok(None)
            }
            Route::Pause => self.freeze(connection, name, true),
            Route::Resume => self.freeze(connection, name, false),
            Route::Update => {
                let resources: Resources = request.json()?;
                let container = self.container(name)?.spec.id.clone();
                let update = HostRequest::Update {
                    container,
                    resources,
                };
                self.ask(vec![update], Then::Respond(connection))
            }
            Route::Resize => self.resize(connection, container(), request),
            Route::Logs => self.logs(connection, name, request),
            Route::ReopenLog => {
                let log = &mut self.container(name)?.log;
                let path = log.path().display().to_string();
                let failed = |e| conflict(format!("cannot reopen the log {path}: {e}"));
                log.reopen().map_err(failed)?;
                Ok(Some((204, Value::Null)))
            }
            Route::Attach | Route::ExecAttach => {
                self.attach(connection, request, route == Route::ExecAttach, segments)
            }
            Route::Exec => self.exec(connection, name, request.json()?),
            Route::ExecWait => {
                self.known_exec(name)?.waiters.push(connection);
                Ok(None)
            }
            Route::ExecKill => self.kill(connection, exec(), request),
            Route::ExecResize => self.resize(connection, exec(), request),
            Route::Port => self.forward(connection, request, name),
            Route::Interfaces => Ok(Some((200, self.list_interfaces(disks)))),
            Route::AttachInterface => self.attach_interface(connection, request.json()?, disks),
            Route::DetachInterface => self.detach_interface(connection, name, disks),
            Route::LimitInterface => self.limit_interface(name, request.json()?, disks),
        }
    }

    /// Asks the agent; `then` follows when all is answered.
    pub(super) fn ask(&mut self, requests: Vec<HostRequest>, then: Then) -> Served {
        let mut ids = Vec::new();
        for request in requests {
            match self.session.request(request) {
                Ok(id) => ids.push(id),
                // What was asked before is answered, and nobody waits for it.
                Err(error) => return Err(Refusal::new(503, error.to_string())),
            }
        }
        self.pending.add(&ids, then);
        Ok(None)
    }

    fn container(&mut self, id: &str) -> Result<&mut Container, Refusal> {
        self.containers
            .get_mut(id)
            .ok_or_else(|| unknown("container"))
    }

    fn known_exec(&mut self, id: &str) -> Result<&mut Exec, Refusal> {
        self.execs.get_mut(id).ok_or_else(|| unknown("exec"))
    }

    fn follow_events(&mut self, connection: ConnectionId, request: &Request) -> Served {
        let feed = Feed::Events {
            since: request.number("since")?.unwrap_or(0),
            follow: request.switch("follow"),
        };
        self.server.begin_stream(connection, "application/x-ndjson");
        self.feeds.insert(connection, feed);
        Ok(None)
    }

    fn logs(&mut self, connection: ConnectionId, name: &str, request: &Request) -> Served {
        let (tail, follow) = (request.number("tail")?, request.switch("follow"));
        let since = request.query.iter().find(|(key, _)| key == "since");
        let since = since.map(|(_, value)| value.clone());
        let path = self.container(name)?.log.path().to_owned();
        let feed = LogFeed::open(name, &path, tail, since, follow)
            .map_err(|e| conflict(format!("cannot read the log {}: {e}", path.display())))?;
        self.server.begin_stream(connection, "text/plain");
        self.feeds.insert(connection, Feed::Log(feed));
        Ok(None)
    }

    fn create(
        &mut self,
        connection: ConnectionId,
        body: CreateContainer,
        disks: &dyn DiskSlots,
    ) -> Served {
        check_id(&body.id)?;
        if self.containers.contains_key(&body.id) {
            return Err(conflict("the pod has a container of this name"));
        }
        if self.containers.len() >= MAX_CONTAINERS {
            let sentence = format!("the pod has {MAX_CONTAINERS} containers: remove one");
            return Err(conflict(sentence));
        }
        let mut process = body.process;
        process.stdio = stdio(&process.stdio, body.stdin, body.terminal)?;
        let image = self.disk("image", body.image, true)?;
        let writable = body
            .writable
            .map(|file| self.disk("writable", vec![file], false))
            .transpose()?;
        let spec = ContainerSpec {
            id: body.id.clone(),
            rootfs: RootFs {
                image: image.serial.clone(),
                writable: writable.as_ref().map(|disk| disk.serial.clone()),
                read_only: body.read_only_root,
            },
            process,
            resources: body.resources,
            mounts: body.mounts,
            devices: body.devices,
            security: body.security,
            pid_namespace: body.pid_namespace,
        };
        let named = |id: &str| format!("{id}.log");
        let log_path = body
            .log_path
            .unwrap_or_else(|| self.directory.join(named(&body.id)));
        let mut container = Container::new(spec, log_path, Vec::new())
            .map_err(|e| Refusal::field("log_path", format!("cannot open the log: {e}")))?;
        for disk in std::iter::once(image).chain(writable) {
            match disks.attach(&disk) {
                Ok(slot) => container.slots.push(slot),
                Err(sentence) => {
                    container.slots.iter().for_each(|slot| disks.detach(*slot));
                    return Err(conflict(sentence));
                }
            }
        }
        let slots = container.slots.clone();
        let bind = slots
            .iter()
            .map(|slot| HostRequest::BindSlot { slot: *slot });
        let asked = self.ask(bind.collect(), Then::Created(connection, body.id.clone()));
        if asked.is_err() {
            slots.iter().for_each(|slot| disks.detach(*slot));
        } else {
            self.containers.insert(body.id, container);
        }
        asked
    }

    fn disk(
        &mut self,
        field: &str,
        files: Vec<DiskFile>,
        read_only: bool,
    ) -> Result<DiskSpec, Refusal> {
        if files.is_empty() {
            return Err(Refusal::field(field, "a disk needs a file"));
        }
        self.serial += 1;
        let parts = files.into_iter().map(|file| DiskPart {
            file: FileSource::Path(file.path),
            size: file.size,
        });
        Ok(DiskSpec {
            // The disks that came with the machine have other names.
            serial: format!("hot{}", self.serial),
            parts: parts.collect(),
            read_only,
        })
    }

    fn start(&mut self, connection: ConnectionId, name: &str) -> Served {
        let container = self.container(name)?;
        if container.state != ContainerState::Created {
            return Err(conflict("only a container that was created can be started"));
        }
        container.state = ContainerState::Starting;
        let start = HostRequest::Start(Box::new(container.spec.clone()));
        let asked = self.ask(vec![start], Then::Started(connection, name.to_owned()));
        if asked.is_err() {
            self.container(name)?.state = ContainerState::Created;
        }
        asked
    }

    fn remove(&mut self, connection: ConnectionId, name: &str) -> Served {
        let container = self.container(name)?;
        let before = container.state;
        let slots = container.slots.clone();
        let asked = match before {
            ContainerState::Exited => {
                let container = name.to_owned();
                let then = Then::Removed(connection, name.to_owned());
                self.ask(vec![HostRequest::Remove { container }], then)
            }
            ContainerState::Created => self.unbind(connection, name, &slots, None),
            _ => return Err(conflict("the container has not ended: kill it first")),
        };
        if asked.is_ok() {
            self.container(name)?.state = ContainerState::Removing;
        }
        asked
    }

    fn unbind(
        &mut self,
        connection: ConnectionId,
        name: &str,
        slots: &[u16],
        failure: Option<String>,
    ) -> Served {
        let unbind = slots
            .iter()
            .map(|slot| HostRequest::UnbindSlot { slot: *slot });
        self.ask(
            unbind.collect(),
            Then::Unbound(connection, name.to_owned(), failure),
        )
    }

    fn kill(&mut self, connection: ConnectionId, process: ProcessId, request: &Request) -> Served {
        let Kill { signal, all } = request.json()?;
        if !(1..=64).contains(&signal) {
            return Err(Refusal::field(
                "signal",
                "a signal is a number from 1 to 64",
            ));
        }
        self.check_process(&process)?;
        let signal = HostRequest::Signal {
            process,
            signal,
            all,
        };
        self.ask(vec![signal], Then::Respond(connection))
    }

    fn resize(
        &mut self,
        connection: ConnectionId,
        process: ProcessId,
        request: &Request,
    ) -> Served {
        let size: TerminalSize = request.json()?;
        self.check_process(&process)?;
        let resize = HostRequest::Resize { process, size };
        self.ask(vec![resize], Then::Respond(connection))
    }

    fn check_process(&mut self, process: &ProcessId) -> Result<(), Refusal> {
        match process {
            ProcessId::Container(id) => self.container(id).map(drop),
            ProcessId::Exec(id) => self.known_exec(id).map(drop),
        }
    }

    fn freeze(&mut self, connection: ConnectionId, name: &str, frozen: bool) -> Served {
        let wanted = match frozen {
            true => ContainerState::Running,
            false => ContainerState::Paused,
        };
        if self.container(name)?.state != wanted {
            let sentence = "only a running container can be paused, and only a paused one resumed";
            return Err(conflict(sentence));
        }
        let container = name.to_owned();
        let request = match frozen {
            true => HostRequest::Pause { container },
            false => HostRequest::Resume { container },
        };
        let then = Then::Frozen(connection, name.to_owned(), frozen);
        self.ask(vec![request], then)
    }

    fn exec(&mut self, connection: ConnectionId, name: &str, body: CreateExec) -> Served {
        if self.container(name)?.state != ContainerState::Running {
            return Err(conflict("the container does not run"));
        }
        if self.execs.len() >= MAX_EXECS {
            // Their clients never asked how they ended.
            self.execs.retain(|_, exec| exec.exit.is_none());
        }
        if self.execs.len() >= MAX_EXECS {
            return Err(conflict(format!("the pod runs {MAX_EXECS} execs already")));
        }
        let mut process = body.process;
        process.stdio = stdio(&process.stdio, body.stdin, body.terminal)?;
        self.serial += 1;
        let exec = format!("exec{}", self.serial);
        let known = Exec::new(name, &process.stdio);
        let request = HostRequest::Exec {
            container: name.to_owned(),
            exec: exec.clone(),
            process: Box::new(process),
        };
        let asked = self.ask(vec![request], Then::ExecStarted(connection, exec.clone()))?;
        self.execs.insert(exec, known);
        Ok(asked)
    }

    fn attach(
        &mut self,
        connection: ConnectionId,
        request: &Request,
        is_exec: bool,
        segments: &[String],
    ) -> Served {
        let [name, stream] = segments else {
            return Err(unknown("stream"));
        };
        let kind = stream_kind(stream)?;
        if !request.upgrade {
            return Err(Refusal::new(426, "a stream needs `Upgrade: cube-stream`"));
        }
        let channels = match is_exec {
            true => &mut self.known_exec(name)?.channels,
            false => &mut self.container(name)?.channels,
        };
        let channel = channels.iter_mut().find(|channel| channel.kind() == kind);
        let channel = channel.ok_or_else(|| unknown("stream"))?;
        if channel.has_client() && (is_exec || kind == Kind::Stdin) {
            return Err(conflict(MAX_CLIENTS_INPUT));
        }
        // Borrowed apart: the server is another field.
        let containers = &mut self.containers;
        if let Some((socket, first)) = self.server.upgrade(connection) {
            let channels = match is_exec {
                true => self.execs.get_mut(name).map(|e| &mut e.channels),
                false => containers.get_mut(name).map(|c| &mut c.channels),
            };
            let mut channels = channels.into_iter().flatten();
            if let Some(channel) = channels.find(|channel| channel.kind() == kind) {
                channel.attach(socket, first);
            }
        }
        Ok(None)
    }

    fn forward(&mut self, connection: ConnectionId, request: &Request, port: &str) -> Served {
        let port: u16 = port
            .parse()
            .map_err(|_| Refusal::new(404, "a port is a number from 1 to 65535"))?;
        if !request.upgrade {
            return Err(Refusal::new(426, "a stream needs `Upgrade: cube-stream`"));
        }
        let token = new_token().map_err(|e| Refusal::new(503, e.to_string()))?;
        let forward = HostRequest::Forward { port, token };
        let asked = self.ask(vec![forward], Then::Forwarded(connection, token))?;
        self.ports.push(Channel::new(Kind::Port, token, true));
        Ok(asked)
    }

    /// Goes on when the agent has answered.
    pub(crate) fn go_on(
        &mut self,
        then: Then,
        result: Result<Answer, String>,
        disks: &dyn DiskSlots,
    ) {
        let failure = result.as_ref().err().cloned();
        match then {
            Then::Respond(connection) => self.tell(connection, failure),
            Then::Stats(connection) => match result {
                Ok(Answer::Stats(stats)) => {
                    self.server.respond(connection, 200, Some(&json!(stats)));
                }
                _ => self.tell(connection, failure),
            },
            Then::Created(connection, id) => self.created(connection, &id, failure),
            Then::Started(connection, id) => {
                if failure.is_some()
                    && let Some(container) = self.containers.get_mut(&id)
                {
                    container.state = ContainerState::Created;
                }
                self.tell(connection, failure);
            }
            Then::Frozen(connection, id, frozen) => {
                if let Some(container) = self.containers.get_mut(&id)
                    && failure.is_none()
                    && container.state != ContainerState::Exited
                {
                    container.state = match frozen {
                        true => ContainerState::Paused,
                        false => ContainerState::Running,
                    };
                }
                self.tell(connection, failure);
            }
            Then::Removed(connection, id) => self.removed(connection, &id, failure),
            Then::Unbound(connection, id, why) => {
                if let Some(container) = self.containers.remove(&id) {
                    container.slots.iter().for_each(|slot| disks.detach(*slot));
                }
                self.execs.retain(|_, exec| exec.container != id);
                if why.is_none() {
                    self.events.push(EventKind::Removed, Some(&id), None);
                }
                self.tell(connection, why);
            }
            Then::ExecStarted(connection, exec) => match failure {
                None => {
                    let created = ExecCreated { exec };
                    self.server.respond(connection, 201, Some(&json!(created)));
                }
                failure => {
                    self.execs.remove(&exec);
                    self.tell(connection, failure);
                }
            },
            Then::Forwarded(connection, token) => self.forwarded(connection, token, failure),
            Then::Interface(step) => self.interface_step(step, failure, disks),
        }
    }

    pub(super) fn tell(&mut self, connection: ConnectionId, failure: Option<String>) {
        match failure {
            None => self.server.respond(connection, 204, None),
            Some(sentence) => self.server.refuse(connection, &conflict(sentence)),
        }
    }

    fn created(&mut self, connection: ConnectionId, id: &str, failure: Option<String>) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        if failure.is_none() {
            container.state = ContainerState::Created;
            let status = json!(container.status());
            self.server.respond(connection, 201, Some(&status));
            return;
        }
        container.state = ContainerState::Removing;
        let slots = container.slots.clone();
        if let Err(refusal) = self.unbind(connection, id, &slots, failure) {
            self.server.refuse(connection, &refusal);
        }
    }

    fn removed(&mut self, connection: ConnectionId, id: &str, failure: Option<String>) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        if failure.is_some() {
            container.state = ContainerState::Exited;
            return self.tell(connection, failure);
        }
        let slots = container.slots.clone();
        if let Err(refusal) = self.unbind(connection, id, &slots, None) {
            self.server.refuse(connection, &refusal);
        }
    }

    fn forwarded(&mut self, connection: ConnectionId, token: u64, failure: Option<String>) {
        if failure.is_some() {
            self.ports.retain(|channel| channel.token() != token);
            return self.tell(connection, failure);
        }
        let upgraded = self.server.upgrade(connection);
        let channel = self.ports.iter_mut().find(|c| c.token() == token);
        match (upgraded, channel) {
            (Some((socket, first)), Some(channel)) => channel.attach(socket, first),
            // The client has gone meanwhile.
            _ => self.ports.retain(|channel| channel.token() != token),
        }
    }
}
