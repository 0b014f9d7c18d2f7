//! What the host asks for, and what answers later than at once.
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::AsFd;

use cube_guest::{Answer, HostRequest, ProcessId};

use super::{Agent, Phase};
use crate::container::Container;
use crate::container::cgroup::Condition;
use crate::error::{Context, Error};
use crate::job::{Answered, Reporter, Subject, Then};
use crate::stdio::pipe;
use crate::stream::End;
use crate::volumes::{files, write_back};
use crate::{measure, network, read_file, slots, sys};

impl Agent {
    /// Does what is asked. `None`: the reply comes when it is done.
    ///
    /// # Errors
    /// A sentence for the host.
    pub(super) fn obey(&mut self, id: u64, request: HostRequest) -> Result<Option<Answer>, Error> {
        let done = Ok(Some(Answer::Done));
        match request {
            HostRequest::BindSlot { slot } => slots::bind(slot).and(done),
            HostRequest::UnbindSlot { slot } => slots::unbind(slot, &mut self.disks).and(done),
            HostRequest::SetUpInterface(spec) => network::add(&spec).and(done),
            HostRequest::AddVolume(spec) => {
                let is_there = self.add_volume(&spec, Some(id))?;
                Ok(is_there.then_some(Answer::Done))
            }
            HostRequest::RemoveVolume { volume } => self.remove_volume(id, &volume),
            HostRequest::WriteFiles { volume, token } => self.write_files(id, &volume, token),
            HostRequest::ReadFile {
                container,
                path,
                max_bytes,
                token,
            } => self.read_file(id, &container, &path, max_bytes, token),
            HostRequest::Start(_) | HostRequest::Exec { .. } if self.phase != Phase::Running => {
                Err(Error::Refused(
                    "the pod is ending and starts nothing".into(),
                ))
            }
            HostRequest::Start(_) if self.boot.waits_for.is_some() => Err(Error::Refused(
                "the pod is still mounting the volumes of its specification".into(),
            )),
            HostRequest::Start(spec) => self.start(&spec, false).and(done),
            HostRequest::Exec {
                container,
                exec,
                process,
            } => self.exec(&container, &exec, &process).and(done),
            HostRequest::Signal {
                process,
                signal,
                all,
            } => self.signal(&process, signal, all).and(done),
            HostRequest::Resize { process, size } => {
                let stream = self.terminal(&process)?;
                self.streams.resize(stream, size).and(done)
            }
            HostRequest::Update {
                container,
                resources,
            } => {
                let (_, made) = self.find(&container)?.running()?;
                made.cgroup.update(&resources).and(done)
            }
            HostRequest::Pause { container } => self.freeze(id, &container, true),
            HostRequest::Resume { container } => self.freeze(id, &container, false),
            HostRequest::Remove { container } => self.remove(id, &container),
            HostRequest::Forward { port, token } => {
                self.forwards.start(port, token, id, &self.poller)?;
                Ok(None)
            }
            HostRequest::Stats => {
                let containers = self.containers.iter();
                let containers = containers.map(|(_, container)| measure::container(container));
                let stats = measure::pod(containers.collect());
                Ok(Some(Answer::Stats(Box::new(stats))))
            }
            HostRequest::Shutdown { grace_ms } => self.shut_down(grace_ms).and(done),
        }
    }

    pub(super) fn number(&self, id: &str) -> Result<u32, Error> {
        let found = self.containers.find(|container| container.id == id);
        found.ok_or_else(|| Error::Refused(format!("the pod has no container `{id}`")))
    }

    fn find(&self, id: &str) -> Result<&Container, Error> {
        self.containers.get(self.number(id)?).ok_or_else(gone)
    }

    fn signal(&self, process: &ProcessId, number: u8, all: bool) -> Result<(), Error> {
        let signal = sys::signal(number)
            .ok_or_else(|| Error::Refused(format!("{number} is not a signal: 1 to 64 are")))?;
        match process {
            ProcessId::Container(id) => self.find(id)?.signal(signal, all),
            ProcessId::Exec(_) if all => Err(Error::Refused(
                "an exec has no cgroup of its own: name its container to signal all".into(),
            )),
            ProcessId::Exec(id) => {
                let found = self.execs.iter().find(|(_, exec)| exec.id == *id);
                let (_, exec) = found.ok_or_else(|| no_exec(id))?;
                let sent = exec.child.signal(signal);
                sent.context(|| format!("signal the exec `{id}`"))
            }
        }
    }

