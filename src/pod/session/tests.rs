//! The session against a fake agent at the other end of socket pairs.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::thread;

use cube_guest::{ContainerSpec, ProcessId, ProcessSpec, RootFs, TerminalSize, frame};

use super::*;
use crate::pod::listen::{Ports, port_path};
use crate::pod::ready::Ready;

const STDOUT: u64 = 11;
const STDERR: u64 = 12;

fn container(id: &str) -> ContainerSpec {
    ContainerSpec {
        id: id.to_owned(),
        rootfs: RootFs {
            image: "image0".to_owned(),
            writable: None,
            read_only: false,
        },
        process: ProcessSpec {
            argv: vec!["true".to_owned()],
            stdio: Stdio::Pipes {
                stdin: None,
                stdout: Some(STDOUT),
                stderr: Some(STDERR),
            },
            ..ProcessSpec::default()
        },
        ..ContainerSpec::default()
    }
}

fn pod() -> PodSpec {
    PodSpec {
        hostname: "pod".to_owned(),
        containers: vec![container("c")],
        exit_with_containers: true,
        ..PodSpec::default()
    }
}

/// A session and the agent's end of its control connection.
struct Pair {
    session: Session,
    agent: UnixStream,
}

impl Pair {
    fn new() -> Self {
        let (agent, host) = UnixStream::pair().unwrap();
        let mut session = Session::new(&pod());
        session.adopt_control(host).unwrap();
        Self { session, agent }
    }

    fn ready() -> Self {
        let mut pair = Self::new();
        pair.say(&hello(PROTOCOL_VERSION));
        let events = pair.turn().unwrap();
        assert!(matches!(&events[..], [SessionEvent::Ready { .. }]));
        pair
    }

    fn say(&mut self, message: &GuestMessage) {
        frame::write(&mut self.agent, message).unwrap();
    }

    fn turn(&mut self) -> Result<Vec<SessionEvent>, SessionError> {
        let mut events = Vec::new();
        self.session
            .turn(&Ready::everything(), &mut events)
            .map(|()| events)
    }

    fn dial(&mut self, token: u64) -> UnixStream {
        let (mut guest, host) = UnixStream::pair().unwrap();
        self.session.adopt_stream(host).unwrap();
        guest.write_all(&token.to_le_bytes()).unwrap();
        guest
    }
}

fn hello(protocol: u32) -> GuestMessage {
    GuestMessage::Hello {
        protocol,
        version: "9.9\x1b[31m".to_owned(),
    }
}

fn started(id: &str) -> GuestMessage {
    GuestMessage::Event(GuestEvent::Started {
        container: id.to_owned(),
    })
}

fn exited(id: &str, code: u8) -> GuestMessage {
    GuestMessage::Event(GuestEvent::Exited {
        container: id.to_owned(),
        status: ExitStatus::Code(code),
    })
}

/// Polls and turns until `done` says so; the peer's end is the only thing that can hold it up.
fn run_until(
    ports: Option<&Ports>,
    session: &mut Session,
    mut done: impl FnMut(SessionEvent) -> bool,
) {
    loop {
        let mut interests = session.interests();
        let listening = ports.iter().flat_map(|ports| ports.interests());
        interests.extend(listening.map(|fd| (fd, PollFlags::IN)));
        let ready = Ready::wait(interests, None).unwrap();
        ports
            .iter()
            .for_each(|ports| ports.turn(session, &ready).unwrap());
        let mut events = Vec::new();
        session.turn(&ready, &mut events).unwrap();
        if events.into_iter().any(&mut done) {
            return;
        }
    }
}

#[test]
fn what_is_not_ready_is_not_touched() {
    let directory = tempfile::tempdir().unwrap();
    let vsock = directory.path().join("vsock.sock");
    let ports = Ports::bind(&vsock).unwrap();
    let mut agent = UnixStream::connect(port_path(&vsock, cube_guest::CONTROL_PORT)).unwrap();
    frame::write(&mut agent, &hello(PROTOCOL_VERSION)).unwrap();
    let mut session = Session::new(&pod());
    let mut events = Vec::new();
    let nothing = Ready::default();
    ports.turn(&mut session, &nothing).unwrap();
    assert_eq!(session.state, State::Listening);
    ports.turn(&mut session, &Ready::everything()).unwrap();
    session.turn(&nothing, &mut events).unwrap();
    assert!(events.is_empty() && session.state == State::Greeting);
    session.turn(&Ready::everything(), &mut events).unwrap();
    assert!(matches!(&events[..], [SessionEvent::Ready { .. }]));
}

