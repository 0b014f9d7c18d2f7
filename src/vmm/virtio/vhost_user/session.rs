//! A session with a backend: what it has, the rings that it serves, on one connection after another.
//!
//! ```text
//!              connect, features ok                  the connection ends
//!   absent ──────────────────────────▶ connected ───────────────────────▶ absent
//!     │  ▲                          rings, if any, go over                  (tried again every 250 ms)
//!     │  └──── reset ─────┐
//!     └──▶ unusable ──────┘   the backend that came lacks what the driver agreed on: NEEDS_RESET
//! ```
//!
//! A ring goes over to the next backend at its used index: what the last one had taken and not finished is
//! done again. For frames, which may be lost, and are in this order, that is enough.
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

use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vm_memory::{Address, Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::connection::{Connection, Deadline, Fault};
use super::message::{
    F_PROTOCOL_FEATURES, P_MQ, P_REPLY_ACK, Region, Request, VringAddress, memory_table,
    vring_address, vring_state, vring_value,
};
use crate::vmm::files::eventfd;
use crate::vmm::memory::GuestMemory;
use crate::vmm::virtio::Interrupt;

/// How long a backend may take to be connected, to take rings over, or to give them back.
pub const PATIENCE: Duration = Duration::from_secs(3);

/// What a backend offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offer {
    /// Virtio features.
    pub features: u64,
    /// Queues that it serves at most; none: it did not say.
    pub queues: Option<u64>,
}

/// A ring for the backend.
pub struct Vring {
    /// Index of the queue in the device.
    pub index: u16,
    /// Entries.
    pub size: u16,
    /// Where it lies; checked against guest memory.
    pub address: VringAddress,
    /// Signalled when the driver has made buffers available.
    pub kick: EventFd,
    /// Whether the backend serves it.
    pub enabled: bool,
}

/// The rings of a device that runs.
pub struct Rings {
    /// Guest memory, shared.
    pub memory: GuestMemory,
    /// Features that the driver agreed to.
    pub features: u64,
    /// The rings.
    pub vrings: Vec<Vring>,
    /// The way to interrupt the driver.
    pub interrupt: Interrupt,
    /// Where the config space says whether there is a backend: 1 or 0, in two bytes.
    pub presence: u64,
}

/// One backend after another.
pub(super) struct Session {
    device: String,
    path: PathBuf,
    connection: Option<Connection>,
    /// The connection's.
    offer: Offer,
    rings: Option<Rings>,
    /// The rings that are, cannot be served by the backend that came.
    unusable: bool,
    /// Whether there is a backend, for others to see.
    present: Arc<AtomicBool>,
}

impl Session {
    /// Connects for the first time.
    pub(super) fn open(device: String, path: PathBuf) -> Result<Self, Fault> {
        let (connection, offer) = greet(&path)?;
        Ok(Self {
            device,
            path,
            connection: Some(connection),
            offer,
            rings: None,
            unusable: false,
            present: Arc::new(AtomicBool::new(true)),
        })
    }

    pub(super) fn offer(&self) -> Offer {
        self.offer
    }

    pub(super) fn present(&self) -> Arc<AtomicBool> {
        self.present.clone()
    }

