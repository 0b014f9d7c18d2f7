//! Kernels of a few instructions: ELF files that run in ring 0, in 64-bit mode, with the first GiB mapped,
//! without interrupts. They need nothing of KVM that an interpreter could not do.
#![forbid(unsafe_code)]
#![allow(dead_code, reason = "each test program uses some of them")]

/// Where payloads are loaded.
pub(crate) const LOAD_ADDRESS: u64 = 0x10_0000;
/// Offset of the code in the file: behind the ELF header and one program header.
const CODE_OFFSET: u64 = 64 + 56;

/// `mov al, 0xfe; out 0x64, al`, and a `hlt` that is not reached: the guest resets itself at once.
pub(crate) const RESET: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64, 0xf4];
/// `jmp .`
pub(crate) const SPIN: &[u8] = &[0xeb, 0xfe];
/// `hlt; jmp .-1`
pub(crate) const HALT: &[u8] = &[0xf4, 0xeb, 0xfd];
/// `ud2`, without any handler.
pub(crate) const TRIPLE_FAULT: &[u8] = &[0x0f, 0x0b];
/// `mov eax, 0x30000000; jmp rax`: on to where nothing is, whose code nobody can execute.
pub(crate) const RUN_NOWHERE: &[u8] = &[0xb8, 0, 0, 0, 0x30, 0xff, 0xe0];

/// An executable of one segment with `code` in it, at [`LOAD_ADDRESS`].
pub(crate) fn elf(code: &[u8]) -> Vec<u8> {
    let mut file = Vec::new();
    // e_ident: magic, 64-bit, little-endian, version 1
    file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    // e_type, e_machine, e_version
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    // e_entry, e_phoff, e_shoff
    for word in [LOAD_ADDRESS, 64, 0] {
        file.extend(word.to_le_bytes());
    }
    // e_flags, e_ehsize, e_phentsize, e_phnum, e_shentsize, e_shnum, e_shstrndx
    file.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    // p_type PT_LOAD, p_flags RWX
    file.extend([1, 0, 0, 0, 7, 0, 0, 0]);
    let length = code.len() as u64;
    // p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_align
    for word in [
        CODE_OFFSET,
        LOAD_ADDRESS,
        LOAD_ADDRESS,
        length,
        length,
        0x1000,
    ] {
        file.extend(word.to_le_bytes());
    }
    file.extend(code);
    file
}

/// `mov al, value; mov dx, 0x3f0; out dx, al`: writes to the mark port.
pub(crate) fn mark(value: u8) -> Vec<u8> {
    vec![0xb0, value, 0x66, 0xba, 0xf0, 0x03, 0xee]
}

/// `mov dword [address], value`, for an address below 2 GiB.
pub(crate) fn store(address: u32, value: u32) -> Vec<u8> {
    [
        &[0xc7, 0x04, 0x25],
        &address.to_le_bytes()[..],
        &value.to_le_bytes()[..],
    ]
    .concat()
}

/// `mov rbx, address; mov dword [rbx], value`.
pub(crate) fn store_far(address: u64, value: u32) -> Vec<u8> {
    [
        &[0x48, 0xbb],
        &address.to_le_bytes()[..],
        &[0xc7, 0x03],
        &value.to_le_bytes()[..],
    ]
    .concat()
}

/// Resets the guest unless the word at `address` is `value`.
/// `mov rbx, address; cmp dword [rbx], value; je over; <RESET>`
pub(crate) fn expect(address: u64, value: u32) -> Vec<u8> {
    let load = [&[0x48, 0xbb], &address.to_le_bytes()[..]].concat();
    let compare = [&[0x81, 0x3b], &value.to_le_bytes()[..]].concat();
    [load, compare, vec![0x74, RESET.len() as u8], RESET.to_vec()].concat()
}

/// Maps the 2 MiB page that contains `address` onto itself, with a page directory at `directory`.
/// The VMM's page directory pointer table is at 0xa000.
pub(crate) fn map(address: u64, directory: u32) -> Vec<u8> {
    let pointer = 0xa000 + 8 * (address >> 30) as u32;
    let entry = directory + 8 * (address >> 21 & 0x1ff) as u32;
    let page = (address & !0x1f_ffff) | 0x83;
    [
        store(pointer, directory | 3),
        store(entry, page as u32),
        store(entry + 4, (page >> 32) as u32),
    ]
    .concat()
}
