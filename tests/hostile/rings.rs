//! Rings and chains, on the simplest device there is (virtio-rng).
use cube::vmm::virtio::rng::{MAX_REQUEST, Rng};

use crate::driver::queue::{INDIRECT, NEXT, WRITE};
use crate::driver::{Buffer, Driver, DriverQueue, F_EVENT_IDX, F_VERSION_1, MEMORY, reg, status};

/// Entries of the queue in most tests.
const SIZE: u16 = 16;

fn rng() -> Driver {
    Driver::new(Box::new(Rng))
}

/// What every test ends with: the device, reset, serves a driver that behaves.
fn still_works(driver: &mut Driver) {
    driver.reset();
    let mut queues = driver.start(&[64]);
    let at = driver.alloc(256);
    let written = driver.call(0, &mut queues[0], &[Buffer::write(at, 256)]);
    assert_eq!(written, 256);
    assert_ne!(driver.bytes(at, 256), vec![0; 256]);
}

/// Runs `wicked` on a started queue; the device must give up, and work again after a reset.
fn breaks_the_device(wicked: impl Fn(&mut Driver, &mut DriverQueue)) {
    for features in [F_VERSION_1, F_VERSION_1 | F_EVENT_IDX] {
        let mut driver = rng();
        let mut queues = driver.start_with(features, &[SIZE]);
        let before = driver.counters.snapshot().faults;
        wicked(&mut driver, &mut queues[0]);
        driver.kick(0);
        driver.wait_needs_reset();
        assert_eq!(driver.counters.snapshot().faults, before + 1);
        // A broken device takes nothing more, whatever it is told.
        let used = queues[0].used_index();
        let at = driver.alloc(64);
        queues[0].add(&[Buffer::write(at, 64)]);
        driver.kick(0);
        driver.settle();
        assert_eq!(queues[0].used_index(), used);
        still_works(&mut driver);
    }
}

/// Sets up a queue wrongly; it must not become ready, and the device must not start.
fn refuses_the_queue(size: u32, addresses: [u64; 3]) {
    let mut driver = rng();
    assert!(driver.negotiate(F_VERSION_1));
    assert!(
        !driver.set_up_queue(0, size, addresses),
        "a queue of {size} at {addresses:#x?} became ready"
    );
    driver.add_status(status::DRIVER_OK);
    assert_ne!(driver.status() & status::NEEDS_RESET, 0);
    driver.kick(0);
    still_works(&mut driver);
}

const GOOD: [u64; 3] = [0x10_0000, 0x11_0000, 0x12_0000];

#[test]
fn random_bytes_arrive_in_every_segment() {
    for features in [F_VERSION_1, F_VERSION_1 | F_EVENT_IDX] {
        let mut driver = rng();
        let mut queues = driver.start_with(features, &[64]);
        let parts: Vec<u64> = (0..5).map(|_| driver.alloc(64)).collect();
        let buffers: Vec<_> = parts.iter().map(|at| Buffer::write(*at, 64)).collect();
        // More requests than the ring has entries: indices and descriptors go round.
        for _ in 0..200 {
            assert_eq!(driver.call(0, &mut queues[0], &buffers), 5 * 64);
        }
        for at in &parts {
            assert_ne!(driver.bytes(*at, 64), vec![0; 64]);
        }
        let counters = driver.counters.snapshot();
        assert_eq!((counters.requests, counters.faults), (200, 0));
        assert_eq!(counters.bytes_to_guest, 200 * 5 * 64);
        still_works(&mut driver);
    }
}

#[test]
fn a_request_gets_no_more_than_the_device_gives_at_once() {
    let mut driver = rng();
    let mut queues = driver.start(&[64]);
    let at = driver.alloc(4 << 20);
    let written = driver.call(0, &mut queues[0], &[Buffer::write(at, 4 << 20)]);
    assert_eq!(written, MAX_REQUEST);
    let behind = driver.bytes(at + u64::from(MAX_REQUEST), 4096);
    assert_eq!(behind, vec![0; 4096]);
}

