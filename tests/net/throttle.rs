//! Rate limits and the link's state, changed while the device runs. No test waits for time to pass: a limit
//! is either too low for a second frame within the age of the universe, or gone.
use cube::vmm::spec::{Rate, RateLimit};

use crate::wire::{GUEST, OTHER, Options, PLAIN, frame, guest, guest_with};

const NONE: RateLimit = RateLimit {
    bytes: None,
    frames: None,
};

fn one_frame() -> RateLimit {
    let rate = Rate {
        per_second: 1,
        burst: 1,
    };
    RateLimit {
        // 1 byte a second, 60 owed: a minute, longer than any test.
        bytes: Some(rate),
        frames: None,
    }
}

#[test]
fn frames_of_the_guest_wait_for_the_limit() {
    let mut guest = guest_with(Options {
        limits: (NONE, one_frame()),
        ..Options::default()
    });
    let frame = frame(GUEST, OTHER, 1000);
    guest.send(PLAIN, &frame);
    guest.offer(PLAIN, &frame);
    guest.driver.settle();
    assert_eq!(guest.queues[1].pop_used(), None);
    assert_eq!(guest.control.counters().sent_throttled, 1);
    guest.control.set_limits(NONE, NONE);
    guest.driver.wait_used(&mut guest.queues[1]);
    assert_eq!(guest.control.counters().sent_frames, 2);
}

#[test]
fn frames_for_the_guest_wait_for_the_limit() {
    let mut guest = guest_with(Options {
        limits: (one_frame(), NONE),
        ..Options::default()
    });
    guest.buffers(60, 1526);
    guest.arrive(PLAIN, &frame(OTHER, GUEST, 1000));
    guest.received();
    guest.arrive(PLAIN, &frame(OTHER, GUEST, 1000));
    guest.driver.settle();
    assert_eq!(guest.queues[0].pop_used(), None);
    assert_eq!(guest.control.counters().received_throttled, 1);
    guest.control.set_limits(NONE, NONE);
    guest.received();
    // And back again.
    guest.control.set_limits(one_frame(), NONE);
    guest.arrive(PLAIN, &frame(OTHER, GUEST, 1000));
    guest.received();
    guest.arrive(PLAIN, &frame(OTHER, GUEST, 1000));
    guest.driver.settle();
    assert_eq!(guest.queues[0].pop_used(), None);
}

#[test]
fn a_limit_that_is_reached_opens_by_itself() {
    let fast = RateLimit {
        bytes: None,
        frames: Some(Rate {
            per_second: 10_000,
            burst: 1,
        }),
    };
    let mut guest = guest_with(Options {
        limits: (fast, fast),
        ..Options::default()
    });
    guest.buffers(60, 1526);
    for _ in 0..10 {
        guest.arrive(PLAIN, &frame(OTHER, GUEST, 60));
        guest.send(PLAIN, &frame(GUEST, OTHER, 60));
    }
    for _ in 0..10 {
        guest.received();
    }
    let counters = guest.control.counters();
    assert!(counters.received_throttled > 0 && counters.sent_throttled > 0);
}

#[test]
fn nothing_passes_a_link_that_is_down() {
    let mut guest = guest();
    guest.buffers(50, 1526);
    guest.driver.settle();
    let generation = guest.driver.read(crate::driver::reg::CONFIG_GENERATION);
    guest.control.set_link(false);
    assert_eq!(guest.driver.wait_interrupt(), 3);
    assert_ne!(
        guest.driver.read(crate::driver::reg::CONFIG_GENERATION),
        generation
    );
    assert_eq!(guest.driver.config::<2>(6), [0, 0]);
    guest.arrive(PLAIN, &frame(OTHER, GUEST, 60));
    guest.offer(PLAIN, &frame(GUEST, OTHER, 60));
    guest.driver.settle();
    assert_eq!(
        (guest.queues[0].pop_used(), guest.seen_by_host()),
        (None, None)
    );
    guest.control.set_link(true);
    guest.received();
    guest.driver.wait_used(&mut guest.queues[1]);
    assert_eq!(guest.driver.config::<2>(6), [1, 0]);
}
