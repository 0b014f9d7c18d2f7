//! The control connection to a backend: requests and their answers, each before a deadline.
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

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, connect, recv, sendmsg, socket_with,
};

use super::message::{HEADER_LEN, Request};

/// The most files of one message: guest memory has two regions at most.
const MAX_FILES: usize = 2;

/// What is wrong with a backend, as the rest of a sentence about it.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// Nobody listens.
    #[error("cannot be reached: {0}")]
    Unreachable(#[source] io::Error),
    /// The connection broke.
    #[error("closed the connection")]
    Gone,
    /// The connection failed.
    #[error("cannot be spoken to: {0}")]
    Broken(#[source] io::Error),
    /// It does not answer.
    #[error("did not answer {} within {} s", request.name(), patience.as_secs())]
    Late {
        /// What it was asked.
        request: Request,
        /// How long it had.
        patience: Duration,
    },
    /// Its answer is none.
    #[error("answered {} with something else", .0.name())]
    Answer(Request),
    /// It said no.
    #[error("refused {}", .0.name())]
    Refused(Request),
    /// It lacks what is needed.
    #[error("{0}")]
    Lacks(String),
}

/// How long a conversation may take.
#[derive(Debug, Clone, Copy)]
pub struct Deadline {
    end: Instant,
    patience: Duration,
}

impl Deadline {
    /// `patience` from now.
    pub fn after(patience: Duration) -> Self {
        let now = Instant::now();
        Self {
            end: now.checked_add(patience).unwrap_or(now),
            patience,
        }
    }
}

/// A connected backend.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
    /// The backend answers every request.
    acknowledges: bool,
}

impl AsFd for Connection {
    /// Readable between requests when the backend has gone (or speaks unasked, which it may not).
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Connection {
    /// Connects to the backend that listens at `path`.
    ///
    /// # Errors
    /// [`Fault::Unreachable`].
    pub fn open(path: &Path) -> Result<Self, Fault> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let connected = || {
            let address = SocketAddrUnix::new(path)?;
            let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            connect(&socket, &address)?;
            Ok(socket)
        };
        let socket = connected().map_err(|error: Errno| Fault::Unreachable(error.into()))?;
        Ok(Self {
            socket,
            acknowledges: false,
        })
    }

    /// From now on every request is answered (REPLY_ACK was negotiated).
    pub fn expect_acknowledgements(&mut self) {
        self.acknowledges = true;
    }

    /// Asks for something that fits `N` bytes.
    ///
    /// # Errors
    /// The backend's fault; the connection is of no use any more.
    pub fn ask<const N: usize>(
        &mut self,
        request: Request,
        payload: &[u8],
        deadline: Deadline,
    ) -> Result<[u8; N], Fault> {
        self.send(request, &request.message(payload, false), &[], deadline)?;
        self.answer(request, deadline)
    }

    /// Tells it something, and hands files over with it.
    ///
    /// # Errors
    /// The backend's fault, or its refusal; the connection is of no use any more.
    pub fn tell(
        &mut self,
        request: Request,
        payload: &[u8],
        files: &[BorrowedFd<'_>],
        deadline: Deadline,
    ) -> Result<(), Fault> {
        let message = request.message(payload, self.acknowledges);
        self.send(request, &message, files, deadline)?;
        if self.acknowledges {
            let answer = self.answer(request, deadline)?;
            if u64::from_le_bytes(answer) != 0 {
                return Err(Fault::Refused(request));
            }
        }
        Ok(())
    }

    fn send(
        &mut self,
        request: Request,
        message: &[u8],
        files: &[BorrowedFd<'_>],
        deadline: Deadline,
    ) -> Result<(), Fault> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(files)) {
            let many = io::Error::new(io::ErrorKind::InvalidInput, "too many files");
            return Err(Fault::Broken(many));
        }
        let mut left = message;
        while !left.is_empty() {
            let bytes = [IoSlice::new(left)];
            match sendmsg(&self.socket, &bytes, &mut ancillary, SendFlags::NOSIGNAL) {
                Ok(sent) => {
                    // The files went with the first byte.
                    ancillary.clear();
                    left = left.get(sent..).unwrap_or_default();
                }
                Err(error) => self.wait(error, request, PollFlags::OUT, deadline)?,
            }
        }
        Ok(())
    }

    fn answer<const N: usize>(
        &mut self,
        request: Request,
        deadline: Deadline,
    ) -> Result<[u8; N], Fault> {
        let mut header = [0; HEADER_LEN];
        self.receive(&mut header, request, deadline)?;
        if !request.is_answered_by(header, N) {
            return Err(Fault::Answer(request));
        }
        let mut payload = [0; N];
        self.receive(&mut payload, request, deadline)?;
        Ok(payload)
    }

    /// Files that come with it are the kernel's to close.
    fn receive(
        &mut self,
        bytes: &mut [u8],
        request: Request,
        deadline: Deadline,
    ) -> Result<(), Fault> {
        let mut left = bytes;
        while !left.is_empty() {
            match recv(&self.socket, &mut *left, RecvFlags::empty()) {
                Ok((0, _)) => return Err(Fault::Gone),
                Ok((received, _)) => left = left.get_mut(received..).unwrap_or_default(),
                Err(error) => self.wait(error, request, PollFlags::IN, deadline)?,
            }
        }
        Ok(())
    }

    /// After a call that failed: sleeps until another may succeed.
    fn wait(
        &self,
        error: Errno,
        request: Request,
        readiness: PollFlags,
        deadline: Deadline,
    ) -> Result<(), Fault> {
        match error {
            Errno::AGAIN | Errno::INTR => {}
            Errno::PIPE | Errno::CONNRESET => return Err(Fault::Gone),
            other => return Err(Fault::Broken(other.into())),
        }
        let left = deadline.end.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(|_| Fault::Gone)?;
        let mut fds = [PollFd::new(&self.socket, readiness)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) => Err(Fault::Late {
                request,
                patience: deadline.patience,
            }),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(other) => Err(Fault::Broken(other.into())),
        }
    }
}
