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

mod requests;
mod start;

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::time::Duration;

use cube_guest::{
    Answer, ContainerSpec, ExitStatus, GuestEvent, GuestMessage, HostMessage, Mark, PodSpec,
    VolumeSpec,
};
use rustix::event::epoll::EventFlags;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use crate::container::exec::Exec;
use crate::container::pid_namespace::PidNamespaces;
use crate::container::{self, Container, Pod};
use crate::control::Control;
use crate::disks::Disks;
use crate::error::{Context, Error, log_error};
use crate::events::{Poller, Source, Watched};
use crate::forward::Forwards;
use crate::job::Jobs;
use crate::port::Port;
use crate::stdio::Streams;
use crate::sys;
use crate::table::Table;
use crate::volumes::Volumes;

/// The whole pod.
pub(crate) struct Agent {
    port: Port,
    poller: Poller,
    control: Control,
    children: Watched,
    grace: Option<Watched>,
    namespaces: PidNamespaces,
    disks: Disks,
    volumes: Volumes,
    streams: Streams,
    containers: Table<Container>,
    execs: Table<Exec>,
    jobs: Jobs,
    forwards: Forwards,
    phase: Phase,
    /// What of the pod's specification is still to be made; it waits for a volume.
    boot: Boot,
    /// How many containers that end the pod have not ended; absent: none does, the pod goes on.
    essential: Option<usize>,
    /// A container was started, and the VMM told.
    started: bool,
}

#[derive(Debug, Default)]
struct Boot {
    volumes: VecDeque<VolumeSpec>,
    containers: Vec<ContainerSpec>,
    /// The volume that a job mounts.
    waits_for: Option<String>,
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
            namespaces: PidNamespaces::new().context(|| "open the PID namespace".into())?,
            disks: Disks::default(),
            volumes: Volumes::default(),
            streams: Streams::new(),
            containers: Table::default(),
            execs: Table::default(),
            jobs: Jobs::default(),
            forwards: Forwards::default(),
            phase: Phase::Running,
            boot: Boot::default(),
            essential: None,
            started: false,
        })
    }

    /// Runs the pod to its end; a pod that could not be set up is reported and ends at once.
    ///
    /// # Errors
    /// The loop itself fails.
    pub(crate) fn run(&mut self, pod: Result<PodSpec, Error>) -> Result<(), Error> {
        match pod {
            Ok(pod) => self.start_pod(pod),
            Err(error) => self.fail(&error.to_string()),
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
        for (_, container) in self.containers.iter() {
            if let Ok(made) = container.made() {
                container::release_namespace(&made.namespace);
            }
        }
        self.volumes.unmount();
        self.disks.unmount();
        self.port.mark(Mark::PowerOff);
        let error = rustix::system::reboot(rustix::system::RebootCommand::Restart);
        log_error(&format!("cannot power off: {error:?}"));
    }

    /// The pod could not be set up.
    fn fail(&mut self, reason: &str) {
        let reason = reason.to_owned();
        self.report(GuestEvent::Failed { reason });
        self.boot = Boot::default();
        self.essential = None;
        self.phase = Phase::Draining;
    }

    fn handle(&mut self, source: Source) {
        match source {
            Source::Children => self.reap(),
            Source::Grace => {
                self.stop_grace();
                self.signal_all(Signal::KILL);
            }
            Source::Control => self.hear_host(),
            Source::Report(index) => self.hear_container(index),
            Source::ExecReport(index) => {
                if let Some(exec) = self.execs.get_mut(index) {
                    exec.child.hear(&self.poller);
                }
            }
            Source::Stream(index) => self.streams.turn(index, &self.poller),
            Source::Memory(index) => _ = self.hear_oom(index),
            Source::Cgroup(index) => self.hear_cgroup(index),
            Source::Job(index) => self.hear_job(index),
            Source::Forward(index) => self.hear_forward(index),
        }
    }

    /// Moves on to the phase that what has happened allows.
    fn settle(&mut self) {
        let is_live = |containers: &Table<Container>| containers.find(Container::is_live).is_some();
        if self.phase == Phase::Running && self.essential == Some(0) {
            self.signal_all(Signal::KILL);
            self.phase = Phase::Stopping;
        }
        if self.phase == Phase::Stopping && !is_live(&self.containers) {
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
        self.namespaces.reaped(pid);
        if let Some(index) = self.containers.find(|container| container.is(pid)) {
            self.container_ended(index, status);
        } else if let Some(index) = self.execs.find(|exec| exec.child.pid() == pid) {
            self.exec_ended(index, status);
        } else if let Some(index) = self.jobs.find(pid) {
            self.hear_job(index);
            self.jobs.end(index);
        }
    }

    fn container_ended(&mut self, index: u32, status: WaitStatus) {
        // It may have ended before its report was read.
        self.hear_container(index);
        let oom_killed = self.hear_oom(index);
        let Some(container) = self.containers.get_mut(index) else {
            return;
        };
        let status = container.end(status, oom_killed, &self.poller);
        let (id, is_essential) = (container.id.clone(), container.is_essential);
        // A freeze or thaw that nobody will see the end of.
        if let Some((awaited, request)) = container.awaited.take() {
            awaited.close(&self.poller);
            self.reply(request, Err(format!("the container `{id}` has ended")));
        }
        if is_essential {
            self.lose_essential();
        }
        self.report_end(&id, status);
    }

    fn lose_essential(&mut self) {
        self.essential = self.essential.map(|left| left.saturating_sub(1));
    }

    fn exec_ended(&mut self, index: u32, status: WaitStatus) {
        let Some(mut exec) = self.execs.take(index) else {
            return;
        };
        exec.child.hear(&self.poller);
        let status = exec.child.end(status, false, &self.poller);
        let exec = exec.id;
        self.report(GuestEvent::ExecExited { exec, status });
    }

    fn hear_container(&mut self, index: u32) {
        if let Some(container) = self.containers.get_mut(index)
            && container.hear(&self.poller)
        {
            let container = container.id.clone();
            self.report(GuestEvent::Started { container });
        }
    }

    /// Reports a new OOM kill; returns whether there was any in the container's life.
    fn hear_oom(&mut self, index: u32) -> bool {
        let Some(container) = self.containers.get_mut(index) else {
            return false;
        };
        let (is_new, ever) = container.oom_killed();
        if is_new && container.is_live() {
            let container = container.id.clone();
            self.report(GuestEvent::OomKilled { container });
        }
        ever
    }

    fn hear_host(&mut self) {
        let turn = self.control.turn(&self.poller);
        if turn.connected {
            self.port.mark(Mark::AgentReady);
        }
        for HostMessage { id, request } in turn.messages {
            match self.obey(id, request) {
                Ok(Some(answer)) => self.reply(id, Ok(answer)),
                // What was begun replies at its end.
                Ok(None) => {}
                Err(error) => self.reply(id, Err(error.to_string())),
            }
        }
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
        let live = self
            .containers
            .iter()
            .filter(|(_, container)| container.is_live());
        for (_, container) in live {
            if let Err(error) = container.signal(signal, false) {
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

    fn reply(&mut self, id: u64, result: Result<Answer, String>) {
        self.control
            .send(&GuestMessage::Reply { id, result }, &self.poller);
    }

    fn pod(&mut self) -> Pod<'_> {
        Pod {
            disks: &mut self.disks,
            volumes: &mut self.volumes,
            streams: &mut self.streams,
            namespaces: &mut self.namespaces,
            poller: &self.poller,
            port: &self.port,
        }
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
