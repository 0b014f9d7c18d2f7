//! The agent: one loop that starts containers, reaps them, and talks to the host.
//!
//! ```text
//! Running ──▶ Stopping ─────────────────────▶ Draining ─────────────────▶ Closing ──▶ Done
//!   │         SIGTERM was sent, the timer      no container is left;       the host     power
//!   │         sends SIGKILL                    streams end                 closes       off
//!   └── the pod's containers have ended (the others get SIGKILL) ──▶┘      control
//! ```
//! A host whose control connection is gone is waited for by nobody: with the last container, the pod is
//! done.
#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::time::Duration;

use cube_guest::{
    Answer, ContainerSpec, ExitStatus, GuestEvent, GuestMessage, HostMessage, HostRequest, Mark,
    PodSpec, ProcessId,
};
use rustix::event::epoll::EventFlags;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use crate::container::{self, Container, Pod};
use crate::control::Control;
use crate::disks::Disks;
use crate::error::{Context, Error, log_error};
use crate::events::{Poller, Source, Watched};
use crate::port::Port;
use crate::stdio::Streams;
use crate::sys;

/// The whole pod.
pub(crate) struct Agent {
    port: Port,
    poller: Poller,
    control: Control,
    children: Watched,
    grace: Option<Watched>,
    disks: Disks,
    streams: Streams,
    containers: Vec<Container>,
    phase: Phase,
    /// How many of `containers`, from the first, end the pod when they have ended; 0: it goes on.
    essential: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Running,
    Stopping,
    Draining,
    Closing,
    Done,
}

impl Agent {
    /// Dials the host and is ready to run.
    ///
    /// # Errors
    /// The kernel refuses a descriptor.
    pub(crate) fn new(port: Port) -> Result<Self, Error> {
        let poller = Poller::new().context(|| "make an epoll set".into())?;
        let signals = sys::child_signals().context(|| "make a signal descriptor".into())?;
        let mut children = Watched::new(signals, Source::Children);
        children
            .watch(&poller, Some(EventFlags::IN))
            .context(|| "watch for ended children".into())?;
        Ok(Self {
            port,
            control: Control::dial(&poller),
            poller,
            children,
            grace: None,
            disks: Disks::default(),
            streams: Streams::new(),
            containers: Vec::new(),
            phase: Phase::Running,
            essential: 0,
        })
    }

    /// Runs the pod to its end; a pod that could not be set up is reported and ends at once.
    ///
    /// # Errors
    /// The loop itself fails.
    pub(crate) fn run(&mut self, pod: Result<PodSpec, Error>) -> Result<(), Error> {
        match pod {
            Ok(pod) => self.start_pod(pod),
            Err(error) => {
                let reason = error.to_string();
                self.report(GuestEvent::Failed { reason });
                self.phase = Phase::Draining;
            }
        }
        self.settle();
        while self.phase != Phase::Done {
            for source in self.poller.wait().context(|| "wait for events".into())? {
                self.handle(source);
            }
            self.settle();
        }
        Ok(())
    }

    /// Unmounts, and ends the VM. Returns only if even a reset does not.
    pub(crate) fn power_off(&mut self) {
        self.disks.unmount();
        self.port.mark(Mark::PowerOff);
        let error = rustix::system::reboot(rustix::system::RebootCommand::Restart);
        log_error(&format!("cannot power off: {error:?}"));
    }

    fn start_pod(&mut self, pod: PodSpec) {
        if pod.exit_with_containers {
            self.essential = pod.containers.len();
        }
        for spec in &pod.containers {
            if let Err(error) = self.start(spec) {
                // Refused before anything was made: it still counts, its streams end, and it is reported
                // like the others.
                let _ = self.streams.open(&spec.process.stdio, &self.poller);
                self.containers.push(Container::not_started(&spec.id));
                self.report_end(&spec.id, container::not_started(error.to_string()));
            }
        }
    }

    /// Starts a container, or reports why it cannot be.
    ///
    /// # Errors
    /// The request itself makes no sense.
    fn start(&mut self, spec: &ContainerSpec) -> Result<(), Error> {
        container::validate(spec)?;
        if self
            .containers
            .iter()
            .any(|container| container.id == spec.id)
        {
            return Err(Error::Refused(format!(
                "the pod already has a container `{}`",
                spec.id
            )));
        }
        let index = self.containers.len();
        let mut pod = Pod {
            disks: &mut self.disks,
            streams: &mut self.streams,
            poller: &self.poller,
            port: &self.port,
        };
        match Container::start(spec, index as u32, index == 0, &mut pod) {
            Ok(container) => self.containers.push(container),
            Err(error) => {
                self.disks.release(&spec.id);
                self.containers.push(Container::not_started(&spec.id));
                self.report_end(&spec.id, container::not_started(error.to_string()));
            }
        }
        Ok(())
    }

    fn handle(&mut self, source: Source) {
        match source {
            Source::Children => self.reap(),
            Source::Grace => {
                self.stop_grace();
                self.signal_all(Signal::KILL);
            }
            Source::Control => self.hear_host(),
            Source::Report(index) => self.hear_container(index as usize),
            Source::Stream(index) => self.streams.turn(index, &self.poller),
        }
    }

