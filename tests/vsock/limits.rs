//! Bounds: streams, clients, deadlines.
use std::io::Write;
use std::time::Duration;

use cube::vmm::virtio::vsock::Limits;
use cube::vmm::virtio::vsock::packet::{Op, SHUTDOWN_BOTH};

use crate::guest::{Guest, expect_closed};

#[test]
fn requests_beyond_the_limit_are_refused_until_a_stream_ends() {
    let mut guest = Guest::with_limits(Limits {
        streams: 16,
        ..Limits::default()
    });
    let service = guest.service(1);
    let mut streams: Vec<_> = (0..16)
        .map(|_| (guest.connect(1), service.accept().unwrap().0))
        .collect();
    for _ in 0..200 {
        assert!(guest.try_connect(1).is_none());
    }
    // A client is turned away too.
    let mut client = guest.client();
    client.write_all(b"CONNECT 1\n").unwrap();
    expect_closed(&mut client);

    let (mut peer, _host) = streams.pop().unwrap();
    guest.send(peer.header(Op::Rst), &[]);
    guest.connect(1);
}

#[test]
fn a_pod_has_a_thousand_streams_in_less_than_80_mib() {
    let limits = Limits::default();
    assert_eq!(limits.streams, 1024);
    let large = limits.large_streams * limits.large_buffer as usize;
    let small = (limits.streams - limits.large_streams) * limits.small_buffer as usize;
    assert!(large + small < 80 << 20);
}

#[test]
fn later_streams_get_smaller_buffers() {
    let mut guest = Guest::with_limits(Limits {
        large_streams: 1,
        ..Limits::default()
    });
    let _service = guest.service(1);
    for (port, expected) in [(1, 256 << 10), (2, 64 << 10)] {
        guest.send(Guest::header(1, port, Op::Request), &[]);
        assert_eq!(guest.expect(Op::Response).buf_alloc, expected);
    }
}

#[test]
fn streams_that_come_and_go_leave_nothing() {
    let mut guest = Guest::new();
    let service = guest.service(1);
    let open_files = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let mut before = 0;
    for round in 0..500 {
        let mut peer = guest.connect(1);
        let (mut host, _) = service.accept().unwrap();
        guest.send(peer.header(Op::Rst), &[]);
        expect_closed(&mut host);
        drop(host);
        if round == 0 {
            before = open_files();
        }
    }
    // Other tests of this process may hold descriptors; a leak would be 500.
    assert!(open_files() < before + 200);
}

#[test]
fn a_client_that_never_sends_its_line_is_dropped() {
    let guest = Guest::with_limits(Limits {
        line: Duration::from_millis(20),
        ..Limits::default()
    });
    let mut client = guest.client();
    client.write_all(b"CONN").unwrap();
    expect_closed(&mut client);
}

#[test]
fn clients_without_a_line_are_few() {
    let mut guest = Guest::with_limits(Limits {
        clients: 2,
        ..Limits::default()
    });
    let mut waiting = [guest.client(), guest.client()];
    let mut third = guest.client();
    expect_closed(&mut third);
    for (client, port) in waiting.iter_mut().zip([7, 8]) {
        client
            .write_all(format!("CONNECT {port}\n").as_bytes())
            .unwrap();
        guest.accept(port);
    }
    // And there is space for two again.
    let mut fourth = guest.client();
    fourth.write_all(b"CONN").unwrap();
    fourth.write_all(b"ECT 9\n").unwrap();
    guest.accept(9);
}

#[test]
fn a_line_of_another_protocol_ends_the_client() {
    let guest = Guest::new();
    for line in ["GET / HTTP/1.1\r\n", "CONNECT\n", "CONNECT 4294967296\n"] {
        let mut client = guest.client();
        client.write_all(line.as_bytes()).unwrap();
        expect_closed(&mut client);
    }
}

#[test]
fn a_guest_that_does_not_answer_a_request_is_reset() {
    let mut guest = Guest::with_limits(Limits {
        dial: Duration::from_millis(20),
        ..Limits::default()
    });
    let mut client = guest.client();
    client.write_all(b"CONNECT 7\n").unwrap();
    let request = guest.expect(Op::Request);
    let rst = guest.expect(Op::Rst);
    assert_eq!(rst.src_port, request.src_port);
    expect_closed(&mut client);
    // An answer now is too late.
    guest.send(Guest::header(request.src_port, 7, Op::Response), &[]);
    guest.expect(Op::Rst);
}

#[test]
fn a_guest_that_does_not_confirm_the_end_is_reset() {
    let mut guest = Guest::with_limits(Limits {
        close: Duration::from_millis(20),
        ..Limits::default()
    });
    let service = guest.service(1);
    let peer = guest.connect(1);
    drop(service.accept().unwrap());
    assert_eq!(guest.expect(Op::Shutdown).flags, SHUTDOWN_BOTH);
    let rst = guest.expect(Op::Rst);
    assert_eq!((rst.src_port, rst.dst_port), (peer.host, peer.guest));
}
