//! The lives of containers.
//!
//! ```text
//! Creating ─▶ Created ─▶ Starting ─▶ Running ◀─▶ Paused
//!    disks       │  ▲        ▲          │
//!    attached    │  └────────│─(refused)▼
//!                │           └─────── Exited
//!                └──────▶ Removing ◀────┘
//! ```
#![forbid(unsafe_code)]

use std::path::PathBuf;

use cube_guest::{ContainerSpec, HostRequest, ProcessId, RootFs, Seccomp, TerminalSize};

use super::{Served, check_name, conflict};
use crate::pod::api::body::{ContainerState, CreateContainer, Kill};
use crate::pod::api::http::{Refusal, Request};
use crate::pod::api::server::ConnectionId;
use crate::pod::container::{Container, stdio};
use crate::pod::machinery::Machinery;
use crate::pod::pending::Then;
use crate::pod::seccomp_profile;
use crate::pod::supervisor::Supervisor;
use crate::vmm::spec::DiskSpec;

/// Containers that a pod has at one time, those that have ended included.
const MAX_CONTAINERS: usize = 64;

impl Supervisor {
    pub(super) fn create(
        &mut self,
        connection: ConnectionId,
        mut body: CreateContainer,
        machine: &dyn Machinery,
    ) -> Served {
        check_name("id", &body.id)?;
        if self.containers.contains_key(&body.id) {
            return Err(conflict("the pod has a container of this name"));
        }
        if self.containers.len() >= MAX_CONTAINERS {
            let sentence = format!("the pod has {MAX_CONTAINERS} containers: remove one");
            return Err(conflict(sentence));
        }
        complete(&mut body)?;
        let image = self.disk("image", body.image.clone(), true)?;
        let writable = body.writable.clone();
        let writable = writable
            .map(|file| self.disk("writable", vec![file], false))
            .transpose()?;
        let id = body.id.clone();
        let log_path = self.log_path(&body)?;
        let stdin_once = body.stdin_once;
        let spec = spec(body, &image, writable.as_ref());
        let mut container = Container::new(spec, log_path, Vec::new(), stdin_once)
            .map_err(|e| Refusal::field("log_path", format!("cannot open the log: {e}")))?;
        for disk in std::iter::once(image).chain(writable) {
            match machine.attach(&disk) {
                Ok(slot) => container.slots.push(slot),
                Err(sentence) => {
                    let attached = container.slots.iter();
                    attached.for_each(|slot| machine.detach(*slot));
                    return Err(conflict(sentence));
                }
            }
        }
        let slots = container.slots.clone();
        let bind = slots
            .iter()
            .map(|slot| HostRequest::BindSlot { slot: *slot });
        let asked = self.ask(bind.collect(), Then::Created(connection, id.clone()));
        if asked.is_err() {
            slots.iter().for_each(|slot| machine.detach(*slot));
        } else {
            self.containers.insert(id, container);
        }
        asked
    }

    /// Where the log goes; absent: there is none.
    fn log_path(&self, body: &CreateContainer) -> Result<Option<PathBuf>, Refusal> {
        match (&body.log_path, body.no_log) {
            (Some(_), true) => {
                let sentence = "a container that keeps no log (`no_log`) has no place for one";
                Err(Refusal::field("log_path", sentence))
            }
            (None, true) => Ok(None),
            (Some(path), false) => Ok(Some(path.clone())),
            (None, false) => Ok(Some(self.directory.join(format!("{}.log", body.id)))),
        }
    }

    /// Starts a container that was created, or starts one again that has ended.
    pub(super) fn start(&mut self, connection: ConnectionId, name: &str) -> Served {
        let container = self.container(name)?;
        match container.state {
            ContainerState::Created => self.start_process(connection, name),
            ContainerState::Exited if container.end().is_none() => {
                Err(conflict("the container's output has not been read yet"))
            }
            ContainerState::Exited => {
                // The guest forgets it; its disks stay, and what was written with them.
                container.state = ContainerState::Starting;
                let container = name.to_owned();
                let then = Then::Forgotten(connection, name.to_owned());
                let asked = self.ask(vec![HostRequest::Remove { container }], then);
                if asked.is_err() {
                    self.container(name)?.state = ContainerState::Exited;
                }
                asked
            }
            _ => Err(conflict(
                "only a container that was created or has ended can be started",
            )),
        }
    }

    pub(super) fn start_process(&mut self, connection: ConnectionId, name: &str) -> Served {
        let container = self.container(name)?;
        container.state = ContainerState::Starting;
        let start = HostRequest::Start(Box::new(container.spec.clone()));
        let asked = self.ask(vec![start], Then::Started(connection, name.to_owned()));
        if asked.is_err() {
            self.container(name)?.state = ContainerState::Created;
        }
        asked
    }

    pub(super) fn remove(&mut self, connection: ConnectionId, name: &str) -> Served {
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

    pub(super) fn unbind(
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

    pub(super) fn kill(
        &mut self,
        connection: ConnectionId,
        process: ProcessId,
        request: &Request,
    ) -> Served {
        let Kill { signal, all } = request.json()?;
        if !(1..=64).contains(&signal) {
            let sentence = "a signal is a number from 1 to 64";
            return Err(Refusal::field("signal", sentence));
        }
        self.check_process(&process)?;
        let signal = HostRequest::Signal {
            process,
            signal,
            all,
        };
        self.ask(vec![signal], Then::Respond(connection))
    }

    pub(super) fn resize(
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

    pub(super) fn freeze(&mut self, connection: ConnectionId, name: &str, frozen: bool) -> Served {
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
}

/// Draws the tokens of the process's streams, and compiles the profile of its system calls.
fn complete(body: &mut CreateContainer) -> Result<(), Refusal> {
    body.process.stdio = stdio(&body.process.stdio, body.stdin, body.terminal)?;
    if let Some(profile) = body.seccomp_profile.take() {
        if body.security.seccomp != Seccomp::Default {
            let sentence = "it and `security.seccomp` exclude each other";
            return Err(Refusal::field("seccomp_profile", sentence));
        }
        body.security.seccomp = seccomp_profile::compile(profile.to_string().as_bytes())
            .map_err(|error| Refusal::field("seccomp_profile", error.to_string()))?;
    }
    Ok(())
}

/// What the guest is told of a container with these disks.
fn spec(body: CreateContainer, image: &DiskSpec, writable: Option<&DiskSpec>) -> ContainerSpec {
    ContainerSpec {
        id: body.id,
        rootfs: RootFs {
            image: image.serial.clone(),
            writable: writable.map(|disk| disk.serial.clone()),
            read_only: body.read_only_root,
        },
        process: body.process,
        resources: body.resources,
        mounts: body.mounts,
        devices: body.devices,
        security: body.security,
        pid_namespace: body.pid_namespace,
    }
}