#[test]
fn a_pod_runs_through_its_events_in_order() {
    let mut pair = Pair::ready();
    pair.say(&started("c"));
    pair.say(&exited("c", 3));
    let events = pair.turn().unwrap();
    let [
        SessionEvent::Started { .. },
        SessionEvent::Exited { container, status },
    ] = &events[..]
    else {
        panic!("{events:?}");
    };
    assert_eq!((container.as_str(), status), ("c", &ExitStatus::Code(3)));
    pair.agent.shutdown(Shutdown::Write).unwrap();
    let events = pair.turn().unwrap();
    assert!(matches!(&events[..], [SessionEvent::Closed]));
    assert_eq!(pair.agent.read(&mut [0]).unwrap(), 0, "the host closed too");
}

#[test]
fn a_pod_that_cannot_be_set_up_says_why_and_ends() {
    let failed = || {
        GuestMessage::Event(GuestEvent::Failed {
            reason: "no disk\x07".to_owned(),
        })
    };
    let mut pair = Pair::ready();
    pair.say(&failed());
    pair.agent.shutdown(Shutdown::Write).unwrap();
    let events = pair.turn().unwrap();
    let [SessionEvent::Failed { reason }] = &events[..] else {
        panic!("{events:?}");
    };
    assert_eq!(reason, "no disk\u{fffd}");
    // Its owner knows the reason before the guest is let go.
    assert!(pair.session.control.is_some());
    assert!(matches!(pair.turn().unwrap()[..], [SessionEvent::Closed]));

    let mut pair = Pair::ready();
    pair.say(&started("c"));
    pair.say(&failed());
    assert!(matches!(pair.turn(), Err(SessionError::OutOfOrder(_))));
}

#[test]
fn a_guest_of_another_version_is_refused_with_both_versions() {
    let mut pair = Pair::new();
    pair.say(&hello(PROTOCOL_VERSION + 1));
    let sentence = pair.turn().unwrap_err().to_string();
    assert!(sentence.contains("cube-init 9.9"), "{sentence}");
    assert!(!sentence.contains('\x1b'), "made printable: {sentence:?}");
}

#[test]
fn what_the_state_does_not_allow_ends_the_session() {
    let reply = GuestMessage::Reply {
        id: 7,
        result: Ok(Answer::Done),
    };
    let cases: [(&str, &[GuestMessage]); 6] = [
        ("a second greeting", &[hello(PROTOCOL_VERSION)]),
        ("a reply to no request", &[reply]),
        ("an exit of a stranger", &[exited("x", 0)]),
        ("two starts", &[started("c"), started("c")]),
        ("two exits", &[exited("c", 0), exited("c", 0)]),
        ("a start after the exit", &[exited("c", 0), started("c")]),
    ];
    for (what, messages) in cases {
        let mut pair = Pair::ready();
        messages.iter().for_each(|message| pair.say(message));
        let error = pair.turn().unwrap_err();
        assert!(
            matches!(error, SessionError::OutOfOrder(_)),
            "{what}: {error}"
        );
    }
    let mut pair = Pair::new();
    pair.say(&started("c"));
    assert!(matches!(pair.turn(), Err(SessionError::NoHello)));
}

#[test]
fn malformed_frames_end_the_session_and_earlier_events_are_kept() {
    let too_long = (frame::MAX_FRAME + 1).to_le_bytes();
    let cases: [&[u8]; 4] = [
        b"\x02\0\0\0{}",
        b"\x04\0\0\0\xff\xff\xff\xff",
        b"\x0f\0\0\0{\"unknown\":true}",
        &too_long,
    ];
    for bytes in cases {
        let mut pair = Pair::ready();
        pair.say(&started("c"));
        pair.agent.write_all(bytes).unwrap();
        let mut events = Vec::new();
        let error = pair
            .session
            .turn(&Ready::everything(), &mut events)
            .unwrap_err();
        assert!(
            matches!(error, SessionError::Frame(_)),
            "{bytes:?}: {error}"
        );
        assert!(matches!(&events[..], [SessionEvent::Started { .. }]));
    }
}