    fn terminal(&self, process: &ProcessId) -> Result<u32, Error> {
        let (what, terminal) = match process {
            ProcessId::Container(id) => {
                let (first, _) = self.find(id)?.running()?;
                (format!("container `{id}`"), first.terminal)
            }
            ProcessId::Exec(id) => {
                let found = self.execs.iter().find(|(_, exec)| exec.id == *id);
                let (_, exec) = found.ok_or_else(|| no_exec(id))?;
                (format!("exec `{id}`"), exec.child.terminal)
            }
        };
        terminal.ok_or_else(|| Error::Refused(format!("the {what} has no terminal")))
    }

    fn freeze(&mut self, id: u64, name: &str, frozen: bool) -> Result<Option<Answer>, Error> {
        let index = self.number(name)?;
        let container = self.containers.get_mut(index).ok_or_else(gone)?;
        let (_, made) = container.running()?;
        made.cgroup.freeze(frozen)?;
        let condition = Condition::Frozen(frozen);
        let awaited = made.cgroup.reach(condition, index, &self.poller)?;
        container.is_paused = frozen;
        let before =
            std::mem::replace(&mut container.awaited, awaited.map(|awaited| (awaited, id)));
        let answer = container.awaited.is_none().then_some(Answer::Done);
        if let Some((awaited, id)) = before {
            awaited.close(&self.poller);
            self.reply(id, Err("a later request has undone it".into()));
        }
        Ok(answer)
    }

    /// Removal: every process has ended, then what was written is written back, then it all goes.
    fn remove(&mut self, id: u64, name: &str) -> Result<Option<Answer>, Error> {
        let index = self.number(name)?;
        if self.jobs.work_on(Subject::Container(index)) {
            return Err(Error::Refused(format!(
                "a file of the container `{name}` is being read"
            )));
        }
        let container = self.containers.get_mut(index).ok_or_else(gone)?;
        if container.is_live() || container.is_leaving {
            return Err(Error::Refused(format!(
                "the container `{name}` {}",
                match container.is_live() {
                    true => "has not ended",
                    false => "is being removed",
                }
            )));
        }
        let Ok(made) = container.made() else {
            self.containers.take(index);
            return Ok(Some(Answer::Done));
        };
        let awaited = made.cgroup.reach(Condition::Empty, index, &self.poller)?;
        container.is_leaving = true;
        match awaited {
            Some(awaited) => container.awaited = Some((awaited, id)),
            None => self.write_back(id, index)?,
        }
        Ok(None)
    }

    /// Has a job write back what the container wrote, which may be much.
    fn write_back(&mut self, request: u64, index: u32) -> Result<(), Error> {
        let container = self.containers.get_mut(index).ok_or_else(gone)?;
        let written = self
            .disks
            .written_by(&crate::container::user(&container.id));
        let work = |reporter: Reporter| {
            let result = written
                .iter()
                .try_for_each(|directory| write_back(directory));
            reporter.answer(result.map(|()| Answer::Done));
        };
        let then = Then::RemoveContainer { index, request };
        let subject = Subject::Container(index);
        let started = self.jobs.start(subject, then, &[], &self.poller, work);
        started.inspect_err(|_| container.is_leaving = false)
    }

    fn remove_volume(&mut self, request: u64, name: &str) -> Result<Option<Answer>, Error> {
        let leaving = self.volumes.begin_removal(name)?;
        let volume = name.to_owned();
        let then = Then::RemoveVolume { volume, request };
        let work = |reporter: Reporter| {
            reporter.answer(leaving.perform().map(|()| Answer::Done));
        };
        let started = self
            .jobs
            .start(Subject::Volume, then, &[], &self.poller, work);
        started.inspect_err(|_| self.volumes.end_job(name))?;
        Ok(None)
    }

    fn write_files(
        &mut self,
        request: u64,
        name: &str,
        token: u64,
    ) -> Result<Option<Answer>, Error> {
        let directory = self.volumes.begin_write(name)?;
        let volume = name.to_owned();
        let then = Then::EndWrite { volume, request };
        let start = || {
            let (reader, writer) = pipe(true)?;
            let reader = File::from(reader);
            let work = |reporter: Reporter| {
                let result = files::replace(&directory, &mut &reader);
                reporter.answer(result.map(|()| Answer::Done));
            };
            let poller = &self.poller;
            self.jobs
                .start(Subject::Volume, then, &[reader.as_fd()], poller, work)?;
            self.streams.dial(token, End::Input(writer), poller)
        };
        match start() {
            Ok(_) => Ok(None),
            Err(error) => {
                self.volumes.end_job(name);
                Err(error)
            }
        }
    }

