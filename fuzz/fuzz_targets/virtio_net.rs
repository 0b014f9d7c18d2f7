//! A network driver that offers any chains, with any bytes in them, on every queue, next to a host that sends
//! frames of any length: nothing panics, and the host gets nothing that was not checked.
#![no_main]

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use cube::vmm::memory::GuestMemory;
use cube::vmm::virtio::chain::Chain;
use cube::vmm::virtio::drain::{Effects, QueueHandler};
use cube::vmm::virtio::net::tap::{Link, Offloads};
use cube::vmm::virtio::net::{Identity, Net};
use cube::vmm::virtio::Interrupt;
use cube::vmm::virtio::mmio::Window;
use cube_guest::network::MacAddress;
use libfuzzer_sys::fuzz_target;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, socketpair};
use virtio_queue::{Queue, QueueState};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const TABLE: u64 = 0x1000;
const DATA: u64 = 0x10000;
const GUEST: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);

struct Wire(Vec<OwnedFd>);

impl Link for Wire {
    fn queues(&self) -> &[OwnedFd] {
        &self.0
    }

    fn offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn set_offloads(&self, _offloads: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn use_queues(&mut self, _count: usize) -> io::Result<()> {
        Ok(())
    }
}

fn wire() -> (OwnedFd, OwnedFd) {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
}

fuzz_target!(|input: &[u8]| {
    let Some((features, mut rest)) = input.split_first_chunk::<8>() else {
        return;
    };
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
    let queue = Queue::try_from(queue).unwrap();
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 512 << 10)]).unwrap();
    let (ours, host) = wire();
    let (second, _other) = wire();
    let identity = Identity {
        name: "eth0".into(),
        mac: GUEST,
        mtu: 1500,
        check_source: true,
    };
    let net = Net::new(identity, Wire(vec![ours, second]), Default::default()).unwrap();
    let interrupt = Interrupt::new(Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()), Window::alone());
    let features = u64::from_le_bytes(*features);
    let mut net = net;
    let mut handler = net.handler(features, &memory, interrupt).unwrap();
    let effects = &mut Effects::default();
    while let Some((&[step, len, more], tail)) = rest.split_first_chunk::<3>() {
        let size = usize::from(len).min(tail.len());
        let (bytes, tail) = tail.split_at(size);
        rest = tail;
        let long = usize::from(more) << 8;
        if step & 0x80 != 0 {
            let frame = [bytes, &vec![step; long]].concat();
            let _ = rustix::net::send(&host, &frame, SendFlags::empty());
            handler.ready(&memory, 2, effects).unwrap();
            continue;
        }
        memory.write_slice(bytes, GuestAddress(DATA)).unwrap();
        let queue_index = u16::from(step & 7) % 5;
        if !handler.wants(queue_index) {
            continue;
        }
        // One readable and one writable descriptor, either of which may be empty.
        let readable = if step & 8 == 0 { size + long } else { 0 };
        let writable = if step & 16 == 0 { size + long } else { 0 };
        let mut chain = Chain::default();
        for (index, (at, len, flags)) in [(DATA, readable, 1u16), (DATA + 0x20000, writable, 2)]
            .into_iter()
            .enumerate()
        {
            let mut raw = at.to_le_bytes().to_vec();
            raw.extend((len as u32).to_le_bytes());
            raw.extend(flags.to_le_bytes());
            raw.extend(1u16.to_le_bytes());
            memory.write_slice(&raw, GuestAddress(TABLE + 16 * index as u64)).unwrap();
        }
        chain.parse(&memory, queue_index, &queue, 0).unwrap();
        let _ = handler.handle(&memory, &mut chain, effects);
        if step & 0x40 != 0 {
            handler.served(&memory, effects).unwrap();
        }
        let mut seen = [0; 70_000];
        while let Ok(len @ 26..) = rustix::io::read(&host, &mut seen) {
            assert_eq!(seen[0] & !1, 0);
            assert_eq!(seen[18..24], GUEST.0, "{len}");
        }
    }
    handler.quiesce(&memory, effects);
});
