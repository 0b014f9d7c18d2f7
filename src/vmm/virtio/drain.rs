//! The one queue-draining loop of the program, and what a device's author writes against it.
//!
//! [`Drain`] is the worker half ([`Active`]) of every device whose queues this process serves. It takes
//! chains from the available rings, hands each to a [`QueueHandler`], publishes what completes in the
//! used rings and interrupts the driver at most once per turn. It runs on one thread, the worker that
//! adopted it, and looks like this to one queue:
//!
//! ```text
//!           kick, RESUME, Effects::run
//!   asleep ───────────────────────────▶ runnable ──▶ handler does not want / put it back ──▶ held
//!     ▲    (notification on)               │                          (notification off) │
//!     │                                    │ ring empty, and still                       │ Effects::run,
//!     └────────────────────────────────────┘ empty after notification on                 ▼ next kick
//!                                                                                     runnable
//!   any state ── ring or chain malformed ──▶ broken: NEEDS_RESET, no descriptor polled, no chain taken
//! ```
//!
//! What a handler answers at once is published at once; what it completes later ([`Effects::complete`]) is put into
//! the used ring and shown with the rest of the turn's, so that a driver that is awake meanwhile finds batches and not
//! single frames, and answers them by the batch.
//!
//! What a turn costs is bounded ([`TURN_CHAINS`], [`TURN_BYTES`]), so that a device with a busy driver
//! does not starve the others on its worker.
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

use std::any::Any;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::chain::Chain;
use super::{
    Activation, Active, ActiveQueue, Counters, GuestFault, HostError, Interest, Interrupt, RESUME,
    Turn,
};
use crate::vmm::memory::GuestMemory;

/// Chains that one turn handles at most.
pub const TURN_CHAINS: u32 = 128;

/// Bytes after which a turn ends; the chain that reaches it is still handled whole.
pub const TURN_BYTES: u64 = 4 << 20;

/// Bytes of an element of the used ring (virtio 1.2, section 2.7.8).
const USED_ELEMENT: u64 = 8;

/// The token of the kick eventfd. A handler's own tokens must be below it.
pub const KICK: u32 = RESUME - 1;

/// What a device's author writes: one call per descriptor chain.
///
/// All calls come from one thread. None may block for longer than an I/O request takes, and none ever
/// waits for the guest.
pub trait QueueHandler: Send + 'static {
    /// Whether a chain of queue `queue` would be welcome now. Asked before each chain is taken; a handler
    /// that says no calls [`Effects::run`] when it changes its mind.
    fn wants(&self, _queue: u16) -> bool {
        true
    }

    /// Handles one chain. To complete it later, take it (`std::mem::take(chain)`), return
    /// [`Outcome::Pending`] and call [`Effects::complete`] from [`QueueHandler::ready`].
    ///
    /// # Errors
    /// [`Failure::Guest`] when the request is so malformed that no answer can be written: the device
    /// shows NEEDS_RESET. [`Failure::Host`] can end the pod. A request that merely fails is
    /// [`Outcome::Done`] with the status that the device's specification gives it.
    fn handle(
        &mut self,
        memory: &GuestMemory,
        chain: &mut Chain,
        effects: &mut Effects,
    ) -> Result<Outcome, Failure>;

    /// The handler's own descriptors (sockets, completion queues), with tokens below [`KICK`].
    fn interests(&self) -> Vec<Interest> {
        Vec::new()
    }

    /// One of the handler's own descriptors is ready; bounded work.
    ///
    /// # Errors
    /// As [`QueueHandler::handle`].
    fn ready(
        &mut self,
        _memory: &GuestMemory,
        _token: u32,
        _effects: &mut Effects,
    ) -> Result<(), Failure> {
        Ok(())
    }

    /// Every queue has been served as far as it goes, in a turn that has time left: the last chance to complete
    /// something before the driver is told of the turn's. Called once a turn; bounded work.
    ///
    /// # Errors
    /// As [`QueueHandler::handle`].
    fn served(&mut self, _memory: &GuestMemory, _effects: &mut Effects) -> Result<(), Failure> {
        Ok(())
    }

    /// The device is about to leave its worker (reset, pause, detach): finishes or cancels every chain
    /// that is pending, or gives it back unused. Completions are still published. After it, nothing touches
    /// guest memory.
    fn quiesce(&mut self, _memory: &GuestMemory, _effects: &mut Effects) {}
}

