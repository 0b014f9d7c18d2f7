//! Frames by way of a backend that keeps to the protocol; backends that come and go.
use std::path::{Path, PathBuf};

use cube::vmm::virtio::net::Identity;
use cube::vmm::virtio::net::vhost::VhostNet;
use cube_guest::network::MacAddress;
use tempfile::TempDir;

use crate::driver::{Buffer, Driver, DriverQueue};
use crate::port::{F_CSUM, F_INDIRECT, F_MQ, F_VERSION_1, FEATURES, Plugged, Port};

pub const SIZE: u16 = 64;
const F_CTRL_VQ: u64 = 1 << 17;

pub fn identity() -> Identity {
    Identity {
        name: "eth0".into(),
        mac: MacAddress([2, 0, 0, 0, 0, 1]),
        mtu: 1500,
        check_source: false,
    }
}

/// A directory with the place of a socket in it.
pub fn place() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("port.sock");
    (directory, socket)
}

/// A driver on a device on whatever listens at `socket`, before its handshake.
pub fn plug(socket: &Path, pairs: usize) -> Driver {
    Driver::new(Box::new(
        VhostNet::connect(identity(), socket, pairs).unwrap(),
    ))
}

/// A frame of `len` bytes behind a header that asks for nothing.
fn frame(len: usize, seed: u8) -> Vec<u8> {
    let pattern = (0..len).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed));
    [0; 12].into_iter().chain(pattern).collect()
}

/// Sends a frame by a pair and waits until it is back; returns what came.
fn round_trip(
    driver: &mut Driver,
    queues: &mut [DriverQueue],
    pair: usize,
    frame: &[u8],
) -> Vec<u8> {
    let (receive, transmit) = (2 * pair, 2 * pair + 1);
    let buffer = driver.alloc(2048);
    queues[receive].add(&[Buffer::write(buffer, 2048)]);
    driver.kick(receive as u32);
    let at = driver.alloc_with(frame);
    let sent = [Buffer::read(at, frame.len() as u32)];
    driver.call(transmit as u32, &mut queues[transmit], &sent);
    let (_, written) = driver.wait_used(&mut queues[receive]);
    driver.bytes(buffer, written as usize)
}

/// What [`round_trip`] must return: in one buffer.
fn echoed(frame: &[u8]) -> Vec<u8> {
    let mut back = frame.to_vec();
    back[10] = 1;
    back
}

fn assert_works(driver: &mut Driver, queues: &mut [DriverQueue], pair: usize) {
    for len in [14, 60, 1514] {
        let frame = frame(len, len as u8);
        assert_eq!(
            round_trip(driver, queues, pair, &frame),
            echoed(&frame),
            "a frame of {len} bytes"
        );
    }
}

/// Waits until the link is as `up` says, by the interrupt that tells of it.
fn wait_link(driver: &Driver, up: bool) {
    while driver.config::<2>(6) != [u8::from(up), 0] {
        driver.wait_interrupt();
    }
}

#[test]
fn frames_pass_both_ways() {
    let (_directory, socket) = place();
    let port = Port::echo(1, FEATURES);
    let _plugged = Plugged::new(&socket, port.clone());
    let mut driver = plug(&socket, 4);
    let mut queues = driver.start(&[SIZE; 2]);
    assert_works(&mut driver, &mut queues, 0);
    // What driver and backend agree on, and nothing of this side's.
    assert_eq!(port.acked(), FEATURES);
    let expected = [2, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0xdc, 5];
    assert_eq!(driver.config::<12>(0), expected);
    driver.reset();
    let mut queues = driver.start(&[SIZE; 2]);
    assert_works(&mut driver, &mut queues, 0);
}

