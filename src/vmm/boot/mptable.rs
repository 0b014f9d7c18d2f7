//! The MP table (Intel MultiProcessor Specification 1.4): how a kernel without ACPI finds its CPUs, the
//! I/O APIC and the interrupt lines.
#![forbid(unsafe_code)]

use vm_memory::{Bytes, GuestAddress};

use crate::vmm::boot::BootError;
use crate::vmm::layout;
use crate::vmm::memory::GuestMemory;
use crate::vmm::spec::ValidSpec;

/// Revision of the specification: 1.4.
const REVISION: u8 = 4;
/// Version register of an integrated local APIC with xAPIC features.
const APIC_VERSION: u8 = 0x14;
/// Version register of our I/O APIC.
const IOAPIC_VERSION: u8 = 0x11;
/// Processor entry: usable, and (second) the one that boots.
const CPU_ENABLED: u8 = 1;
const CPU_BOOT: u8 = 2;
/// Family 6 and the APIC bit are what kernels look at; CPUID tells the rest.
const CPU_SIGNATURE: u32 = 0x600;
const CPU_FEATURES: u32 = 0x201;
/// Entry types (section 4.3).
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IOAPIC: u8 = 2;
const INTERRUPT: u8 = 3;
/// The only bus: ISA, whose lines are edge-triggered and active high.
const ISA_BUS: u8 = 0;

/// What the table describes.
struct Wiring {
    cpus: u8,
    /// Interrupt lines in use; line N is wired to pin N.
    lines: Vec<u8>,
}

impl Wiring {
    fn of(spec: &ValidSpec) -> Self {
        let serial = spec.console.is_some().then_some(layout::SERIAL_IRQ);
        let slots = (0..spec.slots()).map(layout::slot_irq);
        let lines = serial
            .into_iter()
            .chain(slots)
            .map(|irq| irq as u8)
            .collect();
        Self {
            cpus: spec.cpus,
            lines,
        }
    }

    fn entries(&self) -> (Vec<u8>, u16) {
        let ioapic_id = self.cpus;
        let mut bytes = Vec::new();
        for id in 0..self.cpus {
            let flags = CPU_ENABLED | if id == 0 { CPU_BOOT } else { 0 };
            bytes.extend([PROCESSOR, id, APIC_VERSION, flags]);
            bytes.extend(CPU_SIGNATURE.to_le_bytes());
            bytes.extend(CPU_FEATURES.to_le_bytes());
            bytes.extend([0; 8]);
        }
        bytes.extend([BUS, ISA_BUS]);
        bytes.extend(b"ISA   ");
        bytes.extend([IOAPIC, ioapic_id, IOAPIC_VERSION, 1]);
        bytes.extend((layout::IOAPIC as u32).to_le_bytes());
        for line in &self.lines {
            // An ordinary interrupt; polarity and trigger are the bus's.
            bytes.extend([INTERRUPT, 0, 0, 0, ISA_BUS, *line, ioapic_id, *line]);
        }
        let count = u16::from(self.cpus) + 2 + self.lines.len() as u16;
        (bytes, count)
    }

    /// The configuration table: header and entries.
    fn table(&self) -> Vec<u8> {
        let (entries, count) = self.entries();
        let mut table = Vec::from(*b"PCMP");
        table.extend((44 + entries.len() as u16).to_le_bytes());
        table.extend([REVISION, 0]);
        table.extend(b"CUBE    CUBE MICROVM");
        table.extend([0; 6]);
        table.extend(count.to_le_bytes());
        table.extend(layout::LOCAL_APIC.to_le_bytes());
        table.extend([0; 4]);
        table.extend(entries);
        table[7] = checksum(&table);
        table
    }
}

/// The byte that makes the sum of all bytes zero; its own place holds zero meanwhile.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg()
}

fn floating_pointer() -> Vec<u8> {
    let mut pointer = Vec::from(*b"_MP_");
    pointer.extend((layout::MP_TABLE_AREA as u32).to_le_bytes());
    // One paragraph long, revision, checksum, and no default configuration.
    pointer.extend([1, REVISION, 0, 0, 0, 0, 0, 0]);
    pointer[10] = checksum(&pointer);
    pointer
}

/// Writes the table.
pub(super) fn write(memory: &GuestMemory, spec: &ValidSpec) -> Result<(), BootError> {
    let table = Wiring::of(spec).table();
    memory.write_slice(&table, GuestAddress(layout::MP_TABLE_AREA))?;
    memory.write_slice(&floating_pointer(), GuestAddress(layout::MP_POINTER))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn checksums_are_right_and_entries_counted() {
        assert_eq!(
            (floating_pointer().len(), sum(&floating_pointer())),
            (16, 0)
        );
        for cpus in [1, 4, 32] {
            let table = Wiring {
                cpus,
                lines: vec![5, 6],
            }
            .table();
            assert_eq!(sum(&table), 0);
            assert_eq!(
                usize::from(u16::from_le_bytes([table[4], table[5]])),
                table.len()
            );
            let mut at = 44;
            let mut kinds = Vec::new();
            while at < table.len() {
                kinds.push(table[at]);
                at += if table[at] == PROCESSOR { 20 } else { 8 };
            }
            assert_eq!(at, table.len());
            assert_eq!(
                kinds.len(),
                usize::from(u16::from_le_bytes([table[34], table[35]]))
            );
            let processors = kinds.iter().filter(|kind| **kind == PROCESSOR).count();
            assert_eq!(processors, usize::from(cpus));
        }
    }

    #[test]
    fn the_largest_machine_fits_before_the_floating_pointer() {
        let lines = (0..=layout::slot_irq(layout::MAX_SLOTS - 1) as u8).collect();
        let table = Wiring { cpus: 32, lines }.table();
        assert!(table.len() as u64 <= layout::MP_POINTER - layout::MP_TABLE_AREA);
    }

    #[test]
    fn the_first_cpu_boots() {
        let table = Wiring {
            cpus: 2,
            lines: vec![],
        }
        .table();
        assert_eq!((table[44 + 1], table[44 + 3]), (0, 3));
        assert_eq!((table[64 + 1], table[64 + 3]), (1, 1));
    }
}
