//! Registers and the handshake.
use cube::vmm::bus::BusDevice;
use cube::vmm::virtio::rng::Rng;

use crate::driver::{Buffer, Driver, F_VERSION_1, reg, status};

fn rng() -> Driver {
    Driver::new(Box::new(Rng))
}

fn serves(driver: &mut Driver) {
    driver.reset();
    let mut queues = driver.start(&[64]);
    let at = driver.alloc(64);
    assert_eq!(driver.call(0, &mut queues[0], &[Buffer::write(at, 64)]), 64);
}

#[test]
fn a_slot_is_filled_and_emptied_while_its_driver_runs() {
    let mut driver = rng();
    for _ in 0..3 {
        assert_eq!(driver.read(reg::MAGIC), u32::from_le_bytes(*b"virt"));
        assert_eq!(driver.read(reg::VERSION), 2);
        assert_eq!(driver.read(reg::DEVICE_ID), 4);
        serves(&mut driver);
        let device = driver.slot.detach().expect("there is a device");
        assert!(driver.slot.is_empty());
        assert!(driver.slot.detach().is_none());
        assert_eq!(driver.read(reg::MAGIC), u32::from_le_bytes(*b"virt"));
        assert_eq!(driver.read(reg::VERSION), 2);
        for register in [
            reg::DEVICE_ID,
            reg::STATUS,
            reg::DEVICE_FEATURES,
            reg::CONFIG,
        ] {
            assert_eq!(driver.read(register), 0);
        }
        // A driver that did not notice does no harm.
        driver.add_status(status::ACKNOWLEDGE);
        driver.kick(0);
        assert_eq!(driver.status(), 0);
        assert!(driver.slot.attach(device).is_ok());
        assert!(driver.slot.attach(Box::new(Rng)).is_err());
    }
}

#[test]
fn status_bits_come_one_by_one_and_in_order() {
    use status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK};
    let mut driver = rng();
    let steps = [
        (
            0,
            [DRIVER, DRIVER_OK, FEATURES_OK, ACKNOWLEDGE | DRIVER, 0xff],
        ),
        (1, [DRIVER, DRIVER | 5, 9, 0x11, 0x8000_0001]),
        (3, [1, DRIVER, 7, 15, 0x23]),
    ];
    let path = [ACKNOWLEDGE, ACKNOWLEDGE | DRIVER];
    for (depth, (state, wrong)) in steps.iter().enumerate() {
        for value in wrong {
            driver.reset();
            for step in &path[..depth] {
                driver.write(reg::STATUS, *step);
            }
            assert_eq!(driver.status(), *state);
            driver.write(reg::STATUS, *value);
            assert_eq!(driver.status(), *state, "{value:#x} in state {state:#x}");
        }
    }
    // FAILED in any state; after it only a reset helps.
    driver.reset();
    driver.write(reg::STATUS, ACKNOWLEDGE);
    driver.write(reg::STATUS, ACKNOWLEDGE | FAILED);
    driver.write(reg::STATUS, ACKNOWLEDGE | FAILED | DRIVER);
    assert_eq!(driver.status(), ACKNOWLEDGE | FAILED);
    serves(&mut driver);
}

#[test]
fn features_that_were_not_offered_or_are_legacy_are_refused() {
    let mut driver = rng();
    for features in [0, F_VERSION_1 | 1, F_VERSION_1 | 1 << 28, u64::MAX, 1 << 29] {
        driver.reset();
        assert!(!driver.negotiate(features), "{features:#x}");
        // And there is no way round.
        driver.add_status(status::DRIVER_OK);
        assert_eq!(driver.status() & status::DRIVER_OK, 0);
    }
    driver.reset();
    assert!(driver.negotiate(F_VERSION_1));
    // Too late to change one's mind.
    driver.write(reg::DRIVER_FEATURES_SEL, 0);
    driver.write(reg::DRIVER_FEATURES, 1);
    driver.queue(0, 64);
    driver.add_status(status::DRIVER_OK);
    assert_eq!(driver.status() & status::NEEDS_RESET, 0);
    serves(&mut driver);
}

#[test]
fn a_driver_that_starts_without_its_queue_gets_needs_reset() {
    let mut driver = rng();
    assert!(driver.negotiate(F_VERSION_1));
    driver.add_status(status::DRIVER_OK);
    driver.wait_needs_reset();
    serves(&mut driver);
}

