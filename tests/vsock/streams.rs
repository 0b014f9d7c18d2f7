//! Bytes and ends of streams, both ways.
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;

use cube::vmm::virtio::vsock::host::LocalPorts;
use cube::vmm::virtio::vsock::packet::{
    Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND,
};
use cube::vmm::virtio::vsock::{EVENT_QUEUE, Vsock};

use crate::driver::Buffer;
use crate::guest::{CID, Guest, pattern};

const MIB: usize = 1 << 20;

fn read_line(socket: &mut UnixStream) -> String {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        assert_eq!(socket.read(&mut byte).unwrap(), 1, "the line ends early");
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

#[test]
fn the_device_shows_the_guests_cid() {
    let guest = Guest::new();
    let driver = &guest.driver;
    assert_eq!(driver.read(crate::driver::reg::DEVICE_ID), 19);
    assert_eq!(driver.config::<8>(0), u64::from(CID).to_le_bytes());
    assert_eq!(driver.config::<4>(4), [0; 4]);
    assert_eq!(driver.config::<4>(8), [0; 4]);
}

#[test]
fn the_guest_connects_to_a_service() {
    let mut guest = Guest::new();
    let service = guest.service(1024);
    let mut peer = guest.connect(1024);
    let (mut host, _) = service.accept().unwrap();
    host.write_all(b"down").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.converse(&mut peer, b"up"), b"down");
    let mut got = String::new();
    host.read_to_string(&mut got).unwrap();
    assert_eq!(got, "up");
}

#[test]
fn a_client_connects_to_the_guest_and_may_send_early() {
    let mut guest = Guest::new();
    let mut client = guest.client();
    client.write_all(b"CONNECT 52\nearly").unwrap();
    let mut peer = guest.accept(52);
    assert_eq!(read_line(&mut client), format!("OK {}\n", peer.host));
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.converse(&mut peer, b"welcome"), b"early");
    let mut got = String::new();
    client.read_to_string(&mut got).unwrap();
    assert_eq!(got, "welcome");
}

#[test]
fn clients_get_ports_of_their_own() {
    let mut guest = Guest::new();
    let mut hosts = Vec::new();
    for _ in 0..3 {
        let mut client = guest.client();
        client.write_all(b"CONNECT 52\n").unwrap();
        let peer = guest.accept(52);
        assert_eq!(read_line(&mut client), format!("OK {}\n", peer.host));
        hosts.push((peer, client));
    }
    hosts.dedup_by_key(|(peer, _)| peer.host);
    assert_eq!(hosts.len(), 3);
}

#[test]
fn a_client_that_the_guest_refuses_is_closed_without_an_answer() {
    let mut guest = Guest::new();
    let mut client = guest.client();
    client.write_all(b"CONNECT 52\n").unwrap();
    let request = guest.expect(Op::Request);
    guest.send(Guest::header(request.src_port, 52, Op::Rst), &[]);
    assert_eq!(client.read(&mut [0; 8]).unwrap(), 0);
}

#[test]
fn ten_mebibytes_go_both_ways_at_once() {
    for dialled_by_host in [false, true] {
        let mut guest = Guest::new();
        let (mut peer, mut host) = if dialled_by_host {
            let mut client = guest.client();
            client.write_all(b"CONNECT 1\n").unwrap();
            let peer = guest.accept(1);
            read_line(&mut client);
            (peer, client)
        } else {
            let service = guest.service(1);
            let peer = guest.connect(1);
            (peer, service.accept().unwrap().0)
        };
        let (up, down) = (pattern(1, 10 * MIB), pattern(2, 10 * MIB));
        let mut reading = host.try_clone().unwrap();
        let reader = thread::spawn(move || {
            let mut got = Vec::new();
            reading.read_to_end(&mut got).unwrap();
            got
        });
        let expected = down.clone();
        let writer = thread::spawn(move || {
            host.write_all(&down).unwrap();
            host.shutdown(Shutdown::Write).unwrap();
        });
        assert!(guest.converse(&mut peer, &up) == expected);
        assert!(reader.join().unwrap() == up);
        writer.join().unwrap();
    }
}

#[test]
fn a_slow_reader_delays_nobody_and_loses_nothing() {
    let mut guest = Guest::new();
    let service = guest.service(1);
    let mut slow = guest.connect(1);
    let (mut slow_host, _) = service.accept().unwrap();
    // As much as is taken with nobody reading: the credit, and what the socket holds.
    let bytes = pattern(3, 4 * MIB);
    let sent = guest.send_until_full(&mut slow, &bytes);
    assert!((256 << 10..2 * MIB).contains(&sent), "{sent} bytes taken");

    let mut fast = guest.connect(1);
    let (mut fast_host, _) = service.accept().unwrap();
    let expected = pattern(4, 10 * MIB);
    let reader = thread::spawn(move || {
        let mut got = Vec::new();
        fast_host.read_to_end(&mut got).unwrap();
        fast_host.shutdown(Shutdown::Write).unwrap();
        got
    });
    guest.converse(&mut fast, &expected);
    assert!(reader.join().unwrap() == expected);

    // The slow one has lost nothing.
    let expected = bytes.clone();
    let reader = thread::spawn(move || {
        let mut got = Vec::new();
        slow_host.read_to_end(&mut got).unwrap();
        slow_host.shutdown(Shutdown::Write).unwrap();
        got
    });
    guest.converse(&mut slow, &bytes[sent..]);
    assert!(reader.join().unwrap() == expected);
}

