//! What follows when the agent has answered.
#![forbid(unsafe_code)]

use cube_guest::Answer;
use cube_guest::stats::PodStats;
use serde_json::json;

use crate::pod::api::body::{ContainerState, ExecCreated, Stats};
use crate::pod::api::http;
use crate::pod::api::server::ConnectionId;
use crate::pod::api::volume_body::VolumeState;
use crate::pod::event_log::EventKind;
use crate::pod::machinery::Machinery;
use crate::pod::metrics;
use crate::pod::pending::Then;
use crate::pod::supervisor::Supervisor;
use crate::pod::volume::BLOCK;

impl Supervisor {
    /// Goes on when the agent has answered.
    pub(crate) fn go_on(
        &mut self,
        then: Then,
        result: Result<Answer, String>,
        machine: &dyn Machinery,
    ) {
        let failure = result.as_ref().err().cloned();
        match then {
            Then::Respond(connection) => self.tell(connection, failure),
            Then::Stats(connection) => {
                if let Some(stats) = self.measured(connection, result, machine) {
                    self.server.respond(connection, 200, Some(&json!(stats)));
                }
            }
            Then::Metrics(connection) => {
                if let Some(stats) = self.measured(connection, result, machine) {
                    let text = metrics::render(&self.id, &stats);
                    self.server
                        .respond_text(connection, metrics::CONTENT_TYPE, &text);
                }
            }
            Then::Created(connection, id) => self.created(connection, &id, failure),
            Then::Started(connection, id) => {
                if failure.is_some()
                    && let Some(container) = self.containers.get_mut(&id)
                {
                    container.state = ContainerState::Created;
                }
                self.tell(connection, failure);
            }
            Then::Forgotten(connection, id) => self.forgotten(connection, &id, failure),
            Then::Frozen(connection, id, frozen) => {
                if failure.is_none() {
                    self.frozen(&id, frozen);
                }
                self.tell(connection, failure);
            }
            Then::Removed(connection, id) => self.removed(connection, &id, failure),
            Then::Unbound(connection, id, why) => {
                if let Some(container) = self.containers.remove(&id) {
                    let slots = container.slots.iter();
                    slots.for_each(|slot| machine.detach(*slot));
                }
                self.execs.retain(|_, exec| exec.container != id);
                if why.is_none() {
                    self.events.push(EventKind::Removed, Some(&id), None);
                }
                self.tell(connection, why);
            }
            Then::ExecStarted(connection, exec) => self.exec_started(connection, exec, failure),
            Then::Forwarded(connection, token) => {
                let head = http::SWITCHING.to_vec();
                self.begin_stream(connection, token, failure.map_or(Ok(head), Err));
            }
            Then::File(connection, token) => {
                let head = match result {
                    Ok(Answer::File { size, sent }) => Ok(http::file_head(size, sent)),
                    Ok(_) => Err("the guest answered something else".to_owned()),
                    Err(sentence) => Err(sentence),
                };
                self.begin_stream(connection, token, head);
            }
            Then::Written(connection, token) => {
                self.uploads.retain(|upload| upload.token() != token);
                self.tell(connection, failure);
            }
            Then::VolumeStep(connection, name) => self.volume_step(connection, &name, failure),
            Then::VolumeUnmounted(connection, name) => {
                self.volume_unmounted(connection, &name, failure);
            }
            Then::VolumeUnbound(connection, name, why) => {
                self.volume_unbound(connection, &name, why, failure, machine);
            }
            Then::Interface(step) => self.interface_step(step, failure, machine),
        }
    }

    /// What the guest and this process measured. Otherwise the client was told why there is nothing.
    fn measured(
        &mut self,
        connection: ConnectionId,
        result: Result<Answer, String>,
        machine: &dyn Machinery,
    ) -> Option<Stats> {
        let guest: PodStats = match result {
            Ok(Answer::Stats(stats)) => *stats,
            Ok(_) => {
                self.tell(connection, Some("the guest answered something else".into()));
                return None;
            }
            Err(sentence) => {
                self.tell(connection, Some(sentence));
                return None;
            }
        };
        let vmm = machine.own_memory().ok().map(Into::into);
        Some(Stats { guest, vmm })
    }

