//! The worker: one thread, one event loop, the queues of every in-process virtio device.
//!
//! A worker owns the devices it has adopted: nobody else can touch an [`Active`] until it is released, so
//! devices need no lock. Other threads speak to it through a [`WorkerHandle`]: [`WorkerHandle::adopt`] and
//! [`WorkerHandle::release`] are synchronous, and the worker never waits for those that call them (nor for
//! the guest), so a vCPU thread may call them while it holds its transport's lock.
//!
//! ```text
//!   spawn ─▶ hook (seccomp) ─▶ loop: epoll ─▶ ready devices ─▶ devices with more to do ─▶ commands ─┐
//!                                ▲                                                                 │
//!                                └────────────────────────────────────────────────────────────────┘
//!   stop ─▶ quiesce all ─▶ join: the devices come back
//! ```
//!
//! The loop is on epoll itself and not on the event-manager crate: that one knows a subscriber by
//! descriptor and panics on an event of a descriptor it has forgotten, while a device here may close and
//! reopen a descriptor within a turn; and it has no word for "more to do, and no descriptor says so".
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, eventfd};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::vmm::thread;
use crate::vmm::virtio::{Active, HostError, Interest, RESUME};

/// Events taken from epoll at a time.
const EVENTS: usize = 64;

/// The epoll value of the worker's own eventfd; no device has this id.
const COMMANDS: u64 = u64::MAX;

/// A device on a worker. A worker never gives one out twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(u32);

/// Why a worker could not be started or did not answer.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The thread, its epoll or its eventfd could not be made, or the hook refused.
    #[error("start the worker thread {name}: {source}")]
    Start {
        /// The thread's name.
        name: String,
        /// The operating system's answer.
        #[source]
        source: io::Error,
    },
    /// The worker has stopped.
    #[error("the worker thread has stopped; no device can be given to it or taken from it")]
    Stopped,
    /// A device's descriptors cannot be polled.
    #[error("poll the device's descriptors: {0}")]
    Poll(#[source] io::Error),
}

/// A failure of the host that stopped one device.
#[derive(Debug)]
pub struct DeviceFailure {
    /// The device, which stays with the worker, polled no more; none when it never got there.
    pub token: Option<Token>,
    /// What failed.
    pub error: HostError,
}

enum Command {
    Adopt(Token, Box<dyn Active>, SyncSender<Result<(), io::Error>>),
    Release(Token, SyncSender<Option<Box<dyn Active>>>),
    Stop,
}

/// The owner of a worker thread. Dropping it stops and joins the thread.
pub struct Worker {
    handle: WorkerHandle,
    thread: Option<JoinHandle<Vec<Box<dyn Active>>>>,
    failures: Receiver<DeviceFailure>,
    failed: Arc<Wake>,
}

/// The way to give devices to a worker and to take them back, from any other thread.
#[derive(Clone)]
pub struct WorkerHandle {
    commands: Sender<Command>,
    wake: Arc<Wake>,
    failures: Sender<DeviceFailure>,
    failed: Arc<Wake>,
    next_token: Arc<AtomicU32>,
}

impl Worker {
    /// Starts the thread `name`. `hook` runs on it before the loop: the place to install a seccomp filter.
    /// Returns when the hook has returned.
    ///
    /// # Errors
    /// No thread or descriptor could be made, or what `hook` returned.
    pub fn spawn(
        name: &str,
        hook: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> Result<Self, WorkerError> {
        Self::start(name, hook).map_err(|source| WorkerError::Start {
            name: name.to_owned(),
            source,
        })
    }

    fn start(
        name: &str,
        hook: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<Self> {
        let (commands, inbox) = channel();
        let (report, failures) = channel();
        let wake = Arc::new(Wake::new()?);
        let failed = Arc::new(Wake::new()?);
        let event_loop = EventLoop::new(inbox, wake.clone(), report.clone(), failed.clone())?;
        let (started, wait) = sync_channel(1);
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .stack_size(thread::STACK);
        let thread = thread.spawn(move || {
            let hooked = hook();
            let refused = hooked.is_err();
            // The other end waits in `recv` below: it is there.
            let _ = started.send(hooked);
            if refused {
                return Vec::new();
            }
            event_loop.run()
        })?;
        // Nothing comes when the hook panicked.
        wait.recv()
            .unwrap_or_else(|_| Err(io::Error::other("the start hook panicked")))?;
        let next_token = Arc::default();
        Ok(Self {
            handle: WorkerHandle {
                commands,
                wake,
                failures: report,
                failed: failed.clone(),
                next_token,
            },
            thread: Some(thread),
            failures,
            failed,
        })
    }

    /// A handle for other threads.
    pub fn handle(&self) -> WorkerHandle {
        self.handle.clone()
    }

    /// Readable when [`Worker::failure`] has something to say.
    pub fn failure_fd(&self) -> BorrowedFd<'_> {
        self.failed.fd.as_fd()
    }

    /// The next failure of a device, if there is one. Clears [`Worker::failure_fd`].
    pub fn failure(&self) -> Option<DeviceFailure> {
        self.failed.clear();
        let next = self.failures.try_recv().ok();
        if next.is_some() {
            // There may be more behind it.
            self.failed.signal();
        }
        next
    }

    /// Stops the loop, joins the thread and returns the devices that it still owned, quiesced, in the
    /// order in which they were adopted.
    pub fn stop(mut self) -> Vec<Box<dyn Active>> {
        self.join()
    }

    fn join(&mut self) -> Vec<Box<dyn Active>> {
        let Some(thread) = self.thread.take() else {
            return Vec::new();
        };
        // Fails only when the loop has ended already.
        let _ = self.handle.send(Command::Stop);
        thread.join().unwrap_or_default()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.join());
    }
}