    fn read_file(
        &mut self,
        request: u64,
        name: &str,
        path: &str,
        max_bytes: u64,
        stream: u64,
    ) -> Result<Option<Answer>, Error> {
        let index = self.number(name)?;
        let container = self.containers.get(index).ok_or_else(gone)?;
        let made = container.made()?;
        if container.is_leaving {
            return Err(Error::Refused(format!(
                "the container `{name}` is being removed"
            )));
        }
        if !path.starts_with('/') {
            return Err(Error::Refused(format!(
                "the path `{}` is not absolute",
                path.escape_debug()
            )));
        }
        let (from, writer) = pipe(false)?;
        let writer = File::from(writer);
        let work = |reporter: Reporter| {
            read_file::read(&made.namespace, path, max_bytes, reporter, &writer);
        };
        let then = Then::Send {
            stream,
            from,
            request,
        };
        let subject = Subject::Container(index);
        let poller = &self.poller;
        self.jobs
            .start(subject, then, &[writer.as_fd()], poller, work)?;
        Ok(None)
    }

    pub(super) fn hear_cgroup(&mut self, index: u32) {
        let Some(container) = self.containers.get_mut(index) else {
            return;
        };
        let Some((awaited, request)) = container.awaited.take() else {
            return;
        };
        if !awaited.is_reached() {
            container.awaited = Some((awaited, request));
            return;
        }
        let is_leaving = container.is_leaving;
        awaited.close(&self.poller);
        if !is_leaving {
            self.reply(request, Ok(Answer::Done));
        } else if let Err(error) = self.write_back(request, index) {
            self.reply(request, Err(error.to_string()));
        }
    }

    pub(super) fn hear_job(&mut self, index: u32) {
        let Some(Answered { then, result }) = self.jobs.turn(index, &self.poller) else {
            return;
        };
        match then {
            Then::RemoveContainer { index, request } => self.end_removal(index, request, result),
            Then::EndWrite { volume, request } => {
                self.volumes.end_job(&volume);
                self.reply(request, result);
            }
            Then::EndMount { volume, request } => {
                match &result {
                    Ok(_) => self.volumes.end_job(&volume),
                    Err(_) => self.volumes.forget(&volume, &mut self.disks),
                }
                match request {
                    Some(request) => self.reply(request, result),
                    None => self.end_boot_mount(&volume, result),
                }
            }
            Then::RemoveVolume { volume, request } => {
                match &result {
                    Ok(_) => self.volumes.forget(&volume, &mut self.disks),
                    Err(_) => self.volumes.end_job(&volume),
                }
                self.reply(request, result);
            }
            Then::Send {
                stream,
                from,
                request,
            } => {
                let found = result.is_ok();
                self.reply(request, result);
                if found {
                    self.relay(stream, End::Output(from));
                }
            }
        }
    }

    fn end_removal(&mut self, index: u32, request: u64, result: Result<Answer, String>) {
        if result.is_ok()
            && let Some(container) = self.containers.take(index)
        {
            let id = container.id.clone();
            container.remove(&self.poller);
            self.release(&id);
        } else if let Some(container) = self.containers.get_mut(index) {
            container.is_leaving = false;
        }
        self.reply(request, result);
    }

    fn end_boot_mount(&mut self, volume: &str, result: Result<Answer, String>) {
        if self.boot.waits_for.as_deref() != Some(volume) || self.phase != Phase::Running {
            return;
        }
        self.boot.waits_for = None;
        match result {
            Ok(_) => self.go_on_booting(),
            Err(reason) => self.fail(&reason),
        }
    }

    pub(super) fn hear_forward(&mut self, index: u32) {
        let Some(connected) = self.forwards.turn(index, &self.poller) else {
            return;
        };
        match connected.end {
            Ok(end) => {
                self.reply(connected.request, Ok(Answer::Done));
                self.relay(connected.stream, end);
            }
            Err(error) => self.reply(connected.request, Err(error.to_string())),
        }
    }

    /// Dials a stream whose request was answered: the host sees a failure as a stream that never comes.
    fn relay(&mut self, stream: u64, end: End) {
        if let Err(error) = self.streams.dial(stream, end, &self.poller) {
            crate::error::log_error(&error.to_string());
        }
    }
}

fn gone() -> Error {
    Error::Refused("the container is gone".into())
}

fn no_exec(id: &str) -> Error {
    Error::Refused(format!("the pod has no exec `{id}` that runs"))
}
