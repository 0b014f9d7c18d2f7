//! The tiny kernel: six instructions that say "I run" and reset the machine.
//!
//! One ELF serves every VMM: entered in 64-bit mode at the ELF's entry point (the Linux boot protocol) or
//! in 32-bit mode at the address in its PVH note. Its instructions mean the same in both.
#![forbid(unsafe_code)]

/// The byte that stands for "the guest runs": BEL, which no VMM prints of its own accord. The guest
/// writes it to the first serial port.
pub const MARKER: u8 = 0x07;

/// NAK: the guest lacks what it was to use.
pub const ABSENT: u8 = 0x15;

/// Where the kernel is loaded and entered: no lower, because crosvm refuses a kernel below 2 MiB.
const ADDRESS: u64 = 0x20_0000;
/// Where the code is in the file: loaders want pages.
const CODE_OFFSET: u64 = 0x1000;
const HEADER_SIZE: u64 = 64;
const PROGRAM_HEADER_SIZE: u64 = 56;

const CODE: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8  (the serial port's data register)
    0xb0, MARKER, // mov al, MARKER
    0xee,   // out dx, al
    0xb0, 0xfe, // mov al, 0xfe
    0xe6, 0x64, // out 0x64, al  (the i8042's reset line)
    0xf4, // hlt
    0xeb, 0xfd, // jmp to the hlt
];

/// The same for a vCPU that is as KVM makes it, in real mode, where `mov dx` has no prefix.
pub const REAL_MODE: [u8; 13] = [
    0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, MARKER, // mov al, MARKER
    0xee,   // out dx, al
    0xb0, 0xfe, // mov al, 0xfe
    0xe6, 0x64, // out 0x64, al
    0xf4, // hlt
    0xeb, 0xfd, // jmp to the hlt
];

/// The kernel as an ELF file.
pub fn tiny_kernel() -> Vec<u8> {
    let note = pvh_note();
    let note_offset = HEADER_SIZE + 2 * PROGRAM_HEADER_SIZE;
    let mut elf = Vec::new();
    elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    elf.extend(2u16.to_le_bytes()); // ET_EXEC
    elf.extend(62u16.to_le_bytes()); // EM_X86_64
    elf.extend(1u32.to_le_bytes()); // EV_CURRENT
    elf.extend(ADDRESS.to_le_bytes());
    elf.extend(HEADER_SIZE.to_le_bytes());
    elf.extend([0; 12]); // no section headers, no flags
    for half in [HEADER_SIZE, PROGRAM_HEADER_SIZE, 2, 0, 0, 0] {
        elf.extend((half as u16).to_le_bytes());
    }
    elf.extend(program_header(1, CODE_OFFSET, CODE.len() as u64)); // PT_LOAD
    elf.extend(program_header(4, note_offset, note.len() as u64)); // PT_NOTE
    elf.extend(note);
    elf.resize(CODE_OFFSET as usize, 0);
    elf.extend(CODE);
    elf
}

fn program_header(kind: u32, offset: u64, size: u64) -> Vec<u8> {
    let mut header = Vec::new();
    header.extend(kind.to_le_bytes());
    header.extend(5u32.to_le_bytes()); // readable, executable
    let align: u64 = if kind == 1 { 0x1000 } else { 4 };
    for field in [offset, ADDRESS, ADDRESS, size, size, align] {
        header.extend(field.to_le_bytes());
    }
    header
}

/// XEN_ELFNOTE_PHYS32_ENTRY (type 18): the 32-bit entry point of the PVH boot protocol.
fn pvh_note() -> Vec<u8> {
    let mut note = Vec::new();
    for word in [4u32, 4, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend((ADDRESS as u32).to_le_bytes());
    note
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_an_elf_whose_code_is_where_its_header_says() {
        let elf = tiny_kernel();
        let word = |at: usize| u64::from_le_bytes(elf[at..at + 8].try_into().expect("eight bytes"));
        assert_eq!(&elf[..4], b"\x7fELF");
        assert_eq!(word(24), ADDRESS);
        let first = HEADER_SIZE as usize;
        let (offset, size) = (word(first + 8) as usize, word(first + 32) as usize);
        assert_eq!(&elf[offset..offset + size], CODE);
        let second = first + PROGRAM_HEADER_SIZE as usize;
        let note = word(second + 8) as usize;
        assert_eq!(&elf[note + 12..note + 16], b"Xen\0");
    }

    #[test]
    fn it_is_loaded_where_every_vmm_takes_a_kernel() {
        // `KERNEL_START_OFFSET` of crosvm, which is the highest of them.
        const LOWEST: u64 = 2 << 20;
        let elf = tiny_kernel();
        let first = HEADER_SIZE as usize;
        let physical = elf[first + 24..first + 32].try_into().expect("eight bytes");
        assert!(u64::from_le_bytes(physical) >= LOWEST);
    }
}
