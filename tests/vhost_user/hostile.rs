//! Backends that break the protocol.
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread::JoinHandle;

use cube::vmm::virtio::net::vhost::VhostNet;

use crate::driver::{Buffer, reg};
use crate::port::{F_PROTOCOL, F_VERSION_1, FEATURES, Plugged, Port};
use crate::rings::{SIZE, identity, place, plug};

/// What a scripted backend does with a request.
enum Answer {
    Value(u64),
    /// As they are.
    Bytes(Vec<u8>),
    Close,
    /// Says nothing for as long as the other side is there.
    Silence,
    Nothing,
}

fn header(request: u32, flags: u32, size: u32) -> Vec<u8> {
    [request, flags, size]
        .into_iter()
        .flat_map(u32::to_le_bytes)
        .collect()
}

/// Answers by `script`, which is told the request's number, until the other side has gone.
fn backend(socket: &Path, script: impl Fn(u32) -> Answer + Send + 'static) -> JoinHandle<()> {
    let listener = UnixListener::bind(socket).unwrap();
    let socket = socket.to_owned();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        // Nobody else gets in.
        drop(listener);
        std::fs::remove_file(socket).unwrap();
        while let Some(request) = next_request(&mut stream) {
            let answer = match script(request) {
                Answer::Value(value) => {
                    [header(request, 5, 8), value.to_le_bytes().to_vec()].concat()
                }
                Answer::Bytes(bytes) => bytes,
                Answer::Close => return,
                Answer::Silence => {
                    let _ = stream.read_to_end(&mut Vec::new());
                    return;
                }
                Answer::Nothing => continue,
            };
            if stream.write_all(&answer).is_err() {
                return;
            }
        }
    })
}

fn next_request(stream: &mut UnixStream) -> Option<u32> {
    let mut header = [0; 12];
    stream.read_exact(&mut header).ok()?;
    let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
    let mut payload = vec![0; word(8) as usize];
    stream.read_exact(&mut payload).ok()?;
    Some(word(0))
}

/// What the frontend says to a backend that answers GET_FEATURES by `answer`.
fn refusal(answer: impl Fn() -> Answer + Send + 'static) -> String {
    let (_directory, socket) = place();
    let backend = backend(&socket, move |request| match request {
        1 => answer(),
        _ => Answer::Nothing,
    });
    let error = VhostNet::connect(identity(), &socket, 1).err().unwrap();
    backend.join().unwrap();
    let sentence = error.to_string();
    let start = format!("the vhost-user backend at {} ", socket.display());
    sentence.strip_prefix(&start).unwrap().to_owned()
}

#[test]
fn nobody_at_the_socket() {
    let (_directory, socket) = place();
    let error = VhostNet::connect(identity(), &socket, 1).err().unwrap();
    let sentence = error.to_string();
    assert!(
        sentence.contains("cannot be reached: No such file"),
        "{sentence}"
    );
    let listener = UnixListener::bind(&socket).unwrap();
    drop(listener);
    let error = VhostNet::connect(identity(), &socket, 1).err().unwrap();
    assert!(error.to_string().contains("Connection refused"), "{error}");
}

#[test]
fn answers_that_are_none() {
    let other = "answered GET_FEATURES with something else";
    for bytes in [
        // Another request's, no answer, another version, too long, too short.
        [header(2, 5, 8), vec![0; 8]].concat(),
        [header(1, 1, 8), vec![0; 8]].concat(),
        [header(1, 6, 8), vec![0; 8]].concat(),
        [header(1, 5, u32::MAX), vec![0; 8]].concat(),
        [header(1, 5, 4), vec![0; 4]].concat(),
        vec![0xff; 4096],
    ] {
        assert_eq!(refusal(move || Answer::Bytes(bytes.clone())), other);
    }
}

#[test]
fn connections_that_end_early() {
    assert_eq!(refusal(|| Answer::Close), "closed the connection");
    let lacking = "is too old: it has no protocol features (VHOST_USER_F_PROTOCOL_FEATURES)";
    assert_eq!(refusal(|| Answer::Value(F_VERSION_1)), lacking);
}

