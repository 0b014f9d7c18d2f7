//! A hostile guest does not make the host's memory or descriptors grow. Alone in its binary, because it
//! measures its own process.
#![allow(missing_docs)]

#[path = "driver/mod.rs"]
mod driver;

use cube::vmm::virtio::rng::Rng;
use driver::queue::{NEXT, WRITE};
use driver::{Buffer, Driver, F_VERSION_1, reg, status};

/// Resident memory in KiB (guest memory is touched by the first rounds and the same in all others), and
/// open descriptors.
fn usage() -> (u64, usize) {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with("VmRSS:"));
    let kib = line.unwrap().split_whitespace().nth(1).unwrap();
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap().count();
    (kib.parse().unwrap(), descriptors)
}

/// Every way to waste the host's resources that the slot offers.
fn waste(driver: &mut Driver, round: u32) {
    driver.reset();
    driver.negotiate(F_VERSION_1);
    let mut queue = driver.queue(0, 64);
    driver.add_status(status::DRIVER_OK);
    match round % 4 {
        // Full rings.
        0 => {
            let at = driver.alloc(4096);
            for _ in 0..64 {
                queue.add(&[Buffer::write(at, 4096)]);
            }
        }
        // The longest chain, and then a cycle of the same length.
        1 => {
            for index in 0..64 {
                queue.set_descriptor(index, 0x40_0000, 1, NEXT | WRITE, (index + 1) % 64);
            }
            queue.offer(0);
        }
        2 => queue.set_available_index(0xfff),
        // Kicks and half a handshake.
        _ => (0..100).for_each(|index| driver.kick(index)),
    }
    driver.kick(0);
    driver.settle();
    for register in 0..0x40 {
        driver.write(register * 4, round);
    }
    driver.write(reg::QUEUE_NUM, 40_000);
}

#[test]
fn memory_and_descriptors_do_not_grow() {
    let mut driver = Driver::new(Box::new(Rng));
    for round in 0..400 {
        waste(&mut driver, round);
    }
    let (before_kib, before_descriptors) = usage();
    for round in 0..4000 {
        waste(&mut driver, round);
    }
    let (after_kib, after_descriptors) = usage();
    assert_eq!(before_descriptors, after_descriptors);
    // One leaked queue or chain per round would be some MiB.
    assert!(
        after_kib < before_kib + 512,
        "resident memory went from {before_kib} to {after_kib} KiB"
    );
}
