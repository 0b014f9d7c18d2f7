//! Reset and removal of the device.
use std::io::{Read, Write};

use cube::vmm::virtio::vsock::{Vsock, VsockError};

use crate::guest::{Guest, pattern};

#[test]
fn a_reset_in_mid_transfer_ends_all_streams_and_the_device_works_again() {
    let mut guest = Guest::new();
    let service = guest.service(1);
    for _ in 0..3 {
        let mut up = guest.connect(1);
        let (mut reading, _) = service.accept().unwrap();
        let mut down = guest.connect(1);
        let (mut writing, _) = service.accept().unwrap();
        let mut waiting = guest.client();
        waiting.write_all(b"CONN").unwrap();
        // Both directions under way: bytes held for the host, bytes of the host in the socket.
        guest.send_data(&mut up, &pattern(1, 256 << 10));
        writing.write_all(&pattern(2, 64 << 10)).unwrap();
        down.connection.wants_room();
        guest.restart();
        let mut got = Vec::new();
        let _ = reading.read_to_end(&mut got);
        assert!(pattern(1, 256 << 10).starts_with(&got));
        assert!(writing.write_all(&[0; 4096]).is_err());
        assert_eq!(waiting.read(&mut [0; 8]).ok().unwrap_or(0), 0);
    }
    let mut client = guest.client();
    client.write_all(b"CONNECT 7\n").unwrap();
    guest.accept(7);
}

#[test]
fn clients_that_come_before_the_driver_are_served_after_it() {
    let mut guest = Guest::new();
    guest.driver.reset();
    let mut client = guest.client();
    client.write_all(b"CONNECT 7\n").unwrap();
    guest.restart();
    guest.accept(7);
}

#[test]
fn the_socket_goes_with_the_device() {
    let guest = Guest::new();
    let path = guest.path();
    assert!(path.exists());
    let device = guest.driver.slot.detach();
    assert!(path.exists());
    drop(device);
    assert!(!path.exists());
}

#[test]
fn reserved_context_ids_and_taken_paths_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.sock");
    for cid in [0, 1, 2, u32::MAX] {
        assert!(matches!(Vsock::new(cid, &path), Err(VsockError::Cid(_))));
        assert!(!path.exists());
    }
    let _first = Vsock::new(3, &path).unwrap();
    let error = Vsock::new(4, &path).err().unwrap().to_string();
    assert!(
        error.contains("v.sock") && error.contains("another program"),
        "{error}"
    );
    let missing = dir.path().join("no/v.sock");
    let error = Vsock::new(4, &missing).err().unwrap().to_string();
    assert!(error.contains("no/v.sock"), "{error}");
}
