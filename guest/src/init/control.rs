//! The control connection: frames to and from the host, never blocking.
//!
//! ```text
//! Connecting ──▶ Open ──(everything is said: shutdown)──▶ Closing ──(the host closes)──▶ Gone
//!      └───────────┴──────────── any error ─────────────────┴────────────────────────────▲
//! ```
#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;

use cube_guest::frame::{self, Decoder};
use cube_guest::{CONTROL_PORT, GuestMessage, HostMessage, PROTOCOL_VERSION};
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown};

use crate::error::log_error;
use crate::events::{Poller, Source, Watched};
use crate::stream::connection;
use crate::sys;

/// Bytes read at a time: control frames are small.
const READ: usize = 4096;

/// The control connection.
#[derive(Debug)]
pub(crate) struct Control {
    state: State,
    /// Absent only when `Gone`.
    socket: Option<Watched>,
    /// Frames not yet written.
    outgoing: Vec<u8>,
    incoming: Decoder,
    /// Nothing more will be said.
    finished: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Connecting,
    Open,
    Closing,
    Gone,
}

/// What a turn brought.
#[derive(Debug, Default)]
pub(crate) struct Turn {
    /// The connection came up in this turn.
    pub(crate) connected: bool,
    /// What the host asks for.
    pub(crate) messages: Vec<HostMessage>,
}

impl Control {
    /// Dials the host; `Hello` goes out first. A host that cannot be dialled is logged, and the pod
    /// goes on without.
    pub(crate) fn dial(poller: &Poller) -> Self {
        let dialled = sys::dial_host(CONTROL_PORT);
        if let Err(error) = &dialled {
            log_error(&format!(
                "cannot dial the host's vsock port {CONTROL_PORT}: {error}"
            ));
        }
        let mut control = Self::over(dialled.ok());
        control.rearm(poller);
        control
    }

    fn over(socket: Option<OwnedFd>) -> Self {
        let mut control = Self {
            state: if socket.is_some() {
                State::Connecting
            } else {
                State::Gone
            },
            socket: socket.map(|socket| Watched::new(socket, Source::Control)),
            outgoing: Vec::new(),
            incoming: Decoder::default(),
            finished: false,
        };
        control.queue(&GuestMessage::Hello {
            protocol: PROTOCOL_VERSION,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        });
        control
    }

    /// Whether nothing can be said or heard any more.
    pub(crate) fn is_gone(&self) -> bool {
        self.state == State::Gone
    }

    /// Says `message` to the host, now or as soon as there is room.
    pub(crate) fn send(&mut self, message: &GuestMessage, poller: &Poller) {
        self.queue(message);
        self.advance(poller);
    }

    /// Says nothing more after what was said: shuts the sending side down, and the connection is gone when
    /// the host has closed it.
    pub(crate) fn finish(&mut self, poller: &Poller) {
        self.finished = true;
        self.advance(poller);
    }

    /// Does what can be done now.
    pub(crate) fn turn(&mut self, poller: &Poller) -> Turn {
        let mut turn = Turn::default();
        if self.state == State::Connecting {
            turn.connected = self.connect(poller);
        }
        if matches!(self.state, State::Open | State::Closing) {
            self.receive(&mut turn.messages, poller);
        }
        self.advance(poller);
        turn
    }

    fn connect(&mut self, poller: &Poller) -> bool {
        match self.socket.as_ref().map(connection) {
            Some(Ok(true)) => self.state = State::Open,
            Some(Ok(false)) | None => {}
            Some(Err(error)) => self.fail(&format!("the host does not answer: {error}"), poller),
        }
        self.state == State::Open
    }

    fn receive(&mut self, messages: &mut Vec<HostMessage>, poller: &Poller) {
        let Some(socket) = &self.socket else { return };
        let mut buffer = [0; READ];
        match rustix::net::recv(socket, &mut buffer[..], RecvFlags::empty()) {
            Ok((_, 0)) => return self.close(poller),
            Ok((_, read)) => self.incoming.push(&buffer[..read]),
            Err(Errno::AGAIN | Errno::INTR) => return,
            Err(error) => return self.fail(&error.to_string(), poller),
        }
        loop {
            match self.incoming.take() {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => return,
                Err(error) => return self.fail(&error.to_string(), poller),
            }
        }
    }

    fn queue(&mut self, message: &GuestMessage) {
        match frame::encode(message) {
            _ if self.state == State::Gone => {}
            Ok(frame) => self.outgoing.extend_from_slice(&frame),
            Err(error) => log_error(&error.to_string()),
        }
    }

    /// Writes what is queued, shuts down when that was all, and watches what comes next.
    fn advance(&mut self, poller: &Poller) {
        if self.state == State::Open && !self.outgoing.is_empty() {
            self.write(poller);
        }
        if self.state == State::Open
            && self.finished
            && self.outgoing.is_empty()
            && let Some(socket) = &self.socket
        {
            self.state = State::Closing;
            if rustix::net::shutdown(socket, Shutdown::Write).is_err() {
                self.close(poller);
            }
        }
        self.rearm(poller);
    }

    fn write(&mut self, poller: &Poller) {
        let Some(socket) = &self.socket else { return };
        match rustix::net::send(socket, &self.outgoing, SendFlags::NOSIGNAL) {
            Ok(written) => drop(self.outgoing.drain(..written)),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => self.fail(&error.to_string(), poller),
        }
    }

    fn rearm(&mut self, poller: &Poller) {
        let mut wanted = EventFlags::IN;
        wanted.set(EventFlags::OUT, !self.outgoing.is_empty());
        if self.state == State::Connecting {
            wanted = EventFlags::OUT;
        }
        if let Some(socket) = &mut self.socket
            && let Err(error) = socket.watch(poller, Some(wanted))
        {
            self.fail(&error.to_string(), poller);
        }
    }

    fn fail(&mut self, why: &str, poller: &Poller) {
        log_error(&format!("the control connection is lost: {why}"));
        self.close(poller);
    }

    fn close(&mut self, poller: &Poller) {
        self.state = State::Gone;
        self.outgoing = Vec::new();
        if let Some(socket) = self.socket.take() {
            socket.close(poller);
        }
    }
}

#[cfg(test)]
mod tests;
