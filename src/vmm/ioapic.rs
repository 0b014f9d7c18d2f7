//! The I/O APIC (Intel 82093AA datasheet, section 3): the guest's view of the interrupt lines.
//!
//! It delivers nothing itself. Each unmasked redirection entry becomes a route in KVM, and KVM takes a
//! line's irqfd straight to the local APIC. All lines are edge-triggered (the MP table says so), hence
//! there is no remote IRR, and an end of interrupt needs no answer.
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

use std::sync::{Mutex, PoisonError};

use crate::vmm::bus::BusDevice;
use crate::vmm::irq::{Message, Routes};

/// Register window (section 3.1): the index, and the data it selects.
const IOREGSEL: u64 = 0x00;
const IOWIN: u64 = 0x10;
/// Registers by index (section 3.2).
const ID: u8 = 0x00;
const VERSION: u8 = 0x01;
const ARBITRATION: u8 = 0x02;
const REDIRECTION: u8 = 0x10;
/// The 82093AA's version.
const VERSION_NUMBER: u32 = 0x11;
/// The ID register's writable bits.
const ID_MASK: u32 = 0x0f00_0000;
/// Redirection entry (section 3.2.4): masked, and the bits that a guest cannot write (delivery status,
/// remote IRR).
const MASKED: u64 = 1 << 16;
const READ_ONLY: u64 = 1 << 12 | 1 << 14;
/// What a message's address starts with (Intel SDM volume 3, section 11.11.1).
const MESSAGE_ADDRESS: u32 = 0xfee0_0000;

/// An I/O APIC.
pub struct IoApic {
    state: Mutex<State>,
}

struct State {
    index: u8,
    id: u32,
    redirections: Vec<u64>,
    /// What KVM was told last.
    routes: Vec<(u32, Message)>,
    target: Box<dyn Routes>,
}

impl IoApic {
    /// With that many pins, all masked.
    pub fn new(pins: u8, target: Box<dyn Routes>) -> Self {
        let redirections = vec![MASKED; pins.into()];
        let state = State {
            index: 0,
            id: 0,
            redirections,
            routes: Vec::new(),
            target,
        };
        Self {
            state: Mutex::new(state),
        }
    }
}

impl State {
    /// The redirection entry that `index` names, and whether it names the upper half.
    fn redirection(&mut self) -> Option<(&mut u64, bool)> {
        let offset = self.index.checked_sub(REDIRECTION)?;
        let entry = self.redirections.get_mut(usize::from(offset >> 1))?;
        Some((entry, offset & 1 == 1))
    }

    fn read(&mut self) -> u32 {
        match self.index {
            ID | ARBITRATION => self.id,
            VERSION => {
                let last = self.redirections.len().saturating_sub(1) as u32;
                VERSION_NUMBER | last << 16
            }
            _ => match self.redirection() {
                Some((entry, true)) => (*entry >> 32) as u32,
                Some((entry, false)) => *entry as u32,
                None => 0,
            },
        }
    }

    fn write(&mut self, value: u32) {
        if self.index == ID {
            self.id = value & ID_MASK;
            return;
        }
        let Some((entry, upper)) = self.redirection() else {
            return;
        };
        let value = u64::from(value);
        *entry = if upper {
            (*entry & 0xffff_ffff) | value << 32
        } else {
            (*entry & !0xffff_ffff) | (value & !READ_ONLY)
        };
        self.update_routes();
    }

    fn update_routes(&mut self) {
        let routes: Vec<_> = (0..)
            .zip(&self.redirections)
            .filter(|(_, entry)| **entry & MASKED == 0)
            .map(|(pin, entry)| (pin, message(*entry)))
            .collect();
        if routes == self.routes {
            return;
        }
        // A refusal costs the guest its interrupt; the table is kept, so that the next write tries again.
        match self.target.set(&routes) {
            Ok(()) => self.routes = routes,
            Err(error) => log::error!("KVM cannot route the guest's interrupts: {error}"),
        }
    }
}