/// How a chain ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Finished: publish it as used, with this many bytes written into its writable part.
    Done(u32),
    /// The handler completes it later through [`Effects::complete`].
    Pending,
    /// No progress is possible now: the chain goes back to where it came from, and its queue rests until
    /// [`Effects::run`] (a kick of the device may wake it sooner).
    PutBack,
}

/// Why a handler could not answer.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The guest broke the protocol: the device shows NEEDS_RESET.
    #[error(transparent)]
    Guest(#[from] GuestFault),
    /// The host failed.
    #[error(transparent)]
    Host(#[from] HostError),
}

/// What a handler wants done besides answering the chain at hand.
#[derive(Debug, Default)]
pub struct Effects {
    completed: Vec<Completion>,
    given_back: Vec<(u16, u16)>,
    run: Vec<u16>,
    rearm: bool,
    faults: u32,
    errors: u32,
}

#[derive(Debug)]
struct Completion {
    queue: u16,
    head: u16,
    written: u32,
}

impl Effects {
    /// Publishes a pending chain as used, with `written` bytes in its writable part. The driver sees all that
    /// were completed in one call of the handler at once, and at the end of the turn at the latest.
    pub fn complete(&mut self, queue: u16, head: u16, written: u32) {
        self.completed.push(Completion {
            queue,
            head,
            written,
        });
    }

    /// Gives a pending chain back unused. Of the chains that its queue has pending it must be the one that
    /// was taken last.
    pub fn give_back(&mut self, queue: u16, head: u16) {
        self.given_back.push((queue, head));
    }

    /// Looks at `queue` again in this turn or the next: the handler wants chains now.
    pub fn run(&mut self, queue: u16) {
        if !self.run.contains(&queue) {
            self.run.push(queue);
        }
    }

    /// The handler's [`QueueHandler::interests`] changed.
    pub fn rearm(&mut self) {
        self.rearm = true;
    }

    /// Counts a request that the guest made wrongly and that was answered with a failure.
    pub fn count_fault(&mut self) {
        self.faults = self.faults.saturating_add(1);
    }

    /// Counts a request that failed for a reason on the host and was answered with a failure.
    pub fn count_error(&mut self) {
        self.errors = self.errors.saturating_add(1);
    }
}

/// One queue with what the loop knows about it.
struct DrainedQueue {
    index: u16,
    queue: Queue,
    /// Worth looking at in this turn.
    runnable: bool,
    /// Per head: taken and not yet published as used. A head that comes again while set is a fault.
    in_flight: Vec<bool>,
    /// Something is in the used ring that the driver does not see yet.
    staged: bool,
    /// Something was published since the driver was last told.
    published: bool,
    /// The driver was asked to kick.
    notifying: bool,
    /// The used index when the driver was last told, or might have been.
    told: u16,
}

/// The worker half of every device whose queues this process serves: the loop around a handler.
pub struct Drain<H> {
    handler: H,
    memory: GuestMemory,
    /// In the order of their next turns, which is not that of their indices.
    queues: Vec<DrainedQueue>,
    kick: EventFd,
    interrupt: Interrupt,
    counters: Arc<Counters>,
    effects: Effects,
    /// Reused for every chain, so that none costs an allocation.
    chain: Chain,
    broken: bool,
}

/// What is left of a turn.
struct Budget {
    chains: u32,
    bytes: u64,
}

impl Budget {
    fn spend(&mut self, bytes: u32) {
        self.chains = self.chains.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes.into());
    }

    fn is_spent(&self) -> bool {
        self.chains == 0 || self.bytes == 0
    }
}

