//! A descriptor table of any bytes: every head parses into segments inside memory, or is refused.
#![no_main]

use cube::vmm::memory::GuestMemory;
use cube::vmm::virtio::chain::{Chain, Segments};
use libfuzzer_sys::fuzz_target;
use virtio_queue::{Queue, QueueState};
use vm_memory::{Bytes, GuestAddress};

const MEMORY: usize = 64 << 10;
const SIZE: u16 = 32;

fuzz_target!(|table: &[u8]| {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
    let table = &table[..table.len().min(16 * usize::from(SIZE))];
    memory.write_slice(table, GuestAddress(0x1000)).unwrap();
    let queue = Queue::try_from(QueueState {
        max_size: SIZE,
        next_avail: 0,
        next_used: 0,
        event_idx_enabled: false,
        size: SIZE,
        ready: true,
        desc_table: 0x1000,
        avail_ring: 0x2000,
        used_ring: 0x3000,
    })
    .unwrap();
    let mut chain = Chain::default();
    for head in 0..=SIZE {
        if chain.parse(&memory, 0, &queue, head).is_ok() {
            check(&memory, &chain.readable);
            check(&memory, &chain.writable);
        }
    }
});

/// The segments hold what they say, lie in memory, and any cut of them adds up.
fn check(memory: &GuestMemory, segments: &Segments) {
    let len = segments.len();
    let whole: u64 = segments
        .range(0, len)
        .unwrap()
        .inspect(|segment| {
            let end = segment.address.0 + u64::from(segment.len);
            assert!(segment.len > 0 && end <= MEMORY as u64);
        })
        .map(|segment| u64::from(segment.len))
        .sum();
    assert_eq!(whole, u64::from(len));
    assert!(segments.range(1, len).is_err());
    let half = len / 2;
    let cut: u64 = segments
        .range(half, len - half)
        .unwrap()
        .map(|segment| u64::from(segment.len))
        .sum();
    assert_eq!(cut, u64::from(len - half));
    if len < 1 << 20 {
        segments.read(memory, 0, &mut vec![0; len as usize]).unwrap();
    }
}
