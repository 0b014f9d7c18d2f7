//! virtio-rng (virtio 1.2, section 5.4): the host's random bytes, written straight into guest buffers.
//! The handler runs on the worker.
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

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::chain::Chain;
use super::drain::{Drain, Effects, Failure, Outcome, QueueHandler};
use super::iovec::IoVecs;
use super::{Activation, Active, GuestFault, HostError, VirtioDevice};
use crate::vmm::memory::GuestMemory;

/// What one request gets at most, in bytes; a driver that wants more asks again.
pub const MAX_REQUEST: u32 = 64 << 10;

const QUEUE_SIZES: [u16; 1] = [64];

/// The face. The device has no state, so it can be activated any number of times.
#[derive(Debug, Default)]
pub struct Rng;

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn name(&self) -> String {
        "virtio-rng".to_owned()
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<Box<dyn Active>, HostError> {
        Ok(Box::new(Drain::new(activation, RngHandler)))
    }

    fn reset(&mut self, _stopped: Box<dyn Active>) {}
}

/// Answers requests for random bytes.
struct RngHandler;

impl QueueHandler for RngHandler {
    fn handle(
        &mut self,
        memory: &GuestMemory,
        chain: &mut Chain,
        _effects: &mut Effects,
    ) -> Result<Outcome, Failure> {
        // The driver must give at least one writable byte and nothing readable (section 5.4.6.1).
        if chain.writable.is_empty() || !chain.readable.is_empty() {
            return Err(GuestFault::Request.into());
        }
        let len = chain.writable.len().min(MAX_REQUEST);
        let filled = IoVecs::new(memory, &chain.writable, 0, len)?.fill_random();
        filled.map_err(|source| HostError {
            device: "virtio-rng".to_owned(),
            action: "get random bytes from the kernel",
            source,
        })?;
        Ok(Outcome::Done(len))
    }
}