#[test]
fn more_chains_than_a_turn_takes_are_all_used() {
    let mut driver = rng();
    let mut queues = driver.start(&[64]);
    let at = driver.alloc(1 << 20);
    // 64 MiB of buffers offered in one go is many turns.
    for _ in 0..64 {
        queues[0].add(&[Buffer::write(at, 1 << 20)]);
    }
    driver.kick(0);
    for _ in 0..64 {
        driver.wait_used(&mut queues[0]);
    }
}

#[test]
fn queue_sizes_that_are_none_are_refused() {
    for size in [0, 3, 63, 128, 40_000, 65_536, 65_600, u32::MAX] {
        refuses_the_queue(size, GOOD);
    }
}

#[test]
fn rings_outside_memory_or_misaligned_are_refused() {
    for part in 0..3 {
        for address in [
            MEMORY,
            MEMORY - 16,
            1 << 40,
            u64::MAX - 15,
            u64::MAX,
            1 << 63,
        ] {
            let mut addresses = GOOD;
            addresses[part] = address;
            refuses_the_queue(64, addresses);
        }
    }
    for (part, step) in [(0, 8), (1, 1), (2, 2)] {
        let mut addresses = GOOD;
        addresses[part] += step;
        refuses_the_queue(64, addresses);
    }
    refuses_the_queue(64, [GOOD[0], 0, GOOD[2]]);
}

#[test]
fn cyclic_chains_break_the_device() {
    breaks_the_device(|driver, queue| {
        let at = driver.alloc(64);
        queue.set_descriptor(0, at, 64, NEXT | WRITE, 0);
        queue.offer(0);
    });
    breaks_the_device(|driver, queue| {
        let at = driver.alloc(64);
        for index in 0..SIZE {
            let next = (index + 1) % SIZE;
            queue.set_descriptor(index, at, 1, NEXT | WRITE, next);
        }
        queue.offer(3);
    });
    // A cycle of nothing.
    breaks_the_device(|_, queue| {
        queue.set_descriptor(0, 0, 0, NEXT, 1);
        queue.set_descriptor(1, 0, 0, NEXT, 0);
        queue.offer(0);
    });
}

#[test]
fn a_chain_of_every_descriptor_is_no_cycle() {
    let mut driver = rng();
    let mut queues = driver.start(&[SIZE]);
    let at = driver.alloc(64);
    let buffers = vec![Buffer::write(at, 4); SIZE.into()];
    let written = driver.call(0, &mut queues[0], &buffers);
    assert_eq!(written, 4 * u32::from(SIZE));
}

#[test]
fn a_next_or_a_head_beyond_the_table_breaks_the_device() {
    for next in [SIZE, 0x7fff, u16::MAX] {
        breaks_the_device(|driver, queue| {
            let at = driver.alloc(64);
            queue.set_descriptor(0, at, 64, NEXT | WRITE, next);
            queue.offer(0);
        });
        breaks_the_device(|_, queue| queue.offer(next));
    }
}

#[test]
fn indirect_descriptors_were_not_offered_and_break_the_device() {
    breaks_the_device(|driver, queue| {
        let table = driver.alloc(4096);
        queue.set_descriptor(0, table, 64, INDIRECT, 0);
        queue.offer(0);
    });
}

#[test]
fn a_readable_descriptor_behind_a_writable_one_breaks_the_device() {
    breaks_the_device(|driver, queue| {
        let at = driver.alloc(64);
        queue.set_descriptor(0, at, 64, NEXT | WRITE, 1);
        queue.set_descriptor(1, at, 64, 0, 0);
        queue.offer(0);
    });
}

#[test]
fn a_read_only_buffer_where_the_device_writes_breaks_the_device() {
    breaks_the_device(|driver, queue| {
        let at = driver.alloc(64);
        queue.set_descriptor(0, at, 64, 0, 0);
        queue.offer(0);
    });
}

#[test]
fn buffers_outside_memory_break_the_device() {
    let outside = [
        (MEMORY, 1),
        (MEMORY - 1, 2),
        (0, u32::MAX),
        (u64::MAX, 1),
        (u64::MAX - 3, 16),
        (1 << 52, 4096),
    ];
    for (address, len) in outside {
        breaks_the_device(|_, queue| {
            queue.set_descriptor(0, address, len, WRITE, 0);
            queue.offer(0);
        });
    }
}

