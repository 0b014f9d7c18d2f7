//! Frames per second of the network device alone: a fake driver that offers 64 frames at a time, the real
//! worker.
//!
//! `cargo bench --bench virtio_net`, as root: frames to a tap of a network namespace of its own, whose kernel
//! drops them (their EtherType is nobody's), and frames from a pair of sockets (whose sending costs more than
//! all the rest, and is measured by itself beside it).
#![allow(missing_docs, reason = "criterion's macros make public items")]

#[path = "../tests/driver/mod.rs"]
mod driver;

use std::fs::File;
use std::hint::spin_loop;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use cube::net::rtnetlink::Rtnetlink;
use cube::net::{namespace, tap};
use cube::vmm::virtio::net::tap::{Link, Offloads};
use cube::vmm::virtio::net::{Identity, Net};
use cube_guest::network::MacAddress;
use driver::{Driver, DriverQueue};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, socketpair};
use rustix::thread::LinkNameSpaceType;

const BATCH: u16 = 64;
const SIZE: u16 = 128;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const MAC: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);

struct AnyFile(Vec<OwnedFd>);

impl Link for AnyFile {
    fn queues(&self) -> &[OwnedFd] {
        &self.0
    }

    fn offloads(&self) -> Offloads {
        Offloads::NONE
    }

    fn set_offloads(&self, _offloads: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn use_queues(&mut self, _count: usize) -> io::Result<()> {
        Ok(())
    }
}

fn start(link: OwnedFd) -> (Driver, Vec<DriverQueue>) {
    let identity = Identity {
        name: "bench".into(),
        mac: MAC,
        mtu: 1500,
        check_source: true,
    };
    let net = Net::new(identity, AnyFile(vec![link]), Default::default()).unwrap();
    let driver = Driver::new(Box::new(net));
    let queues = driver.start(&[SIZE; 3]);
    (driver, queues)
}

fn wait_for(queue: &DriverQueue, index: u16) {
    while queue.used_index() != index {
        spin_loop();
    }
}

/// A tap in a namespace that this thread moves to and that nobody else has.
fn own_tap() -> OwnedFd {
    let name = format!("cube-bench-{}", std::process::id());
    namespace::create(&name).unwrap();
    let file = File::open(namespace::path(&name)).unwrap();
    let kind = Some(LinkNameSpaceType::Network);
    rustix::thread::move_into_link_name_space(file.as_fd(), kind).unwrap();
    namespace::remove(&name).unwrap();
    let queue = tap::create("bench", 1).unwrap().remove(0);
    let netlink = Rtnetlink::open().unwrap();
    let link = netlink.link("bench").unwrap();
    netlink.bring_up(link.index, 1500).unwrap();
    queue
}

fn transmit(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("virtio-net transmit");
    group.throughput(Throughput::Elements(BATCH.into()));
    for len in [60usize, 1514] {
        let (mut driver, mut queues) = start(own_tap());
        let frame = [
            &[0; 12][..],
            &[0xff; 6],
            &MAC.0,
            &[0x88, 0xb5],
            &vec![0; len - 14],
        ]
        .concat();
        for head in 0..BATCH {
            // Header and frame in descriptors of their own, as Linux does it.
            let at = driver.alloc_with(&frame);
            queues[1].set_descriptor(head, at, 12, NEXT, BATCH + head);
            queues[1].set_descriptor(BATCH + head, at + 12, len as u32, 0, 0);
        }
        let mut used = 0u16;
        group.bench_function(format!("{len} bytes"), |bencher| {
            bencher.iter(|| {
                for head in 0..BATCH {
                    queues[1].offer(head);
                }
                driver.kick(1);
                used = used.wrapping_add(BATCH);
                wait_for(&queues[1], used);
            });
        });
    }
}

fn receive(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("virtio-net receive");
    group.throughput(Throughput::Elements(BATCH.into()));
    for len in [60usize, 1514] {
        let frame = [&[0; 12][..], &MAC.0, &vec![1; len - 6]].concat();
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let pair = || socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let (link, host) = pair();
        let (mut driver, mut queues) = start(link);
        for head in 0..SIZE {
            let at = driver.alloc(1536);
            queues[0].set_descriptor(head, at, 1536, WRITE, 0);
            queues[0].offer(head);
        }
        driver.kick(0);
        driver.settle();
        let mut used = 0u16;
        group.bench_function(format!("{len} bytes"), |bencher| {
            bencher.iter(|| {
                for _ in 0..BATCH {
                    rustix::net::send(&host, &frame, SendFlags::empty()).unwrap();
                }
                used = used.wrapping_add(BATCH);
                wait_for(&queues[0], used);
                // Buffers are used in the order in which they were offered.
                for at in 0..BATCH {
                    queues[0].offer(used.wrapping_sub(BATCH).wrapping_add(at) % SIZE);
                }
                driver.kick(0);
            });
        });
        let (sender, receiver) = pair();
        let mut buffer = vec![0; 2000];
        group.bench_function(format!("{len} bytes, the sockets alone"), |bencher| {
            bencher.iter(|| {
                for _ in 0..BATCH {
                    rustix::net::send(&sender, &frame, SendFlags::empty()).unwrap();
                }
                for _ in 0..BATCH {
                    rustix::io::read(&receiver, &mut buffer[..]).unwrap();
                }
            });
        });
    }
}

criterion_group!(benches, transmit, receive);
criterion_main!(benches);