#[test]
fn an_agent_that_dies_is_told_from_one_that_is_done() {
    for last_words in [&b""[..], &b"\x05\0\0"[..]] {
        let Pair {
            mut session,
            mut agent,
        } = Pair::ready();
        agent.write_all(last_words).unwrap();
        drop(agent);
        let error = session
            .turn(&Ready::everything(), &mut Vec::new())
            .unwrap_err();
        assert!(matches!(error, SessionError::ClosedEarly), "{error}");
    }
}

#[test]
fn requests_carry_ids_and_replies_find_them() {
    let mut pair = Pair::ready();
    let resize = HostRequest::Resize {
        process: ProcessId::Container("c".to_owned()),
        size: TerminalSize {
            rows: 24,
            columns: 80,
        },
    };
    let first = pair.session.request(resize.clone()).unwrap();
    let second = pair.session.request(resize).unwrap();
    for id in [second, first] {
        frame::read::<HostMessage>(&mut pair.agent)
            .unwrap()
            .unwrap();
        let result = Err("no\nterminal".to_owned());
        pair.say(&GuestMessage::Reply { id, result });
    }
    let events = pair.turn().unwrap();
    let [
        SessionEvent::Reply { id, result },
        SessionEvent::Reply { .. },
    ] = &events[..]
    else {
        panic!("{events:?}");
    };
    assert_eq!(*id, second);
    assert_eq!(result.as_ref().unwrap_err(), "no\u{fffd}terminal");
    assert!(pair.session.unanswered.is_empty());
}

#[test]
fn requests_need_a_session_and_a_guest_that_reads() {
    let shutdown = HostRequest::Shutdown { grace_ms: 0 };
    let error = Pair::new().session.request(shutdown.clone()).unwrap_err();
    assert!(matches!(error, SessionError::NotReady), "{error}");

    let mut pair = Pair::ready();
    let error = (0..1_000_000)
        .find_map(|_| pair.session.request(shutdown.clone()).err())
        .expect("the queue is bounded");
    assert!(matches!(error, SessionError::Behind), "{error}");
}

#[test]
fn only_the_first_control_connection_is_the_agent() {
    let mut pair = Pair::ready();
    let (mut intruder, host) = UnixStream::pair().unwrap();
    pair.session.adopt_control(host).unwrap();
    assert_eq!(intruder.read(&mut [0]).unwrap(), 0, "dropped");
    pair.say(&started("c"));
    assert_eq!(pair.turn().unwrap().len(), 1);
}

#[test]
fn a_container_started_later_brings_its_streams() {
    let mut pair = Pair::ready();
    let mut further = container("d");
    further.process.stdio = Stdio::Terminal {
        token: 99,
        size: TerminalSize::default(),
    };
    pair.session
        .request(HostRequest::Start(Box::new(further)))
        .unwrap();
    let _guest = pair.dial(99);
    pair.say(&started("d"));
    let events = pair.turn().unwrap();
    assert!(matches!(events[0], SessionEvent::Stream { token: 99, .. }));
    assert!(matches!(&events[1], SessionEvent::Started { container } if container == "d"));
}

/// The bytes that a stream of the big test carries.
fn pattern(length: usize, seed: u8) -> Vec<u8> {
    (0..length)
        .map(|i| (i.wrapping_mul(31) as u8).wrapping_add(seed))
        .collect()
}

