//! A disk request of any bytes: it is answered with a status byte, or refused, and the disk keeps its size.
#![no_main]

use std::cell::RefCell;
use std::fs::File;

use cube::vmm::memory::GuestMemory;
use cube::vmm::virtio::blk::{BlkHandler, Disk, PartFile};
use cube::vmm::virtio::chain::Chain;
use cube::vmm::virtio::drain::{Effects, Outcome, QueueHandler};
use libfuzzer_sys::fuzz_target;
use virtio_queue::{Queue, QueueState};
use vm_memory::{Bytes, GuestAddress};

const MEMORY: usize = 256 << 10;
const DISK: u64 = 64 << 10;
const TABLE: u64 = 0x1000;
const REQUEST: u64 = 0x10000;
const ANSWER: u64 = 0x20000;

struct Fixture {
    memory: GuestMemory,
    handler: BlkHandler<Disk>,
    file: File,
    queue: Queue,
}

fn fixture() -> Fixture {
    let file = tempfile::tempfile().unwrap();
    file.set_len(DISK).unwrap();
    let part = PartFile {
        file: file.try_clone().unwrap(),
        path: "fuzz.img".into(),
        size: None,
    };
    let disk = Disk::new("fuzz", vec![part], false).unwrap();
    let queue = QueueState {
        max_size: 16,
        next_avail: 0,
        next_used: 0,
        event_idx_enabled: false,
        size: 16,
        ready: true,
        desc_table: TABLE,
        avail_ring: 0x2000,
        used_ring: 0x3000,
    };
    Fixture {
        memory: GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap(),
        handler: BlkHandler::new(disk, "fuzz", 0),
        file,
        queue: Queue::try_from(queue).unwrap(),
    }
}

thread_local! {
    static FIXTURE: RefCell<Fixture> = RefCell::new(fixture());
}

// The first two bytes say how much room there is for the answer; the rest is the request.
fuzz_target!(|input: &[u8]| {
    let Some((room, request)) = input.split_first_chunk::<2>() else {
        return;
    };
    let room = u32::from(u16::from_le_bytes(*room)).max(1);
    let request = &request[..request.len().min(0x8000)];
    FIXTURE.with_borrow_mut(|fixture| run(fixture, request, room));
});

fn run(fixture: &mut Fixture, request: &[u8], room: u32) {
    let memory = &fixture.memory;
    memory.write_slice(request, GuestAddress(REQUEST)).unwrap();
    let status = GuestAddress(ANSWER + u64::from(room) - 1);
    memory.write_obj(0xeeu8, status).unwrap();
    descriptor(memory, 0, REQUEST, request.len() as u32, 1, 1);
    descriptor(memory, 1, ANSWER, room, 2, 0);
    let mut chain = Chain::default();
    chain.parse(memory, 0, &fixture.queue, 0).unwrap();
    let outcome = fixture
        .handler
        .handle(memory, &mut chain, &mut Effects::default())
        .unwrap();
    let Outcome::Done(written) = outcome else {
        panic!("a local disk answers at once");
    };
    assert!((1..=room).contains(&written));
    assert!(memory.read_obj::<u8>(status).unwrap() <= 2);
    assert_eq!(fixture.file.metadata().unwrap().len(), DISK);
}

fn descriptor(memory: &GuestMemory, index: u64, address: u64, len: u32, flags: u16, next: u16) {
    let mut raw = address.to_le_bytes().to_vec();
    raw.extend(len.to_le_bytes());
    raw.extend(flags.to_le_bytes());
    raw.extend(next.to_le_bytes());
    let at = GuestAddress(TABLE + 16 * index);
    memory.write_slice(&raw, at).unwrap();
}
