//! Guest memory: untouched until somebody writes, and not counted against the host's commit limit. It is
//! private and anonymous, unless another process works on it (vhost-user): then it is a sealed file in memory.
//!
//! Unsafe for `mmap(2)`, `munmap(2)` and `madvise(2)`.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use vm_memory::mmap::{FromRangesError, MmapRegionError};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestRegionMmap, MmapRegion};

use crate::vmm::layout::{HOLE_END, HOLE_START};

/// The guest's memory: cheap to clone (an `Arc` per region), shared by every thread of the VMM.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;

/// The guest-physical ranges of that many bytes of RAM, as (start, length): one, or two around the hole
/// below 4 GiB.
pub fn ranges(bytes: u64) -> Vec<(u64, u64)> {
    if bytes <= HOLE_START {
        vec![(0, bytes)]
    } else {
        vec![(0, HOLE_START), (HOLE_END, bytes - HOLE_START)]
    }
}

/// The size of a transparent huge page, and of the largest page in KVM's own tables but one.
pub const HUGE_PAGE: u64 = 2 << 20;

/// Reserves that many bytes of guest memory. `huge_pages`: whether the host may back all of it with
/// transparent huge pages; without, what the guest touches costs what it touches.
///
/// # Errors
/// The operating system's refusal.
pub fn allocate(bytes: u64, huge_pages: bool) -> Result<GuestMemory, FromRangesError> {
    reserve(bytes, huge_pages, |_, length| MmapRegion::new(length))
}

/// As [`allocate`], but in a file that other processes can map.
///
/// # Errors
/// The operating system's refusal.
pub fn allocate_shared(bytes: u64, huge_pages: bool) -> Result<GuestMemory, FromRangesError> {
    let file = Arc::new(sealed_file(bytes).map_err(MmapRegionError::Mmap)?);
    reserve(bytes, huge_pages, |offset, length| {
        MmapRegion::from_file(FileOffset::from_arc(file.clone(), offset), length)
    })
}

/// A file in memory of that many bytes, for ever: whoever gets it cannot cut it short, which would end this
/// process (SIGBUS) at its next look at the missing part.
fn sealed_file(bytes: u64) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create("cube-guest", flags)?);
    file.set_len(bytes)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

/// Maps every range by `map`, which is told the bytes in the ranges before and the range's length.
fn reserve(
    bytes: u64,
    huge_pages: bool,
    map: impl Fn(u64, usize) -> Result<MmapRegion, MmapRegionError>,
) -> Result<GuestMemory, FromRangesError> {
    let mut regions = Vec::new();
    let mut offset = 0;
    for (start, length) in ranges(bytes) {
        let mapping = map_aligned(length as usize, || map(offset, length as usize))?;
        offset += length;
        if !huge_pages {
            advise(&mapping, Advice::LinuxNoHugepage);
        }
        let region = GuestRegionMmap::new(mapping, GuestAddress(start));
        regions.push(region.ok_or(FromRangesError::InvalidGuestRegion)?);
    }
    Ok(GuestMemory::from_regions(regions)?)
}

/// Maps memory by `map` at a multiple of [`HUGE_PAGE`]: KVM maps a huge page in one step only where guest
/// and host address agree in their lower bits. Linux aligns such mappings itself since 6.7; before, a hole
/// of the right size and place is made for it. A kernel that puts the mapping elsewhere all the same gives
/// small pages, which cost time and nothing else.
fn map_aligned(
    length: usize,
    map: impl Fn() -> Result<MmapRegion, MmapRegionError>,
) -> Result<MmapRegion, FromRangesError> {
    let mapping = map()?;
    if (length as u64) < HUGE_PAGE || is_aligned(&mapping) {
        return Ok(mapping);
    }
    let around = Surroundings::of_hole(length);
    let aligned = map()?;
    drop(around);
    // Only now: where it lies is free and of the right size, so the kernel would choose it again.
    drop(mapping);
    Ok(aligned)
}

fn is_aligned(mapping: &MmapRegion) -> bool {
    (mapping.as_ptr() as u64).is_multiple_of(HUGE_PAGE)
}

/// Mappings directly before and behind a free, aligned range of addresses.
struct Surroundings([(*mut c_void, usize); 2]);

impl Surroundings {
    /// Around a hole of `length` bytes; `None` if the addresses cannot be had.
    fn of_hole(length: usize) -> Option<Self> {
        let spare = HUGE_PAGE as usize;
        let whole = length.checked_add(spare)?;
        // SAFETY: a new mapping, at an address that the kernel chooses, that nobody may access.
        let start = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                whole,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .ok()?;
        let before = (start as usize).next_multiple_of(spare) - start as usize;
        let hole = start.wrapping_byte_add(before);
        let behind = (hole.wrapping_byte_add(length), spare - before);
        // SAFETY: a part of the mapping above, which nobody else knows of.
        unsafe { munmap(hole, length) }.ok()?;
        Some(Self([(start, before), behind]))
    }
}

