//! A real tap, in a network namespace of the test's own: needs root.
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;

use cube::net::{namespace, tap};
use cube::vmm::virtio::net::tap::{Link, Tap};
use cube::vmm::virtio::net::{Identity, Net};
use rustix::thread::LinkNameSpaceType;

use crate::driver::{Buffer, Driver, DriverQueue};
use crate::wire::{GUEST, HEADER, PLAIN, SIZE};

/// Moves this thread to a namespace of its own, which ends with the thread.
fn own_namespace() {
    let name = format!("cube-tap-{:?}", std::thread::current().id()).replace(['(', ')'], "");
    let name = format!("{name}-{}", std::process::id());
    namespace::create(&name).unwrap();
    let file = File::open(namespace::path(&name)).unwrap();
    let kind = Some(LinkNameSpaceType::Network);
    rustix::thread::move_into_link_name_space(file.as_fd(), kind).unwrap();
    namespace::remove(&name).unwrap();
}

fn ip(words: &str) -> String {
    let output = Command::new("ip").args(words.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {words}");
    String::from_utf8(output.stdout).unwrap()
}

fn tap_of(queues: usize) -> Tap {
    own_namespace();
    let queues = tap::create("t0", queues).unwrap();
    ip("addr add 10.0.0.1/24 dev t0");
    ip("link set t0 up");
    Tap::new(queues).unwrap()
}

fn start(tap: Tap, queues: usize) -> (Driver, Vec<DriverQueue>) {
    let identity = Identity {
        name: "eth0".into(),
        mac: GUEST,
        mtu: 1500,
        check_source: true,
    };
    let net = Net::new(identity, tap, Default::default()).unwrap();
    let driver = Driver::new(Box::new(net));
    let queues = driver.start(&vec![SIZE; queues]);
    (driver, queues)
}

/// Who has 10.0.0.1? Tell 10.0.0.2.
fn question() -> Vec<u8> {
    let head = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
    let ask = [8, 6, 0, 1, 8, 0, 6, 4, 0, 1];
    [
        &PLAIN[..],
        &head,
        &GUEST.0,
        &ask,
        &GUEST.0,
        &[10, 0, 0, 2],
        &[0; 6],
        &[10, 0, 0, 1],
    ]
    .concat()
}

/// Sends the question by one pair and waits for the answer on any of the receive queues.
fn ask(driver: &mut Driver, queues: &mut [DriverQueue], pair: usize) {
    let at = driver.alloc_with(&question());
    let transmit = 2 * pair + 1;
    driver.call(
        transmit as u32,
        &mut queues[transmit],
        &[Buffer::read(at, 54)],
    );
}

fn offer_buffers(driver: &mut Driver, queue: &mut DriverQueue, index: u32) -> Vec<u64> {
    let buffers: Vec<_> = (0..50).map(|_| driver.alloc(1526)).collect();
    for buffer in &buffers {
        queue.add(&[Buffer::write(*buffer, 1526)]);
    }
    driver.kick(index);
    buffers
}

#[test]
fn the_host_answers_the_guest() {
    let (mut driver, mut queues) = start(tap_of(1), 3);
    let buffers = offer_buffers(&mut driver, &mut queues[0], 0);
    ask(&mut driver, &mut queues, 0);
    for buffer in buffers {
        let (_, written) = driver.wait_used(&mut queues[0]);
        let frame = driver.bytes(buffer + HEADER as u64, written as usize - HEADER);
        // The kernel also has things of its own to say on a new interface.
        if frame[12..14] == [8, 6] {
            assert!(
                frame[..6] == GUEST.0 && frame[20..22] == [0, 2] && frame[28..32] == [10, 0, 0, 1]
            );
            assert!(ip("neigh show dev t0").contains(&format!("10.0.0.2 lladdr {GUEST}")));
            return;
        }
    }
    panic!("no answer");
}

#[test]
fn queues_are_attached_as_the_driver_uses_them() {
    let tap = tap_of(2);
    assert!(tap.offloads().can_segment());
    let (mut driver, mut queues) = start(tap, 5);
    let pairs = |driver: &mut Driver, queues: &mut [DriverQueue], count: u8| {
        let command = driver.alloc_with(&[4, 0, count, 0]);
        let answer = driver.alloc(1);
        let buffers = [Buffer::read(command, 4), Buffer::write(answer, 1)];
        driver.call(4, &mut queues[4], &buffers);
        driver.bytes(answer, 1)[0]
    };
    for count in [2, 1, 1, 2] {
        assert_eq!(pairs(&mut driver, &mut queues, count), 0);
    }
    ask(&mut driver, &mut queues, 1);
    driver.reset();
    let mut queues = driver.start(&[SIZE; 5]);
    assert_eq!(pairs(&mut driver, &mut queues, 2), 0);
    ask(&mut driver, &mut queues, 0);
}

#[test]
fn what_is_no_tap_is_refused() {
    let file: OwnedFd = tempfile::tempfile().unwrap().into();
    let error = Tap::new(vec![file]).unwrap_err().to_string();
    assert!(
        error.starts_with("it is not a tap interface's queue"),
        "{error}"
    );
    own_namespace();
    assert!(
        tap::open_existing("absent", 1)
            .unwrap_err()
            .to_string()
            .contains("no tap interface `absent`")
    );
    ip("tuntap add plain mode tap");
    ip("tuntap add several mode tap multi_queue");
    for (name, asked, got) in [
        ("plain", 1, 1),
        ("plain", 4, 1),
        ("several", 1, 1),
        ("several", 4, 4),
    ] {
        let (queues, mtu) = tap::open_existing(name, asked).unwrap();
        assert_eq!((queues.len(), mtu), (got, 1500), "{name}");
        Tap::new(queues).unwrap();
    }
    let long = tap::create("a-name-of-more-than-15-bytes", 1).unwrap_err();
    assert!(long.to_string().contains("a-name-of-more"), "{long}");
}
