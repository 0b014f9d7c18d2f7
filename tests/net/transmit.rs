//! Frames of the guest.
use crate::driver::Buffer;
use crate::wire::{GUEST, OTHER, Options, PLAIN, feature, frame, guest, guest_with};

/// Checksum to be completed at 14 + 20 + 16.
const CHECKSUM: [u8; 12] = [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0];

#[test]
fn a_frame_arrives_as_it_was_sent() {
    let mut guest = guest();
    for len in [14, 15, 60, 1514, 1518] {
        let frame = frame(GUEST, OTHER, len);
        guest.send(PLAIN, &frame);
        assert_eq!(guest.seen_by_host(), Some([&PLAIN[..], &frame].concat()));
    }
    let counters = guest.control.counters();
    assert_eq!(
        (counters.sent_frames, counters.sent_bytes),
        (5, 14 + 15 + 60 + 1514 + 1518)
    );
}

#[test]
fn a_frame_may_be_split_anywhere() {
    let mut guest = guest();
    let frame = frame(GUEST, OTHER, 200);
    let bytes = [&CHECKSUM[..], &frame].concat();
    for cut in [1, 11, 12, 13, 25, 26, 27, 211] {
        let (first, second) = bytes.split_at(cut);
        let buffers = [first, second]
            .map(|part| Buffer::read(guest.driver.alloc_with(part), part.len() as u32));
        guest.driver.call(1, &mut guest.queues[1], &buffers);
        assert_eq!(guest.seen_by_host().as_ref(), Some(&bytes), "cut at {cut}");
    }
}

#[test]
fn the_host_gets_a_header_of_its_own() {
    let mut guest = guest();
    let frame = frame(GUEST, OTHER, 100);
    // Flags that the driver must not set, fields that mean nothing without them, a number of buffers.
    let odd = [0xfe, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9];
    guest.send(odd, &frame);
    assert_eq!(guest.seen_by_host(), Some([&PLAIN[..], &frame].concat()));
}

#[test]
fn a_segmented_frame_may_be_longer_than_the_mtu() {
    let mut guest = guest();
    let frame = frame(GUEST, OTHER, 65_549);
    let header = [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0];
    guest.send(header, &frame);
    assert_eq!(guest.seen_by_host(), Some([&header[..], &frame].concat()));
}

#[test]
fn what_no_driver_should_send_is_dropped_and_counted() {
    let mut guest = guest_with(Options {
        check_source: true,
        without: feature::CSUM,
        ..Options::default()
    });
    let good = frame(GUEST, OTHER, 60);
    guest.send(PLAIN, &good[..13]);
    guest.send(CHECKSUM, &good);
    guest.send([0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &good);
    guest.send(PLAIN, &frame(OTHER, GUEST, 60));
    guest.send(PLAIN, &frame(GUEST, OTHER, 1523));
    let at = guest.driver.alloc(4);
    guest
        .driver
        .call(1, &mut guest.queues[1], &[Buffer::read(at, 4)]);
    assert_eq!(guest.seen_by_host(), None);
    let counters = guest.control.counters();
    assert_eq!(
        (
            counters.sent_malformed,
            counters.sent_spoofed,
            counters.sent_oversized
        ),
        (4, 1, 1)
    );
    assert_eq!(guest.driver.counters.snapshot().faults, 6);
    guest.still_works();
}

#[test]
fn a_full_link_takes_the_frame_later() {
    let mut guest = guest();
    let frame = frame(GUEST, OTHER, 1514);
    let mut sent = 0;
    let waiting = loop {
        let head = guest.offer(PLAIN, &frame);
        guest.driver.settle();
        match guest.queues[1].pop_used() {
            Some(used) => assert_eq!(used, (head, 0)),
            None => break head,
        }
        sent += 1;
        guest.driver.free_buffers();
    };
    assert_eq!(guest.control.counters().sent_frames, sent);
    let expected = [&PLAIN[..], &frame].concat();
    for _ in 0..sent {
        assert!(guest.seen_by_host() == Some(expected.clone()));
    }
    assert_eq!(guest.driver.wait_used(&mut guest.queues[1]), (waiting, 0));
    assert!(guest.seen_by_host() == Some(expected));
}

#[test]
fn a_link_that_is_gone_drops_frames() {
    let mut guest = guest();
    guest.host.clear();
    guest.send(PLAIN, &frame(GUEST, OTHER, 60));
    assert_eq!(guest.control.counters().sent_refused, 1);
    assert!(guest.driver.counters.snapshot().errors >= 1);
}
