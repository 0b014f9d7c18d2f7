#![forbid(unsafe_code)]
//! The host is the other end of a Unix socket pair.

use cube_guest::{GuestEvent, HostRequest};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::*;

struct Fixture {
    poller: Poller,
    control: Control,
    host: OwnedFd,
}

fn fixture() -> Fixture {
    let (host, socket) = socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::NONBLOCK,
        None,
    )
    .unwrap();
    let poller = Poller::new().unwrap();
    let mut control = Control::over(Some(socket));
    control.rearm(&poller);
    Fixture {
        poller,
        control,
        host,
    }
}

impl Fixture {
    fn wait(&mut self) -> Turn {
        self.poller.wait().unwrap();
        self.control.turn(&self.poller)
    }

    fn heard(&self) -> Vec<GuestMessage> {
        let mut decoder = Decoder::default();
        let mut buffer = [0; 4096];
        while let Ok(read @ 1..) = rustix::io::read(&self.host, &mut buffer) {
            decoder.push(&buffer[..read]);
        }
        std::iter::from_fn(|| decoder.take().unwrap()).collect()
    }
}

fn started(container: &str) -> GuestMessage {
    GuestMessage::Event(GuestEvent::Started {
        container: container.into(),
    })
}

#[test]
fn hello_comes_first_whatever_was_said_before_the_connection_was_up() {
    let mut it = fixture();
    it.control.send(&started("c0"), &it.poller);
    assert!(it.heard().is_empty());
    assert!(it.wait().connected);
    let heard = it.heard();
    assert!(matches!(
        &heard[0],
        GuestMessage::Hello {
            protocol: PROTOCOL_VERSION,
            ..
        }
    ));
    assert_eq!(heard[1..], [started("c0")]);
}

#[test]
fn requests_arrive_in_any_pieces() {
    let mut it = fixture();
    it.wait();
    let asked = HostMessage {
        id: 7,
        request: HostRequest::Shutdown { grace_ms: 5 },
    };
    let bytes = frame::encode(&asked).unwrap();
    let mut messages = vec![];
    for byte in [&bytes[..], &bytes[..]].concat().chunks(3) {
        rustix::io::write(&it.host, byte).unwrap();
        messages.extend(it.wait().messages);
    }
    assert_eq!(messages, [asked.clone(), asked]);
}

#[test]
fn the_end_is_said_last_and_waits_for_the_host() {
    let mut it = fixture();
    it.control.send(&started("c0"), &it.poller);
    it.control.finish(&it.poller);
    it.wait();
    assert_eq!(it.heard().len(), 2);
    assert_eq!(rustix::io::read(&it.host, &mut [0; 1]), Ok(0));
    assert!(!it.control.is_gone());
    rustix::net::shutdown(&it.host, Shutdown::Both).unwrap();
    it.wait();
    assert!(it.control.is_gone());
}

#[test]
fn a_host_that_leaves_or_talks_nonsense_is_gone() {
    let Fixture {
        poller,
        mut control,
        host,
    } = fixture();
    drop(host);
    while !control.is_gone() {
        poller.wait().unwrap();
        control.turn(&poller);
    }
    control.send(&started("c0"), &poller);
    assert!(control.outgoing.is_empty());

    let mut it = fixture();
    it.wait();
    rustix::io::write(&it.host, &[0xff; 64]).unwrap();
    it.wait();
    assert!(it.control.is_gone());
}

#[test]
fn without_a_host_nothing_is_kept() {
    let poller = Poller::new().unwrap();
    let mut control = Control::over(None);
    control.send(&started("c0"), &poller);
    control.finish(&poller);
    assert!(control.is_gone() && control.outgoing.is_empty());
}
