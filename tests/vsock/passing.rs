//! Streams that whoever accepted them passes on.
use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread;

use cube::vmm::virtio::vsock::packet::{Op, SHUTDOWN_BOTH};
use cube::vmm::virtio::vsock::passing::{Until, pass_on};
use rustix::event::{PollFd, PollFlags, poll};

use crate::guest::{Guest, Peer, expect_closed, pattern};

const MIB: usize = 1 << 20;

/// A stream that the guest has dialled, and its end on the host.
fn dialled() -> (Guest, Peer, UnixStream) {
    let mut guest = Guest::new();
    let service = guest.service(1);
    let peer = guest.connect(1);
    let host = service.accept().unwrap().0;
    (guest, peer, host)
}

/// Passes the stream on; returns the end of the socket that it now leads to.
fn passed(host: &UnixStream, until: Until) -> UnixStream {
    let (client, served) = UnixStream::pair().unwrap();
    pass_on(host, &served, until).unwrap();
    client
}

/// Waits until the device has closed its end, and reads nothing.
fn expect_hang_up(host: &UnixStream) {
    let mut fds = [PollFd::new(host, PollFlags::empty())];
    assert_eq!(poll(&mut fds, None).unwrap(), 1);
    assert!(fds[0].revents().contains(PollFlags::HUP));
}

fn read_all(mut from: UnixStream) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut got = Vec::new();
        from.read_to_end(&mut got).unwrap();
        got
    })
}

#[test]
fn all_that_was_said_before_comes_first_in_both_directions() {
    let (mut guest, mut peer, mut host) = dialled();
    let (up, down) = (pattern(1, 3 * MIB), pattern(2, 3 * MIB));
    // Nobody reads: it fills the sockets, and the rest waits in the device.
    let sent = guest.send_until_full(&mut peer, &up);
    let first = 100 << 10;
    host.write_all(&down[..first]).unwrap();
    let client = passed(&host, Until::BothEnds);
    let reader = read_all(client.try_clone().unwrap());
    let rest = down[first..].to_vec();
    let writer = thread::spawn(move || {
        (&client).write_all(&rest).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        client
    });
    assert!(guest.converse(&mut peer, &up[sent..]) == down);
    assert!(reader.join().unwrap() == up);
    writer.join().unwrap();
    expect_hang_up(&host);
}

#[test]
fn what_one_read_in_part_before_is_not_sent_twice() {
    let (mut guest, mut peer, mut host) = dialled();
    guest.send_data(&mut peer, b"0123456789");
    guest.wait_sent();
    let mut first = [0; 4];
    host.read_exact(&mut first).unwrap();
    let client = passed(&host, Until::OutputEnds);
    let reader = read_all(client);
    guest.converse(&mut peer, b" and more");
    assert_eq!(reader.join().unwrap(), b"456789 and more");
}

#[test]
fn a_client_that_does_not_end_its_side_is_closed_with_the_output() {
    let (mut guest, mut peer, host) = dialled();
    let mut client = passed(&host, Until::OutputEnds);
    assert_eq!(guest.converse(&mut peer, b"output"), b"");
    let mut got = String::new();
    client.read_to_string(&mut got).unwrap();
    assert_eq!(got, "output");
    expect_hang_up(&host);
    assert!(client.write_all(b"too late").is_err());
}

#[test]
fn a_client_that_hangs_up_ends_the_stream() {
    for until in [Until::BothEnds, Until::OutputEnds] {
        let (mut guest, peer, host) = dialled();
        drop(passed(&host, until));
        let (header, _) = guest.receive_for(&peer);
        assert_eq!(Op::from_raw(header.op), Some(Op::Shutdown));
        assert_eq!(header.flags, SHUTDOWN_BOTH);
        expect_hang_up(&host);
    }
}

#[test]
fn what_waits_for_a_client_that_goes_keeps_no_stream() {
    let (mut guest, mut peer, host) = dialled();
    // More than the client's socket takes: some of it stays unread where the stream was before.
    guest.send_until_full(&mut peer, &pattern(5, 4 * MIB));
    let client = passed(&host, Until::BothEnds);
    let mut byte = [0];
    (&client).read_exact(&mut byte).unwrap();
    guest.send(peer.header(Op::Rst), &[]);
    guest.wait_sent();
    drop(client);
    expect_hang_up(&host);
}

#[test]
fn the_guests_reset_ends_the_client() {
    let (mut guest, mut peer, host) = dialled();
    let mut client = passed(&host, Until::BothEnds);
    let header = peer.header(Op::Rst);
    guest.send(header, &[]);
    expect_closed(&mut client);
    expect_hang_up(&host);
}

#[test]
fn a_slow_client_delays_its_own_stream_alone() {
    let (mut guest, mut slow, host) = dialled();
    let client = passed(&host, Until::OutputEnds);
    let bytes = pattern(3, 4 * MIB);
    let sent = guest.send_until_full(&mut slow, &bytes);
    assert!((256 << 10..2 * MIB).contains(&sent), "{sent} bytes taken");
    let service = guest.service(2);
    let mut fast = guest.connect(2);
    let other = service.accept().unwrap().0;
    let reader = read_all(passed(&other, Until::OutputEnds));
    guest.converse(&mut fast, &pattern(4, MIB));
    assert!(reader.join().unwrap() == pattern(4, MIB));
    let reader = read_all(client);
    guest.converse(&mut slow, &bytes[sent..]);
    assert!(reader.join().unwrap() == bytes);
}

#[test]
fn what_is_no_socket_ends_its_stream_and_no_other() {
    let (mut guest, mut peer, host) = dialled();
    let file = OwnedFd::from(File::open("/proc/self/exe").unwrap());
    pass_on(&host, &UnixStream::from(file), Until::BothEnds).unwrap();
    let (header, _) = guest.receive_for(&peer);
    assert_eq!(Op::from_raw(header.op), Some(Op::Rst));
    peer.receive(&header);
    expect_hang_up(&host);
    let service = guest.service(2);
    let mut other = guest.connect(2);
    let reader = read_all(service.accept().unwrap().0);
    guest.converse(&mut other, b"as before");
    assert_eq!(reader.join().unwrap(), b"as before");
}
