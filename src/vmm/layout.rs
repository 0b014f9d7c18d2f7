//! Where everything lies in the guest's physical address space.
//!
//! ```text
//! 0x0000_0000  RAM: below 640 KiB what the VMM writes for the kernel
//!   0x0500       GDT
//!   0x7000       boot_params ("zero page")
//!   0x9000       page tables: PML4, PDPT, PD
//!   0x2_0000     kernel command line
//!   0x9_f000     MP table, to the end of the 640 KiB (reserved in the e820 map)
//! 0x0010_0000  RAM: kernel (where its ELF headers say), initramfs at the end of low memory
//! 0xc000_0000  the hole: no RAM from 3 GiB to 4 GiB
//!   0xd000_0000  virtio-mmio slots, 512 bytes each
//!   0xfec0_0000  I/O APIC
//!   0xfee0_0000  local APICs
//! 0x1_0000_0000  RAM beyond 3 GiB
//! ```
#![forbid(unsafe_code)]

/// Where the hole below 4 GiB begins.
pub const HOLE_START: u64 = 3 << 30;
/// Where RAM continues after the hole.
pub const HOLE_END: u64 = 4 << 30;
/// Start of extended memory.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// The GDT.
pub const GDT: u64 = 0x500;
/// `struct boot_params`.
pub const ZERO_PAGE: u64 = 0x7000;
/// Page map level 4.
pub const PML4: u64 = 0x9000;
/// Page directory pointer table.
pub const PDPT: u64 = 0xa000;
/// Page directory: 512 pages of 2 MiB, the first GiB.
pub const PD: u64 = 0xb000;
/// How far the boot page tables map.
pub const IDENTITY_MAPPED: u64 = 1 << 30;
/// The kernel's command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// The longest command line without its final NUL: x86's COMMAND_LINE_SIZE is 2,048.
pub const COMMAND_LINE_MAX: usize = 2047;
/// The MP configuration table and, behind it, the floating pointer; not RAM in the memory map.
pub const MP_TABLE_AREA: u64 = 0x9_f000;
/// The MP floating pointer: the last KiB of base memory is one of the places where the kernel looks for
/// it (MultiProcessor Specification 1.4, section 4).
pub const MP_POINTER: u64 = 0x9_fc00;

/// I/O APIC registers.
pub const IOAPIC: u64 = 0xfec0_0000;
/// Size of the I/O APIC's window.
pub const IOAPIC_SIZE: u64 = 0x100;
/// Local APIC registers.
pub const LOCAL_APIC: u32 = 0xfee0_0000;

/// The first virtio-mmio slot.
pub const SLOTS: u64 = 0xd000_0000;
/// Distance between slots and size of each: the registers, and as much again for the config space.
pub const SLOT_SIZE: u64 = 0x200;
/// The most slots of a machine; their declarations fill half of the command line.
pub const MAX_SLOTS: usize = 32;

/// Interrupt line of the 16550.
pub const SERIAL_IRQ: u32 = 4;
/// Interrupt line of the first slot; the others follow.
pub const FIRST_SLOT_IRQ: u32 = 5;

/// Guest-physical address of a slot.
pub const fn slot_address(slot: usize) -> u64 {
    SLOTS + slot as u64 * SLOT_SIZE
}

/// Interrupt line of a slot.
pub const fn slot_irq(slot: usize) -> u32 {
    FIRST_SLOT_IRQ + slot as u32
}

/// Number of I/O APIC pins of a machine with that many slots: no more than are wired, because the
/// guest visits each at boot.
pub const fn ioapic_pins(slots: usize) -> u8 {
    FIRST_SLOT_IRQ as u8 + slots as u8
}
