//! The socket and its connections: reads requests, writes responses, drops clients that hang.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use serde_json::{Value, json};

use super::http::{self, Parser, Refusal, Request};
use super::routes;
use crate::pod::ready::Ready;

/// What clients may ask of this side's memory and time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Connections served at one time; further ones wait in the socket's backlog.
    pub(crate) connections: usize,
    /// A client that has not sent a whole request, or not read its response, for so long is dropped.
    pub(crate) patience: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 512,
            patience: Duration::from_secs(10),
        }
    }
}

/// Bytes read at a time.
const READ_SIZE: usize = 16 << 10;

/// Names a connection; never used twice.
pub(crate) type ConnectionId = u64;

#[derive(Debug, PartialEq, Eq)]
enum State {
    /// A request is on its way.
    Receiving,
    /// It is being served.
    Serving,
    /// The body goes on until it is finished.
    Streaming,
    /// The last response is on its way out.
    Closing,
}

#[derive(Debug)]
struct Connection {
    socket: UnixStream,
    parser: Parser,
    out: Vec<u8>,
    state: State,
    close: bool,
    /// A further request may have arrived behind the last one.
    again: bool,
    deadline: Option<Instant>,
    patience: Duration,
}

/// The API's socket.
#[derive(Debug)]
pub(crate) struct Server {
    listener: UnixListener,
    connections: BTreeMap<ConnectionId, Connection>,
    next: ConnectionId,
    limits: Limits,
}

/// What became of a connection in a turn.
#[derive(Debug)]
pub(crate) enum Call {
    /// A request, to be answered.
    Request(ConnectionId, Box<Request>),
    /// The client has gone, whatever it was waiting for.
    Gone(ConnectionId),
}

impl Server {
    /// Serves at `listener`, which only this user can reach: the directory that it is in is private.
    pub(crate) fn new(listener: UnixListener, limits: Limits) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self {
            listener,
            connections: BTreeMap::new(),
            next: 1,
            limits,
        })
    }

    /// Descriptors to poll, level-triggered.
    pub(crate) fn interests(&self) -> Vec<(BorrowedFd<'_>, PollFlags)> {
        let mut interests = Vec::new();
        if self.connections.len() < self.limits.connections {
            interests.push((self.listener.as_fd(), PollFlags::IN));
        }
        for connection in self.connections.values() {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, connection.state == State::Receiving);
            flags.set(PollFlags::OUT, !connection.out.is_empty());
            interests.push((connection.socket.as_fd(), flags));
        }
        interests
    }

    /// When the next client loses this side's patience.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let next = |c: &Connection| match c.again {
            true => Some(Instant::now()),
            false => c.deadline,
        };
        self.connections.values().filter_map(next).min()
    }

    /// Does what is ready.
    pub(crate) fn turn(&mut self, ready: &Ready) -> io::Result<Vec<Call>> {
        while self.connections.len() < self.limits.connections && ready.has(&self.listener) {
            match self.listener.accept() {
                Ok((socket, _)) => self.adopt(socket)?,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(e) => return Err(e),
            }
        }
        let mut calls = Vec::new();
        self.connections.retain(|id, connection| {
            let late = connection.deadline.is_some_and(|at| at <= Instant::now());
            let alive = !late && connection.turn(*id, ready, &mut calls);
            if !alive {
                calls.push(Call::Gone(*id));
            }
            alive
        });
        Ok(calls)
    }

    fn adopt(&mut self, socket: UnixStream) -> io::Result<()> {
        socket.set_nonblocking(true)?;
        let connection = Connection {
            socket,
            parser: Parser::new(routes::body_limit),
            out: Vec::new(),
            state: State::Receiving,
            close: false,
            again: false,
            deadline: Some(Instant::now() + self.limits.patience),
            patience: self.limits.patience,
        };
        self.connections.insert(self.next, connection);
        self.next += 1;
        Ok(())
    }

    /// Answers a request. A client that has gone is no error.
    pub(crate) fn respond(&mut self, id: ConnectionId, status: u16, body: Option<&Value>) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.respond(status, body);
        }
    }

    /// Answers a request with text.
    pub(crate) fn respond_text(&mut self, id: ConnectionId, content_type: &str, body: &str) {
        if let Some(connection) = self.connections.get_mut(&id) {
            let response = http::text_response(200, content_type, body, connection.close);
            connection.send_response(&response);
        }
    }

    /// Answers a request with an error.
    pub(crate) fn refuse(&mut self, id: ConnectionId, refusal: &Refusal) {
        self.respond(id, refusal.status, Some(&error_body(refusal)));
    }

    /// Begins a body that ends with the connection.
    pub(crate) fn begin_stream(&mut self, id: ConnectionId, content_type: &str) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.out.extend(http::stream_head(content_type));
            connection.state = State::Streaming;
        }
    }

    /// Whether the client has taken all that it was sent: only then it is sent more.
    pub(crate) fn is_drained(&self, id: ConnectionId) -> bool {
        self.connections
            .get(&id)
            .is_some_and(|connection| connection.out.is_empty())
    }

    /// Sends more of a streamed body.
    pub(crate) fn send(&mut self, id: ConnectionId, bytes: &[u8]) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.out.extend_from_slice(bytes);
            connection.flush();
        }
    }

    /// Ends a streamed body.
    pub(crate) fn finish(&mut self, id: ConnectionId) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.state = State::Closing;
            connection.deadline = Some(Instant::now() + connection.patience);
            connection.flush();
        }
    }

    /// Makes a raw stream of a connection: the socket, and the bytes that came behind the request.
    pub(crate) fn upgrade(&mut self, id: ConnectionId) -> Option<(UnixStream, Vec<u8>)> {
        self.hand_over(id, http::SWITCHING)
    }

    /// Gives the connection away after `head`: the socket, and the bytes that came behind the request.
    pub(crate) fn hand_over(
        &mut self,
        id: ConnectionId,
        head: &[u8],
    ) -> Option<(UnixStream, Vec<u8>)> {
        let mut connection = self.connections.remove(&id)?;
        // A fresh socket's buffer holds these few bytes; one that does not is a client that never reads.
        connection.socket.write_all(head).ok()?;
        Some((connection.socket, connection.parser.into_rest()))
    }

    /// Writes what is left to clients that read, at the pod's end.
    pub(crate) fn close(&mut self) {
        for connection in self.connections.values_mut() {
            connection.flush();
            let _ = connection.socket.shutdown(Shutdown::Both);
        }
    }
}

