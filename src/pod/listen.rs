//! The sockets at which a vsock device delivers what the guest dials: `<path>_<port>`.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use cube_guest::{CONTROL_PORT, STREAM_PORT};

use super::ready::Ready;
use super::session::Session;

/// Connections taken per port and turn, so that a flood of them does not starve the rest of the loop.
const MAX_ACCEPTS: usize = 16;

/// Why the ports could not be listened on.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {}: {source}", path.display())]
pub struct ListenError {
    path: PathBuf,
    source: io::Error,
}

/// The control port and the stream port.
#[derive(Debug)]
pub struct Ports {
    control: UnixListener,
    streams: UnixListener,
}

/// The socket that stands for `port` of the vsock device whose host socket is `vsock`.
pub fn port_path(vsock: &Path, port: u32) -> PathBuf {
    let mut path = OsString::from(vsock);
    path.push(format!("_{port}"));
    path.into()
}

fn bind(vsock: &Path, port: u32) -> Result<UnixListener, ListenError> {
    let path = port_path(vsock, port);
    UnixListener::bind(&path)
        .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
        .map_err(|source| ListenError { path, source })
}

/// A waiting connection; `None` when there is none.
fn accept(listener: &UnixListener) -> io::Result<Option<std::os::unix::net::UnixStream>> {
    match listener.accept() {
        Ok((stream, _)) => Ok(Some(stream)),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
        // The peer gave up between the wake-up and the accept.
        Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => Ok(None),
        Err(e) => Err(e),
    }
}

impl Ports {
    /// Listens beside `vsock`, the path in the machine's vsock specification. To be done before the
    /// machine starts: the guest dials once.
    ///
    /// # Errors
    /// The path is too long for a Unix socket (107 bytes), taken, or not writable.
    pub fn bind(vsock: &Path) -> Result<Self, ListenError> {
        Ok(Self {
            control: bind(vsock, CONTROL_PORT)?,
            streams: bind(vsock, STREAM_PORT)?,
        })
    }

    /// Descriptors to poll for reading.
    pub fn interests(&self) -> [BorrowedFd<'_>; 2] {
        [self.control.as_fd(), self.streams.as_fd()]
    }

    /// Hands waiting connections to `session`.
    ///
    /// # Errors
    /// The host cannot accept: out of descriptors or memory.
    pub(crate) fn turn(&self, session: &mut Session, ready: &Ready) -> io::Result<()> {
        let accept = |listener| match ready.has(listener) {
            true => accept(listener),
            false => Ok(None),
        };
        for _ in 0..MAX_ACCEPTS {
            let Some(stream) = accept(&self.control)? else {
                break;
            };
            session.adopt_control(stream)?;
        }
        for _ in 0..MAX_ACCEPTS {
            let Some(stream) = accept(&self.streams)? else {
                break;
            };
            session.adopt_stream(stream)?;
        }
        Ok(())
    }
}
