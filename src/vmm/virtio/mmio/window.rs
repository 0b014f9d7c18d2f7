//! What the registers of virtio-mmio slots read as: memory that the guest may read and not write.
//!
//! KVM shows it to the guest in place of a device (KVM_MEM_READONLY), so that a read is a load and no exit. A write
//! still comes to the transport, or to an ioeventfd. So a register that changes by itself is changed here, by whoever
//! changes it, and one that follows from what the driver wrote is brought up to date before the driver goes on.
//!
//! Eight slots share a page: an empty one costs half a kilobyte.
#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::arithmetic_side_effects
    )
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::register::{CONFIG, CONFIG_GENERATION};
use crate::vmm::layout::SLOT_SIZE;

/// Bytes of a page of guest memory.
const PAGE: usize = 4096;
/// Registers of a slot, 32 bits each.
const WORDS: usize = SLOT_SIZE as usize / size_of::<AtomicU32>();
/// A mask as well: their number is a power of two.
const LAST_WORD: usize = WORDS - 1;
const _: () = assert!(WORDS.is_power_of_two());
/// Slots of a page.
const SLOTS: usize = PAGE / SLOT_SIZE as usize;

/// As KVM wants memory: whole pages, at multiples of their size.
#[repr(C, align(4096))]
struct Page([[AtomicU32; WORDS]; SLOTS]);

impl Page {
    fn new() -> Self {
        Self([const { [const { AtomicU32::new(0) }; WORDS] }; SLOTS])
    }
}

/// The windows of all slots of a machine, side by side. Cheap to clone.
#[derive(Clone)]
pub struct Windows(Arc<[Page]>);

impl Windows {
    /// For that many slots; all read as zeroes.
    pub fn new(slots: usize) -> Self {
        let pages = slots.div_ceil(SLOTS);
        Self(std::iter::repeat_with(Page::new).take(pages).collect())
    }

    /// The window of a slot; none: there are fewer.
    pub fn of_slot(&self, slot: usize) -> Option<Window> {
        let (page, place) = (slot.checked_div(SLOTS)?, slot.checked_rem(SLOTS)?);
        (page < self.0.len()).then(|| Window {
            pages: self.0.clone(),
            page,
            place,
        })
    }

    /// Where this process has them: a multiple of the page size.
    pub fn address(&self) -> *const u8 {
        self.0.as_ptr().cast()
    }

    /// Bytes of all, a multiple of the page size. 0: there are no slots.
    pub fn length(&self) -> usize {
        size_of_val(&*self.0)
    }
}

/// The window of one slot. Cheap to clone: all copies are the same.
#[derive(Clone)]
pub struct Window {
    pages: Arc<[Page]>,
    page: usize,
    place: usize,
}

impl Window {
    /// The window of the only slot of a machine.
    pub fn alone() -> Self {
        Self {
            pages: Windows::new(1).0,
            page: 0,
            place: 0,
        }
    }

    /// The register at `offset`; each value of 32 bits of the config space is one too.
    #[expect(
        clippy::indexing_slicing,
        reason = "a window is made for a page and a place that are there, and the mask is the last word"
    )]
    pub(in crate::vmm::virtio) fn register(&self, offset: u64) -> &AtomicU32 {
        let words = &self.pages[self.page].0[self.place];
        &words[(offset as usize >> 2) & LAST_WORD]
    }

    /// Sets the register at `offset`.
    pub(super) fn set(&self, offset: u64, value: u32) {
        self.register(offset).store(value, Ordering::Release);
    }

    /// Changes what lies at `offset` of the config space, and its generation before and after: whoever reads meanwhile finds
    /// another one at the end than at the beginning (virtio 1.2, section 2.5.1). Nothing happens if it is there already.
    pub(in crate::vmm::virtio) fn set_config(&self, offset: u64, bytes: &[u8]) {
        let start = offset.saturating_add(CONFIG);
        let changed = |(at, byte): &(u64, &u8)| {
            let mut now = [0];
            self.read(*at, &mut now);
            now != [**byte]
        };
        let mut changes = (start..SLOT_SIZE).zip(bytes).filter(changed).peekable();
        if changes.peek().is_some() {
            let generation = self.register(CONFIG_GENERATION);
            generation.fetch_add(1, Ordering::AcqRel);
            changes.for_each(|(at, byte)| self.set_byte(at, *byte));
            generation.fetch_add(1, Ordering::AcqRel);
        }
    }

    fn set_byte(&self, at: u64, byte: u8) {
        let changed = |word: u32| {
            let mut bytes = word.to_le_bytes();
            if let Some(place) = bytes.get_mut((at % 4) as usize) {
                *place = byte;
            }
            Some(u32::from_le_bytes(bytes))
        };
        let register = self.register(at);
        // It always has a new value.
        let _ = register.fetch_update(Ordering::AcqRel, Ordering::Acquire, changed);
    }

    /// What lies at `offset`, as the guest would read it; zeroes behind the window's end.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        for (at, byte) in (offset..SLOT_SIZE).zip(data) {
            let word = self.register(at).load(Ordering::Acquire);
            let [first, second, third, fourth] = word.to_le_bytes();
            *byte = match at % 4 {
                0 => first,
                1 => second,
                2 => third,
                _ => fourth,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_pages_for_kvm() {
        for (slots, pages) in [(0, 0), (1, 1), (8, 1), (9, 2), (32, 4)] {
            let windows = Windows::new(slots);
            assert_eq!(windows.length(), pages * PAGE, "{slots} slots");
            assert_eq!(windows.address() as usize % PAGE, 0);
            assert!(windows.of_slot(pages * SLOTS).is_none());
        }
    }

    #[test]
    fn a_window_lies_at_its_slots_address() {
        let windows = Windows::new(10);
        for slot in 0..10 {
            let window = windows.of_slot(slot).unwrap();
            let place = std::ptr::from_ref(window.register(0x60)) as usize;
            let expected = slot * SLOT_SIZE as usize + 0x60;
            assert_eq!(place - windows.address() as usize, expected);
        }
    }

    #[test]
    fn bytes_are_read_as_they_lie_in_memory() {
        let window = Window::alone();
        window.set(0x100, 0x0403_0201);
        window.set(0x104, 0x0807_0605);
        let mut data = [0; 6];
        window.read(0x101, &mut data);
        assert_eq!(data, [2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn a_change_of_the_config_space_has_a_generation_and_no_change_none() {
        let window = Window::alone();
        window.set_config(5, &[1, 2, 3]);
        let mut data = [0; 4];
        window.read(CONFIG + 4, &mut data);
        assert_eq!(data, [0, 1, 2, 3]);
        let generation = || window.register(CONFIG_GENERATION).load(Ordering::Acquire);
        assert_eq!(generation(), 2);
        window.set_config(6, &[2, 3]);
        assert_eq!(generation(), 2);
        window.set_config(6, &[2, 4]);
        assert_eq!(generation(), 4);
    }

    #[test]
    fn behind_its_end_a_window_reads_as_zeroes() {
        let window = Window::alone();
        window.set(SLOT_SIZE - 4, u32::MAX);
        for (offset, expected) in [
            (SLOT_SIZE - 2, [0xff, 0xff, 0, 0]),
            (SLOT_SIZE, [0; 4]),
            (u64::MAX, [0; 4]),
        ] {
            let mut data = [0xee; 4];
            window.read(offset, &mut data);
            assert_eq!(data, expected, "at {offset:#x}");
        }
    }
}
