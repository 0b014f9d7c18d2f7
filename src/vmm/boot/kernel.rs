//! Loads an uncompressed ELF kernel.
//!
//! linux-loader does the loading; here the headers are checked first, so that a file that cannot work
//! is refused with a sentence before guest memory is touched.
#![forbid(unsafe_code)]

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use linux_loader::elf::{self, Elf64_Ehdr, Elf64_Phdr};
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::ByteValued;

use crate::vmm::boot::{BootError, length};
use crate::vmm::files::Opened;
use crate::vmm::layout::{HIGH_MEMORY, IDENTITY_MAPPED};
use crate::vmm::memory::{self, GuestMemory};
use crate::vmm::spec::ValidSpec;

/// `e_ident[EI_CLASS]` of a 64-bit file (ELF specification, figure 4-6).
const ELFCLASS64: u8 = 2;
/// `e_machine` of x86_64 (System V ABI, AMD64 supplement, section 4.1).
const EM_X86_64: u16 = 62;
/// More program headers than any kernel has.
const MAX_SEGMENTS: u16 = 64;

/// A loaded kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LoadedKernel {
    /// Guest-physical address of the first instruction.
    pub(super) entry: u64,
    /// The byte after the kernel, its bss included.
    pub(super) end: u64,
}

/// Checks and loads the kernel.
pub(super) fn load(
    memory: &GuestMemory,
    kernel: &mut Opened,
    spec: &ValidSpec,
) -> Result<LoadedKernel, BootError> {
    let filled = check(kernel, spec)?;
    memory::prefer_huge_pages(memory, filled.start, filled.end);
    let loaded = Elf::load(memory, None, &mut kernel.file, None)
        .map_err(|error| BootError::Load(kernel.path.clone(), error))?;
    Ok(LoadedKernel {
        entry: loaded.kernel_load.0,
        end: loaded.kernel_end,
    })
}

/// Returns what of guest memory the file fills, gaps between segments included.
fn check(kernel: &Opened, spec: &ValidSpec) -> Result<Range<u64>, BootError> {
    let file = HeaderReader {
        kernel,
        length: length(&kernel.file, &kernel.path)?,
    };
    let header: Elf64_Ehdr = file.read(0)?;
    check_header(&header, &kernel.path)?;
    let mut entry_is_loaded = false;
    let (mut first, mut after) = (u64::MAX, 0);
    for index in 0..u64::from(header.e_phnum) {
        let offset = index * size_of::<Elf64_Phdr>() as u64;
        let segment: Elf64_Phdr = file.read(header.e_phoff.saturating_add(offset))?;
        if segment.p_type != elf::PT_LOAD || segment.p_memsz == 0 {
            continue;
        }
        file.check_length(segment.p_offset.saturating_add(segment.p_filesz))?;
        check_place(&segment, &kernel.path, spec)?;
        let place = segment.p_paddr..segment.p_paddr + segment.p_filesz;
        entry_is_loaded |= place.contains(&header.e_entry);
        (first, after) = (first.min(place.start), after.max(place.end));
    }
    if !entry_is_loaded {
        let reason = "its entry point is in no segment";
        return Err(BootError::NotElf(kernel.path.clone(), reason));
    }
    Ok(first..after)
}

fn check_header(header: &Elf64_Ehdr, path: &Path) -> Result<(), BootError> {
    let reason = if !header.e_ident.starts_with(b"\x7fELF") {
        "its first bytes say so"
    } else if header.e_ident[elf::EI_CLASS] != ELFCLASS64 {
        "it is a 32-bit file"
    } else if header.e_machine != EM_X86_64 {
        "it is for another architecture"
    } else if header.e_phnum == 0 || header.e_phnum > MAX_SEGMENTS {
        "it has no program headers, or too many"
    } else if usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>() {
        "its program headers have an odd size"
    } else {
        return Ok(());
    };
    Err(BootError::NotElf(path.into(), reason))
}

/// A segment must lie in extended memory, below what the boot page tables map.
fn check_place(segment: &Elf64_Phdr, path: &Path, spec: &ValidSpec) -> Result<(), BootError> {
    if segment.p_filesz > segment.p_memsz {
        return Err(BootError::NotElf(
            path.into(),
            "a segment is larger in the file than in memory",
        ));
    }
    let (start, end) = (
        segment.p_paddr,
        segment.p_paddr.saturating_add(segment.p_memsz),
    );
    let available = spec.memory_bytes().min(IDENTITY_MAPPED);
    if start < HIGH_MEMORY || end > available {
        let (path, memory_mib) = (path.into(), spec.memory_mib);
        return Err(BootError::KernelDoesNotFit {
            path,
            start,
            end,
            memory_mib,
            available,
        });
    }
    Ok(())
}

struct HeaderReader<'a> {
    kernel: &'a Opened,
    length: u64,
}

impl HeaderReader<'_> {
    fn check_length(&self, needed: u64) -> Result<(), BootError> {
        let length = self.length;
        if needed > length {
            return Err(BootError::Truncated {
                path: self.kernel.path.clone(),
                needed,
                length,
            });
        }
        Ok(())
    }

    fn read<T: ByteValued + Default>(&self, offset: u64) -> Result<T, BootError> {
        self.check_length(offset.saturating_add(size_of::<T>() as u64))?;
        let mut value = T::default();
        let path = &self.kernel.path;
        match self.kernel.file.read_exact_at(value.as_mut_slice(), offset) {
            Ok(()) => Ok(value),
            Err(error) => Err(BootError::Read(path.clone(), error)),
        }
    }
}

#[cfg(test)]
mod tests;
