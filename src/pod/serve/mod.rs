//! What each route of the API does: here the way from a route to it, and what concerns the whole pod.
//!
//! - `containers`: their lives; `streams`: execs, attached streams, forwarded ports, files.
//! - `volumes`: volumes and the files in them.
//! - `replies`: what follows when the agent has answered.
#![forbid(unsafe_code)]

mod containers;
mod replies;
mod streams;
mod volumes;

use cube_guest::frame::FrameError;
use cube_guest::{HostRequest, ProcessId, Resources};
use serde_json::{Value, json};

use super::api::body::{DiskFile, Stop};
use super::api::http::{Refusal, Request};
use super::api::routes::{self, Route};
use super::api::server::ConnectionId;
use super::container::{Container, Exec};
use super::feed::{Feed, LogFeed};
use super::machinery::Machinery;
use super::pending::Then;
use super::session::SessionError;
use super::supervisor::Supervisor;
use crate::vmm::spec::{DiskPart, DiskSpec, FileSource};

/// What is sent at once; `None`: the answer comes later.
type Served = Result<Option<(u16, Value)>, Refusal>;

fn unknown(what: &str) -> Refusal {
    Refusal::new(404, format!("the pod has no such {what}"))
}

fn conflict(sentence: impl Into<String>) -> Refusal {
    Refusal::new(409, sentence)
}

fn no_log() -> Refusal {
    conflict("the container keeps no log: its output goes to whoever is attached to it")
}

/// A name, in `field`, that is a file name too, and that no path can hide in.
fn check_name(field: &str, name: &str) -> Result<(), Refusal> {
    let good = name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.len() <= 63
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    let sentence =
        "a name has 1 to 63 letters, digits, `-`, `_`, `.` and begins with one of the first two";
    good.then_some(())
        .ok_or_else(|| Refusal::field(field, sentence))
}

/// A request on its way to what serves it.
struct Asked<'a> {
    connection: ConnectionId,
    request: &'a Request,
    machine: &'a dyn Machinery,
}

impl Supervisor {
    /// Serves a request: answers it, or notes who waits for the answer.
    pub(crate) fn serve(
        &mut self,
        connection: ConnectionId,
        request: &Request,
        machine: &dyn Machinery,
    ) {
        let asked = Asked {
            connection,
            request,
            machine,
        };
        let served = routes::find(&request.method, &request.path)
            .and_then(|(route, segments)| self.route(&asked, route, &segments));
        match served {
            Ok(Some((204, _))) => self.server.respond(connection, 204, None),
            Ok(Some((status, body))) => self.server.respond(connection, status, Some(&body)),
            Ok(None) => {}
            Err(refusal) => self.server.refuse(connection, &refusal),
        }
    }

    fn route(&mut self, asked: &Asked<'_>, route: Route, segments: &[String]) -> Served {
        let Asked {
            connection,
            request,
            machine,
        } = *asked;
        let name = segments.first().map_or("", String::as_str);
        let container = || ProcessId::Container(name.to_owned());
        let exec = || ProcessId::Exec(name.to_owned());
        match route {
            Route::Pod => Ok(Some((200, json!(self.status(machine))))),
            Route::Stop => {
                let Stop { grace_ms } = request.json()?;
                self.stop(grace_ms);
                self.stop_waiters.push(connection);
                Ok(None)
            }
            Route::Stats => self.ask(vec![HostRequest::Stats], Then::Stats(connection)),
            Route::Metrics => self.ask(vec![HostRequest::Stats], Then::Metrics(connection)),
            Route::Events => self.follow_events(connection, request),
            Route::List => Ok(Some((200, json!(self.status(machine).containers)))),
            Route::Create => self.create(connection, request.json()?, machine),
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
            Route::Update => self.update(connection, name, request.json()?),
            Route::Resize => self.resize(connection, container(), request),
            Route::Logs => self.logs(connection, name, request),
            Route::ReopenLog => self.reopen_log(name),
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
            Route::ReadFile => self.read_file(connection, request, name),
            Route::Volumes => Ok(Some((200, self.list_volumes()))),
            Route::CreateVolume => self.create_volume(connection, request.json()?, machine),
            Route::RemoveVolume => self.remove_volume(connection, name),
            Route::PutFiles => self.put_files(connection, name, request.json()?),
            Route::Interfaces => Ok(Some((200, self.list_interfaces(machine)))),
            Route::AttachInterface => self.attach_interface(connection, request.json()?, machine),
            Route::DetachInterface => self.detach_interface(connection, name, machine),
            Route::LimitInterface => self.limit_interface(name, request.json()?, machine),
        }
    }

    /// Asks the agent; `then` follows when all is answered.
    pub(super) fn ask(&mut self, requests: Vec<HostRequest>, then: Then) -> Served {
        let mut ids = Vec::new();
        for request in requests {
            match self.session.request(request) {
                Ok(id) => ids.push(id),
                Err(SessionError::Frame(FrameError::TooLong(length))) => {
                    let sentence = format!("the guest takes no request of {length} bytes");
                    return Err(Refusal::new(413, sentence));
                }
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
        let since = request.text("since")?;
        let log = self.container(name)?.log.as_ref().ok_or_else(no_log)?;
        let path = log.path().to_owned();
        let feed = LogFeed::open(name, &path, tail, since, follow)
            .map_err(|e| conflict(format!("cannot read the log {}: {e}", path.display())))?;
        self.server.begin_stream(connection, "text/plain");
        self.feeds.insert(connection, Feed::Log(feed));
        Ok(None)
    }

    fn reopen_log(&mut self, name: &str) -> Served {
        let log = self.container(name)?.log.as_mut().ok_or_else(no_log)?;
        let path = log.path().display().to_string();
        let failed = |e| conflict(format!("cannot reopen the log {path}: {e}"));
        log.reopen().map_err(failed)?;
        Ok(Some((204, Value::Null)))
    }

    fn update(&mut self, connection: ConnectionId, name: &str, resources: Resources) -> Served {
        let container = self.container(name)?.spec.id.clone();
        let update = HostRequest::Update {
            container,
            resources,
        };
        self.ask(vec![update], Then::Respond(connection))
    }

    /// A disk of `files`, which `field` named, under a serial that no other disk has or had.
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

    pub(super) fn tell(&mut self, connection: ConnectionId, failure: Option<String>) {
        match failure {
            None => self.server.respond(connection, 204, None),
            Some(sentence) => self.server.refuse(connection, &conflict(sentence)),
        }
    }
}
