//! One stream with its socket: moves bytes between the socket and guest memory as
//! [`Connection`] allows.
//!
//! Towards the host, a packet's payload goes from guest memory straight into the socket; what the socket
//! does not take is copied into `pending`, which credit bounds, and follows when the socket is writable.
//! Towards the guest, bytes are read from the socket straight into guest memory; nothing is buffered.
//!
//! Whoever accepted a stream of the guest's may pass it on to another socket ([`super::passing`]). Until that, its bytes
//! towards the guest are copied once, a packet at a time: a descriptor may come with them.
//!
//! The socket is polled edge-triggered: `readable` stays set until a read has found the socket empty, and
//! writability is watched only while something waits for the socket. So a stream in full flow costs no epoll
//! call at all.
#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::arithmetic_side_effects
    )
)]

use std::io;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::event::epoll::EventFlags;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use super::connection::{Connection, Phase};
use super::packet::HEADER_LEN;
use super::passing::{self, PassedOn, Until};
use super::ring::{Ring, SpareRings};
use crate::vmm::memory::GuestMemory;
use crate::vmm::virtio::GuestFault;
use crate::vmm::virtio::chain::Segments;
use crate::vmm::virtio::iovec::IoVecs;

/// Bytes that are read at a time from a socket whose other end may pass the stream on: what fits into one of the
/// buffers that Linux posts (4 KiB, with the header).
const PASSABLE_READ: u32 = 4096 - HEADER_LEN as u32;

/// Bytes that nobody read before the stream was passed on are moved in pieces of this size.
const UNREAD_PIECE: usize = 4096;

/// One stream: its protocol state, its socket, and the bytes between.
pub struct Stream {
    /// The protocol state.
    pub connection: Connection,
    /// When the phase's deadline is, if it has one.
    pub deadline: Option<Instant>,
    /// Gone when the host's side is closed.
    socket: Option<UnixStream>,
    /// What the socket has not taken yet; as long as `connection.held()`.
    pending: Ring,
    /// A read may find bytes or the end.
    readable: bool,
    /// The end comes after what is there to read: a read that comes back short is not the last.
    ending: bool,
    /// Polled for writability.
    watched: bool,
    /// The client waits to be told `OK`.
    greet: bool,
    write_shut: bool,
    read_shut: bool,
    passing: Passing,
}

/// Whether the stream was passed on.
enum Passing {
    /// It was not, and cannot be.
    Never,
    /// It can be.
    Possible,
    /// It was.
    Done {
        /// The socket that was there before, held open: its hang-up is how its other end sees the stream's end.
        before: UnixStream,
        /// What the guest sent there and nobody has read: it goes to the new socket before everything else.
        unread: Option<UnixStream>,
        until: Until,
        /// The new socket is polled in place of the one before.
        polled: bool,
    },
}

impl Stream {
    /// The guest dialled; the host has accepted.
    pub fn answered(connection: Connection, socket: UnixStream) -> Self {
        Self {
            connection,
            deadline: None,
            socket: Some(socket),
            pending: Ring::default(),
            readable: true,
            ending: false,
            watched: false,
            greet: false,
            write_shut: false,
            read_shut: false,
            passing: Passing::Possible,
        }
    }

    /// A client of the host dials; the guest has yet to accept.
    pub fn dialled(connection: Connection, client: UnixStream) -> Self {
        Self {
            greet: true,
            passing: Passing::Never,
            ..Self::answered(connection, client)
        }
    }

    /// The socket, unless the host's side is closed.
    pub fn socket(&self) -> Option<&UnixStream> {
        self.socket.as_ref()
    }

    /// The events that the socket is to be polled for.
    pub fn events(&self) -> EventFlags {
        let mut events = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
        if self.waits_for_socket() {
            events |= EventFlags::OUT;
        }
        events
    }

    /// Whether there are bytes that the socket has not taken.
    fn waits_for_socket(&self) -> bool {
        !self.pending.is_empty() || self.has_unread()
    }

    fn has_unread(&self) -> bool {
        matches!(&self.passing, Passing::Done { unread, .. } if unread.is_some())
    }

