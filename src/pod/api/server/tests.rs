//! The server and its clients, turn by turn: no test waits for time to pass.

use super::*;

struct Place {
    _directory: tempfile::TempDir,
    server: Server,
    path: std::path::PathBuf,
}

fn place(limits: Limits) -> Place {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    Place {
        server: Server::new(UnixListener::bind(&path).unwrap(), limits).unwrap(),
        path,
        _directory: directory,
    }
}

impl Place {
    fn client(&self) -> UnixStream {
        UnixStream::connect(&self.path).unwrap()
    }

    fn turn(&mut self) -> Vec<Call> {
        self.server.turn(&Ready::everything()).unwrap()
    }

    /// The next request, by what poll finds ready.
    fn request(&mut self) -> (ConnectionId, Box<Request>) {
        loop {
            let due = self.server.deadline().filter(|at| *at <= Instant::now());
            let timeout = due.map(|_| rustix::event::Timespec::default());
            let ready = Ready::wait(self.server.interests(), timeout.as_ref()).unwrap();
            for call in self.server.turn(&ready).unwrap() {
                if let Call::Request(id, request) = call {
                    return (id, request);
                }
            }
        }
    }
}

fn said(mut client: UnixStream) -> String {
    let mut text = String::new();
    client.read_to_string(&mut text).unwrap();
    text
}

const GET: &[u8] = b"GET /v1/pod HTTP/1.1\r\n\r\n";

#[test]
fn a_client_that_says_half_a_request_loses_patience() {
    let mut place = place(Limits {
        patience: Duration::ZERO,
        ..Limits::default()
    });
    for half in [
        &b""[..],
        b"GET /v1",
        b"POST / HTTP/1.1\r\ncontent-length: 5\r\n\r\n{",
    ] {
        let mut client = place.client();
        client.write_all(half).unwrap();
        // It is taken in, and with no patience its time is up by the next turn.
        assert!(
            place
                .turn()
                .iter()
                .all(|call| matches!(call, Call::Gone(_)))
        );
        place.turn();
        assert!(place.server.connections.is_empty());
        // The end, or a reset if something had not been read.
        assert!(matches!(client.read(&mut [0]), Ok(0) | Err(_)));
    }
}

#[test]
fn a_client_that_does_not_read_its_response_is_dropped_and_one_that_waits_is_not() {
    let mut place = place(Limits::default());
    let mut slow = place.client();
    slow.write_all(GET).unwrap();
    let (id, _) = place.request();
    // As long as it is served there is no deadline: the answer may take its time.
    assert_eq!(place.server.deadline(), None);
    let much = json!("x".repeat(4 << 20));
    place.server.respond(id, 200, Some(&much));
    assert!(place.server.deadline().is_some());
    let connection = place.server.connections.get_mut(&id).unwrap();
    assert!(!connection.out.is_empty());
    connection.deadline = Some(Instant::now());
    let calls = place.turn();
    assert!(matches!(calls.as_slice(), [Call::Gone(gone)] if *gone == id));
}

#[test]
fn no_more_connections_are_taken_than_are_served() {
    let mut place = place(Limits {
        connections: 3,
        ..Limits::default()
    });
    let mut clients: Vec<_> = (0..5).map(|_| place.client()).collect();
    place.turn();
    assert_eq!(place.server.connections.len(), 3);
    // Those that wait cost nothing and are not polled for.
    assert_eq!(place.server.interests().len(), 3);
    clients[4].write_all(GET).unwrap();
    drop(clients.drain(..4));
    let (id, _) = place.request();
    place.server.respond(id, 204, None);
    clients[0].shutdown(Shutdown::Write).unwrap();
    place.turn();
    assert!(said(clients.remove(0)).starts_with("HTTP/1.1 204 "));
}

#[test]
fn a_client_that_asks_for_much_at_once_is_answered_in_order() {
    let mut place = place(Limits::default());
    let mut client = place.client();
    client.write_all(&[GET, GET, GET].concat()).unwrap();
    for number in 0..3 {
        let (id, _) = place.request();
        place.server.respond(id, 200, Some(&json!(number)));
    }
    client.shutdown(Shutdown::Write).unwrap();
    place.turn();
    let text = said(client);
    let at = |number: u32| text.find(&format!("\r\n\r\n{number}\n")).unwrap();
    assert!(at(0) < at(1) && at(1) < at(2), "{text}");
}

#[test]
fn what_is_no_request_is_refused_and_the_connection_closed() {
    let mut place = place(Limits::default());
    let mut client = place.client();
    client.write_all(b"\x16\x03\x01\r\n\r\n").unwrap();
    place.turn();
    place.turn();
    assert!(said(client).starts_with("HTTP/1.1 400 "));
    place.turn();
    assert!(place.server.connections.is_empty());
}
