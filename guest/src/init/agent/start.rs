//! Starts: of the pod's specification at boot, of volumes, containers and execs.
#![forbid(unsafe_code)]

use std::os::fd::AsFd;

use cube_guest::{Answer, ContainerSpec, GuestEvent, PodSpec, ProcessSpec, VolumeSpec};

use super::{Agent, Boot};
use crate::container::exec::{self, Exec};
use crate::container::{self, Container, Pod, user};
use crate::error::Error;
use crate::job::{Subject, Then};
use crate::stdio::make_devpts;
use crate::volumes::Added;

impl Agent {
    pub(super) fn start_pod(&mut self, pod: PodSpec) {
        if pod.exit_with_containers && !pod.containers.is_empty() {
            self.essential = Some(pod.containers.len());
        }
        self.boot = Boot {
            volumes: pod.volumes.into(),
            containers: pod.containers,
            waits_for: None,
        };
        self.go_on_booting();
    }

    /// Makes the pod's volumes in order, then its containers; stops at a volume that a job has to mount.
    pub(super) fn go_on_booting(&mut self) {
        while let Some(spec) = self.boot.volumes.pop_front() {
            match self.add_volume(&spec, None) {
                Ok(true) => {}
                Ok(false) => {
                    self.boot.waits_for = Some(spec.name);
                    return;
                }
                Err(error) => return self.fail(&error.to_string()),
            }
        }
        for spec in std::mem::take(&mut self.boot.containers) {
            if let Err(error) = self.start(&spec, true) {
                self.refuse(&spec, &error);
            }
        }
    }

    /// Makes a volume. Returns whether it is there: a job may have to mount it, which then answers
    /// `request`.
    ///
    /// # Errors
    /// It cannot be made.
    pub(super) fn add_volume(
        &mut self,
        spec: &VolumeSpec,
        request: Option<u64>,
    ) -> Result<bool, Error> {
        let Added::Mount(export) = self.volumes.add(spec, &mut self.disks)? else {
            return Ok(true);
        };
        let then = Then::EndMount {
            volume: spec.name.clone(),
            request,
        };
        let mount = |reporter: crate::job::Reporter| {
            reporter.answer(export.mount().map(|()| Answer::Done));
        };
        let started = self
            .jobs
            .start(Subject::Volume, then, &[], &self.poller, mount);
        started
            .map(|()| false)
            .inspect_err(|_| self.volumes.forget(&spec.name, &mut self.disks))
    }

    /// A container that the pod's specification should not have: it still counts, its streams end, and it
    /// is reported like the others.
    fn refuse(&mut self, spec: &ContainerSpec, error: &Error) {
        if let Ok(devpts) = make_devpts() {
            let stdio = &spec.process.stdio;
            let _ = self.streams.open(stdio, devpts.as_fd(), &self.poller);
        }
        self.containers.insert(Container::not_started(&spec.id));
        self.lose_essential();
        self.report_end(&spec.id, container::not_started(error.to_string()));
    }

    /// Starts a container, or reports why it cannot be.
    ///
    /// # Errors
    /// The request itself makes no sense.
    pub(super) fn start(&mut self, spec: &ContainerSpec, at_boot: bool) -> Result<(), Error> {
        container::validate(spec)?;
        if self.containers.find(|other| other.id == spec.id).is_some() {
            return Err(Error::Refused(format!(
                "the pod already has a container `{}`",
                spec.id
            )));
        }
        let is_first = !std::mem::replace(&mut self.started, true);
        let index = self.containers.vacant();
        match Container::start(spec, index, is_first, &mut self.pod()) {
            Ok(mut container) => {
                container.is_essential = at_boot;
                self.containers.insert(container);
            }
            Err(error) => {
                self.release(&spec.id);
                self.containers.insert(Container::not_started(&spec.id));
                if at_boot {
                    self.lose_essential();
                }
                self.report_end(&spec.id, container::not_started(error.to_string()));
            }
        }
        Ok(())
    }

    /// Starts a further process in a container, or reports why it cannot be.
    ///
    /// # Errors
    /// The request itself makes no sense.
    pub(super) fn exec(
        &mut self,
        container: &str,
        id: &str,
        process: &ProcessSpec,
    ) -> Result<(), Error> {
        exec::validate(id, process)?;
        if self.execs.find(|other| other.id == id).is_some() {
            return Err(Error::Refused(format!(
                "the pod already has an exec `{id}`"
            )));
        }
        let place = self.number(container)?;
        let container = self.containers.get(place).ok_or_else(gone)?;
        container.running()?;
        if container.is_paused {
            return Err(Error::Refused(format!(
                "the container `{}` is paused and runs nothing",
                container.id
            )));
        }
        let index = self.execs.vacant();
        let mut pod = Pod {
            disks: &mut self.disks,
            volumes: &mut self.volumes,
            streams: &mut self.streams,
            namespaces: &mut self.namespaces,
            poller: &self.poller,
            port: &self.port,
        };
        match Exec::start(id, process, container, index, &mut pod) {
            Ok(exec) => _ = self.execs.insert(exec),
            Err(error) => {
                let (exec, status) = (id.to_owned(), container::not_started(error.to_string()));
                self.report(GuestEvent::ExecExited { exec, status });
            }
        }
        Ok(())
    }

    /// Lets go of the disks and volumes of a container.
    pub(super) fn release(&mut self, id: &str) {
        let user = user(id);
        self.disks.release(&user);
        self.volumes.release(&user);
    }
}

/// What was just found cannot be.
fn gone() -> Error {
    Error::Refused("the container is gone".into())
}