#[test]
fn queue_pairs_are_used_as_the_driver_says() {
    let (_directory, socket) = place();
    let port = Port::echo(3, FEATURES | F_MQ | F_CSUM);
    let _plugged = Plugged::new(&socket, port.clone());
    // Two vCPUs: two of the backend's three.
    let mut driver = plug(&socket, 2);
    let offered = driver.offered_features();
    let both = F_MQ | F_CTRL_VQ | F_CSUM;
    assert_eq!(offered & (both | F_INDIRECT), both);
    let mut queues = driver.start(&[SIZE; 5]);
    assert_works(&mut driver, &mut queues, 0);
    let command = |driver: &mut Driver, queues: &mut [DriverQueue], bytes: &[u8]| {
        let at = driver.alloc_with(bytes);
        let answer = driver.alloc(1);
        let buffers = [
            Buffer::read(at, bytes.len() as u32),
            Buffer::write(answer, 1),
        ];
        assert_eq!(driver.call(4, &mut queues[4], &buffers), 1);
        driver.bytes(answer, 1)[0]
    };
    for (bytes, answer) in [
        (&[4, 0, 0, 0][..], 1),
        (&[4, 0, 3, 0], 1),
        // Promiscuous mode is the switch's business.
        (&[0, 0, 1], 1),
        (&[4], 1),
        (&[4, 0, 2, 0], 0),
    ] {
        assert_eq!(
            command(&mut driver, &mut queues, bytes),
            answer,
            "{bytes:?}"
        );
    }
    assert_works(&mut driver, &mut queues, 1);
    assert_works(&mut driver, &mut queues, 0);
    assert_eq!(port.acked() & (F_MQ | F_CTRL_VQ), 0);
}

#[test]
fn a_reset_takes_the_rings_back() {
    let (_directory, socket) = place();
    let port = Port::echo(1, FEATURES);
    let _plugged = Plugged::new(&socket, port.clone());
    let mut driver = plug(&socket, 1);
    let mut queues = driver.start(&[SIZE; 2]);
    assert_works(&mut driver, &mut queues, 0);
    let buffer = driver.alloc(2048);
    driver.memory_fill(buffer, 2048, 0xee);
    queues[0].add(&[Buffer::write(buffer, 2048)]);
    driver.kick(0);
    driver.reset();
    // The buffer is the driver's again.
    port.send(0, frame(60, 1));
    assert_eq!(driver.bytes(buffer, 2048), [0xee; 2048]);
}

#[test]
fn the_next_backend_takes_over() {
    let (_directory, socket) = place();
    let plugged = Plugged::new(&socket, Port::echo(1, FEATURES));
    let mut driver = plug(&socket, 1);
    let mut queues = driver.start(&[SIZE; 2]);
    assert_works(&mut driver, &mut queues, 0);
    drop(plugged);
    wait_link(&driver, false);
    // Nobody takes this one now.
    let frame = frame(300, 9);
    let buffer = driver.alloc(2048);
    queues[0].add(&[Buffer::write(buffer, 2048)]);
    let at = driver.alloc_with(&frame);
    queues[1].add(&[Buffer::read(at, frame.len() as u32)]);
    driver.kick(0);
    driver.kick(1);
    let _plugged = Plugged::new(&socket, Port::echo(1, FEATURES | F_CSUM));
    let (_, written) = driver.wait_used(&mut queues[0]);
    assert_eq!(driver.bytes(buffer, written as usize), echoed(&frame));
    driver.wait_used(&mut queues[1]);
    wait_link(&driver, true);
    assert_works(&mut driver, &mut queues, 0);
}

#[test]
fn a_driver_may_start_while_there_is_no_backend() {
    let (_directory, socket) = place();
    let plugged = Plugged::new(&socket, Port::echo(1, FEATURES));
    let mut driver = plug(&socket, 1);
    drop(plugged);
    let mut queues = driver.start(&[SIZE; 2]);
    let _plugged = Plugged::new(&socket, Port::echo(1, FEATURES));
    assert_works(&mut driver, &mut queues, 0);
}

#[test]
fn a_backend_that_lacks_what_is_used_needs_a_reset() {
    let (_directory, socket) = place();
    let plugged = Plugged::new(&socket, Port::echo(1, FEATURES | F_CSUM));
    let mut driver = plug(&socket, 1);
    driver.start(&[SIZE; 2]);
    drop(plugged);
    let plugged = Plugged::new(&socket, Port::echo(1, FEATURES));
    driver.wait_needs_reset();
    drop(plugged);
    let _plugged = Plugged::new(&socket, Port::echo(1, FEATURES));
    driver.reset();
    // The driver now does without.
    let features = driver.offered_features() & !F_CSUM;
    let mut queues = driver.start_with(features, &[SIZE; 2]);
    assert_works(&mut driver, &mut queues, 0);
}

#[test]
fn a_backend_of_the_legacy_interface_is_refused() {
    let (_directory, socket) = place();
    let _plugged = Plugged::new(&socket, Port::echo(1, FEATURES & !F_VERSION_1));
    let error = VhostNet::connect(identity(), &socket, 1).err().unwrap();
    assert!(
        error.to_string().ends_with("it does not speak virtio 1"),
        "{error}"
    );
}