impl WorkerHandle {
    /// Gives `active` to the worker, which calls it with [`RESUME`] once. Returns when it is polled.
    ///
    /// # Errors
    /// The worker has stopped, or the device's descriptors cannot be polled; the device is dropped.
    pub fn adopt(&self, active: Box<dyn Active>) -> Result<Token, WorkerError> {
        let token = Token(self.next_token.fetch_add(1, Ordering::Relaxed));
        let (answer, wait) = sync_channel(1);
        self.send(Command::Adopt(token, active, answer))?;
        wait.recv()
            .map_err(|_| WorkerError::Stopped)?
            .map_err(WorkerError::Poll)?;
        Ok(token)
    }

    /// Takes a device back: when this returns, the worker has quiesced it and touches it no more.
    ///
    /// # Errors
    /// The worker has stopped, or it does not own the device.
    pub fn release(&self, token: Token) -> Result<Box<dyn Active>, WorkerError> {
        let (answer, wait) = sync_channel(1);
        self.send(Command::Release(token, answer))?;
        let released = wait.recv().map_err(|_| WorkerError::Stopped)?;
        released.ok_or(WorkerError::Stopped)
    }

    /// Reports the failure of a device that did not get as far as the worker.
    pub fn report(&self, error: HostError) {
        // Fails only when nobody owns the worker any more.
        let _ = self.failures.send(DeviceFailure { token: None, error });
        self.failed.signal();
    }

    fn send(&self, command: Command) -> Result<(), WorkerError> {
        self.commands
            .send(command)
            .map_err(|_| WorkerError::Stopped)?;
        self.wake.signal();
        Ok(())
    }
}

/// An eventfd that is only ever set and cleared.
struct Wake {
    fd: OwnedFd,
}

impl Wake {
    fn new() -> io::Result<Self> {
        let fd = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        Ok(Self { fd })
    }

    fn signal(&self) {
        // Fails only when the counter is full, and then it is set already.
        let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
    }

    fn clear(&self) {
        // Fails only when it is clear already.
        let _ = rustix::io::read(&self.fd, &mut [0u8; 8]);
    }
}

/// A device that the loop owns.
struct Owned {
    active: Box<dyn Active>,
    /// What is registered in epoll for it.
    interests: Vec<Interest>,
    /// It has more to do.
    again: bool,
    /// It failed: kept until it is released, but never called again.
    failed: bool,
}

/// The thread's half.
struct EventLoop {
    epoll: Epoll,
    inbox: Receiver<Command>,
    wake: Arc<Wake>,
    report: Sender<DeviceFailure>,
    failed: Arc<Wake>,
    devices: BTreeMap<Token, Owned>,
    stopping: bool,
}