    /// Readable when the backend has gone.
    pub(super) fn hangup(&self) -> Option<BorrowedFd<'_>> {
        self.connection.as_ref().map(AsFd::as_fd)
    }

    /// Whether [`Session::reconnect`] is worth a try.
    pub(super) fn is_waiting(&self) -> bool {
        self.connection.is_none() && !self.unusable
    }

    /// The driver is ready.
    pub(super) fn start(&mut self, rings: Rings) {
        self.rings = Some(rings);
        self.hand_over(false);
    }

    /// Serves one ring, or pauses it.
    pub(super) fn enable(&mut self, index: u16, enabled: bool) {
        let vrings = self.rings.iter_mut().flat_map(|rings| &mut rings.vrings);
        for vring in vrings.filter(|vring| vring.index == index) {
            vring.enabled = enabled;
        }
        let state = vring_state(index, enabled.into());
        if let Some(connection) = &mut self.connection {
            let deadline = Deadline::after(PATIENCE);
            let told = connection.tell(Request::SetVringEnable, &state, &[], deadline);
            told.unwrap_or_else(|fault| self.lose(&fault));
        }
    }

    /// Takes the rings back: no backend that keeps to the protocol touches them after this.
    pub(super) fn stop(&mut self) {
        self.unusable = false;
        let Some((rings, connection)) = self.rings.take().zip(self.connection.as_mut()) else {
            return;
        };
        let deadline = Deadline::after(PATIENCE);
        for vring in &rings.vrings {
            if let Err(fault) = take_back(connection, vring, deadline) {
                return self.lose(&fault);
            }
        }
    }

    /// The connection is readable: that is its end.
    pub(super) fn hang_up(&mut self) {
        self.lose(&Fault::Gone);
    }

    fn lose(&mut self, fault: &Fault) {
        log::warn!("{}: {}", self.device, Self::sentence(&self.path, fault));
        self.connection = None;
        self.show(false);
    }

    fn sentence(path: &Path, fault: &Fault) -> String {
        format!("the vhost-user backend at {} {fault}", path.display())
    }

    /// Tells everybody whether there is a backend.
    fn show(&self, present: bool) {
        self.present.store(present, Ordering::Release);
        if let Some(rings) = &self.rings {
            let (at, shown) = (rings.presence, u16::from(present));
            rings.interrupt.config_change(at, &shown.to_le_bytes());
        }
    }

    /// Tries to connect to the next backend.
    pub(super) fn reconnect(&mut self) {
        // Nobody is there yet, or somebody who is no backend: the next attempt tells.
        if let Ok((connection, offer)) = greet(&self.path) {
            self.connection = Some(connection);
            self.offer = offer;
            self.hand_over(true);
            if self.connection.is_some() {
                log::info!("{}: a vhost-user backend is back", self.device);
                self.show(true);
            }
        }
    }

    /// Gives the rings to the connected backend. `again`: another had them before.
    fn hand_over(&mut self, again: bool) {
        let (Some(rings), Some(connection)) = (&self.rings, &mut self.connection) else {
            return;
        };
        if let Err(fault) = suits(self.offer, rings) {
            let sentence = Self::sentence(&self.path, &fault);
            log::error!("{}: {sentence}; the driver must reset it", self.device);
            self.connection = None;
            self.unusable = true;
            rings.interrupt.needs_reset();
            return;
        }
        if let Err(fault) = serve(connection, rings, again, Deadline::after(PATIENCE)) {
            return self.lose(&fault);
        }
        if again {
            // What the last backend has or has not said and heard: both sides look once more.
            for vring in &rings.vrings {
                let _ = vring.kick.write(1);
            }
            rings.interrupt.used_buffer();
        }
    }
}

/// Connects and agrees on the protocol.
fn greet(path: &Path) -> Result<(Connection, Offer), Fault> {
    let deadline = Deadline::after(PATIENCE);
    let mut connection = Connection::open(path)?;
    connection.tell(Request::SetOwner, &[], &[], deadline)?;
    let ask = |connection: &mut Connection, request| {
        let answer = connection.ask(request, &[], deadline);
        answer.map(u64::from_le_bytes)
    };
    let features = ask(&mut connection, Request::GetFeatures)?;
    if features & F_PROTOCOL_FEATURES == 0 {
        let what = "is too old: it has no protocol features (VHOST_USER_F_PROTOCOL_FEATURES)";
        return Err(Fault::Lacks(what.to_owned()));
    }
    let protocol = ask(&mut connection, Request::GetProtocolFeatures)?;
    let used = protocol & (P_MQ | P_REPLY_ACK);
    let request = Request::SetProtocolFeatures;
    connection.tell(request, &used.to_le_bytes(), &[], deadline)?;
    let queues = match used & P_MQ {
        0 => None,
        _ => Some(ask(&mut connection, Request::GetQueueNum)?),
    };
    if used & P_REPLY_ACK != 0 {
        connection.expect_acknowledgements();
    }
    let features = features & !F_PROTOCOL_FEATURES;
    Ok((connection, Offer { features, queues }))
}