impl<H: QueueHandler> Drain<H> {
    /// The worker half that serves `activation` with `handler`.
    pub fn new(activation: Activation, handler: H) -> Self {
        let queues = activation.queues.into_iter().map(DrainedQueue::new);
        Self {
            handler,
            memory: activation.memory,
            queues: queues.collect(),
            kick: activation.kick,
            interrupt: activation.interrupt,
            counters: activation.counters,
            effects: Effects::default(),
            chain: Chain::default(),
            broken: false,
        }
    }

    /// The handler of a worker half that [`VirtioDevice::reset`](super::VirtioDevice::reset) was given;
    /// none when it is of another type.
    pub fn into_handler(stopped: Box<dyn Active>) -> Option<H> {
        let stopped: Box<dyn Any> = stopped;
        stopped.downcast::<Self>().ok().map(|drain| drain.handler)
    }

    /// One turn: dispatches the token, serves the queues, publishes, interrupts.
    fn turn(&mut self, token: u32) -> Result<bool, Failure> {
        match token {
            // Every queue: one eventfd stands for all of them. Nobody reads it: each signal wakes anew.
            KICK => self.run_all(),
            RESUME => {}
            token => self.handler.ready(&self.memory, token, &mut self.effects)?,
        }
        self.apply_effects()?;
        let mut budget = Budget {
            chains: TURN_CHAINS,
            bytes: TURN_BYTES,
        };
        let mut told = false;
        while !budget.is_spent() {
            let Some(at) = self.queues.iter().position(|queue| queue.runnable) else {
                if std::mem::replace(&mut told, true) {
                    break;
                }
                self.handler.served(&self.memory, &mut self.effects)?;
                self.apply_effects()?;
                continue;
            };
            self.serve(at, &mut budget)?;
            // The queue served last is the last in line, so that a busy one does not starve its siblings.
            let after = at.saturating_add(1).min(self.queues.len());
            self.queues.rotate_left(after);
        }
        Ok(self.queues.iter().any(|queue| queue.runnable))
    }

    fn run_all(&mut self) {
        for queue in &mut self.queues {
            queue.runnable = true;
        }
    }

    /// Takes chains from one queue until it is empty, the handler holds it, or the budget is spent.
    fn serve(&mut self, at: usize, budget: &mut Budget) -> Result<(), Failure> {
        while !budget.is_spent() {
            let Some(queue) = self.queues.get_mut(at) else {
                return Ok(());
            };
            if !self.handler.wants(queue.index) {
                queue.runnable = false;
                return Ok(());
            }
            queue.wake(&self.memory)?;
            let Some(head) = queue.pop(&self.memory)? else {
                // The guest may make the ring look empty and not empty by turns: that costs budget too.
                budget.spend(0);
                if queue.sleep(&self.memory)? {
                    return Ok(());
                }
                continue;
            };
            self.chain
                .parse(&self.memory, queue.index, &queue.queue, head)?;
            let readable = self.chain.readable.len();
            let writable = self.chain.writable.len();
            let outcome = self
                .handler
                .handle(&self.memory, &mut self.chain, &mut self.effects)?;
            if outcome == Outcome::PutBack {
                queue.put_back(head);
                self.apply_effects()?;
                // What the handler asked for in the same call does not wake the queue that it put back.
                self.hold(at);
                return Ok(());
            }
            self.counters.request(readable);
            if let Outcome::Done(written) = outcome {
                self.counters.completion(written);
                queue.put_used(&self.memory, head, written)?;
                queue.publish(&self.memory)?;
            }
            self.apply_effects()?;
            budget.spend(readable.saturating_add(writable));
        }
        Ok(())
    }

    fn hold(&mut self, at: usize) {
        if let Some(queue) = self.queues.get_mut(at) {
            queue.runnable = false;
        }
    }