    /// Moves on to the phase that what has happened allows.
    fn settle(&mut self) {
        let essential = &self.containers[..self.essential];
        if self.phase == Phase::Running
            && !essential.is_empty()
            && !essential.iter().any(Container::is_live)
        {
            self.signal_all(Signal::KILL);
            self.phase = Phase::Stopping;
        }
        if self.phase == Phase::Stopping && !self.containers.iter().any(Container::is_live) {
            self.stop_grace();
            self.phase = Phase::Draining;
        }
        if self.phase == Phase::Draining && (self.streams.are_done() || self.control.is_gone()) {
            self.control.finish(&self.poller);
            self.phase = Phase::Closing;
        }
        if self.phase == Phase::Closing && self.control.is_gone() {
            self.phase = Phase::Done;
        }
    }

    /// Reaps every child that has ended, containers' and orphans alike.
    fn reap(&mut self) {
        let mut drained = [0; 512];
        let _ = rustix::io::read(&self.children, &mut drained);
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            self.reaped(pid, status);
        }
    }

    fn reaped(&mut self, pid: Pid, status: WaitStatus) {
        let Some(index) = self
            .containers
            .iter()
            .position(|container| container.is(pid))
        else {
            return;
        };
        // It may have ended before its report was read.
        self.hear_container(index);
        let container = &mut self.containers[index];
        let status = container.end(status, &self.poller);
        let id = container.id.clone();
        self.disks.release(&id);
        self.report_end(&id, status);
    }

    fn hear_container(&mut self, index: usize) {
        if let Some(container) = self.containers.get_mut(index)
            && container.hear(&self.poller)
        {
            let container = container.id.clone();
            self.report(GuestEvent::Started { container });
        }
    }

    fn hear_host(&mut self) {
        let turn = self.control.turn(&self.poller);
        if turn.connected {
            self.port.mark(Mark::AgentReady);
        }
        for HostMessage { id, request } in turn.messages {
            let result = self
                .obey(request)
                .map(|()| Answer::Done)
                .map_err(|error| error.to_string());
            self.control
                .send(&GuestMessage::Reply { id, result }, &self.poller);
        }
    }

    fn obey(&mut self, request: HostRequest) -> Result<(), Error> {
        match request {
            HostRequest::Start(_) if self.phase != Phase::Running => Err(Error::Refused(
                "the pod is ending and starts no container".into(),
            )),
            HostRequest::Start(spec) => self.start(&spec),
            HostRequest::Signal {
                process: ProcessId::Container(container),
                signal,
                ..
            } => {
                let signal = sys::signal(signal).ok_or_else(|| {
                    Error::Refused(format!("{signal} is not a signal: 1 to 64 are"))
                })?;
                self.find(&container)?.signal(signal)
            }
            HostRequest::Resize {
                process: ProcessId::Container(container),
                size,
            } => match self.find(&container)?.terminal {
                Some(stream) => self.streams.resize(stream, size),
                None => Err(Error::Refused(format!(
                    "the container `{container}` has no terminal"
                ))),
            },
            HostRequest::Shutdown { grace_ms } => self.shut_down(grace_ms),
            _ => Err(Error::Refused(
                "this version of cube-init does not serve the request".into(),
            )),
        }
    }

    fn find(&self, id: &str) -> Result<&Container, Error> {
        let found = self.containers.iter().find(|container| container.id == id);
        found.ok_or_else(|| Error::Refused(format!("the pod has no container `{id}`")))
    }

    fn shut_down(&mut self, grace_ms: u32) -> Result<(), Error> {
        if !matches!(self.phase, Phase::Running | Phase::Stopping) {
            return Ok(());
        }
        self.phase = Phase::Stopping;
        if grace_ms == 0 {
            self.signal_all(Signal::KILL);
            return Ok(());
        }
        self.signal_all(Signal::TERM);
        self.stop_grace();
        let mut timer = Watched::new(
            grace_timer(grace_ms).context(|| "arm the timer of the grace period".into())?,
            Source::Grace,
        );
        timer
            .watch(&self.poller, Some(EventFlags::IN))
            .context(|| "watch the timer of the grace period".into())?;
        self.grace = Some(timer);
        Ok(())
    }

    fn stop_grace(&mut self) {
        if let Some(timer) = self.grace.take() {
            timer.close(&self.poller);
        }
    }

    fn signal_all(&self, signal: Signal) {
        for container in self
            .containers
            .iter()
            .filter(|container| container.is_live())
        {
            if let Err(error) = container.signal(signal) {
                log_error(&error.to_string());
            }
        }
    }

    fn report_end(&mut self, container: &str, status: ExitStatus) {
        let container = container.to_owned();
        self.report(GuestEvent::Exited { container, status });
    }

    fn report(&mut self, event: GuestEvent) {
        self.control.send(&GuestMessage::Event(event), &self.poller);
    }
}

fn grace_timer(milliseconds: u32) -> rustix::io::Result<OwnedFd> {
    let timer = timerfd_create(
        TimerfdClockId::Monotonic,
        TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
    )?;
    let after = Duration::from_millis(milliseconds.into());
    let setting = Itimerspec {
        it_interval: Timespec::default(),
        it_value: Timespec {
            tv_sec: after.as_secs() as i64,
            tv_nsec: after.subsec_nanos().into(),
        },
    };
    timerfd_settime(&timer, TimerfdTimerFlags::empty(), &setting)?;
    Ok(timer)
}