/// The message that a redirection entry stands for: destination and mode go to the address, the low
/// 16 bits have the layout of the data but for the destination mode.
fn message(entry: u64) -> Message {
    let destination = (entry >> 56) as u32;
    let logical = (entry >> 11 & 1) as u32;
    let vector_and_delivery = (entry & 0x7ff) as u32;
    let level = (entry >> 15 & 1) as u32;
    Message {
        address: MESSAGE_ADDRESS | destination << 12 | logical << 2,
        data: vector_and_delivery | level << 15 | level << 14,
    }
}

impl BusDevice for IoApic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let value = match offset {
            IOREGSEL => state.index.into(),
            IOWIN => state.read(),
            _ => 0,
        };
        data.fill(0);
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // Registers are written as 32-bit words (section 3.0); Linux does nothing else.
        let Ok(bytes) = <[u8; 4]>::try_from(data) else {
            return;
        };
        let value = u32::from_le_bytes(bytes);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match offset {
            IOREGSEL => state.index = value as u8,
            IOWIN => state.write(value),
            _ => (),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    type Log = Arc<Mutex<Vec<Vec<(u32, Message)>>>>;

    struct Recorder(Log);

    impl Routes for Recorder {
        fn set(&mut self, routes: &[(u32, Message)]) -> std::io::Result<()> {
            self.0.lock().unwrap().push(routes.to_vec());
            Ok(())
        }
    }

    fn ioapic(pins: u8) -> (IoApic, Log) {
        let log = Log::default();
        (IoApic::new(pins, Box::new(Recorder(log.clone()))), log)
    }

    fn write(ioapic: &IoApic, index: u32, value: u32) {
        ioapic.write(IOREGSEL, &index.to_le_bytes());
        ioapic.write(IOWIN, &value.to_le_bytes());
    }

    fn read(ioapic: &IoApic, index: u32) -> u32 {
        ioapic.write(IOREGSEL, &index.to_le_bytes());
        let mut data = [0; 4];
        ioapic.read(IOWIN, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn version_tells_the_last_pin() {
        let (ioapic, _) = ioapic(7);
        assert_eq!(read(&ioapic, 1), 0x0006_0011);
        write(&ioapic, 0, 0xffff_ffff);
        assert_eq!(read(&ioapic, 0), 0x0f00_0000);
    }

    #[test]
    fn an_unmasked_entry_becomes_one_route() {
        let (ioapic, log) = ioapic(7);
        write(&ioapic, 0x10 + 2 * 5 + 1, 3 << 24);
        assert_eq!(
            log.lock().unwrap().len(),
            0,
            "a masked entry tells KVM nothing"
        );
        write(&ioapic, 0x10 + 2 * 5, 0x31);
        let expected = (
            5,
            Message {
                address: 0xfee0_3000,
                data: 0x31,
            },
        );
        assert_eq!(*log.lock().unwrap(), [vec![expected]]);
        write(&ioapic, 0x10 + 2 * 5, 0x31);
        assert_eq!(log.lock().unwrap().len(), 1, "no change, no call");
        write(&ioapic, 0x10 + 2 * 5, 0x10031);
        assert_eq!(log.lock().unwrap().last().unwrap().len(), 0);
    }

    #[test]
    fn entries_read_back_without_the_read_only_bits() {
        let (ioapic, _) = ioapic(7);
        assert_eq!(read(&ioapic, 0x10), 0x10000);
        write(&ioapic, 0x10, 0xffff_ffff);
        assert_eq!(read(&ioapic, 0x10), 0xffff_afff);
    }

    #[test]
    fn logical_level_messages_have_their_bits() {
        let entry = 0x0200_0000_0000_8931;
        assert_eq!(
            message(entry),
            Message {
                address: 0xfee0_2004,
                data: 0xc131
            }
        );
    }

    #[test]
    fn odd_accesses_do_nothing() {
        let (ioapic, log) = ioapic(2);
        write(&ioapic, 0x10 + 2 * 2, 0);
        write(&ioapic, 0xff, 0);
        ioapic.write(IOWIN, &[0; 8]);
        ioapic.write(0x40, &[0; 4]);
        let mut data = [0xaa; 8];
        ioapic.read(0x40, &mut data);
        assert_eq!(data, [0; 8]);
        assert_eq!(log.lock().unwrap().len(), 0);
    }
}
