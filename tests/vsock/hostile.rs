//! Packets that no driver should send. None may panic or hang the device or cost it its other streams.
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use cube::vmm::virtio::vsock::Vsock;
use cube::vmm::virtio::vsock::packet::{HEADER_LEN, HOST_CID, Header, Op};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::driver::{Buffer, status};
use crate::guest::{CID, Guest, Peer, pattern};

fn open(guest: &mut Guest) -> (Peer, UnixStream) {
    let path = guest.dir.path().join("v.sock_1");
    let _ = std::fs::remove_file(path);
    let service = guest.service(1);
    let peer = guest.connect(1);
    (peer, service.accept().unwrap().0)
}

/// A guest whose device has nothing to receive with.
fn unprepared() -> Guest {
    let dir = tempfile::tempdir().unwrap();
    let vsock = Vsock::new(CID, &dir.path().join("v.sock")).unwrap();
    Guest::without_buffers(vsock, dir)
}

fn still_works(guest: &mut Guest) {
    assert_eq!(guest.driver.status() & status::NEEDS_RESET, 0);
    let (mut peer, mut host) = open(guest);
    host.write_all(b"down").unwrap();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.converse(&mut peer, b"up"), b"down");
    let mut got = String::new();
    host.read_to_string(&mut got).unwrap();
    assert_eq!(got, "up");
}

/// The packet ends the stream: an RST to the guest, the end to the host.
fn ends_the_stream(spoil: impl FnOnce(&mut Guest, &mut Peer)) {
    let mut guest = Guest::new();
    let (mut peer, mut host) = open(&mut guest);
    let faults = guest.driver.counters.snapshot().faults;
    spoil(&mut guest, &mut peer);
    let rst = guest.expect(Op::Rst);
    assert_eq!((rst.src_port, rst.dst_port), (peer.host, peer.guest));
    assert_eq!(host.read(&mut [0; 8]).unwrap(), 0);
    assert_eq!(guest.driver.counters.snapshot().faults, faults + 1);
    // It is gone: the next packet belongs to nobody.
    guest.send(peer.header(Op::CreditRequest), &[]);
    guest.expect(Op::Rst);
    still_works(&mut guest);
}

#[test]
fn a_length_beyond_the_chain_ends_the_stream() {
    ends_the_stream(|guest, peer| {
        let header = Header {
            len: 6,
            ..peer.header(Op::Rw)
        };
        guest.send_raw(&header.to_bytes(), b"hello");
    });
}

#[test]
fn payload_on_a_control_packet_ends_the_stream() {
    ends_the_stream(|guest, peer| {
        let header = peer.header(Op::CreditUpdate);
        guest.send(header, b"hello");
    });
}

#[test]
fn bad_types_and_operations_end_the_stream() {
    ends_the_stream(|guest, peer| {
        let socket_type = 2;
        let header = peer.header(Op::Rw);
        guest.send(
            Header {
                socket_type,
                ..header
            },
            b"x",
        );
    });
    for op in [0, 8, u16::MAX] {
        ends_the_stream(|guest, peer| {
            let header = peer.header(Op::Rw);
            guest.send(Header { op, ..header }, &[]);
        });
    }
}

#[test]
fn a_request_for_a_stream_that_exists_ends_it() {
    ends_the_stream(|guest, peer| {
        let header = peer.header(Op::Request);
        guest.send(header, &[]);
    });
    ends_the_stream(|guest, peer| {
        let header = peer.header(Op::Response);
        guest.send(header, &[]);
    });
}

#[test]
fn lies_about_credit_end_the_stream() {
    // Bytes that were never sent.
    ends_the_stream(|guest, peer| {
        let header = Header {
            fwd_cnt: 1,
            ..peer.header(Op::CreditUpdate)
        };
        guest.send(header, &[]);
    });
}

#[test]
fn bytes_beyond_the_credit_that_was_announced_end_the_stream() {
    let mut guest = unprepared();
    let service = guest.service(1);
    // One buffer, for the answer: no news of credit can follow it.
    guest.send(Guest::header(1, 7, Op::Request), &[]);
    let at = guest.driver.alloc(64);
    let (rx, buffer) = (&mut guest.rx, Buffer::write(at, 64));
    assert_eq!(guest.driver.call(0, rx, &[buffer]), HEADER_LEN as u32);
    let (mut host, _) = service.accept().unwrap();
    let reader = std::thread::spawn(move || {
        let mut got = Vec::new();
        let _ = host.read_to_end(&mut got);
        got.len()
    });
    for _ in 0..4 {
        guest.send(Guest::header(1, 7, Op::Rw), &[7; 64 << 10]);
    }
    guest.wait_sent();
    assert_eq!(guest.driver.counters.snapshot().faults, 0);
    guest.send(Guest::header(1, 7, Op::Rw), &[7]);
    guest.wait_sent();
    assert_eq!(guest.driver.counters.snapshot().faults, 1);
    guest.fill_rx(10, 4096);
    guest.expect(Op::Rst);
    assert!(reader.join().unwrap() <= 256 << 10);
    guest.restart();
    std::fs::remove_file(guest.dir.path().join("v.sock_1")).unwrap();
    still_works(&mut guest);
}