#[test]
fn queue_registers_are_dead_outside_queue_set_up() {
    let mut driver = rng();
    // Before the handshake.
    assert!(!driver.set_up_queue(0, 64, [0x10_0000, 0x11_0000, 0x12_0000]));
    let mut queues = driver.start(&[64]);
    // While the device runs: its rings stay where they are.
    driver.write(reg::QUEUE_READY, 0);
    assert_eq!(driver.read(reg::QUEUE_READY), 1);
    driver.set_up_queue(0, 2, [0, 2, 4]);
    let at = driver.alloc(64);
    assert_eq!(driver.call(0, &mut queues[0], &[Buffer::write(at, 64)]), 64);
    // Queues that are not there.
    for queue in [1, 7, 1 << 16, u32::MAX] {
        driver.write(reg::QUEUE_SEL, queue);
        assert_eq!(driver.read(reg::QUEUE_NUM_MAX), 0);
        assert_eq!(driver.read(reg::QUEUE_READY), 0);
        assert!(!driver.set_up_queue(queue, 64, [0x10_0000, 0x11_0000, 0x12_0000]));
    }
    assert_eq!(driver.status() & status::NEEDS_RESET, 0);
    serves(&mut driver);
}

#[test]
fn registers_are_written_in_one_width_and_the_rest_reads_as_zero() {
    let mut driver = rng();
    for width in [1, 2, 8] {
        driver.slot.write(reg::STATUS, &vec![1; width]);
        assert_eq!(driver.status(), 0);
    }
    for offset in [0x018, 0x0f0, 0x100, 0x1fe, 0x1000, u64::MAX] {
        let mut data = [0xee; 4];
        driver.slot.read(offset, &mut data);
        assert_eq!(data, [0; 4], "at {offset:#x}");
        driver.slot.write(offset, &[0xff; 4]);
    }
    // No shared memory regions: their length reads as -1.
    assert_eq!(driver.read(0x0b0), u32::MAX);
    serves(&mut driver);
}

#[test]
fn what_is_written_where_nothing_can_be_changes_nothing() {
    let mut driver = rng();
    let whole = |driver: &Driver| {
        let mut data = [0; 0x200];
        driver.slot.read(0, &mut data);
        data
    };
    let before = whole(&driver);
    for offset in [
        reg::MAGIC,
        1,
        2,
        0x6,
        0x008,
        0x034,
        0x060,
        0x071,
        0x0b0,
        0x0fc,
        0x0ff,
    ] {
        driver.slot.write(offset, &[0xff; 4]);
        assert_eq!(whole(&driver), before, "after a write at {offset:#x}");
    }
    serves(&mut driver);
}

/// As a guest's kernel may that knows these devices: an exit less for each interrupt.
#[test]
fn a_driver_that_acknowledges_nothing_is_interrupted_all_the_same() {
    let mut driver = rng();
    let mut queues = driver.start(&[64]);
    let at = driver.alloc(64);
    for _ in 0..3 {
        let queue = &mut queues[0];
        queue.want_interrupt();
        let head = queue.add(&[Buffer::write(at, 64)]);
        driver.kick(0);
        assert_eq!(driver.take_interrupt(), 1);
        assert_eq!(queue.pop_used(), Some((head, 64)));
    }
}

#[test]
fn a_thousand_resets_in_a_row_and_half_way_are_harmless() {
    let mut driver = rng();
    for round in 0..1000u32 {
        driver.reset();
        if round % 3 > 0 {
            driver.negotiate(F_VERSION_1);
        }
        if round % 3 == 2 {
            let mut queue = driver.queue(0, 16);
            driver.add_status(status::DRIVER_OK);
            let at = driver.alloc(1 << 20);
            for _ in 0..16 {
                queue.add(&[Buffer::write(at, 1 << 20)]);
            }
            driver.kick(0);
        }
    }
    serves(&mut driver);
}

#[test]
fn a_stopped_worker_is_a_host_error_and_no_hang() {
    let mut driver = rng();
    let elsewhere = cube::vmm::worker::Worker::spawn("elsewhere", || Ok(())).unwrap();
    let _queues = driver.start(&[64]);
    let stopped = std::mem::replace(&mut driver.worker, elsewhere);
    assert_eq!(stopped.stop().len(), 1);
    driver.reset();
    assert!(driver.negotiate(F_VERSION_1));
    driver.queue(0, 64);
    driver.add_status(status::DRIVER_OK);
    driver.wait_needs_reset();
    assert_eq!(driver.counters.snapshot().errors, 1);
}