#[test]
fn silence_ends_after_a_while() {
    let late = "did not answer GET_FEATURES within 3 s";
    assert_eq!(refusal(|| Answer::Silence), late);
    // A part of an answer is none.
    assert_eq!(refusal(|| Answer::Bytes(header(1, 5, 8))), late);
}

/// A backend without REPLY_ACK that greets well and answers GET_VRING_BASE by `base`.
fn greeting(base: impl Fn() -> Answer + Send + 'static) -> impl Fn(u32) -> Answer + Send {
    move |request| match request {
        1 => Answer::Value(FEATURES),
        15 => Answer::Value(0),
        11 => base(),
        _ => Answer::Nothing,
    }
}

#[test]
fn a_backend_that_keeps_the_rings_is_hung_up_on() {
    for base in [
        || Answer::Silence,
        || Answer::Close,
        // Of another ring.
        || Answer::Bytes([header(11, 5, 8), vec![9, 0, 0, 0, 0, 0, 0, 0]].concat()),
    ] {
        let (_directory, socket) = place();
        let backend = backend(&socket, greeting(base));
        let mut driver = plug(&socket, 1);
        driver.start(&[SIZE; 2]);
        driver.reset();
        backend.join().unwrap();
        // The next one gets the device.
        let _plugged = Plugged::new(&socket, Port::echo(1, FEATURES));
        let mut queues = driver.start(&[SIZE; 2]);
        let (buffer, frame) = (driver.alloc(2048), driver.alloc_with(&[0; 72]));
        queues[0].add(&[Buffer::write(buffer, 2048)]);
        driver.kick(0);
        driver.call(1, &mut queues[1], &[Buffer::read(frame, 72)]);
        assert_eq!(driver.wait_used(&mut queues[0]).1, 72);
    }
}

#[test]
fn a_backend_that_speaks_unasked_is_hung_up_on() {
    let (_directory, socket) = place();
    let script = |request| match request {
        1 => Answer::Value(FEATURES),
        15 => Answer::Value(0),
        // SET_VRING_ENABLE, which without REPLY_ACK has no answer.
        18 => Answer::Value(0),
        _ => Answer::Nothing,
    };
    let backend = backend(&socket, script);
    let driver = plug(&socket, 1);
    driver.start(&[SIZE; 2]);
    backend.join().unwrap();
    while driver.config::<1>(6) != [0] {
        driver.wait_interrupt();
    }
    assert_ne!(driver.read(reg::STATUS), 0);
}

#[test]
fn a_refusal_is_heard() {
    let (_directory, socket) = place();
    let script = |request| match request {
        1 => Answer::Value(FEATURES),
        // REPLY_ACK
        15 => Answer::Value(1 << 3),
        // SET_OWNER and SET_PROTOCOL_FEATURES come before the agreement.
        3 | 16 => Answer::Nothing,
        // SET_MEM_TABLE
        5 => Answer::Value(1),
        _ => Answer::Value(0),
    };
    let backend = backend(&socket, script);
    let driver = plug(&socket, 1);
    driver.start(&[SIZE; 2]);
    backend.join().unwrap();
    while driver.config::<1>(6) != [0] {
        driver.wait_interrupt();
    }
}

#[test]
fn any_bytes_are_survived() {
    use proptest::prelude::*;
    let config = ProptestConfig {
        cases: 64,
        ..ProptestConfig::default()
    };
    proptest!(config, |(answers in prop::collection::vec(prop::collection::vec(any::<u8>(), 12..40), 3..6), sane: bool)| {
        let (_directory, socket) = place();
        let answers = std::sync::Mutex::new(answers);
        let backend = backend(&socket, move |request| match (sane, request) {
            (true, 1) => Answer::Value(FEATURES | F_PROTOCOL),
            (_, 1 | 11 | 15 | 17) => match answers.lock().unwrap().pop() {
                Some(bytes) => Answer::Bytes(bytes),
                None => Answer::Close,
            },
            _ => Answer::Nothing,
        });
        prop_assert!(VhostNet::connect(identity(), &socket, 1).is_err());
        backend.join().unwrap();
    });
}
