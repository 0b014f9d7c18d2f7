//! The boot parameters ("zero page") with the memory map (Documentation/x86/zero-page.rst).
#![forbid(unsafe_code)]

use linux_loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{Bytes, GuestAddress};

use crate::vmm::boot::BootError;
use crate::vmm::boot::initramfs::Ramdisk;
use crate::vmm::layout;
use crate::vmm::memory::{self, GuestMemory};

/// `E820_TYPE_RAM`.
const RAM: u32 = 1;
/// `boot_flag`: always this (Documentation/x86/boot.rst).
const BOOT_FLAG: u16 = 0xaa55;
/// `header`: "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
/// `type_of_loader`: a loader without an assigned number.
const UNDEFINED_LOADER: u8 = 0xff;
/// The kernel's default physical alignment; a zero would be taken for a broken loader.
const KERNEL_ALIGNMENT: u32 = 0x100_0000;

/// The usable ranges as (start, length): base memory below the MP table, and all RAM from 1 MiB.
fn usable(memory_bytes: u64) -> Vec<(u64, u64)> {
    let mut map = vec![(0, layout::MP_TABLE_AREA)];
    for (start, length) in memory::ranges(memory_bytes) {
        let from = start.max(layout::HIGH_MEMORY);
        map.push((from, (start + length).saturating_sub(from)));
    }
    map.retain(|(_, length)| *length > 0);
    map
}

/// Writes the boot parameters.
pub(super) fn write(
    memory: &GuestMemory,
    memory_bytes: u64,
    ramdisk: Option<Ramdisk>,
) -> Result<(), BootError> {
    let mut params = boot_params::default();
    params.hdr.type_of_loader = UNDEFINED_LOADER;
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.kernel_alignment = KERNEL_ALIGNMENT;
    params.hdr.cmd_line_ptr = layout::COMMAND_LINE as u32;
    params.hdr.cmdline_size = layout::COMMAND_LINE_MAX as u32;
    if let Some(ramdisk) = ramdisk {
        // Low memory ends at 3 GiB: both fit.
        params.hdr.ramdisk_image = ramdisk.address as u32;
        params.hdr.ramdisk_size = ramdisk.length as u32;
    }
    let map = usable(memory_bytes);
    params.e820_entries = map.len() as u8;
    for (entry, (addr, size)) in params.e820_table.iter_mut().zip(map) {
        *entry = boot_e820_entry {
            addr,
            size,
            r#type: RAM,
        };
    }
    memory.write_obj(params, GuestAddress(layout::ZERO_PAGE))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_leaves_the_mp_table_and_the_hole_out() {
        let base = (0, 0x9_f000);
        assert_eq!(usable(64 << 20), [base, (1 << 20, 63 << 20)]);
        assert_eq!(usable(1 << 20), [base]);
        let below = (1 << 20, (3 << 30) - (1 << 20));
        assert_eq!(usable(3 << 30), [base, below]);
        assert_eq!(usable(4 << 30), [base, below, (4 << 30, 1 << 30)]);
    }

    #[test]
    fn the_kernel_finds_command_line_ramdisk_and_map() {
        let memory = memory::allocate(2 << 20, false).unwrap();
        let ramdisk = Ramdisk {
            address: 0x1f_f000,
            length: 77,
        };
        write(&memory, 2 << 20, Some(ramdisk)).unwrap();
        let byte = |at: u64| memory.read_obj::<u8>(GuestAddress(0x7000 + at)).unwrap();
        let word = |at: u64| memory.read_obj::<u32>(GuestAddress(0x7000 + at)).unwrap();
        // Offsets from Documentation/x86/boot.rst and zero-page.rst.
        assert_eq!((byte(0x210), byte(0x1e8)), (0xff, 2));
        assert_eq!((word(0x202), word(0x228)), (HEADER_MAGIC, 0x2_0000));
        assert_eq!((word(0x218), word(0x21c)), (0x1f_f000, 77));
        assert_eq!((word(0x2d0), word(0x2d8), word(0x2e0)), (0, 0x9_f000, 1));
        assert_eq!(
            (word(0x2e4), word(0x2ec), word(0x2f4)),
            (0x10_0000, 0x10_0000, 1)
        );
    }
}