    /// The events to poll for, if they are others than before.
    pub fn changed_events(&mut self) -> Option<EventFlags> {
        let watch = self.waits_for_socket();
        if std::mem::replace(&mut self.watched, watch) == watch {
            return None;
        }
        Some(self.events())
    }

    /// Takes what epoll says about the socket.
    pub fn on_events(&mut self, events: EventFlags, spare: &mut SpareRings) {
        let end = EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR;
        self.ending |= events.intersects(end);
        self.readable |= events.intersects(end | EventFlags::IN);
        if events.intersects(EventFlags::HUP) {
            self.connection.hung_up();
        }
        if events.intersects(EventFlags::OUT | EventFlags::HUP | EventFlags::ERR) {
            self.flush(spare);
        }
    }

    /// Whether the stream has something for the guest, as far as is known without asking the socket.
    pub fn wants_turn(&self) -> bool {
        self.connection.has_control() || (self.readable && self.connection.room() > 0)
    }

    /// Asks the guest for credit if only that is missing.
    pub fn notice_drought(&mut self) {
        if self.readable {
            self.connection.wants_room();
        }
    }

    /// The guest accepted: tells the client, in the dialect, which host port it got.
    pub fn opened(&mut self, port: u32) {
        if !std::mem::take(&mut self.greet) {
            return;
        }
        let line = format!("OK {port}\n");
        let sent = self.socket.as_ref().map(|to| send(to, line.as_bytes()));
        // Nothing was sent before it, so there is space for it, unless the client is gone.
        if !matches!(sent, Some(Ok(n)) if n as usize == line.len()) {
            self.connection.sink_refused();
        }
    }

    /// Takes `len` bytes of payload that the connection has accepted, after the header in `packet`.
    ///
    /// # Errors
    /// The packet's memory cannot be read.
    pub fn take_payload(
        &mut self,
        memory: &GuestMemory,
        packet: &Segments,
        len: u32,
        spare: &mut SpareRings,
    ) -> Result<(), GuestFault> {
        let mut offset = header_len();
        let mut left = len;
        if !self.waits_for_socket() && left > 0 {
            let sent = match self.send_directly(memory, packet, offset, left)? {
                Ok(sent) => sent,
                Err(_) => {
                    self.refused(spare);
                    return Ok(());
                }
            };
            self.connection.forwarded(sent);
            offset = offset.saturating_add(sent);
            left = left.saturating_sub(sent);
        }
        if left > 0 {
            self.hold(memory, packet, offset, left, spare)?;
        }
        self.apply_shutdown();
        Ok(())
    }

    /// Sends straight from guest memory; 0 when the socket takes nothing now.
    fn send_directly(
        &self,
        memory: &GuestMemory,
        packet: &Segments,
        offset: u32,
        len: u32,
    ) -> Result<io::Result<u32>, GuestFault> {
        let Some(socket) = &self.socket else {
            return Ok(Err(io::ErrorKind::NotConnected.into()));
        };
        let mut vectors = IoVecs::new(memory, packet, offset, len)?;
        Ok(patiently(|| vectors.send_some(socket.as_fd())))
    }

    /// Copies what the socket did not take.
    fn hold(
        &mut self,
        memory: &GuestMemory,
        packet: &Segments,
        offset: u32,
        len: u32,
        spare: &mut SpareRings,
    ) -> Result<(), GuestFault> {
        if self.pending.capacity() == 0 {
            self.pending = spare.take(self.connection.buffer() as usize);
        }
        // Credit bounds what is held, these bytes included: there is space.
        let (first, second) = self
            .pending
            .append(len as usize)
            .ok_or(GuestFault::Request)?;
        packet.read(memory, offset, first)?;
        let split = u32::try_from(first.len()).map_err(|_| GuestFault::Request)?;
        packet.read(memory, offset.saturating_add(split), second)
    }

    /// Passes pending bytes on, as many as the socket takes.
    pub fn flush(&mut self, spare: &mut SpareRings) {
        match self.flush_unread() {
            Ok(true) => {}
            Ok(false) => return,
            Err(_) => self.refused(spare),
        }
        while !self.pending.is_empty() {
            let Some(socket) = &self.socket else {
                self.refused(spare);
                return;
            };
            let first = self.pending.front();
            match send(socket, first) {
                Ok(0) => return,
                Ok(sent) => {
                    self.pending.consume(sent as usize);
                    self.connection.forwarded(sent);
                }
                Err(_) => self.refused(spare),
            }
        }
        spare.give(std::mem::take(&mut self.pending));
        self.apply_shutdown();
    }

