//! Anything at all: random registers, ring contents and request bytes. Whatever happens, the slot answers,
//! the worker lives, and a driver that behaves is served after a reset.
use std::fs::File;

use cube::vmm::bus::BusDevice;
use cube::vmm::virtio::blk::{Blk, Disk};
use proptest::prelude::*;

use crate::disk::{IN, OK, header, part};
use crate::driver::{Buffer, Driver, DriverQueue, F_EVENT_IDX, F_VERSION_1, MEMORY, reg, status};

const SIZE: u16 = 16;

fn disk(file: &File) -> Driver {
    let disk = Disk::new("disk0", vec![part(file)], false).unwrap();
    Driver::new(Box::new(Blk::new(disk)))
}

fn image() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(64 << 10).unwrap();
    file
}

fn still_works(driver: &mut Driver) {
    driver.reset();
    let mut queues = driver.start(&[SIZE]);
    let head = driver.alloc_with(&header(IN, 1));
    let back = driver.alloc(513);
    let buffers = [Buffer::read(head, 16), Buffer::write(back, 513)];
    assert_eq!(driver.call(0, &mut queues[0], &buffers), 513);
    assert_eq!(driver.bytes(back + 512, 1), [OK]);
}

/// A guest-physical address: mostly in memory, often at its edges.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0..MEMORY,
        1 => MEMORY - 64..MEMORY + 64,
        1 => any::<u64>(),
        1 => Just(u64::MAX),
    ]
}

fn value() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => 0..20u32,
        1 => Just(status::FAILED),
        1 => Just(SIZE.into()),
        1 => Just(40_000),
        2 => (0..MEMORY as u32).prop_map(|address| address & !0xf),
        1 => any::<u32>(),
    ]
}

/// One access to the slot's window.
#[derive(Debug, Clone)]
enum Access {
    Read {
        offset: u64,
        width: usize,
    },
    Write {
        offset: u64,
        value: u64,
        width: usize,
    },
}

fn access() -> impl Strategy<Value = Access> {
    let offset = prop_oneof![
        6 => (0..0x40u64).prop_map(|word| word * 4),
        2 => Just(reg::STATUS),
        1 => 0..0x1100u64,
        1 => any::<u64>(),
    ];
    let width = prop_oneof![8 => Just(4usize), 1 => Just(1), 1 => Just(2), 1 => Just(8)];
    (offset, width, value(), any::<bool>()).prop_map(|(offset, width, value, read)| {
        if read {
            return Access::Read { offset, width };
        }
        Access::Write {
            offset,
            value: value.into(),
            width,
        }
    })
}

fn perform(driver: &Driver, access: &Access) {
    match access {
        Access::Read { offset, width } => driver.slot.read(*offset, &mut vec![0; *width]),
        Access::Write {
            offset,
            value,
            width,
        } => driver.slot.write(*offset, &value.to_le_bytes()[..*width]),
    }
}

/// A descriptor: address, length, flags, next.
type Descriptor = (u64, u32, u16, u16);

fn descriptor() -> impl Strategy<Value = Descriptor> {
    let len = prop_oneof![4 => 0..2048u32, 2 => Just(16), 2 => Just(512), 1 => any::<u32>()];
    let flags = prop_oneof![8 => 0..4u16, 1 => any::<u16>()];
    let next = prop_oneof![8 => 0..SIZE, 1 => any::<u16>()];
    (address(), len, flags, next)
}

fn fill(queue: &mut DriverQueue, descriptors: &[Descriptor], heads: &[u16]) {
    for (index, (address, len, flags, next)) in descriptors.iter().enumerate() {
        queue.set_descriptor(index as u16, *address, *len, *flags, *next);
    }
    for head in heads {
        queue.offer(*head);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn any_register_accesses(
        before in prop::collection::vec(access(), 0..30),
        after in prop::collection::vec(access(), 0..60),
        start in any::<bool>(),
    ) {
        let mut driver = disk(&image());
        for access in &before {
            perform(&driver, access);
        }
        if start {
            driver.reset();
            driver.start(&[SIZE]);
        }
        for access in &after {
            perform(&driver, access);
        }
        still_works(&mut driver);
    }

    #[test]
    fn any_descriptors(
        descriptors in prop::collection::vec(descriptor(), SIZE as usize),
        heads in prop::collection::vec(prop_oneof![9 => 0..SIZE, 1 => any::<u16>()], 1..20),
        jump in prop_oneof![4 => Just(None), 1 => any::<u16>().prop_map(Some)],
        event_idx in any::<bool>(),
    ) {
        let mut driver = disk(&image());
        let features = F_VERSION_1 | if event_idx { F_EVENT_IDX } else { 0 };
        let mut queues = driver.start_with(features, &[SIZE]);
        fill(&mut queues[0], &descriptors, &heads);
        if let Some(jump) = jump {
            queues[0].set_available_index(jump);
        }
        driver.kick(0);
        driver.settle();
        still_works(&mut driver);
    }

    /// Well-formed chains with any bytes in the header and behind it.
    #[test]
    fn any_requests(
        requests in prop::collection::vec(
            (0..16u32, prop_oneof![0..200u64, any::<u64>()], prop::collection::vec(any::<u8>(), 0..64), 0..1100u32),
            1..7,
        ),
    ) {
        let mut driver = disk(&image());
        let mut queues = driver.start(&[SIZE]);
        let mut statuses = Vec::new();
        for (kind, sector, told, asked) in &requests {
            let mut readable = header(*kind, *sector);
            readable.extend(told);
            let head = driver.alloc_with(&readable);
            let back = driver.alloc(asked + 1);
            driver.memory_fill(back, asked + 1, 0xee);
            statuses.push(back + u64::from(*asked));
            let buffers = [
                Buffer::read(head, readable.len() as u32),
                Buffer::write(back, asked + 1),
            ];
            queues[0].add(&buffers);
        }
        driver.kick(0);
        for status in statuses {
            driver.wait_used(&mut queues[0]);
            prop_assert!(driver.bytes(status, 1)[0] <= 2);
        }
        still_works(&mut driver);
    }

    /// Every byte of the rings, and what they lie next to.
    #[test]
    fn any_ring_bytes(
        bytes in prop::collection::vec((0..640u64, any::<u8>()), 1..100),
        kicks in 1..4usize,
    ) {
        let mut driver = disk(&image());
        let queues = driver.start(&[SIZE]);
        let [base, ..] = queues[0].addresses();
        for _ in 0..kicks {
            for (offset, byte) in &bytes {
                driver.memory_fill(base + offset, 1, *byte);
            }
            driver.kick(0);
        }
        driver.settle();
        still_works(&mut driver);
    }
}