impl EventLoop {
    fn new(
        inbox: Receiver<Command>,
        wake: Arc<Wake>,
        report: Sender<DeviceFailure>,
        failed: Arc<Wake>,
    ) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        epoll.ctl(
            ControlOperation::Add,
            wake.fd.as_raw_fd(),
            EpollEvent::new(EventSet::IN, COMMANDS),
        )?;
        Ok(Self {
            epoll,
            inbox,
            wake,
            report,
            failed,
            devices: BTreeMap::new(),
            stopping: false,
        })
    }

    fn run(mut self) -> Vec<Box<dyn Active>> {
        let mut events = [EpollEvent::default(); EVENTS];
        while !self.stopping {
            let busy = self.devices.values().any(|device| device.again);
            let timeout = if busy { 0 } else { -1 };
            let ready = match self.epoll.wait(timeout, &mut events) {
                Ok(n) => events.get(..n).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // Only a descriptor that is no epoll, or a bad pointer: neither is possible.
                Err(error) => panic!("epoll_wait in the worker: {error}"),
            };
            let busy = self.busy_devices();
            let mut commands = false;
            for event in ready {
                if event.data() == COMMANDS {
                    commands = true;
                } else {
                    let (token, local) = unpack(event.data());
                    self.turn(token, local);
                }
            }
            for token in busy {
                self.turn(token, RESUME);
            }
            if commands {
                self.obey();
            }
        }
        let owned = std::mem::take(&mut self.devices);
        owned
            .into_values()
            .map(|mut device| {
                device.active.quiesce();
                device.active
            })
            .collect()
    }

    fn busy_devices(&self) -> Vec<Token> {
        let busy = self.devices.iter().filter(|(_, device)| device.again);
        busy.map(|(token, _)| *token).collect()
    }

    /// Lets one device work. A device that has been released meanwhile is not there: nothing happens.
    fn turn(&mut self, token: Token, local: u32) {
        let Some(device) = self.devices.get_mut(&token) else {
            return;
        };
        if device.failed {
            return;
        }
        let failed = match device.active.ready(local) {
            Ok(turn) => {
                // Any turn serves all of a device's queues, so the last one knows whether more is left.
                device.again = turn.again;
                turn.rearm
                    .then(|| device.rearm(&self.epoll, token))
                    .and_then(Result::err)
                    .map(|source| HostError {
                        device: format!("device {} on the worker", token.0),
                        action: "poll the device's descriptors",
                        source,
                    })
            }
            Err(error) => Some(error),
        };
        if let Some(error) = failed {
            device.again = false;
            device.failed = true;
            device.disarm(&self.epoll);
            // Fails only when nobody owns the worker any more.
            let _ = self.report.send(DeviceFailure {
                token: Some(token),
                error,
            });
            self.failed.signal();
        }
    }

    /// Does what other threads asked for.
    fn obey(&mut self) {
        self.wake.clear();
        while let Ok(command) = self.inbox.try_recv() {
            match command {
                Command::Adopt(token, active, answer) => {
                    let result = self.adopt(token, active);
                    // The caller waits for it.
                    let _ = answer.send(result);
                }
                Command::Release(token, answer) => {
                    let released = self.devices.remove(&token).map(|mut device| {
                        device.disarm(&self.epoll);
                        device.active.quiesce();
                        device.active
                    });
                    let _ = answer.send(released);
                }
                Command::Stop => self.stopping = true,
            }
        }
    }

    fn adopt(&mut self, token: Token, active: Box<dyn Active>) -> io::Result<()> {
        let mut device = Owned {
            active,
            interests: Vec::new(),
            again: true,
            failed: false,
        };
        if let Err(error) = device.rearm(&self.epoll, token) {
            device.disarm(&self.epoll);
            return Err(error);
        }
        self.devices.insert(token, device);
        Ok(())
    }
}

impl Owned {
    /// Makes epoll hold what the device is interested in now. A descriptor may have been closed, and its
    /// number reused, since the last time: so nothing is taken for registered because it once was.
    fn rearm(&mut self, epoll: &Epoll, token: Token) -> io::Result<()> {
        let wanted = self.active.interests();
        for old in &self.interests {
            if !wanted.iter().any(|interest| interest.fd == old.fd) {
                forget(epoll, old.fd);
            }
        }
        self.interests = wanted;
        for interest in &self.interests {
            register(epoll, token, interest)?;
        }
        Ok(())
    }

    fn disarm(&mut self, epoll: &Epoll) {
        for interest in self.interests.drain(..) {
            forget(epoll, interest.fd);
        }
    }
}

fn register(epoll: &Epoll, token: Token, interest: &Interest) -> io::Result<()> {
    let mut set = EventSet::empty();
    set.set(EventSet::IN, interest.readable);
    set.set(EventSet::OUT, interest.writable);
    set.set(EventSet::EDGE_TRIGGERED, interest.edge_triggered);
    let event = EpollEvent::new(set, pack(token, interest.token));
    match epoll.ctl(ControlOperation::Modify, interest.fd, event) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            epoll.ctl(ControlOperation::Add, interest.fd, event)
        }
        result => result,
    }
}

/// Takes a descriptor out of epoll; one that was closed is out already.
fn forget(epoll: &Epoll, fd: RawFd) {
    let _ = epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
}

fn pack(token: Token, local: u32) -> u64 {
    u64::from(token.0) << 32 | u64::from(local)
}

fn unpack(data: u64) -> (Token, u32) {
    // Both halves fit by construction.
    (Token((data >> 32) as u32), data as u32)
}

#[cfg(test)]
mod tests;
