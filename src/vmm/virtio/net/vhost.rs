//! A network interface whose frames pass between the guest and a vhost-user backend (a switch), on rings in
//! shared memory. Here is what is left: the config space, and the control queue, of which only the number of
//! queue pairs matters; everything about addresses is the switch's business.
//!
//! The link is down while there is no backend.
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

use std::path::Path;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_ERR, VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_OK,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::control::Command;
use super::{Identity, MAX_PAIRS, QUEUE_SIZE, STATUS, read_config};
use crate::vmm::memory::GuestMemory;
use crate::vmm::virtio::chain::Chain;
use crate::vmm::virtio::drain::{Drain, Effects, Failure, Outcome, QueueHandler};
use crate::vmm::virtio::vhost_user::connection::Fault;
use crate::vmm::virtio::vhost_user::message::VringAddress;
use crate::vmm::virtio::vhost_user::session::{Rings, Vring};
use crate::vmm::virtio::vhost_user::{Frontend, Switch, VhostUserError};
use crate::vmm::virtio::{Activation, Active, ActiveQueue, GuestFault, HostError, VirtioDevice};

/// What is between driver and backend alone: offered if the backend has it.
const BACKEND: [u32; 16] = [
    VIRTIO_F_VERSION_1,
    VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_HOST_USO,
];

/// The same, but of every queue: not where one of them is served here.
const BACKEND_ALONE: [u32; 1] = [VIRTIO_RING_F_INDIRECT_DESC];
/// What this process does itself.
const OWN: [u32; 3] = [VIRTIO_NET_F_MAC, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS];
/// The same, where there is more than one pair.
const OWN_MULTIPLE: [u32; 2] = [VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ];

/// The face of an interface on a switch.
pub struct VhostNet {
    identity: Identity,
    frontend: Frontend,
    pairs: usize,
    features: u64,
    queue_sizes: Vec<u16>,
    kicks: Vec<EventFd>,
}

impl VhostNet {
    /// An interface on the backend that listens at `socket`, with at most `pairs` queue pairs. Of `identity`
    /// the source address is not checked.
    ///
    /// # Errors
    /// The backend cannot be used, or no descriptor can be had.
    pub fn connect(
        identity: Identity,
        socket: &Path,
        pairs: usize,
    ) -> Result<Self, VhostUserError> {
        let frontend = Frontend::connect(identity.device(), socket)?;
        let offer = frontend.offer();
        if offer.features & (1 << VIRTIO_F_VERSION_1) == 0 {
            return Err(VhostUserError::Backend {
                path: socket.to_owned(),
                fault: Fault::Lacks("is too old: it does not speak virtio 1".to_owned()),
            });
        }
        // The protocol says queues, and some backends say pairs: half of it is right for both.
        let most = usize::try_from(offer.queues.unwrap_or(2) / 2).unwrap_or(usize::MAX);
        let pairs = pairs.min(most).clamp(1, MAX_PAIRS);
        let control = usize::from(pairs > 1);
        let queues = pairs.saturating_mul(2).saturating_add(control);
        let kicks = (0..queues).map(|_| EventFd::new(EFD_NONBLOCK));
        Ok(Self {
            features: features(offer.features, pairs),
            identity,
            frontend,
            pairs,
            queue_sizes: vec![QUEUE_SIZE; queues],
            kicks: kicks.collect::<Result<_, _>>()?,
        })
    }

    /// Index of the control queue under `features`: behind all pairs that there may be.
    fn control_queue(&self, features: u64) -> u16 {
        let pairs = match features & (1 << VIRTIO_NET_F_MQ) {
            0 => 1,
            _ => self.pairs,
        };
        u16::try_from(pairs.saturating_mul(2)).unwrap_or(u16::MAX)
    }