#[test]
fn unknown_streams_get_an_rst_and_rsts_get_none() {
    let mut guest = Guest::new();
    for op in [
        Op::Response,
        Op::Shutdown,
        Op::Rw,
        Op::CreditUpdate,
        Op::CreditRequest,
    ] {
        guest.send(Guest::header(5, 6, op), &[]);
        let rst = guest.expect(Op::Rst);
        assert_eq!((rst.src_port, rst.dst_port), (5, 6));
        assert_eq!((rst.src_cid, rst.dst_cid), (HOST_CID, CID.into()));
    }
    guest.send(Guest::header(5, 6, Op::Rst), &[]);
    guest.expect_silence();
    // Nobody listens there.
    assert!(guest.try_connect(5).is_none());
    still_works(&mut guest);
}

#[test]
fn other_destinations_are_refused_and_other_sources_ignored() {
    let mut guest = Guest::new();
    let header = Guest::header(5, 6, Op::Request);
    guest.send(
        Header {
            dst_cid: 7,
            ..header
        },
        &[],
    );
    let (rst, _) = guest.receive();
    assert_eq!((rst.op, rst.src_cid), (Op::Rst as u16, 7));
    guest.send(
        Header {
            src_cid: 7,
            ..header
        },
        &[],
    );
    guest.send(
        Header {
            src_cid: 1 << 32 | u64::from(CID),
            ..header
        },
        &[],
    );
    guest.expect_silence();
    assert_eq!(guest.driver.counters.snapshot().faults, 2);
    still_works(&mut guest);
}

#[test]
fn shutdown_flags_that_nobody_knows_mean_nothing() {
    let mut guest = Guest::new();
    let (mut peer, mut host) = open(&mut guest);
    let flags = 0xffff_fffc;
    let header = peer.header(Op::Shutdown);
    guest.send(Header { flags, ..header }, &[]);
    guest.send(Header { flags: 0, ..header }, &[]);
    host.write_all(b"down").unwrap();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.converse(&mut peer, b"up"), b"down");
}

#[test]
fn packets_and_buffers_too_small_for_a_header_are_given_back() {
    let mut guest = Guest::new();
    guest.send_raw(&[0; HEADER_LEN - 1], &[]);
    guest.wait_sent();
    // Writable where the device reads, so nothing to read at all.
    let at = guest.driver.alloc(64);
    guest.offer(at, Buffer::write(at, 64));
    guest.wait_sent();
    guest.expect_silence();
    assert_eq!(guest.driver.counters.snapshot().faults, 2);
    still_works(&mut guest);
}

#[test]
fn a_buffer_without_space_for_bytes_is_given_back_empty() {
    let mut guest = unprepared();
    let at = guest.driver.alloc(64);
    guest.send(Guest::header(5, 6, Op::Rw), &[]);
    for buffer in [
        Buffer::write(at, 44),
        Buffer::write(at, 1),
        Buffer::read(at, 64),
    ] {
        assert_eq!(guest.driver.call(0, &mut guest.rx, &[buffer]), 0);
    }
    assert_eq!(
        guest
            .driver
            .call(0, &mut guest.rx, &[Buffer::write(at, 64)]),
        44
    );
}

#[test]
fn a_guest_that_takes_no_packets_stops_itself() {
    let mut guest = unprepared();
    // More packets that want an RST than the device keeps.
    for port in 0..100 {
        guest.send(Guest::header(5, port, Op::Rw), &[]);
    }
    guest.wait_taken(36);
    assert_eq!(guest.unsent(), 36);
    guest.fill_rx(100, 4096);
    for port in 0..100 {
        assert_eq!(guest.expect(Op::Rst).dst_port, port);
    }
}

#[test]
fn chains_outside_memory_cost_the_device_until_a_reset() {
    let mut guest = Guest::new();
    let (_peer, mut host) = open(&mut guest);
    guest.offer(0, Buffer::read(1 << 40, 64));
    guest.driver.wait_needs_reset();
    guest.restart();
    assert_eq!(host.read(&mut [0; 8]).unwrap(), 0);
    still_works(&mut guest);
}

/// A header that is wrong in few places, so that it gets far.
fn header() -> impl Strategy<Value = Header> {
    let small = prop_oneof![Just(0u32), 1u32..4, Just(u32::MAX), any::<u32>()];
    (
        (0u16..9, prop_oneof![9 => Just(1u16), 1 => any::<u16>()]),
        (prop_oneof![9 => 1u32..3, 1 => any::<u32>()], 100u32..104),
        (0u32..5, small.clone(), small),
        prop_oneof![Just(0u32), Just(1 << 10), any::<u32>()],
    )
        .prop_map(
            |((op, socket_type), (host, guest), (flags, fwd_cnt, len), buf_alloc)| Header {
                op,
                socket_type,
                flags,
                fwd_cnt,
                len: len & 0xff,
                buf_alloc,
                ..Guest::header(host, guest, Op::Rst)
            },
        )
}

#[test]
fn nothing_a_guest_sends_breaks_the_device() {
    let packets = proptest::collection::vec((header(), 0usize..300), 1..60);
    let mut runner = TestRunner::new(Config::with_cases(60));
    let result = runner.run(&packets, |packets| {
        let mut guest = Guest::new();
        let service = guest.service(2);
        service.set_nonblocking(true).unwrap();
        for (header, payload) in packets {
            guest.send_raw(&header.to_bytes(), &pattern(9, payload));
            if let Ok((mut host, _)) = service.accept() {
                // Bytes the other way, and an end.
                let _ = host.write_all(b"0123456789");
            }
            while guest.try_receive().is_some() {}
        }
        guest.wait_sent();
        guest.restart();
        still_works(&mut guest);
        Ok(())
    });
    result.unwrap();
}
