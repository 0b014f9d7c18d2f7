//! PID namespaces: a container's own, or the one that the pod's containers share.
//!
//! A process is forked into another namespace by moving the agent's `pid_for_children` there and back; it
//! stays the agent's child, which reaps it. The shared namespace is made with its first container. Its PID
//! 1 is a fork of the agent that does nothing: the kernel reaps for it, and no signal from inside reaches
//! it. It is not the agent itself, so that a container sees neither the agent nor the kernel's threads.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Result;
use rustix::process::{Pid, PidfdFlags, Signal};
use rustix::thread::{LinkNameSpaceType, ThreadNameSpaceType};

use crate::sys::{self, NewNamespaces};

/// The namespaces that outlive a container.
#[derive(Debug)]
pub(crate) struct PidNamespaces {
    /// The agent's own.
    own: OwnedFd,
    /// PID 1 of the shared one.
    pod: Option<Pid>,
}

/// Where a process is forked to.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Where<'a> {
    /// A new namespace, as its PID 1.
    New,
    /// The namespace that the pod's containers share.
    Pod,
    /// That of the process behind this pidfd.
    Of(BorrowedFd<'a>),
}

impl PidNamespaces {
    pub(crate) fn new() -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let own = rustix::fs::open("/proc/self/ns/pid", flags, Mode::empty())?;
        Ok(Self { own, pod: None })
    }

    /// Forks, into a new mount namespace if `new_mounts`. Returns `None` in the child.
    pub(crate) fn fork(
        &mut self,
        place: Where<'_>,
        new_mounts: bool,
        cgroup: BorrowedFd<'_>,
    ) -> Result<Option<Pid>> {
        let namespaces = NewNamespaces {
            mount: new_mounts,
            pid: matches!(place, Where::New),
        };
        match place {
            Where::New => sys::fork(namespaces, Some(cgroup)),
            Where::Of(process) => self.fork_beside(process, namespaces, cgroup),
            Where::Pod => {
                let init = rustix::process::pidfd_open(self.pod()?, PidfdFlags::empty())?;
                self.fork_beside(init.as_fd(), namespaces, cgroup)
            }
        }
    }

    /// Notes that a child has ended.
    pub(crate) fn reaped(&mut self, pid: Pid) {
        if self.pod == Some(pid) {
            self.pod = None;
        }
    }

    fn fork_beside(
        &self,
        process: BorrowedFd<'_>,
        namespaces: NewNamespaces,
        cgroup: BorrowedFd<'_>,
    ) -> Result<Option<Pid>> {
        rustix::thread::move_into_thread_name_spaces(process, ThreadNameSpaceType::PROCESS_ID)?;
        let forked = sys::fork(namespaces, Some(cgroup));
        if !matches!(forked, Ok(None)) {
            let back = rustix::thread::move_into_link_name_space(
                self.own.as_fd(),
                Some(LinkNameSpaceType::ProcessID),
            );
            // Otherwise every later child would be in the wrong namespace.
            back.expect("a process may always return to its own PID namespace");
        }
        forked
    }

    /// PID 1 of the shared namespace, made if there is none.
    fn pod(&mut self) -> Result<Pid> {
        if let Some(pid) = self.pod {
            return Ok(pid);
        }
        let namespaces = NewNamespaces {
            mount: false,
            pid: true,
        };
        match sys::fork(namespaces, None)? {
            Some(pid) => {
                self.pod = Some(pid);
                Ok(pid)
            }
            None => idle(),
        }
    }
}

fn idle() -> ! {
    sys::ignore_children();
    let closed = sys::close_all_but(&[]);
    if closed.is_err() {
        // It would keep streams of containers open for good.
        let _ = rustix::process::kill_process(rustix::process::getpid(), Signal::KILL);
    }
    loop {
        rustix::event::pause();
    }
}
