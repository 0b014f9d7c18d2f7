//! Guest memory: private, anonymous, untouched until somebody writes, and not counted against the
//! host's commit limit.
//!
//! Unsafe for `mmap(2)`, `munmap(2)` and `madvise(2)`.
#![allow(unsafe_code)]

use std::ffi::c_void;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use vm_memory::mmap::FromRangesError;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestRegionMmap, MmapRegion};

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
const HUGE_PAGE: u64 = 2 << 20;

/// Reserves that many bytes of guest memory. `huge_pages`: whether the host may back all of it with
/// transparent huge pages; without, what the guest touches costs what it touches.
///
/// # Errors
/// The operating system's refusal.
pub fn allocate(bytes: u64, huge_pages: bool) -> Result<GuestMemory, FromRangesError> {
    let mut regions = Vec::new();
    for (start, length) in ranges(bytes) {
        let mapping = map_aligned(length as usize)?;
        if !huge_pages {
            advise(&mapping, Advice::LinuxNoHugepage);
        }
        let region = GuestRegionMmap::new(mapping, GuestAddress(start));
        regions.push(region.ok_or(FromRangesError::InvalidGuestRegion)?);
    }
    Ok(GuestMemory::from_regions(regions)?)
}

/// Maps anonymous memory at a multiple of [`HUGE_PAGE`]: KVM maps a huge page in one step only where guest
/// and host address agree in their lower bits. Linux aligns such mappings itself since 6.7; before, a hole
/// of the right size and place is made for it. A kernel that puts the mapping elsewhere all the same gives
/// small pages, which cost time and nothing else.
fn map_aligned(length: usize) -> Result<MmapRegion, FromRangesError> {
    let mapping = MmapRegion::new(length)?;
    if (length as u64) < HUGE_PAGE || is_aligned(&mapping) {
        return Ok(mapping);
    }
    drop(mapping);
    let around = Surroundings::of_hole(length);
    let mapping = MmapRegion::new(length)?;
    drop(around);
    Ok(mapping)
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
    use vm_memory::GuestMemoryRegion;

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
            let memory = allocate(bytes, false).unwrap();
            for region in memory.iter() {
                let host = region.as_ptr() as u64;
                assert_eq!(host % HUGE_PAGE, region.start_addr().0 % HUGE_PAGE);
            }
        }
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
