//! Guest memory: private, anonymous, untouched until somebody writes, and not counted against the
//! host's commit limit.
//!
//! Unsafe for `madvise(2)`.
#![allow(unsafe_code)]

use rustix::mm::{Advice, madvise};
use vm_memory::{GuestAddress, GuestMemoryBackend};

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

/// Reserves that many bytes of guest memory.
///
/// # Errors
/// The operating system's refusal.
pub fn allocate(bytes: u64) -> Result<GuestMemory, vm_memory::mmap::FromRangesError> {
    let ranges: Vec<_> = ranges(bytes)
        .into_iter()
        .map(|(start, length)| (GuestAddress(start), length as usize))
        .collect();
    GuestMemory::from_ranges(&ranges)
}

/// The size of a transparent huge page.
const HUGE_PAGE: u64 = 2 << 20;

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
    use super::*;

    #[test]
    fn advice_outside_of_memory_or_pages_is_none() {
        let memory = allocate(8 << 20).unwrap();
        for (start, end) in [(0, 8 << 20), (1, 2), (3 << 20, 1 << 40), (5 << 20, 1 << 20)] {
            prefer_huge_pages(&memory, start, end);
        }
    }

    #[test]
    fn memory_leaves_the_hole_free() {
        assert_eq!(ranges(64 << 20), [(0, 64 << 20)]);
        assert_eq!(ranges(3 << 30), [(0, 3 << 30)]);
        assert_eq!(ranges(4 << 30), [(0, 3 << 30), (4 << 30, 1 << 30)]);
    }
}