    /// Passes on what nobody read before the stream was; whether that is all.
    fn flush_unread(&mut self) -> io::Result<bool> {
        let (Passing::Done { unread, .. }, Some(socket)) = (&mut self.passing, &self.socket) else {
            return Ok(true);
        };
        while let Some(source) = unread {
            let mut piece = [0; UNREAD_PIECE];
            let flags = RecvFlags::DONTWAIT;
            let length = match rustix::net::recv(&*source, &mut piece, flags | RecvFlags::PEEK) {
                Ok((_, length)) => length,
                Err(Errno::INTR) => continue,
                Err(_) => 0,
            };
            let bytes = piece.get(..length).unwrap_or_default();
            // At its end, or empty: this device alone writes there, and it does so no more.
            if bytes.is_empty() {
                *unread = None;
                break;
            }
            let sent = send(socket, bytes)? as usize;
            if sent == 0 {
                return Ok(false);
            }
            let taken = piece.get_mut(..sent).unwrap_or_default();
            rustix::net::recv(&*source, taken, flags)?;
        }
        Ok(true)
    }

    fn refused(&mut self, spare: &mut SpareRings) {
        if let Passing::Done { unread, .. } = &mut self.passing {
            *unread = None;
        }
        spare.give(std::mem::take(&mut self.pending));
        self.connection.sink_refused();
    }

    /// Shuts the sides of the socket that the guest has shut.
    pub fn apply_shutdown(&mut self) {
        let (Some(socket), false) = (&self.socket, self.has_unread()) else {
            return;
        };
        // They fail only when the other side is gone, which epoll reports.
        if !self.write_shut && self.connection.write_side_done() {
            self.write_shut = true;
            let _ = socket.shutdown(Shutdown::Write);
        }
        if self.write_shut && self.ends_with_output() {
            self.socket = None;
            self.passing = Passing::Never;
            self.connection.hung_up();
            self.connection.source_ended();
            return;
        }
        if !self.read_shut && self.connection.read_side_done() {
            self.read_shut = true;
            let _ = socket.shutdown(Shutdown::Read);
        }
    }

    fn ends_with_output(&self) -> bool {
        matches!(
            self.passing,
            Passing::Done {
                until: Until::OutputEnds,
                ..
            }
        )
    }

    fn was_just_passed_on(&self) -> bool {
        matches!(self.passing, Passing::Done { polled: false, .. })
    }

    /// Puts the socket that it was passed on to in the place of the one before.
    fn take_over(&mut self, passed: PassedOn, spare: &mut SpareRings) {
        let Some(before) = self.socket.replace(passed.client) else {
            return;
        };
        self.passing = Passing::Done {
            before,
            unread: Some(passed.unread),
            until: passed.until,
            polled: false,
        };
        self.readable = true;
        self.ending = false;
        self.write_shut = false;
        self.read_shut = false;
        self.flush(spare);
        self.watched = self.waits_for_socket();
    }

    /// Once after the stream was passed on: the socket from before, and the one that is to be polled in its place, for
    /// these events.
    pub fn moved(&mut self) -> Option<(&UnixStream, &UnixStream, EventFlags)> {
        let events = self.events();
        match (&mut self.passing, &self.socket) {
            (Passing::Done { before, polled, .. }, Some(socket)) if !*polled => {
                *polled = true;
                Some((before, socket, events))
            }
            _ => None,
        }
    }