#[test]
fn a_chain_of_more_bytes_than_a_length_can_say_breaks_the_device() {
    let mut driver = rng();
    let mut queues = driver.start(&[64]);
    // Each descriptor is fine, and says all of memory; together they have 2^32 bytes.
    for index in 0..64 {
        let flags = if index < 63 { NEXT } else { 0 };
        queues[0].set_descriptor(index, 0, MEMORY as u32, flags | WRITE, index + 1);
    }
    queues[0].offer(0);
    driver.kick(0);
    driver.wait_needs_reset();
    still_works(&mut driver);
}

#[test]
fn descriptors_without_bytes_say_nothing() {
    let mut driver = rng();
    let mut queues = driver.start(&[SIZE]);
    let at = driver.alloc(64);
    // The address of nothing may be anywhere.
    let buffers = [
        Buffer::read(u64::MAX, 0),
        Buffer::write(at, 0),
        Buffer::write(at, 32),
        Buffer::write(1 << 60, 0),
    ];
    assert_eq!(driver.call(0, &mut queues[0], &buffers), 32);
    breaks_the_device(|_, queue| {
        queue.add(&[Buffer::write(0x1000, 0)]);
    });
}

#[test]
fn an_available_index_that_jumps_breaks_the_device() {
    for jump in [SIZE + 1, 0x8000, u16::MAX] {
        breaks_the_device(|_, queue| queue.set_available_index(jump));
    }
}

#[test]
fn kicks_without_buffers_are_harmless() {
    let mut driver = rng();
    // Before anything is set up, too, and for queues that are not there.
    driver.kick(0);
    let mut queues = driver.start(&[SIZE]);
    for queue in 0..10_000 {
        driver.kick(queue);
    }
    driver.settle();
    assert_eq!(queues[0].used_index(), 0);
    assert_eq!(driver.read(reg::INTERRUPT_STATUS), 0);
    let at = driver.alloc(64);
    assert_eq!(driver.call(0, &mut queues[0], &[Buffer::write(at, 64)]), 64);
    still_works(&mut driver);
}

#[test]
fn the_driver_is_interrupted_only_when_it_wants_to_be() {
    // Without EVENT_IDX: the flag in the available ring.
    let mut driver = rng();
    let at = driver.alloc(64);
    let mut queues = driver.start_with(F_VERSION_1, &[SIZE]);
    queues[0].set_available_flags(1);
    queues[0].add(&[Buffer::write(at, 64)]);
    driver.kick(0);
    driver.settle();
    assert_eq!(queues[0].used_index(), 1);
    assert_eq!(driver.read(reg::INTERRUPT_STATUS), 0);
    queues[0].set_available_flags(0);
    queues[0].add(&[Buffer::write(at, 64)]);
    driver.kick(0);
    driver.settle();
    assert_eq!(driver.read(reg::INTERRUPT_STATUS), 1);

    // With it: the index at which it wants one.
    driver.reset();
    let mut queues = driver.start_with(F_VERSION_1 | F_EVENT_IDX, &[SIZE]);
    queues[0].set_used_event(1);
    queues[0].add(&[Buffer::write(at, 64)]);
    driver.kick(0);
    driver.settle();
    assert_eq!(queues[0].used_index(), 1);
    assert_eq!(driver.read(reg::INTERRUPT_STATUS), 0);
    // And the device asks for a kick at the next chain only.
    assert_eq!(queues[0].avail_event(), 1);
    queues[0].add(&[Buffer::write(at, 64)]);
    driver.kick(0);
    driver.settle();
    assert_eq!(driver.read(reg::INTERRUPT_STATUS), 1);
    assert_eq!(queues[0].avail_event(), 2);
}

#[test]
fn chains_offered_before_the_device_starts_are_served_without_a_kick() {
    let mut driver = rng();
    let at = driver.alloc(64);
    assert!(driver.negotiate(F_VERSION_1));
    let mut queue = driver.queue(0, SIZE);
    queue.add(&[Buffer::write(at, 64)]);
    driver.add_status(status::DRIVER_OK);
    assert_eq!(driver.wait_used(&mut queue), (0, 64));
}