/// An error as the API says it.
pub(crate) fn error_body(refusal: &Refusal) -> Value {
    match &refusal.field {
        Some(field) => json!({ "error": refusal.sentence, "field": field }),
        None => json!({ "error": refusal.sentence }),
    }
}

impl Connection {
    fn respond(&mut self, status: u16, body: Option<&Value>) {
        let response = http::response(status, body, self.close);
        self.send_response(&response);
    }

    fn send_response(&mut self, response: &[u8]) {
        self.out.extend_from_slice(response);
        self.state = if self.close {
            State::Closing
        } else {
            State::Receiving
        };
        self.again = !self.parser.is_empty();
        self.deadline = Some(Instant::now() + self.patience);
        self.flush();
    }

    /// Whether the connection goes on.
    fn turn(&mut self, id: ConnectionId, ready: &Ready, calls: &mut Vec<Call>) -> bool {
        let again = std::mem::take(&mut self.again);
        if !again && !ready.has(&self.socket) {
            return true;
        }
        if !self.flush() {
            return false;
        }
        match self.state {
            State::Receiving if self.out.is_empty() => self.receive(id, calls),
            State::Receiving => true,
            State::Closing => !self.out.is_empty(),
            State::Serving | State::Streaming => !self.has_gone(),
        }
    }

    /// Writes what the client takes now; `false` if it has gone.
    fn flush(&mut self) -> bool {
        while !self.out.is_empty() {
            match self.socket.write(&self.out) {
                Ok(length @ 1..) => drop(self.out.drain(..length)),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return true,
                Ok(_) | Err(_) => return false,
            }
        }
        if self.state == State::Closing {
            // Wakes the loop, which then forgets the connection.
            let _ = self.socket.shutdown(Shutdown::Both);
        }
        true
    }

    /// A client that closed its socket; one that only shut down its sending side still waits.
    fn has_gone(&self) -> bool {
        let mut fds = [rustix::event::PollFd::new(&self.socket, PollFlags::empty())];
        let now = rustix::event::Timespec::default();
        rustix::event::poll(&mut fds, Some(&now)).is_ok_and(|count| count > 0)
    }

    fn receive(&mut self, id: ConnectionId, calls: &mut Vec<Call>) -> bool {
        let mut piece = [0; READ_SIZE];
        loop {
            match self.parser.take() {
                Ok(Some(request)) => {
                    self.state = State::Serving;
                    self.close = request.close;
                    self.deadline = None;
                    calls.push(Call::Request(id, Box::new(request)));
                    return true;
                }
                Ok(None) => {}
                Err(refusal) => {
                    self.close = true;
                    self.respond(refusal.status, Some(&error_body(&refusal)));
                    return true;
                }
            }
            match self.socket.read(&mut piece) {
                Ok(length @ 1..) => self.parser.push(&piece[..length]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return true,
                Ok(_) | Err(_) => return false,
            }
        }
    }
}

#[cfg(test)]
mod tests;