    /// The guest has forgotten a container that is to start again.
    fn forgotten(&mut self, connection: ConnectionId, id: &str, failure: Option<String>) {
        let Some(container) = self.containers.get_mut(id) else {
            return;
        };
        if failure.is_some() {
            container.state = ContainerState::Exited;
            return self.tell(connection, failure);
        }
        if let Err(error) = container.renew() {
            // The guest knows it no more, its disks are there.
            container.state = ContainerState::Created;
            let sentence = format!("cannot draw a stream's token: {error}");
            return self.tell(connection, Some(sentence));
        }
        if let Err(refusal) = self.start_process(connection, id) {
            self.server.refuse(connection, &refusal);
        }
    }

    fn frozen(&mut self, id: &str, frozen: bool) {
        let container = self.containers.get_mut(id);
        if let Some(container) = container.filter(|c| c.state != ContainerState::Exited) {
            container.state = match frozen {
                true => ContainerState::Paused,
                false => ContainerState::Running,
            };
        }
    }

    fn exec_started(&mut self, connection: ConnectionId, exec: String, failure: Option<String>) {
        if failure.is_some() {
            self.execs.remove(&exec);
            return self.tell(connection, failure);
        }
        let created = ExecCreated { exec };
        self.server.respond(connection, 201, Some(&json!(created)));
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

    /// Makes a raw stream of a connection, after `head`, or says why there is none.
    fn begin_stream(
        &mut self,
        connection: ConnectionId,
        token: u64,
        head: Result<Vec<u8>, String>,
    ) {
        let head = match head {
            Ok(head) => head,
            Err(sentence) => {
                self.streams.retain(|channel| channel.token() != token);
                return self.tell(connection, Some(sentence));
            }
        };
        let taken = self.server.hand_over(connection, &head);
        let channel = self.streams.iter_mut().find(|c| c.token() == token);
        match (taken, channel) {
            (Some((socket, first)), Some(channel)) => channel.attach(socket, first),
            // The client has gone meanwhile.
            _ => self.streams.retain(|channel| channel.token() != token),
        }
    }

    /// The disk of a volume is there, or it is mounted: what comes next, if it did not fail.
    fn volume_step(&mut self, connection: ConnectionId, name: &str, failure: Option<String>) {
        let asked = match failure {
            None => self.mount(connection, name),
            failure => self.release_disk(connection, name, failure),
        };
        self.answer(connection, asked);
    }

    fn volume_unmounted(&mut self, connection: ConnectionId, name: &str, failure: Option<String>) {
        if failure.is_some() {
            if let Some(volume) = self.volumes.get_mut(name) {
                volume.state = VolumeState::Ready;
            }
            return self.tell(connection, failure);
        }
        let asked = self.release_disk(connection, name, None);
        self.answer(connection, asked);
    }

    /// `why`: what kept the volume from being made; `failure`: what keeps its disk.
    fn volume_unbound(
        &mut self,
        connection: ConnectionId,
        name: &str,
        why: Option<String>,
        failure: Option<String>,
        machine: &dyn Machinery,
    ) {
        let volume = self.volumes.get_mut(name);
        if why.is_none()
            && failure.is_some()
            && let Some(volume) = volume.filter(|volume| volume.kind == BLOCK)
        {
            // A container has it: it stays.
            volume.state = VolumeState::Ready;
            return self.tell(connection, failure);
        }
        if let Some((slot, _)) = self.volumes.remove(name).and_then(|volume| volume.disk) {
            machine.detach(slot);
        }
        self.tell(connection, why);
    }

    fn answer(&mut self, connection: ConnectionId, served: super::Served) {
        match served {
            Ok(Some((status, body))) => self.server.respond(connection, status, Some(&body)),
            Ok(None) => {}
            Err(refusal) => self.server.refuse(connection, &refusal),
        }
    }
}
