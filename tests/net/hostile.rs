//! Anything at all on every queue: the device answers, breaks or drops, and works again after a reset.
use proptest::prelude::*;

use crate::driver::{Buffer, MEMORY};
use crate::wire::{GUEST, OTHER, Options, PLAIN, frame, guest_with};

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Frames of any bytes: what reaches the host is one of them, with a header that passed.
    #[test]
    fn any_frames(
        check_source: bool,
        frames in prop::collection::vec((any::<[u8; 12]>(), 0..2000usize, any::<bool>()), 1..12),
    ) {
        let mut guest = guest_with(Options { check_source, ..Options::default() });
        for (header, len, own) in frames {
            let from = if own { GUEST } else { OTHER };
            let bytes = frame(from, OTHER, len + 14);
            guest.send(header, &bytes[..len]);
            if let Some(seen) = guest.seen_by_host() {
                prop_assert!(own || !check_source);
                prop_assert_eq!(&seen[12..], &bytes[..len]);
                prop_assert_eq!(seen[0] & !1, 0);
                if seen[1] != 0 {
                    prop_assert_eq!(seen[0], 1);
                }
            }
        }
        guest.still_works();
    }

    /// Commands of any bytes.
    #[test]
    fn any_commands(
        commands in prop::collection::vec((0..6u8, 0..3u8, prop::collection::vec(any::<u8>(), 0..80)), 1..20),
    ) {
        let mut guest = guest_with(Options { pairs: 2, ..Options::default() });
        for (class, kind, data) in commands {
            let answer = guest.command(&[&[class, kind][..], &data].concat());
            prop_assert!(answer <= 1);
        }
        guest.start_again();
        guest.still_works();
    }

    /// Buffers of any shape on the receive queue, while frames of any length arrive.
    #[test]
    fn any_buffers(
        merged: bool,
        chains in prop::collection::vec(prop::collection::vec((1..4000u32, any::<bool>()), 1..6), 1..10),
        lengths in prop::collection::vec(14..9000usize, 1..6),
    ) {
        let without = if merged { 0 } else { crate::wire::feature::MRG_RXBUF };
        let mut guest = guest_with(Options { without, ..Options::default() });
        for len in lengths {
            guest.arrive(PLAIN, &frame(OTHER, GUEST, len));
        }
        for chain in chains {
            let mut buffers: Vec<_> = chain
                .iter()
                .map(|(len, writable)| Buffer {
                    address: guest.driver.alloc(*len),
                    len: *len,
                    writable: *writable,
                })
                .collect();
            buffers.sort_by_key(|buffer| buffer.writable);
            if guest.queues[0].free_descriptors() >= buffers.len() {
                guest.queues[0].add(&buffers);
            }
        }
        guest.driver.kick(0);
        guest.driver.settle();
        guest.start_again();
        while guest.seen_by_host().is_some() {}
        guest.driver.settle();
    }

    /// Any bytes in the rings of all queues.
    #[test]
    fn any_ring_bytes(bytes in prop::collection::vec((0..3usize, 0..2000u64, any::<u8>()), 1..100)) {
        let mut guest = guest_with(Options::default());
        guest.arrive(PLAIN, &frame(OTHER, GUEST, 60));
        for (queue, offset, byte) in bytes {
            let [base, ..] = guest.queues[queue].addresses();
            guest.driver.memory_fill((base + offset).min(MEMORY - 1), 1, byte);
        }
        for queue in 0..3 {
            guest.driver.kick(queue);
        }
        guest.driver.settle();
        guest.start_again();
    }
}