    fn vring(&self, queue: &ActiveQueue) -> Result<Vring, HostError> {
        let kick = self.kicks.get(usize::from(queue.index));
        let kick = kick.ok_or_else(|| std::io::ErrorKind::NotFound.into());
        let kick = kick.and_then(EventFd::try_clone);
        let ring = &queue.queue;
        Ok(Vring {
            index: queue.index,
            size: ring.size(),
            address: VringAddress {
                descriptors: ring.desc_table(),
                used: ring.used_ring(),
                available: ring.avail_ring(),
            },
            kick: kick.map_err(|error| self.identity.error("duplicate a kick eventfd", error))?,
            // The driver begins with one pair (section 5.1.5).
            enabled: queue.index < 2,
        })
    }
}

fn features(backend: u64, pairs: usize) -> u64 {
    match pairs {
        1 => backend & (mask(&BACKEND) | mask(&BACKEND_ALONE)) | mask(&OWN),
        _ => backend & mask(&BACKEND) | mask(&OWN) | mask(&OWN_MULTIPLE),
    }
}

fn mask(bits: &[u32]) -> u64 {
    bits.iter().fold(0, |mask, bit| mask | 1 << bit)
}

impl VirtioDevice for VhostNet {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn name(&self) -> String {
        self.identity.device()
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn required_queues(&self) -> usize {
        2
    }

    fn interrupts_often(&self) -> bool {
        true
    }

    fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.identity.config(self.frontend.is_present(), self.pairs);
        read_config(&config, offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Box<dyn Active>, HostError> {
        let control = self.control_queue(activation.features);
        let queues = std::mem::take(&mut activation.queues);
        let (rings, own): (Vec<_>, Vec<_>) =
            queues.into_iter().partition(|queue| queue.index < control);
        let vrings = rings.iter().map(|queue| self.vring(queue));
        let vrings = vrings.collect::<Result<Vec<_>, _>>()?;
        let pairs = vrings.len() / 2;
        let started = self.frontend.start(Rings {
            memory: activation.memory.clone(),
            features: activation.features & !(mask(&OWN) | mask(&OWN_MULTIPLE)),
            vrings,
            interrupt: activation.interrupt.clone(),
            presence: STATUS,
        });
        started.map_err(|error| self.identity.error("start", error))?;
        if let Some(kick) = self.kicks.get(usize::from(control)) {
            let kick = kick.try_clone();
            activation.kick =
                kick.map_err(|error| self.identity.error("duplicate a kick eventfd", error))?;
        }
        activation.queues = own;
        let handler = PairControl {
            switch: self.frontend.switch(),
            pairs,
        };
        Ok(Box::new(Drain::new(activation, handler)))
    }

    fn reset(&mut self, _stopped: Box<dyn Active>) {
        self.frontend.stop();
    }
}

/// Answers the control queue.
struct PairControl {
    switch: Switch,
    /// Pairs that the driver set up.
    pairs: usize,
}

impl PairControl {
    /// Whether the command was carried out.
    fn apply(&self, command: Option<Command>) -> bool {
        let Some(Command::QueuePairs(wanted)) = command else {
            return false;
        };
        let wanted = usize::from(wanted);
        if wanted == 0 || wanted > self.pairs {
            return false;
        }
        for (pair, queue) in (0..self.pairs).zip((0_u16..).step_by(2)) {
            self.switch.enable(queue, pair < wanted);
            self.switch.enable(queue.saturating_add(1), pair < wanted);
        }
        true
    }
}

impl QueueHandler for PairControl {
    fn handle(
        &mut self,
        memory: &GuestMemory,
        chain: &mut Chain,
        effects: &mut Effects,
    ) -> Result<Outcome, Failure> {
        // Without a byte for the answer there is no way to give one.
        if chain.writable.is_empty() {
            return Err(GuestFault::Request.into());
        }
        let done = self.apply(Command::parse(memory, &chain.readable));
        if !done {
            effects.count_fault();
        }
        let answer = if done { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
        let answer = u8::try_from(answer).unwrap_or(u8::MAX);
        chain.writable.write(memory, 0, &[answer])?;
        Ok(Outcome::Done(1))
    }
}
