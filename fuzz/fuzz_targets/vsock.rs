//! A vsock driver that sends any packets, next to a host that reads and writes at any time: every packet
//! is taken, what comes back is well formed, and nothing is kept beyond the limits.
#![no_main]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use cube::vmm::memory::GuestMemory;
use cube::vmm::virtio::chain::Chain;
use cube::vmm::virtio::drain::{Effects, Outcome, QueueHandler};
use cube::vmm::virtio::vsock::host::{Listener, LocalListener, LocalPorts};
use cube::vmm::virtio::vsock::muxer::Muxer;
use cube::vmm::virtio::vsock::packet::{HEADER_LEN, HOST_CID, Header, Op};
use cube::vmm::virtio::vsock::poll::PollSet;
use cube::vmm::virtio::vsock::{Host, Limits, RX_QUEUE, TX_QUEUE};
use libfuzzer_sys::fuzz_target;
use virtio_queue::{Queue, QueueState};
use vm_memory::{Bytes, GuestAddress};

const CID: u32 = 3;
const PORT: u32 = 1;
const TABLE: u64 = 0x1000;
const PACKET: u64 = 0x10000;
const READ: u16 = 0;
const WRITE: u16 = 2;

struct Machine {
    memory: GuestMemory,
    queue: Queue,
    muxer: Muxer,
    local: LocalListener,
    hosts: Vec<UnixStream>,
}

fn machine(dir: &tempfile::TempDir) -> Machine {
    let ports = LocalPorts::new();
    let local = ports.listen(PORT).unwrap();
    let listener = Listener::bind(&dir.path().join("v.sock")).unwrap();
    let poll = PollSet::new(&listener).unwrap();
    let host = Host {
        listener,
        ports: Box::new(ports),
    };
    let limits = Limits {
        streams: 4,
        ..Limits::default()
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
    Machine {
        memory: GuestMemory::from_ranges(&[(GuestAddress(0), 256 << 10)]).unwrap(),
        queue: Queue::try_from(queue).unwrap(),
        muxer: Muxer::new(CID, limits, host, poll),
        local,
        hosts: Vec::new(),
    }
}

fuzz_target!(|input: &[u8]| {
    let dir = tempfile::tempdir().unwrap();
    let mut machine = machine(&dir);
    let mut rest = input;
    while let Some((step, tail)) = rest.split_first() {
        rest = tail;
        match step % 8 {
            0..4 => {
                let Some((bytes, tail)) = rest.split_first_chunk::<HEADER_LEN>() else {
                    return;
                };
                rest = tail;
                let mut header = Header::parse(bytes);
                if step & 0x80 == 0 {
                    header.src_cid = CID.into();
                    header.dst_cid = HOST_CID;
                    header.dst_port = PORT;
                    header.src_port &= 7;
                    header.socket_type = 1;
                    header.op &= 7;
                }
                machine.send(&header, u32::from(*step) << 5);
            }
            4 => machine.receive(44 + (u32::from(*step) << 4)),
            5 => machine.poll(),
            6 => machine.host_writes(*step),
            _ => machine.host_reads_or_closes(*step),
        }
    }
});

impl Machine {
    fn chain(&self, index: u16, len: u32, flags: u16) -> Chain {
        let mut raw = PACKET.to_le_bytes().to_vec();
        raw.extend(len.to_le_bytes());
        raw.extend(flags.to_le_bytes());
        raw.extend([0; 2]);
        self.memory.write_slice(&raw, GuestAddress(TABLE)).unwrap();
        let mut chain = Chain::default();
        chain.parse(&self.memory, index, &self.queue, 0).unwrap();
        chain
    }

    fn send(&mut self, header: &Header, payload: u32) {
        if !self.muxer.wants(TX_QUEUE) {
            return;
        }
        let at = GuestAddress(PACKET);
        self.memory.write_slice(&header.to_bytes(), at).unwrap();
        let mut chain = self.chain(TX_QUEUE, HEADER_LEN as u32 + payload, READ);
        let effects = &mut Effects::default();
        let outcome = self.muxer.handle(&self.memory, &mut chain, effects);
        assert_eq!(outcome.unwrap(), Outcome::Done(0));
        self.hosts.extend(self.local.accept().inspect(|host| {
            host.set_nonblocking(true).unwrap();
        }));
    }

    fn receive(&mut self, len: u32) {
        if !self.muxer.wants(RX_QUEUE) {
            return;
        }
        let mut chain = self.chain(RX_QUEUE, len, WRITE);
        let effects = &mut Effects::default();
        let outcome = self.muxer.handle(&self.memory, &mut chain, effects);
        match outcome.unwrap() {
            Outcome::Done(0) => assert!(len <= HEADER_LEN as u32),
            Outcome::Done(written) => {
                let mut bytes = [0; HEADER_LEN];
                let at = GuestAddress(PACKET);
                self.memory.read_slice(&mut bytes, at).unwrap();
                let header = Header::parse(&bytes);
                assert_eq!(header.len, written - HEADER_LEN as u32);
                assert!(Op::from_raw(header.op).is_some());
                assert!(written <= len);
            }
            Outcome::PutBack => {}
            Outcome::Pending => panic!("a buffer is filled or put back"),
        }
    }

    fn poll(&mut self) {
        let effects = &mut Effects::default();
        self.muxer.ready(&self.memory, 0, effects).unwrap();
    }

    fn host_writes(&mut self, step: u8) {
        if let Some(mut host) = self.hosts.last() {
            let _ = host.write(&vec![step; usize::from(step) << 6]);
        }
    }

    fn host_reads_or_closes(&mut self, step: u8) {
        if step & 0x80 != 0 {
            self.hosts.pop();
        } else if let Some(mut host) = self.hosts.first() {
            let _ = host.read(&mut [0; 4096]);
        }
    }
}