impl Drop for Surroundings {
    fn drop(&mut self) {
        for (start, length) in self.0.into_iter().filter(|(_, length)| *length > 0) {
            // SAFETY: these are what is left of the mapping made in `of_hole`; nobody accesses them.
            let unmapped = unsafe { munmap(start, length) };
            debug_assert!(unmapped.is_ok(), "a whole mapping can be unmapped");
        }
    }
}

/// Advice that changes how memory is backed, and not its content. It fails on a kernel without huge pages,
/// and then they are small.
fn advise(mapping: &MmapRegion, advice: Advice) {
    // SAFETY: the range is the whole mapping; the advice changes no content.
    let _ = unsafe { madvise(mapping.as_ptr().cast(), mapping.size(), advice) };
}

/// Asks for huge pages where all of `start..end` is about to be written: a kernel's image costs a handful of
/// page faults then, here and in the guest, instead of thousands. Only whole huge pages inside the range are
/// asked for, so that not a byte more is touched. A host that has none gives small pages.
pub fn prefer_huge_pages(memory: &GuestMemory, start: u64, end: u64) {
    let (first, after) = (start.next_multiple_of(HUGE_PAGE), end & !(HUGE_PAGE - 1));
    let Some(length) = after.checked_sub(first).filter(|length| *length > 0) else {
        return;
    };
    let Ok(slice) = memory.get_slice(GuestAddress(first), length as usize) else {
        return;
    };
    let range = slice.ptr_guard_mut().as_ptr().cast();
    // SAFETY: the range lies in a mapping that `memory` keeps; the advice changes no content.
    let advised = unsafe { madvise(range, slice.len(), Advice::LinuxHugepage) };
    // It fails on a kernel without huge pages, and then they are small.
    let _ = advised;
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::{Bytes, GuestMemoryRegion};

    use super::*;

    #[test]
    fn advice_outside_of_memory_or_pages_is_none() {
        let memory = allocate(8 << 20, false).unwrap();
        for (start, end) in [(0, 8 << 20), (1, 2), (3 << 20, 1 << 40), (5 << 20, 1 << 20)] {
            prefer_huge_pages(&memory, start, end);
        }
    }

    #[test]
    fn guest_and_host_addresses_agree_in_a_huge_pages_bits() {
        for bytes in [64 << 20, 130 << 20, (3 << 30) + (64 << 20)] {
            for allocate in [allocate, allocate_shared] {
                let memory = allocate(bytes, false).unwrap();
                for region in memory.iter() {
                    let host = region.as_ptr() as u64;
                    assert_eq!(host % HUGE_PAGE, region.start_addr().0 % HUGE_PAGE);
                }
            }
        }
    }

    #[test]
    fn a_range_that_is_not_aligned_is_not_taken_twice() {
        let (length, spare) = (64 << 20, HUGE_PAGE as usize);
        let (access, kind) = (ProtFlags::empty(), MapFlags::PRIVATE | MapFlags::NORESERVE);
        // SAFETY: a new mapping at an address that the kernel chooses, and a part of it that nobody uses.
        unsafe {
            let whole = length + 2 * spare;
            let start = mmap_anonymous(std::ptr::null_mut(), whole, access, kind).unwrap();
            let aligned = (start as usize).next_multiple_of(spare) - start as usize;
            munmap(start.wrapping_byte_add(aligned + 4096), length).unwrap();
        }
        let file = Arc::new(sealed_file(length as u64).unwrap());
        let place = || FileOffset::from_arc(file.clone(), 0);
        let mapping = map_aligned(length, || MmapRegion::from_file(place(), length)).unwrap();
        assert!(is_aligned(&mapping), "{:?}", mapping.as_ptr());
    }

    #[test]
    fn shared_memory_is_one_file_that_nobody_can_cut_short() {
        let memory = allocate_shared((3 << 30) + (64 << 20), false).unwrap();
        let mut end = 0;
        for region in memory.iter() {
            let place = region.file_offset().unwrap();
            assert_eq!(place.start(), end);
            end += region.len();
            let last = region.last_addr();
            memory.write_obj(last.0 as u8 ^ 0x5a, last).unwrap();
            let mut byte = [0];
            place.file().read_exact_at(&mut byte, end - 1).unwrap();
            assert_eq!(byte, [last.0 as u8 ^ 0x5a]);
            let refused = place.file().set_len(0).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
        }
        assert_eq!(end, (3 << 30) + (64 << 20));
        let private = allocate(1 << 20, false).unwrap();
        assert!(private.iter().all(|region| region.file_offset().is_none()));
    }

    #[test]
    fn a_hole_is_where_it_was_promised() {
        let around = Surroundings::of_hole(16 << 20).unwrap();
        let [(start, before), (behind, after)] = around.0;
        assert_eq!((start as usize + before) % HUGE_PAGE as usize, 0);
        assert_eq!(behind as usize - (start as usize + before), 16 << 20);
        assert_eq!(before + after, HUGE_PAGE as usize);
    }

    #[test]
    fn memory_leaves_the_hole_free() {
        assert_eq!(ranges(64 << 20), [(0, 64 << 20)]);
        assert_eq!(ranges(3 << 30), [(0, 3 << 30)]);
        assert_eq!(ranges(4 << 30), [(0, 3 << 30), (4 << 30, 1 << 30)]);
    }
}
