//! Loads an uncompressed ELF kernel.
//!
//! The headers are read once, into host types, and checked against the file and the guest's memory before
//! any of it is touched: a file that cannot work is refused with a sentence. What was checked is what is
//! loaded, even from a file that somebody changes meanwhile.
#![forbid(unsafe_code)]

use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

use linux_loader::elf::{self, Elf64_Ehdr, Elf64_Phdr};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use crate::vmm::boot::{BootError, length};
use crate::vmm::files::Opened;
use crate::vmm::layout::{HIGH_MEMORY, IDENTITY_MAPPED};
use crate::vmm::memory::{self, GuestMemory, HUGE_PAGE};
use crate::vmm::spec::ValidSpec;

/// `e_ident[EI_CLASS]` of a 64-bit file and `e_ident[EI_DATA]` of a little-endian one (ELF specification,
/// figure 4-6).
const ELFCLASS64: u8 = 2;
const ELFDATA2LSB: u8 = 1;
/// `e_machine` of x86_64 (System V ABI, AMD64 supplement, section 4.1).
const EM_X86_64: u16 = 62;
/// More program headers than any kernel has.
const MAX_SEGMENTS: u16 = 64;

/// A loaded kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadedKernel {
    /// Guest-physical address of the first instruction.
    pub(super) entry: u64,
    /// The byte after the kernel, its bss included.
    pub(super) end: u64,
}

/// What the headers say, checked.
struct Image {
    entry: u64,
    /// What is loaded: at least the segment with the entry point.
    segments: Vec<Elf64_Phdr>,
}

/// Checks and loads the kernel.
pub(super) fn load(
    memory: &GuestMemory,
    kernel: &mut Opened,
    spec: &ValidSpec,
) -> Result<LoadedKernel, BootError> {
    let Image { entry, segments } = check(kernel, spec)?;
    let (mut first, mut end) = (u64::MAX, 0);
    for segment in &segments {
        first = first.min(segment.p_paddr);
        end = end.max(segment.p_paddr + segment.p_memsz);
    }
    // Gaps between segments included: they are the kernel's too. And the last huge page if the kernel takes most
    // of it: the rest is the first that it hands out.
    memory::prefer_huge_pages(memory, first, (end + HUGE_PAGE / 2) & !(HUGE_PAGE - 1));
    for segment in &segments {
        copy(memory, kernel, segment)?;
    }
    Ok(LoadedKernel { entry, end })
}

/// The rest of a segment, its bss, is zero already: nobody has written to guest memory.
fn copy(memory: &GuestMemory, kernel: &mut Opened, segment: &Elf64_Phdr) -> Result<(), BootError> {
    let failed = |error| BootError::Read(kernel.path.clone(), error);
    let (at, length) = (GuestAddress(segment.p_paddr), segment.p_filesz as usize);
    let start = SeekFrom::Start(segment.p_offset);
    kernel.file.seek(start).map_err(failed)?;
    memory
        .read_exact_volatile_from(at, &mut kernel.file, length)
        .map_err(|error| failed(std::io::Error::other(error)))
}

fn check(kernel: &Opened, spec: &ValidSpec) -> Result<Image, BootError> {
    let file = HeaderReader {
        kernel,
        length: length(&kernel.file, &kernel.path)?,
    };
    let header = file.header()?;
    check_header(&header, &kernel.path)?;
    let mut segments = file.segments(&header)?;
    segments.retain(|segment| segment.p_type == elf::PT_LOAD && segment.p_memsz > 0);
    let mut entry_is_loaded = false;
    for segment in &segments {
        file.check_length(segment.p_offset.saturating_add(segment.p_filesz))?;
        check_place(segment, &kernel.path, spec)?;
        let place = segment.p_paddr..segment.p_paddr + segment.p_filesz;
        entry_is_loaded |= place.contains(&header.e_entry);
    }
    if !entry_is_loaded {
        let reason = "its entry point is in no segment";
        return Err(BootError::NotElf(kernel.path.clone(), reason));
    }
    Ok(Image {
        entry: header.e_entry,
        segments,
    })
}

fn check_header(header: &Elf64_Ehdr, path: &Path) -> Result<(), BootError> {
    let reason = if !header.e_ident.starts_with(b"\x7fELF") {
        "its first bytes say so"
    } else if header.e_ident[elf::EI_CLASS] != ELFCLASS64 {
        "it is a 32-bit file"
    } else if header.e_ident[elf::EI_DATA] != ELFDATA2LSB {
        "it is big-endian"
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

    fn header(&self) -> Result<Elf64_Ehdr, BootError> {
        let mut header = Elf64_Ehdr::default();
        self.read(header.as_mut_slice(), 0)?;
        Ok(header)
    }

    /// All program headers, in one read.
    fn segments(&self, header: &Elf64_Ehdr) -> Result<Vec<Elf64_Phdr>, BootError> {
        const SIZE: usize = size_of::<Elf64_Phdr>();
        let mut bytes = vec![0; usize::from(header.e_phnum) * SIZE];
        self.read(&mut bytes, header.e_phoff)?;
        let parse = |bytes: &[u8]| {
            let mut segment = Elf64_Phdr::default();
            segment.as_mut_slice().copy_from_slice(bytes);
            segment
        };
        Ok(bytes.chunks_exact(SIZE).map(parse).collect())
    }

    fn read(&self, bytes: &mut [u8], offset: u64) -> Result<(), BootError> {
        self.check_length(offset.saturating_add(bytes.len() as u64))?;
        let read = self.kernel.file.read_exact_at(bytes, offset);
        read.map_err(|error| BootError::Read(self.kernel.path.clone(), error))
    }
}

#[cfg(test)]
mod tests;
