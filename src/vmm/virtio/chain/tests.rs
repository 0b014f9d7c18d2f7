//! Segments against a plain vector of bytes. What `Chain::parse` refuses is in `tests/hostile`.
use proptest::prelude::*;

use super::*;

const MEMORY: usize = 1 << 16;

/// Segments at the given places, and a map from each of their bytes to its address.
fn segments(list: &[(u64, u32)]) -> (Segments, Vec<u64>) {
    let mut segments = Segments::default();
    let mut addresses = Vec::new();
    for (at, len) in list {
        segments.push(GuestAddress(*at), *len).unwrap();
        addresses.extend(*at..*at + u64::from(*len));
    }
    (segments, addresses)
}

fn memory() -> GuestMemory {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
    let bytes: Vec<u8> = (0..MEMORY).map(|i| (i ^ (i >> 8)) as u8).collect();
    memory.write_slice(&bytes, GuestAddress(0)).unwrap();
    memory
}

proptest! {
    #[test]
    fn a_range_names_exactly_its_bytes(
        list in prop::collection::vec((0..60_000u64, 1..300u32), 0..20),
        from in 0..6000u32,
        len in 0..6000u32,
    ) {
        let (segments, addresses) = segments(&list);
        prop_assert_eq!(segments.len() as usize, addresses.len());
        let range = segments.range(from, len);
        let expected = addresses.get(from as usize..(from + len) as usize);
        prop_assert_eq!(range.is_ok(), expected.is_some());
        if let (Ok(range), Some(expected)) = (range, expected) {
            let named: Vec<u64> = range
                .flat_map(|segment| {
                    assert!(segment.len > 0);
                    segment.address.0..segment.address.0 + u64::from(segment.len)
                })
                .collect();
            prop_assert_eq!(&named[..], expected);
        }
    }

    #[test]
    fn reading_follows_the_segments_and_writing_is_read_back(
        // Apart from each other, so that no byte is written twice.
        lens in prop::collection::vec(1..300u32, 1..20),
        from in 0..200u32,
    ) {
        let list: Vec<_> = lens.iter().enumerate().map(|(i, len)| (i as u64 * 512, *len)).collect();
        let (segments, addresses) = segments(&list);
        let from = from.min(segments.len());
        let memory = memory();
        let mut read = vec![0; (segments.len() - from) as usize];
        segments.read(&memory, from, &mut read).unwrap();
        let expected: Vec<u8> = addresses[from as usize..]
            .iter()
            .map(|at| (at ^ (at >> 8)) as u8)
            .collect();
        prop_assert_eq!(&read, &expected);
        let new: Vec<u8> = read.iter().map(|byte| !byte).collect();
        segments.write(&memory, from, &new).unwrap();
        segments.read(&memory, from, &mut read).unwrap();
        prop_assert_eq!(read, new);
        let mut one_more = vec![0; segments.len() as usize + 1];
        prop_assert_eq!(segments.read(&memory, 0, &mut one_more), Err(GuestFault::Request));
        prop_assert_eq!(segments.write(&memory, 1, &one_more), Err(GuestFault::Request));
    }
}

#[test]
fn a_range_beyond_what_a_length_can_say_is_refused() {
    let (segments, _) = segments(&[(0, 16)]);
    assert!(segments.range(u32::MAX, u32::MAX).is_err());
    assert!(segments.range(17, 0).is_err());
    assert_eq!(segments.range(16, 0).unwrap().count(), 0);
}