#[test]
fn streams_take_turns_towards_the_guest() {
    let mut guest = Guest::new();
    let service = guest.service(1);
    let mut streams = Vec::new();
    for _ in 0..4 {
        let peer = guest.connect(1);
        streams.push((peer, service.accept().unwrap().0));
    }
    // 25 packets of 4 KiB from each fit into what the sockets hold and the guest's credit.
    for (_, host) in &mut streams {
        host.write_all(&pattern(5, 100 << 10)).unwrap();
    }
    let mut counts = [0u32; 4];
    while counts.iter().sum::<u32>() < 4 * (100 << 10) {
        let (header, payload) = guest.receive();
        let at = streams.iter().position(|(p, _)| p.guest == header.dst_port);
        counts[at.unwrap()] += payload.len() as u32;
    }
    assert_eq!(counts, [100 << 10; 4]);
}

#[test]
fn the_guest_half_closes_and_still_receives() {
    let mut guest = Guest::new();
    let service = guest.service(1);
    let mut peer = guest.connect(1);
    let (mut host, _) = service.accept().unwrap();
    guest.send_data(&mut peer, b"question");
    let header = peer.header(Op::Shutdown);
    guest.send(
        Header {
            flags: SHUTDOWN_SEND,
            ..header
        },
        &[],
    );
    let mut got = String::new();
    host.read_to_string(&mut got).unwrap();
    assert_eq!(got, "question");
    host.write_all(b"answer").unwrap();
    let (header, payload) = guest.receive();
    assert_eq!(
        (header.op, payload.as_slice()),
        (Op::Rw as u16, &b"answer"[..])
    );
    // Both sides have ended: that is said, and confirmed.
    host.shutdown(Shutdown::Write).unwrap();
    let header = guest.expect(Op::Shutdown);
    assert_eq!(header.flags, SHUTDOWN_BOTH);
    guest.send(peer.header(Op::Rst), &[]);
    guest.expect_silence();
}

#[test]
fn the_host_half_closes_and_still_receives() {
    let mut guest = Guest::new();
    let service = guest.service(1);
    let mut peer = guest.connect(1);
    let (mut host, _) = service.accept().unwrap();
    host.write_all(b"question").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.receive().1, b"question");
    assert_eq!(guest.expect(Op::Shutdown).flags, SHUTDOWN_SEND);
    guest.send_data(&mut peer, b"answer");
    let header = peer.header(Op::Shutdown);
    guest.send(
        Header {
            flags: SHUTDOWN_BOTH,
            ..header
        },
        &[],
    );
    guest.expect(Op::Rst);
    let mut got = String::new();
    host.read_to_string(&mut got).unwrap();
    assert_eq!(got, "answer");
}

#[test]
fn a_guest_that_receives_no_more_makes_writing_fail() {
    let mut guest = Guest::new();
    let service = guest.service(1);
    let mut peer = guest.connect(1);
    let (mut host, _) = service.accept().unwrap();
    let header = peer.header(Op::Shutdown);
    guest.send(
        Header {
            flags: SHUTDOWN_RECEIVE,
            ..header
        },
        &[],
    );
    guest.wait_sent();
    let error = host.write_all(b"x").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
    // The other direction lives.
    guest.send_data(&mut peer, b"still");
    let mut got = [0; 5];
    host.read_exact(&mut got).unwrap();
    drop(host);
    assert_eq!(guest.expect(Op::Shutdown).flags, SHUTDOWN_BOTH);
}

#[test]
fn a_host_that_closes_delivers_its_bytes_first() {
    let mut guest = Guest::new();
    let service = guest.service(1);
    let mut peer = guest.connect(1);
    let (mut host, _) = service.accept().unwrap();
    let bytes = pattern(6, 100 << 10);
    host.write_all(&bytes).unwrap();
    drop(host);
    let mut got = Vec::new();
    let last = loop {
        let (header, payload) = guest.receive();
        if header.op != Op::Rw as u16 {
            break header;
        }
        got.extend(payload);
    };
    assert!(got == bytes);
    assert_eq!((last.op, last.flags), (Op::Shutdown as u16, SHUTDOWN_BOTH));
    // What the guest had under way is taken and dropped.
    guest.send_data(&mut peer, b"late");
    guest.send(peer.header(Op::Rst), &[]);
    guest.expect_silence();
}

