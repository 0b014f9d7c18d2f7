use std::io::{Read, Write};
use std::os::unix::net::UnixListener;

use super::*;

#[test]
fn a_stale_socket_is_replaced_and_removed_at_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.sock");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let listener = Listener::bind(&path).unwrap();
    UnixStream::connect(&path).unwrap();
    listener.accept().unwrap();
    drop(listener);
    assert!(!path.exists());
}

#[test]
fn what_is_not_ours_to_remove_stays() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.sock");
    std::fs::write(&path, "precious").unwrap();
    let error = Listener::bind(&path).err().unwrap().to_string();
    assert!(error.contains("not a socket"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    std::fs::remove_file(&path).unwrap();

    let other = UnixListener::bind(&path).unwrap();
    let error = Listener::bind(&path).err().unwrap().to_string();
    assert!(error.contains("another program listens"), "{error}");
    assert!(error.contains("v.sock"), "{error}");
    UnixStream::connect(&path).unwrap();
    drop(other);
}

#[test]
fn a_successors_socket_is_not_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.sock");
    let old = Listener::bind(&path).unwrap();
    // Moved, not removed: a freed inode number may be given out again at once.
    std::fs::rename(&path, dir.path().join("old")).unwrap();
    let _new = Listener::bind(&path).unwrap();
    drop(old);
    assert!(path.exists());
}

#[test]
fn a_path_that_leaves_no_room_for_ports_is_refused() {
    let path = Path::new("/tmp").join("x".repeat(92));
    let error = Listener::bind(&path).err().unwrap();
    assert!(matches!(error, VsockError::PathTooLong { most: 96, .. }));
}

#[test]
fn unix_ports_connect_beside_the_path() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("v.sock");
    let mut ports = UnixPorts::new(&path);
    assert!(ports.connect(7).is_err());
    let service = UnixListener::bind(dir.path().join("v.sock_7")).unwrap();
    let mut stream = ports.connect(7).unwrap();
    stream.write_all(b"hi").unwrap();
    drop(stream);
    let mut text = String::new();
    service
        .accept()
        .unwrap()
        .0
        .read_to_string(&mut text)
        .unwrap();
    assert_eq!(text, "hi");
}

#[test]
fn local_ports_hand_over_one_end_of_a_pair() {
    let mut ports = LocalPorts::new();
    assert!(ports.connect(7).is_err());
    let listener = ports.listen(7).unwrap();
    assert!(ports.listen(7).is_err());
    assert!(listener.accept().is_none());
    let mut guest = ports.connect(7).unwrap();
    let mut host = listener.accept().unwrap();
    guest.write_all(b"up").unwrap();
    host.write_all(b"down").unwrap();
    let mut bytes = [0; 2];
    host.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"up");
    assert!(listener.accept().is_none());
    drop(listener);
    assert!(ports.connect(7).is_err());
    ports.listen(7).unwrap();
}

#[test]
fn a_listener_that_does_not_accept_refuses_after_its_backlog() {
    let mut ports = LocalPorts::new();
    let listener = ports.listen(7).unwrap();
    let held: Vec<_> = (0..BACKLOG).map(|_| ports.connect(7).unwrap()).collect();
    assert!(ports.connect(7).is_err());
    listener.accept().unwrap();
    ports.connect(7).unwrap();
    drop(held);
}