    /// Publishes completions, marks queues runnable, counts.
    fn apply_effects(&mut self) -> Result<(), GuestFault> {
        for _ in 0..std::mem::take(&mut self.effects.faults) {
            self.counters.fault();
        }
        for _ in 0..std::mem::take(&mut self.effects.errors) {
            self.counters.error();
        }
        for index in self.effects.run.drain(..) {
            if let Some(queue) = self.queues.iter_mut().find(|queue| queue.index == index) {
                queue.runnable = true;
            }
        }
        for (index, head) in self.effects.given_back.drain(..) {
            if let Some(queue) = self.queues.iter_mut().find(|queue| queue.index == index) {
                queue.put_back(head);
            }
        }
        for done in self.effects.completed.drain(..) {
            let mut queues = self.queues.iter_mut();
            if let Some(queue) = queues.find(|queue| queue.index == done.queue) {
                self.counters.completion(done.written);
                queue.put_used(&self.memory, done.head, done.written)?;
            }
        }
        Ok(())
    }

    /// Publishes what is not yet, and tells the driver, once, about everything that was in this turn.
    fn interrupt_driver(&mut self) -> Result<(), GuestFault> {
        let mut wanted = false;
        for queue in &mut self.queues {
            queue.publish(&self.memory)?;
            if std::mem::take(&mut queue.published) {
                wanted |= queue.driver_wants_interrupt(&self.memory)?;
            }
        }
        if wanted {
            self.interrupt.used_buffer();
        }
        Ok(())
    }

    fn give_up(&mut self) {
        self.broken = true;
        self.interrupt.needs_reset();
    }
}

impl<H: QueueHandler> Active for Drain<H> {
    fn interests(&self) -> Vec<Interest> {
        if self.broken {
            return Vec::new();
        }
        let mut interests = self.handler.interests();
        interests.push(Interest {
            fd: self.kick.as_raw_fd(),
            token: KICK,
            readable: true,
            writable: false,
            edge_triggered: true,
        });
        interests
    }

    fn ready(&mut self, token: u32) -> Result<Turn, HostError> {
        if self.broken {
            return Ok(Turn::default());
        }
        let result = self.turn(token);
        // Chains that completed before a fault are the driver's whatever came after them.
        let result = match (result, self.interrupt_driver()) {
            (Ok(_), Err(fault)) => Err(Failure::Guest(fault)),
            (result, _) => result,
        };
        match result {
            Ok(again) => Ok(Turn {
                rearm: std::mem::take(&mut self.effects.rearm),
                again,
            }),
            Err(Failure::Guest(_)) => {
                self.counters.fault();
                self.give_up();
                Ok(Turn {
                    rearm: true,
                    again: false,
                })
            }
            Err(Failure::Host(error)) => {
                self.counters.error();
                self.give_up();
                Err(error)
            }
        }
    }

    fn quiesce(&mut self) {
        self.handler.quiesce(&self.memory, &mut self.effects);
        // The driver may have broken its rings meanwhile; it is about to lose the device anyway.
        let published = self.apply_effects().and_then(|()| self.interrupt_driver());
        if published.is_err() {
            self.counters.fault();
        }
    }
}

impl DrainedQueue {
    fn new(active: ActiveQueue) -> Self {
        Self {
            index: active.index,
            in_flight: vec![false; active.queue.size().into()],
            told: active.queue.next_used(),
            queue: active.queue,
            // The driver may have filled the ring before the device was adopted.
            runnable: true,
            staged: false,
            published: false,
            notifying: true,
        }
    }

    /// The next available head, checked; none when the ring is empty.
    fn pop(&mut self, memory: &GuestMemory) -> Result<Option<u16>, GuestFault> {
        // Refuses an available index further ahead than the queue is long.
        let mut available = self.queue.iter(memory).map_err(|_| GuestFault::Ring)?;
        let Some(head) = available.next().map(|chain| chain.head_index()) else {
            return Ok(None);
        };
        match self.in_flight.get_mut(usize::from(head)) {
            Some(in_flight) if !*in_flight => *in_flight = true,
            // Beyond the table, or the device holds it already.
            _ => return Err(GuestFault::Ring),
        }
        Ok(Some(head))
    }