#[test]
fn a_guest_that_sends_to_a_host_that_is_gone_is_told_at_once() {
    let mut guest = Guest::new();
    let service = guest.service(1);
    let mut peer = guest.connect(1);
    let (host, _) = service.accept().unwrap();
    // Only reading ends, so nothing tells the device before it tries.
    host.shutdown(Shutdown::Read).unwrap();
    guest.send_data(&mut peer, b"x");
    assert_eq!(guest.expect(Op::Shutdown).flags, SHUTDOWN_RECEIVE);
}

#[test]
fn what_waits_for_a_slow_host_survives_the_guests_reset() {
    let mut guest = Guest::new();
    let service = guest.service(1);
    let mut peer = guest.connect(1);
    let (mut host, _) = service.accept().unwrap();
    let bytes = pattern(7, 4 * MIB);
    // More than the socket holds, and a full credit on top.
    let sent = guest.send_until_full(&mut peer, &bytes);
    guest.send(peer.header(Op::Rst), &[]);
    guest.wait_sent();
    // The ports are free for a new stream at once.
    while guest.try_receive().is_some() {}
    let again = Guest::header(peer.host, peer.guest, Op::Request);
    guest.send(again, &[]);
    guest.expect(Op::Response);
    let mut got = Vec::new();
    host.read_to_end(&mut got).unwrap();
    assert!(got == bytes[..sent]);
}

#[test]
fn credit_of_the_guest_is_respected_to_the_byte() {
    let mut guest = Guest::new();
    let service = guest.service(1);
    let port = guest.port();
    let small = |fwd_cnt, op| Header {
        buf_alloc: 100,
        fwd_cnt,
        ..Guest::header(1, port, op)
    };
    guest.send(small(0, Op::Request), &[]);
    guest.expect(Op::Response);
    let (mut host, _) = service.accept().unwrap();
    let bytes = pattern(8, 250);
    host.write_all(&bytes).unwrap();
    let mut got = Vec::new();
    for expected in [100, 100, 50] {
        let (header, payload) = guest.receive();
        assert_eq!((header.op, payload.len()), (Op::Rw as u16, expected));
        got.extend(payload);
        if expected == 100 {
            guest.expect(Op::CreditRequest);
            // "None yet" is taken as an answer.
            guest.send(small(got.len() as u32 - 100, Op::CreditUpdate), &[]);
            guest.expect_silence();
            guest.send(small(got.len() as u32, Op::CreditUpdate), &[]);
        }
    }
    assert_eq!(got, bytes);
}

#[test]
fn buffers_of_any_shape_are_filled() {
    let dir = tempfile::tempdir().unwrap();
    let vsock = Vsock::new(CID, &dir.path().join("v.sock")).unwrap();
    let mut guest = Guest::without_buffers(vsock, dir);
    let service = guest.service(1);
    // The header across three descriptors, the payload across two, one byte of each together.
    let at = guest.driver.alloc(4096);
    let shape = [(0, 10), (10, 33), (43, 2), (45, 5)];
    let buffers = shape.map(|(offset, len)| Buffer::write(at + offset, len));
    let add = |guest: &mut Guest| {
        guest.rx.add(&buffers);
        guest.driver.kick(0);
    };
    add(&mut guest);
    guest.send(Guest::header(1, 7, Op::Request), &[]);
    let (mut host, _) = service.accept().unwrap();
    assert_eq!(guest.driver.wait_used(&mut guest.rx).1, 44);
    host.write_all(b"shaped").unwrap();
    add(&mut guest);
    assert_eq!(guest.driver.wait_used(&mut guest.rx).1, 50);
    assert_eq!(guest.driver.bytes(at + 44, 6), b"shaped");
}

#[test]
fn listeners_of_this_process_come_before_sockets() {
    let dir = tempfile::tempdir().unwrap();
    let local = LocalPorts::new();
    let listener = local.listen(1024).unwrap();
    let vsock = Vsock::with_local(CID, &dir.path().join("v.sock"), local).unwrap();
    let mut guest = Guest::with_device(vsock, dir);
    let service = guest.service(1025);
    let mut peer = guest.connect(1024);
    let mut host = listener.accept().expect("the connection waits");
    host.write_all(b"hello").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.converse(&mut peer, b"hi"), b"hello");
    drop(host);
    guest.connect(1025);
    service.accept().unwrap();
}

#[test]
fn a_restored_guest_is_told_that_its_connections_are_gone() {
    let mut guest = Guest::with(|mut vsock| {
        vsock.announce_transport_reset();
        vsock
    });
    let at = guest.driver.alloc_with(&[0xff; 8]);
    let queue = &mut guest.event;
    let buffers = [Buffer::write(at, 8)];
    assert_eq!(guest.driver.call(EVENT_QUEUE.into(), queue, &buffers), 4);
    assert_eq!(guest.driver.bytes(at, 4), [0; 4]);
    // Once.
    guest.event.add(&buffers);
    guest.driver.kick(EVENT_QUEUE.into());
    guest.expect_silence();
    assert!(guest.event.pop_used().is_none());
}