#[test]
fn big_streams_and_the_exit_status_arrive_complete_through_the_sockets() {
    const LENGTH: usize = 16 << 20;
    let directory = tempfile::tempdir().unwrap();
    let vsock = directory.path().join("vsock");
    let ports = Ports::bind(&vsock).unwrap();
    let agent = thread::spawn(move || {
        let dial = |port| UnixStream::connect(port_path(&vsock, port)).unwrap();
        let mut control = dial(cube_guest::CONTROL_PORT);
        frame::write(&mut control, &hello(PROTOCOL_VERSION)).unwrap();
        let writers = [STDOUT, STDERR].map(|token| {
            let mut stream = dial(cube_guest::STREAM_PORT);
            thread::spawn(move || {
                stream.write_all(&token.to_le_bytes()).unwrap();
                stream.write_all(&pattern(LENGTH, token as u8)).unwrap();
            })
        });
        frame::write(&mut control, &started("c")).unwrap();
        frame::write(&mut control, &exited("c", 0)).unwrap();
        writers.into_iter().for_each(|w| w.join().unwrap());
        control.shutdown(Shutdown::Write).unwrap();
        assert_eq!(control.read(&mut [0]).unwrap(), 0, "waits for the host");
    });

    let mut session = Session::new(&pod());
    let mut readers = Vec::new();
    let mut exited = false;
    run_until(Some(&ports), &mut session, |event| {
        match event {
            SessionEvent::Stream { token, mut stream } => readers.push(thread::spawn(move || {
                let mut all = Vec::new();
                stream.read_to_end(&mut all).unwrap();
                assert!(all == pattern(LENGTH, token as u8), "stream {token}");
            })),
            SessionEvent::Exited { .. } => exited = true,
            _ => {}
        }
        exited && readers.len() == 2
    });
    readers
        .into_iter()
        .for_each(|reader| reader.join().unwrap());
    run_until(None, &mut session, |event| {
        matches!(event, SessionEvent::Closed)
    });
    agent.join().unwrap();
}

#[test]
fn a_stream_that_nobody_reads_does_not_hold_up_the_control_connection() {
    let mut pair = Pair::ready();
    let mut guest = pair.dial(STDOUT);
    guest.set_nonblocking(true).unwrap();
    while guest.write(&[0; 4096]).is_ok() {}
    pair.say(&started("c"));
    let events = pair.turn().unwrap();
    assert!(matches!(
        &events[..],
        [SessionEvent::Stream { .. }, SessionEvent::Started { .. }]
    ));
}

#[test]
fn a_path_too_long_for_a_socket_is_named() {
    let path = std::path::PathBuf::from(format!("/tmp/{}", "x".repeat(120)));
    let sentence = Ports::bind(&path).unwrap_err().to_string();
    assert!(sentence.contains("xxx_1024"), "{sentence}");
}

#[test]
fn the_oom_killer_is_heard_of_while_the_container_lives_and_no_longer() {
    let oom = |container: &str| {
        let container = container.to_owned();
        GuestMessage::Event(GuestEvent::OomKilled { container })
    };
    let mut pair = Pair::ready();
    pair.say(&oom("c"));
    let events = pair.turn().unwrap();
    assert!(matches!(&events[..], [SessionEvent::OomKilled { container }] if container == "c"));
    let (container, status) = ("c".to_owned(), ExitStatus::Code(0));
    pair.say(&GuestMessage::Event(GuestEvent::Exited {
        container,
        status,
    }));
    pair.turn().unwrap();
    pair.say(&oom("c"));
    assert!(matches!(pair.turn(), Err(SessionError::OutOfOrder(_))));
}

#[test]
fn a_stream_that_does_not_come_after_its_processs_end_has_ended() {
    let mut pair = Pair::ready();
    pair.session.stream_patience = Duration::ZERO;
    pair.say(&started("c"));
    let _stderr = pair.dial(STDERR);
    assert_eq!(pair.turn().unwrap().len(), 2);
    assert_eq!(pair.session.deadline(), None, "its process may live long");
    pair.say(&exited("c", 0));
    assert_eq!(pair.turn().unwrap().len(), 1);
    assert!(pair.session.deadline().is_some());
    let mut events = pair.turn().unwrap();
    let Some(SessionEvent::Stream { token, mut stream }) = events.pop() else {
        panic!("{events:?}");
    };
    assert_eq!((token, stream.read(&mut [0]).unwrap()), (STDOUT, 0));
    assert_eq!(pair.session.deadline(), None);
}

#[test]
fn a_stream_that_was_promised_and_does_not_come_has_ended() {
    let mut pair = Pair::ready();
    pair.session.stream_patience = Duration::ZERO;
    let forward = HostRequest::Forward { port: 80, token: 7 };
    let id = pair.session.request(forward).unwrap();
    assert!(pair.turn().unwrap().is_empty());
    let result = Ok(Answer::Done);
    pair.say(&GuestMessage::Reply { id, result });
    assert!(matches!(
        &pair.turn().unwrap()[..],
        [SessionEvent::Reply { .. }]
    ));
    assert!(matches!(
        &pair.turn().unwrap()[..],
        [SessionEvent::Stream { token: 7, .. }]
    ));
}
