//! vhost-user: queues of a device that another process serves, such as a DPDK or VPP switch. That process, the
//! backend, gets guest memory and the queues' eventfds; no frame passes through this one.
//!
//! ```text
//!   driver ──kick──▶ ioeventfd of each queue ────────────────▶ backend
//!          ◀──────── irqfd ◀───────────────────────────── call ──┘ │ rings and buffers, in shared memory
//!   vCPU, worker ── Command ──▶ thread `vhost-user` ── socket ─────┘
//! ```
//!
//! [`Frontend`] is what a device holds. All talk with the backend is done by a thread of its own
//! ([`session`]), so that a backend that is slow, or silent, delays neither vCPUs nor other devices; only the
//! driver that resets its device waits for the rings to come back. [`connection`] has the deadlines,
//! [`message`] the bytes.
//!
//! The messages are the dozen that a frontend needs, written here: the frontend of the `vhost` crate reads an
//! answer for as long as it takes, and one that is too short for ever.
//!
//! A backend can read and write all of guest memory: it is trusted with the guest, though not with this process.
#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::arithmetic_side_effects
    )
)]

pub mod connection;
pub mod message;
pub mod session;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use crate::vmm::memory::GuestMemory;
use crate::vmm::thread::{self, Role};
use connection::Fault;
use session::{Offer, Rings, Session};

/// How often a backend that is not there is looked for.
const RETRY: Duration = Duration::from_millis(250);

/// A backend cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum VhostUserError {
    /// It is not what the device needs.
    #[error("the vhost-user backend at {path} {fault}")]
    Backend {
        /// Its socket.
        path: PathBuf,
        /// What is wrong.
        fault: Fault,
    },
    /// No thread or descriptor can be had.
    #[error("cannot start the vhost-user thread: {0}")]
    Io(#[from] io::Error),
}

/// What the device's threads ask of the session's.
enum Command {
    Start(Rings),
    Enable(u16, bool),
    Stop(SyncSender<()>),
    End,
}

/// The way to the session's thread.
#[derive(Clone)]
struct Mailbox {
    commands: Sender<Command>,
    wake: Arc<OwnedFd>,
}

impl Mailbox {
    fn send(&self, command: Command) {
        // Fails only when the thread has panicked: the device does nothing from then on.
        let _ = self.commands.send(command);
        // Fails only when the counter is full, and then it is signalled already.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }
}

/// A device's way to its backend. Dropping it ends the session.
pub struct Frontend {
    mailbox: Mailbox,
    offer: Offer,
    present: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Frontend {
    /// Connects to the backend at `path`, for the device that messages call `device`.
    ///
    /// # Errors
    /// There is no backend, or it does not keep to the protocol; or no thread can be had.
    pub fn connect(device: String, path: &Path) -> Result<Self, VhostUserError> {
        let session = Session::open(device, path.to_owned()).map_err(|fault| {
            let path = path.to_owned();
            VhostUserError::Backend { path, fault }
        })?;
        let (offer, present) = (session.offer(), session.present());
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        let wake = Arc::new(eventfd(0, flags).map_err(io::Error::from)?);
        let (commands, inbox) = channel();
        let woken = wake.clone();
        let thread = std::thread::Builder::new()
            .name("vhost-user".into())
            .stack_size(thread::STACK)
            .spawn(move || {
                // Without its filter it must not speak to anybody.
                match thread::begin(Role::VhostUser) {
                    Ok(()) => run(session, &inbox, &woken),
                    Err(error) => log::error!("no filter for the vhost-user thread: {error}"),
                }
            })?;
        Ok(Self {
            mailbox: Mailbox { commands, wake },
            offer,
            present,
            thread: Some(thread),
        })
    }

    /// What the first backend has.
    pub fn offer(&self) -> Offer {
        self.offer
    }

    /// Whether there is a backend now. When that changes, the device that runs shows a change of its
    /// configuration.
    pub fn is_present(&self) -> bool {
        self.present.load(Ordering::Acquire)
    }

    /// Gives the rings to the backend, or to the next one if there is none now.
    ///
    /// # Errors
    /// The guest's memory is private.
    pub fn start(&self, rings: Rings) -> io::Result<()> {
        if !is_shared(&rings.memory) {
            let why = "the guest's memory is not shared with other processes";
            return Err(io::Error::new(io::ErrorKind::Unsupported, why));
        }
        self.mailbox.send(Command::Start(rings));
        Ok(())
    }

    /// What the rings' enabling is controlled by, from another thread.
    pub fn switch(&self) -> Switch {
        Switch(self.mailbox.clone())
    }

    /// Takes the rings back. When this returns, no backend that keeps to the protocol touches guest memory on
    /// their behalf; one that does not give them back in time was hung up on.
    pub fn stop(&self) {
        let (stopped, wait) = sync_channel(1);
        self.mailbox.send(Command::Stop(stopped));
        // Fails only when the thread has panicked.
        let _ = wait.recv();
    }
}

/// Whether another process can map guest memory.
pub fn is_shared(memory: &GuestMemory) -> bool {
    session::places(memory).is_some()
}

impl Drop for Frontend {
    fn drop(&mut self) {
        self.mailbox.send(Command::End);
        if let Some(thread) = self.thread.take() {
            // A panic was reported when it happened.
            let _ = thread.join();
        }
    }
}

/// Enables and pauses rings.
pub struct Switch(Mailbox);

impl Switch {
    /// Lets the backend serve a ring, or not. It does so soon after this returns: until then a kick waits.
    pub fn enable(&self, queue: u16, enabled: bool) {
        self.0.send(Command::Enable(queue, enabled));
    }
}

fn run(mut session: Session, inbox: &Receiver<Command>, wake: &OwnedFd) {
    loop {
        let ready = wait(&session, wake);
        while let Ok(command) = inbox.try_recv() {
            match command {
                Command::Start(rings) => session.start(rings),
                Command::Enable(queue, enabled) => session.enable(queue, enabled),
                Command::Stop(stopped) => {
                    session.stop();
                    // The device waits for it.
                    let _ = stopped.send(());
                }
                Command::End => return,
            }
        }
        if ready == Ready::Hangup && session.hangup().is_some() {
            session.hang_up();
        } else if ready == Ready::Retry && session.is_waiting() {
            session.reconnect();
        }
    }
}

#[derive(PartialEq, Eq)]
enum Ready {
    Command,
    Hangup,
    Retry,
}

fn wait(session: &Session, wake: &OwnedFd) -> Ready {
    let wake_or = PollFd::new(wake, PollFlags::IN);
    let hangup = session.hangup();
    let watched = hangup.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
    let mut fds: Vec<PollFd<'_>> = std::iter::once(wake_or).chain(watched).collect();
    let retry = Timespec::try_from(RETRY).ok();
    let timeout = retry.filter(|_| session.is_waiting());
    // Fails only by a signal, and then the next call tells.
    let polled = poll(&mut fds, timeout.as_ref());
    let is_ready = |fd: Option<&PollFd<'_>>| fd.is_some_and(|fd| !fd.revents().is_empty());
    if is_ready(fds.first()) {
        // Not readable: it was read before.
        let _ = rustix::io::read(wake, &mut [0; 8]);
        Ready::Command
    } else if is_ready(fds.get(1)) {
        Ready::Hangup
    } else if polled == Ok(0) {
        Ready::Retry
    } else {
        Ready::Command
    }
}
