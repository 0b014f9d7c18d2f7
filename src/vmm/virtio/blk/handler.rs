//! The request queues of a disk, on the worker.
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

use std::collections::BTreeMap;
use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
};

use super::request::{Limits, Refusal, Request};
use super::{Backend, Data, Op, SERIAL, Tag};
use crate::vmm::memory::GuestMemory;
use crate::vmm::virtio::chain::{Chain, Segments};
use crate::vmm::virtio::drain::{Effects, Failure, Outcome, QueueHandler};
use crate::vmm::virtio::{GuestFault, Interest};

/// Answers the requests of one disk.
pub struct BlkHandler<B> {
    backend: B,
    serial: [u8; SERIAL],
    limits: Limits,
    /// The driver cannot flush, so what is written must be durable at once (virtio 1.2, section 5.2.6.2).
    write_through: bool,
    in_flight: BTreeMap<Tag, InFlight>,
    /// Reused between calls of [`Backend::ready`].
    done: Vec<(Tag, io::Result<()>)>,
}

/// A request that the backend has.
struct InFlight {
    writable: Segments,
    /// Bytes in front of the status byte that success fills.
    filled: u32,
}

impl<B: Backend> BlkHandler<B> {
    /// A handler for `backend` under the negotiated `features`.
    pub fn new(backend: B, serial: &str, features: u64) -> Self {
        let mut padded = [0; SERIAL];
        for (to, byte) in padded.iter_mut().zip(serial.bytes()) {
            *to = byte;
        }
        Self {
            serial: padded,
            limits: Limits {
                len: backend.len(),
                read_only: backend.is_read_only(),
            },
            write_through: features & (1 << VIRTIO_BLK_F_FLUSH) == 0,
            in_flight: BTreeMap::new(),
            done: Vec::new(),
            backend,
        }
    }

    /// The backend, when the device has left its worker.
    pub fn into_backend(self) -> B {
        self.backend
    }

    /// Starts a request; none: in flight.
    fn submit(
        &mut self,
        memory: &GuestMemory,
        chain: &Chain,
        request: &Request,
    ) -> Option<io::Result<()>> {
        let data = |segments, offset, len| Data {
            memory,
            segments,
            offset,
            len,
        };
        let op = match request {
            Request::Read { at, len } => Op::Read {
                at: *at,
                data: data(&chain.writable, 0, *len),
            },
            Request::Write { at, len } => Op::Write {
                at: *at,
                data: data(&chain.readable, Request::WRITE_DATA, *len),
                durable: self.write_through,
            },
            Request::Flush => Op::Flush,
            Request::GetId { len } => {
                let serial = self.serial.iter().copied().take(*len as usize);
                let serial: Vec<u8> = serial.collect();
                let written = chain.writable.write(memory, 0, &serial);
                return Some(written.map_err(io::Error::other));
            }
            Request::Discard(extents) => Op::Discard(extents),
            Request::WriteZeroes { extent, unmap } => Op::WriteZeroes {
                extent: *extent,
                unmap: *unmap,
            },
        };
        let tag = Tag {
            queue: chain.queue(),
            head: chain.head(),
        };
        self.backend.submit(tag, op)
    }

    /// Writes the status bytes of requests that the backend has finished.
    fn complete(&mut self, memory: &GuestMemory, effects: &mut Effects) -> Result<(), GuestFault> {
        for (tag, result) in self.done.drain(..) {
            let Some(request) = self.in_flight.remove(&tag) else {
                continue;
            };
            let written = answer(memory, &request.writable, request.filled, &result, effects)?;
            effects.complete(tag.queue, tag.head, written);
        }
        Ok(())
    }
}

impl<B: Backend> QueueHandler for BlkHandler<B> {
    fn handle(
        &mut self,
        memory: &GuestMemory,
        chain: &mut Chain,
        effects: &mut Effects,
    ) -> Result<Outcome, Failure> {
        // Without a byte for the status there is no way to answer.
        if chain.writable.is_empty() {
            return Err(GuestFault::Request.into());
        }
        let request = match Request::parse(memory, chain, self.limits) {
            Ok(request) => request,
            Err(refusal) => {
                effects.count_fault();
                let status = match refusal {
                    Refusal::Invalid => VIRTIO_BLK_S_IOERR,
                    Refusal::Unsupported => VIRTIO_BLK_S_UNSUPP,
                };
                write_status(memory, &chain.writable, status)?;
                return Ok(Outcome::Done(1));
            }
        };
        let filled = match &request {
            Request::Read { len, .. } => *len,
            Request::GetId { len } => (*len).min(SERIAL as u32),
            _ => 0,
        };
        match self.submit(memory, chain, &request) {
            Some(result) => {
                let written = answer(memory, &chain.writable, filled, &result, effects)?;
                Ok(Outcome::Done(written))
            }
            None => {
                let tag = Tag {
                    queue: chain.queue(),
                    head: chain.head(),
                };
                let writable = std::mem::take(&mut chain.writable);
                self.in_flight.insert(tag, InFlight { writable, filled });
                Ok(Outcome::Pending)
            }
        }
    }

    fn interests(&self) -> Vec<Interest> {
        self.backend.interests()
    }

    fn ready(
        &mut self,
        memory: &GuestMemory,
        token: u32,
        effects: &mut Effects,
    ) -> Result<(), Failure> {
        self.backend.ready(token, &mut self.done);
        Ok(self.complete(memory, effects)?)
    }

    fn quiesce(&mut self, memory: &GuestMemory, effects: &mut Effects) {
        self.backend.quiesce(&mut self.done);
        // The segments were checked when the chains were parsed: writing to them cannot fail.
        let _ = self.complete(memory, effects);
        self.in_flight.clear();
    }
}

/// Writes the status byte for a finished operation; returns how many bytes the driver may look at.
fn answer(
    memory: &GuestMemory,
    writable: &Segments,
    filled: u32,
    result: &io::Result<()>,
    effects: &mut Effects,
) -> Result<u32, GuestFault> {
    let (status, written) = match result {
        Ok(()) => (VIRTIO_BLK_S_OK, filled.saturating_add(1)),
        Err(error) if error.kind() == io::ErrorKind::Unsupported => (VIRTIO_BLK_S_UNSUPP, 1),
        // Counted, not logged: the guest can have as many as it likes.
        Err(_) => {
            effects.count_error();
            (VIRTIO_BLK_S_IOERR, 1)
        }
    };
    write_status(memory, writable, status)?;
    Ok(written)
}

/// The status is the last byte of the writable side, wherever the driver put it.
fn write_status(memory: &GuestMemory, writable: &Segments, status: u32) -> Result<(), GuestFault> {
    let last = writable.len().checked_sub(1).ok_or(GuestFault::Request)?;
    writable.write(memory, last, &[status.to_le_bytes()[0]])
}
