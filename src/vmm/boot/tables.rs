//! 64-bit mode from the first instruction: GDT, identity page tables and the system registers to match
//! (Documentation/x86/boot.rst, "64-bit boot protocol"; Intel SDM volume 3, sections 3.4.5 and 4.5).
#![forbid(unsafe_code)]

use kvm_bindings::{kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress};

use crate::vmm::layout::{GDT, PD, PDPT, PML4};
use crate::vmm::memory::GuestMemory;

/// The boot protocol wants these selectors: `__BOOT_CS` and `__BOOT_DS`.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;
/// Null, unused, code, data, TSS. Flat 4 GiB segments; the TSS is empty: entering needs one, nobody uses it.
const GDT_ENTRIES: [u64; 5] = [
    0,
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x008f_8b00_0000_ffff,
];

/// Page table entry bits: present and writable; page size for a 2 MiB page.
const PRESENT_WRITABLE: u64 = 0x3;
const LARGE: u64 = 0x80;

/// CR0: protection enable, paging; CR4: physical address extension; EFER: long mode enable and active.
const CR0_PE: u64 = 1;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

/// Writes GDT and page tables: the first GiB mapped onto itself in 2 MiB pages.
pub(super) fn write(memory: &GuestMemory) -> Result<(), vm_memory::GuestMemoryError> {
    for (entry, at) in GDT_ENTRIES.iter().zip((GDT..).step_by(8)) {
        memory.write_obj(*entry, GuestAddress(at))?;
    }
    memory.write_obj(PDPT | PRESENT_WRITABLE, GuestAddress(PML4))?;
    memory.write_obj(PD | PRESENT_WRITABLE, GuestAddress(PDPT))?;
    let mut directory = [0; 4096];
    for (entry, page) in directory.chunks_exact_mut(8).zip(0u64..) {
        let value = (page << 21) | PRESENT_WRITABLE | LARGE;
        entry.copy_from_slice(&value.to_le_bytes());
    }
    memory.write_slice(&directory, GuestAddress(PD))
}

/// A segment register that holds descriptor `selector / 8` of the GDT.
fn segment(selector: u16) -> kvm_segment {
    let entry = GDT_ENTRIES[usize::from(selector / 8)];
    let bit = |n: u32| (entry >> n & 1) as u8;
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: (entry >> 40 & 0xf) as u8,
        s: bit(44),
        dpl: (entry >> 45 & 3) as u8,
        present: bit(47),
        avl: bit(52),
        l: bit(53),
        db: bit(54),
        g: bit(55),
        unusable: 0,
        padding: 0,
    }
}

/// The system registers with which the first vCPU starts, from those that KVM gave it at reset.
pub fn start_sregs(reset: kvm_sregs) -> kvm_sregs {
    let data = segment(DATA_SELECTOR);
    let mut sregs = reset;
    sregs.gdt.base = GDT;
    sregs.gdt.limit = (size_of_val(&GDT_ENTRIES) - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cs = segment(CODE_SELECTOR);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(TSS_SELECTOR);
    sregs.cr0 |= CR0_PE | CR0_PG;
    sregs.cr3 = PML4;
    sregs.cr4 |= CR4_PAE;
    sregs.efer |= EFER_LME | EFER_LMA;
    sregs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::memory;

    #[test]
    fn every_address_below_one_gib_maps_to_itself() {
        let memory = memory::allocate(1 << 20, false).unwrap();
        write(&memory).unwrap();
        let entry = |table: u64, index: u64| -> u64 {
            memory
                .read_obj(GuestAddress((table & !0xfff) + 8 * index))
                .unwrap()
        };
        for address in [0, 0x1234, 0x100_0000, 0x2fff_ffff, 0x3fff_ffff_u64] {
            let pdpt = entry(PML4, address >> 39);
            let pd = entry(pdpt, address >> 30);
            let page = entry(pd, address >> 21);
            assert_eq!(page & 0x83, 0x83, "a present, writable, large page");
            assert_eq!((page & !0x1f_ffff) + (address & 0x1f_ffff), address);
        }
        assert_eq!(entry(entry(PML4, 0), 1), 0, "nothing is mapped beyond");
    }

    #[test]
    fn segments_are_those_of_the_boot_protocol() {
        let sregs = start_sregs(kvm_sregs::default());
        let code = sregs.cs;
        assert_eq!(
            (code.selector, code.type_, code.s, code.l, code.db),
            (0x10, 0xb, 1, 1, 0)
        );
        let data = sregs.ds;
        assert_eq!(
            (data.selector, data.type_, data.s, data.l, data.db),
            (0x18, 0x3, 1, 0, 1)
        );
        assert_eq!(
            (sregs.tr.type_, sregs.tr.s, sregs.tr.present),
            (0xb, 0, 1),
            "a busy TSS"
        );
        assert_eq!(sregs.gdt.limit, 39);
    }
}