/// Whether who offers that can serve the rings.
fn suits(offer: Offer, rings: &Rings) -> Result<(), Fault> {
    let missing = rings.features & !offer.features;
    if missing != 0 {
        let what = format!("lacks features that the driver uses ({missing:#x})");
        return Err(Fault::Lacks(what));
    }
    let last = rings
        .vrings
        .iter()
        .map(|vring| u64::from(vring.index))
        .max();
    if offer.queues.is_some_and(|queues| last >= Some(queues)) {
        let what = "serves fewer queues than the driver uses".to_owned();
        return Err(Fault::Lacks(what));
    }
    Ok(())
}

/// Tells the backend everything about the rings.
fn serve(
    connection: &mut Connection,
    rings: &Rings,
    again: bool,
    deadline: Deadline,
) -> Result<(), Fault> {
    let mut tell = |request, payload: &[u8], files: &[BorrowedFd<'_>]| {
        connection.tell(request, payload, files, deadline)
    };
    let features = rings.features | F_PROTOCOL_FEATURES;
    tell(Request::SetFeatures, &features.to_le_bytes(), &[])?;
    let places = places(&rings.memory).unwrap_or_default();
    let (regions, files): (Vec<_>, Vec<_>) = places
        .iter()
        .map(|(region, file)| (*region, file.file().as_fd()))
        .unzip();
    tell(Request::SetMemTable, &memory_table(&regions), &files)?;
    for vring in &rings.vrings {
        let state = |value| vring_state(vring.index, value);
        let base = match again {
            true => used_index(&rings.memory, vring.address.used),
            false => 0,
        };
        tell(Request::SetVringNum, &state(vring.size.into()), &[])?;
        tell(Request::SetVringBase, &state(base.into()), &[])?;
        let address = vring_address(vring.index, vring.address);
        tell(Request::SetVringAddr, &address, &[])?;
        // An eventfd for the ring of this index follows.
        let index = u64::from(vring.index).to_le_bytes();
        let call = eventfd(rings.interrupt.lend());
        tell(Request::SetVringCall, &index, &[call])?;
        tell(Request::SetVringKick, &index, &[eventfd(&vring.kick)])?;
    }
    for vring in &rings.vrings {
        let state = vring_state(vring.index, vring.enabled.into());
        tell(Request::SetVringEnable, &state, &[])?;
    }
    Ok(())
}

fn take_back(connection: &mut Connection, vring: &Vring, deadline: Deadline) -> Result<(), Fault> {
    let disable = vring_state(vring.index, 0);
    connection.tell(Request::SetVringEnable, &disable, &[], deadline)?;
    let request = Request::GetVringBase;
    let base = connection.ask(request, &disable, deadline)?;
    // Where it stopped is of no interest: the driver begins anew.
    let base = vring_value(vring.index, base);
    base.map(drop).ok_or(Fault::Answer(request))
}

/// Guest memory as a backend maps it; none: it is private.
pub(super) fn places(memory: &GuestMemory) -> Option<Vec<(Region, FileOffset)>> {
    let place = |region: &vm_memory::GuestRegionMmap| {
        let file = region.file_offset()?;
        let place = Region {
            start: region.start_addr().raw_value(),
            len: region.len(),
            offset: file.start(),
        };
        Some((place, file.clone()))
    };
    memory.iter().map(place).collect()
}

/// Entries that were used of the ring whose used ring is at `used` (its second field). What the guest may have
/// written there costs the guest its frames.
fn used_index(memory: &GuestMemory, used: u64) -> u16 {
    let index = GuestAddress(used).checked_add(2);
    let index = index.and_then(|at| memory.load(at, Ordering::Acquire).ok());
    index.map_or(0, u16::from_le)
}
