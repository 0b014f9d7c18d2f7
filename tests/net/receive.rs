//! Frames for the guest.
use std::sync::atomic::{AtomicBool, Ordering};

use crate::driver::Buffer;
use crate::wire::{GUEST, OTHER, Options, PLAIN, feature, frame, guest, guest_with};

#[test]
fn a_frame_is_written_into_the_first_buffer() {
    let mut guest = guest();
    let frame = frame(OTHER, GUEST, 600);
    let buffers = guest.buffers(50, 1526);
    let header = [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0xff, 0xff];
    guest.arrive(header, &frame);
    let (head, at) = buffers[0];
    assert_eq!(guest.received(), (head, 612));
    // One buffer, whatever the host's kernel left there.
    let expected = [&header[..10], &[1, 0], &frame].concat();
    assert_eq!(guest.driver.bytes(at, 612), expected);
    assert_eq!(guest.driver.bytes(at + 612, 1), [0xee]);
    let counters = guest.control.counters();
    assert_eq!(
        (counters.received_frames, counters.received_bytes),
        (1, 600)
    );
}

#[test]
fn a_long_frame_lies_in_several_buffers() {
    let mut guest = guest();
    let buffers = guest.buffers(50, 1526);
    let frame = frame(OTHER, GUEST, 65_549);
    guest.arrive(PLAIN, &frame);
    let mut bytes = Vec::new();
    for (head, at) in buffers.iter().take(43) {
        let (used, written) = guest.received();
        assert_eq!(used, *head);
        bytes.extend(guest.driver.bytes(*at, written as usize));
    }
    assert_eq!(bytes[10..12], [43, 0]);
    assert!(bytes[12..] == frame);
    assert_eq!(guest.queues[0].used_index(), 43);
}

struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Linux takes a frame apart as soon as it sees its first buffer, and must find the others.
#[test]
fn the_driver_never_sees_a_part_of_a_frame() {
    let mut guest = guest_with(Options {
        without: feature::SEGMENTED,
        mtu: 9000,
        ..Options::default()
    });
    let frame = frame(OTHER, GUEST, 4 * 2000 - 12);
    let done = AtomicBool::new(false);
    let queue = guest.queues[0].clone_view();
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                assert_eq!(queue.used_index() % 4, 0, "a part of a frame is visible");
            }
        });
        // Also when the test fails, or the watcher watches for ever.
        let _done = Done(&done);
        guest.buffers(8, 2000);
        for _ in 0..500 {
            guest.arrive(PLAIN, &frame);
            (0..4).for_each(|_| _ = guest.received());
            guest.buffers(4, 2000);
        }
        done.store(true, Ordering::Relaxed);
        watcher.join().unwrap();
    });
}

/// The host's stack answers while a frame is being written to a tap: that costs the guest one interrupt, not two.
#[test]
fn an_answer_comes_with_the_interrupt_for_what_was_sent() {
    let mut guest = guest_with(Options {
        deaf: true,
        ..Options::default()
    });
    guest.buffers(50, 1526);
    guest.driver.settle();
    guest.arrive(PLAIN, &frame(OTHER, GUEST, 60));
    guest.driver.settle();
    assert_eq!(guest.queues[0].used_index(), 0, "somebody told the device");
    guest.offer(PLAIN, &frame(GUEST, OTHER, 60));
    guest.driver.wait_interrupt();
    assert_eq!(guest.queues[1].used_index(), 1);
    assert_eq!(guest.queues[0].used_index(), 1);
}

#[test]
fn frames_wait_for_buffers() {
    let mut guest = guest();
    let frames: Vec<_> = (60..70).map(|len| frame(OTHER, GUEST, len)).collect();
    frames.iter().for_each(|frame| guest.arrive(PLAIN, frame));
    guest.driver.settle();
    // Enough for a frame, but not for the longest there could be.
    guest.buffers(42, 1526);
    guest.driver.settle();
    assert_eq!(guest.queues[0].used_index(), 0);
    guest.buffers(20, 1526);
    for frame in &frames {
        assert_eq!(guest.received().1 as usize, 12 + frame.len());
    }
}

#[test]
fn without_merged_buffers_each_frame_has_its_own() {
    let mut guest = guest_with(Options {
        without: feature::MRG_RXBUF | feature::SEGMENTED,
        ..Options::default()
    });
    let header = guest.driver.alloc(12);
    let data = guest.driver.alloc(1518);
    let head = guest.queues[0].add(&[Buffer::write(header, 12), Buffer::write(data, 1518)]);
    guest.driver.kick(0);
    let short = frame(OTHER, GUEST, 1514);
    guest.arrive(PLAIN, &frame(OTHER, GUEST, 1600));
    guest.arrive(PLAIN, &short);
    assert_eq!(guest.received(), (head, 1526));
    assert_eq!(guest.driver.bytes(data, 1514), short);
    assert_eq!(
        guest.driver.bytes(header, 12),
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]
    );
    assert_eq!(guest.control.counters().received_oversized, 1);
    // A buffer that is too small for what arrives.
    guest.buffers(1, 100);
    guest.arrive(PLAIN, &short);
    guest.arrive(PLAIN, &frame(OTHER, GUEST, 60));
    assert_eq!(guest.received().1, 72);
    assert_eq!(guest.control.counters().received_oversized, 2);
}

#[test]
fn a_flood_that_nobody_wants_ends() {
    let mut guest = guest();
    // Frames for nobody in this guest (unicast, not its own), more than one turn takes.
    assert_eq!(guest.command(&[0, 0, 0]), 0);
    for _ in 0..100 {
        guest.arrive(PLAIN, &frame(GUEST, OTHER, 60));
    }
    guest.arrive(PLAIN, &frame(OTHER, GUEST, 61));
    guest.buffers(50, 1526);
    assert_eq!(guest.received().1, 73);
    assert_eq!(guest.control.counters().received_filtered, 100);
}

#[test]
fn buffers_without_a_frame_go_back_at_a_reset() {
    let mut guest = guest();
    guest.buffers(50, 1526);
    guest.driver.settle();
    guest.driver.write(crate::driver::reg::STATUS, 0);
    assert_eq!(guest.queues[0].used_index(), 0);
    guest.start_again();
    guest.still_works();
}

#[test]
fn a_buffer_of_no_use_is_refused() {
    let mut guest = guest();
    let (head, _) = guest.buffer(20);
    guest.driver.kick(0);
    assert_eq!(guest.received(), (head, 0));
    let shreds: Vec<_> = (0..4)
        .map(|_| Buffer::write(guest.driver.alloc(500), 500))
        .collect();
    let head = guest.queues[0].add(&shreds);
    guest.driver.kick(0);
    assert_eq!(guest.received(), (head, 0));
    assert_eq!(guest.driver.counters.snapshot().faults, 2);
    guest.still_works();
}