    /// Reads bytes of the host straight into `packet`, after the space for the header. Returns how many:
    /// 0 when there are none now, or no credit for them, or the host has ended (the connection knows).
    ///
    /// # Errors
    /// The packet's memory cannot be written.
    pub fn read_into(
        &mut self,
        memory: &GuestMemory,
        packet: &Segments,
        most: u32,
        spare: &mut SpareRings,
    ) -> Result<u32, GuestFault> {
        let space = packet.len().saturating_sub(header_len());
        let most = most.min(space).min(self.connection.room());
        if self.socket.is_none() || most == 0 || !self.readable {
            return Ok(0);
        }
        let (most, result) = match self.passing {
            Passing::Possible => {
                let most = most.min(PASSABLE_READ);
                (most, self.receive(memory, packet, most, spare)?)
            }
            _ => (most, self.receive_directly(memory, packet, most)?),
        };
        match result {
            Ok(0) if self.was_just_passed_on() => Ok(0),
            Ok(0) => {
                self.readable = false;
                // One SHUTDOWN tells of both sides: a host that closed is often seen at its end before
                // epoll says that it hung up.
                if self.socket.as_ref().is_some_and(has_hung_up) {
                    self.connection.hung_up();
                }
                self.connection.source_ended();
                Ok(0)
            }
            Ok(read) => {
                self.readable = self.ending || read == most || self.was_just_passed_on();
                self.connection.sending(read);
                Ok(read)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                Ok(0)
            }
            // Such as "connection reset": the host closed with bytes of the guest unread.
            Err(_) => {
                self.readable = false;
                self.connection.hung_up();
                self.connection.source_ended();
                Ok(0)
            }
        }
    }

    fn receive_directly(
        &self,
        memory: &GuestMemory,
        packet: &Segments,
        most: u32,
    ) -> Result<io::Result<u32>, GuestFault> {
        let Some(socket) = &self.socket else {
            return Ok(Err(io::ErrorKind::NotConnected.into()));
        };
        let mut vectors = IoVecs::new(memory, packet, header_len(), most)?;
        Ok(uninterrupted(|| vectors.receive_some(socket.as_fd())))
    }

    /// As [`Stream::receive_directly`], and looks whether the stream is passed on.
    fn receive(
        &mut self,
        memory: &GuestMemory,
        packet: &Segments,
        most: u32,
        spare: &mut SpareRings,
    ) -> Result<io::Result<u32>, GuestFault> {
        let Some(socket) = &self.socket else {
            return Ok(Err(io::ErrorKind::NotConnected.into()));
        };
        let mut buffer = [0; PASSABLE_READ as usize];
        let buffer = buffer.get_mut(..most as usize).unwrap_or_default();
        let mut passed = None;
        let received = uninterrupted(|| {
            let (length, then) = passing::receive(socket, buffer)?;
            passed = then;
            Ok(length)
        });
        if let Ok(length) = received {
            let bytes = buffer.get(..length as usize).unwrap_or_default();
            packet.write(memory, header_len(), bytes)?;
        }
        if let Some(passed) = passed {
            self.take_over(passed, spare);
        }
        Ok(received)
    }

    /// Closes the host's side at once; what is pending is lost.
    pub fn close(&mut self, spare: &mut SpareRings) {
        self.socket = None;
        self.passing = Passing::Never;
        spare.give(std::mem::take(&mut self.pending));
    }

    /// The guest has ended the stream, and nothing waits for the host: it can be removed.
    pub fn is_over(&self) -> bool {
        self.connection.phase() == Phase::Ended && !self.waits_for_socket()
    }
}

/// Whether both sides of the socket are shut.
fn has_hung_up(socket: &UnixStream) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::empty())];
    let polled = poll(&mut fds, Some(&Timespec::default()));
    let [fd] = fds;
    polled.is_ok() && fd.revents().contains(PollFlags::HUP)
}

fn header_len() -> u32 {
    HEADER_LEN as u32
}

/// Sends from this process's memory; 0 bytes when the socket takes nothing now.
fn send(socket: &UnixStream, bytes: &[u8]) -> io::Result<u32> {
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    patiently(|| Ok(rustix::net::send(socket, bytes, flags)?))
}

/// Repeats a call that a signal interrupts.
fn uninterrupted(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<u32> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return u32::try_from(result?).map_err(io::Error::other),
        }
    }
}

/// The same, and "would block" is 0 bytes.
fn patiently(call: impl FnMut() -> io::Result<usize>) -> io::Result<u32> {
    match uninterrupted(call) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
        result => result,
    }
}