    /// Undoes [`DrainedQueue::pop`].
    fn put_back(&mut self, head: u16) {
        self.queue.go_to_previous_position();
        self.forget(head);
    }

    /// Tells the driver not to bother while the queue is being served.
    fn wake(&mut self, memory: &GuestMemory) -> Result<(), GuestFault> {
        if std::mem::take(&mut self.notifying) {
            self.queue
                .disable_notification(memory)
                .map_err(|_| GuestFault::Ring)?;
        }
        Ok(())
    }

    /// Asks the driver for notifications and looks once more, so that a chain added in between is not
    /// missed. Returns whether the queue may rest.
    fn sleep(&mut self, memory: &GuestMemory) -> Result<bool, GuestFault> {
        self.notifying = true;
        self.runnable = self
            .queue
            .enable_notification(memory)
            .map_err(|_| GuestFault::Ring)?;
        Ok(!self.runnable)
    }

    /// Puts a chain into the used ring, where the driver does not see it before [`DrainedQueue::publish`].
    fn put_used(
        &mut self,
        memory: &GuestMemory,
        head: u16,
        written: u32,
    ) -> Result<(), GuestFault> {
        self.forget(head);
        let next = self.queue.next_used();
        let element = u64::from(head) | u64::from(written) << 32;
        // A size of 0 never gets as far as here.
        let slot = next.checked_rem(self.queue.size()).unwrap_or_default();
        let offset = u64::from(slot).saturating_mul(USED_ELEMENT);
        let at = self.used_field(offset.saturating_add(4))?;
        memory
            .write_slice(&element.to_le_bytes(), at)
            .map_err(|_| GuestFault::Ring)?;
        self.queue.set_next_used(next.wrapping_add(1));
        self.staged = true;
        Ok(())
    }

    /// Shows the driver what was put into the used ring.
    fn publish(&mut self, memory: &GuestMemory) -> Result<(), GuestFault> {
        if !std::mem::take(&mut self.staged) {
            return Ok(());
        }
        self.published = true;
        let next = self.queue.next_used();
        memory
            .store(next.to_le(), self.used_field(2)?, Ordering::Release)
            .map_err(|_| GuestFault::Ring)
    }

    fn used_field(&self, offset: u64) -> Result<GuestAddress, GuestFault> {
        let ring = GuestAddress(self.queue.used_ring());
        ring.checked_add(offset).ok_or(GuestFault::Ring)
    }

    fn forget(&mut self, head: u16) {
        if let Some(in_flight) = self.in_flight.get_mut(usize::from(head)) {
            *in_flight = false;
        }
    }

    /// Whether what was published since the last call is worth an interrupt to the driver (virtio 1.2, section
    /// 2.7.7.2).
    fn driver_wants_interrupt(&mut self, memory: &GuestMemory) -> Result<bool, GuestFault> {
        let (old, new) = (self.told, self.queue.next_used());
        self.told = new;
        // The driver writes what it wants, then looks at the used index; here it is the other way round.
        fence(Ordering::SeqCst);
        let available = GuestAddress(self.queue.avail_ring());
        let field = |offset| -> Result<u16, GuestFault> {
            let at = available.checked_add(offset).ok_or(GuestFault::Ring)?;
            let value = memory.load(at, Ordering::Relaxed);
            value.map(u16::from_le).map_err(|_| GuestFault::Ring)
        };
        if !self.queue.event_idx_enabled() {
            // The driver asks for silence in the available ring's flags, its first field.
            return Ok(u32::from(field(0)?) & VRING_AVAIL_F_NO_INTERRUPT == 0);
        }
        // `used_event` lies behind the ring; the answer is yes when the index has passed it.
        let used_event = field(
            u64::from(self.queue.size())
                .saturating_mul(2)
                .saturating_add(4),
        )?;
        Ok(new.wrapping_sub(used_event).wrapping_sub(1) < new.wrapping_sub(old))
    }
}
