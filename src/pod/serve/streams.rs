//! Execs, attached streams, forwarded ports and files: all that becomes a raw stream, or begins one.
#![forbid(unsafe_code)]

use cube_guest::HostRequest;
use cube_guest::files::MAX_SET;

use super::{Served, conflict, unknown};
use crate::pod::api::body::{ContainerState, CreateExec};
use crate::pod::api::http::{Refusal, Request};
use crate::pod::api::server::ConnectionId;
use crate::pod::channel::{Channel, Kind};
use crate::pod::container::{Exec, stdio};
use crate::pod::pairing::new_token;
use crate::pod::pending::Then;
use crate::pod::supervisor::Supervisor;

/// Execs that a pod has at one time, those that nobody waited for included.
const MAX_EXECS: usize = 256;
/// The end of a file that is read when nobody says how much, in bytes.
const FILE_BYTES: u64 = 1 << 20;

fn check_upgrade(request: &Request) -> Result<(), Refusal> {
    match request.upgrade {
        true => Ok(()),
        false => Err(Refusal::new(426, "a stream needs `Upgrade: cube-stream`")),
    }
}

fn draw_token() -> Result<u64, Refusal> {
    new_token().map_err(|e| Refusal::new(503, format!("cannot draw a stream's token: {e}")))
}

impl Supervisor {
    pub(super) fn exec(
        &mut self,
        connection: ConnectionId,
        name: &str,
        body: CreateExec,
    ) -> Served {
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

    pub(super) fn attach(
        &mut self,
        connection: ConnectionId,
        request: &Request,
        is_exec: bool,
        segments: &[String],
    ) -> Served {
        let [name, stream] = segments else {
            return Err(unknown("stream"));
        };
        check_upgrade(request)?;
        let channels = match is_exec {
            true => &mut self.known_exec(name)?.channels,
            false => &mut self.container(name)?.channels,
        };
        let channel = channels.iter_mut().find(|c| c.kind().name() == stream);
        let sentence = "the process has no such stream: there are stdin, stdout, stderr, or tty";
        let channel = channel.ok_or_else(|| Refusal::new(404, sentence))?;
        if channel.has_client() && (is_exec || channel.kind().is_stdin()) {
            return Err(conflict("a client is attached to this stream already"));
        }
        let token = channel.token();
        if let Some((socket, first)) = self.server.upgrade(connection) {
            let containers = self.containers.values_mut().flat_map(|c| &mut c.channels);
            let execs = self.execs.values_mut().flat_map(|e| &mut e.channels);
            if let Some(channel) = containers.chain(execs).find(|c| c.token() == token) {
                channel.attach(socket, first);
            }
        }
        Ok(None)
    }

    pub(super) fn forward(
        &mut self,
        connection: ConnectionId,
        request: &Request,
        port: &str,
    ) -> Served {
        let port: u16 = port
            .parse()
            .ok()
            .filter(|port| *port > 0)
            .ok_or_else(|| Refusal::new(404, "a port is a number from 1 to 65535"))?;
        check_upgrade(request)?;
        let token = draw_token()?;
        let forward = HostRequest::Forward { port, token };
        let asked = self.ask(vec![forward], Then::Forwarded(connection, token))?;
        self.streams
            .push(Channel::for_one_client(Kind::Port, token));
        Ok(asked)
    }

    pub(super) fn read_file(
        &mut self,
        connection: ConnectionId,
        request: &Request,
        name: &str,
    ) -> Served {
        let container = self.container(name)?.spec.id.clone();
        let path = request.text("path")?;
        let path = path.filter(|path| path.starts_with('/'));
        let path = path.ok_or_else(|| {
            Refusal::field("path", "name a file of the container by its absolute path")
        })?;
        let max_bytes = request.number("max_bytes")?.unwrap_or(FILE_BYTES);
        if max_bytes > MAX_SET {
            let sentence = format!("{MAX_SET} bytes can be read at a time");
            return Err(Refusal::field("max_bytes", sentence));
        }
        let token = draw_token()?;
        let read = HostRequest::ReadFile {
            container,
            path,
            max_bytes,
            token,
        };
        let asked = self.ask(vec![read], Then::File(connection, token))?;
        self.streams
            .push(Channel::for_one_client(Kind::File, token));
        Ok(asked)
    }
}
