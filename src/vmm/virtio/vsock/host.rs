//! The host's ends: the socket that programs connect to, and where the guest's own connections go.
//!
//! [`HostPorts`] is the seam: whoever answers for a host port hands over a connected stream socket. There
//! are two: [`UnixPorts`] connects to `<path>_<port>`, and [`LocalPorts`] hands one end of a socket pair
//! to a listener in this process. A device asks the second first.
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

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::VsockError;

/// Connections that wait in a listener's queue at most, in this process or the kernel.
const BACKLOG: u16 = 128;

/// The longest path of a Unix socket, in bytes (`sun_path` less its terminator).
const PATH_MAX: usize = 107;

/// Who answers for host ports.
pub trait HostPorts: Send {
    /// Connects to `port` for the guest: a stream socket, connected and non-blocking. Must not wait.
    ///
    /// # Errors
    /// Any error refuses the guest's connection.
    fn connect(&mut self, port: u32) -> io::Result<UnixStream>;
}

/// Answers for port N with the Unix socket `<path>_N`.
#[derive(Debug, Clone)]
pub struct UnixPorts {
    path: PathBuf,
}

impl UnixPorts {
    /// Ports beside the socket `path`.
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
        }
    }
}

impl HostPorts for UnixPorts {
    fn connect(&mut self, port: u32) -> io::Result<UnixStream> {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        connect(Path::new(&path))
    }
}

/// Connects without waiting: a listener whose queue is full is an error too.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let socket = stream_socket()?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

fn stream_socket() -> rustix::io::Result<OwnedFd> {
    rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
        None,
    )
}

/// Host ports that this process itself listens on. Clones share the ports.
#[derive(Clone, Default)]
pub struct LocalPorts {
    listeners: Arc<Mutex<HashMap<u32, Arc<Backlog>>>>,
}

/// Connections of the guest that nobody has accepted yet.
struct Backlog {
    /// Counts what waits.
    ready: OwnedFd,
    streams: Mutex<VecDeque<UnixStream>>,
}

/// A listener for one host port; dropping it frees the port and the connections that wait.
pub struct LocalListener {
    port: u32,
    backlog: Arc<Backlog>,
    ports: LocalPorts,
}

impl LocalPorts {
    /// No ports.
    pub fn new() -> Self {
        Self::default()
    }

    /// Listens on `port`.
    ///
    /// # Errors
    /// `AddrInUse` if somebody does already, or no descriptor could be made.
    pub fn listen(&self, port: u32) -> io::Result<LocalListener> {
        let mut listeners = lock(&self.listeners);
        if listeners.contains_key(&port) {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK | EventfdFlags::SEMAPHORE;
        let backlog = Arc::new(Backlog {
            ready: eventfd(0, flags)?,
            streams: Mutex::default(),
        });
        listeners.insert(port, backlog.clone());
        Ok(LocalListener {
            port,
            backlog,
            ports: self.clone(),
        })
    }
}

impl LocalPorts {
    /// Whether somebody listens on `port`.
    pub fn has(&self, port: u32) -> bool {
        lock(&self.listeners).contains_key(&port)
    }
}

impl HostPorts for LocalPorts {
    fn connect(&mut self, port: u32) -> io::Result<UnixStream> {
        let listeners = lock(&self.listeners);
        let refused = io::Error::from(io::ErrorKind::ConnectionRefused);
        let Some(backlog) = listeners.get(&port) else {
            return Err(refused);
        };
        let mut streams = lock(&backlog.streams);
        if streams.len() >= BACKLOG.into() {
            return Err(refused);
        }
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        rustix::io::write(&backlog.ready, &1u64.to_ne_bytes())?;
        streams.push_back(theirs);
        Ok(ours)
    }
}

impl LocalListener {
    /// The next connection of the guest to this port, in blocking mode; none if none waits. The
    /// listener's descriptor is readable while one does.
    pub fn accept(&self) -> Option<UnixStream> {
        let stream = lock(&self.backlog.streams).pop_front()?;
        // One count for one stream: there is one to take.
        let _ = rustix::io::read(&self.backlog.ready, &mut [0u8; 8]);
        Some(stream)
    }
}

impl AsFd for LocalListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.backlog.ready.as_fd()
    }
}

impl Drop for LocalListener {
    fn drop(&mut self) {
        lock(&self.ports.listeners).remove(&self.port);
    }
}

/// Nobody panics while holding one of these locks, and what they guard is whole at any time.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A listening Unix socket, non-blocking. Its file goes when it is dropped.
pub struct Listener {
    socket: OwnedFd,
    path: PathBuf,
    /// Device and inode of the file, so that no successor's is removed.
    file: (u64, u64),
}

impl Listener {
    /// Listens at `path`. A socket file that nobody listens on any more is replaced if it is the
    /// caller's own; anything else there is left alone.
    ///
    /// # Errors
    /// The path is too long or taken, or the operating system refused.
    pub fn bind(path: &Path) -> Result<Self, VsockError> {
        let most = PATH_MAX.saturating_sub("_4294967295".len());
        if path.as_os_str().len() > most {
            return Err(VsockError::PathTooLong {
                path: path.to_owned(),
                most,
            });
        }
        remove_stale(path)?;
        let failed = |source: io::Error| VsockError::Listen {
            path: path.to_owned(),
            source,
        };
        let socket = stream_socket().map_err(|e| failed(e.into()))?;
        let address = SocketAddrUnix::new(path).map_err(|e| failed(e.into()))?;
        rustix::net::bind(&socket, &address).map_err(|e| failed(e.into()))?;
        let file = std::fs::symlink_metadata(path).map_err(failed)?;
        let listener = Self {
            socket,
            path: path.to_owned(),
            file: (file.dev(), file.ino()),
        };
        rustix::net::listen(&listener.socket, BACKLOG.into()).map_err(|e| failed(e.into()))?;
        Ok(listener)
    }

    /// Where the socket is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The next client; non-blocking.
    ///
    /// # Errors
    /// `WouldBlock` when there is none; otherwise the operating system's.
    pub fn accept(&self) -> io::Result<UnixStream> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        loop {
            match rustix::net::accept_with(&self.socket, flags) {
                Ok(socket) => return Ok(socket.into()),
                // A client that went away before it was accepted is no reason to stop.
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Ok(file) = std::fs::symlink_metadata(&self.path)
            && (file.dev(), file.ino()) == self.file
        {
            // Nobody is left to tell if it fails.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Removes a socket file at `path` if nobody listens on it and this user owns it.
fn remove_stale(path: &Path) -> Result<(), VsockError> {
    let taken = |why: &'static str| VsockError::Taken {
        path: path.to_owned(),
        why,
    };
    let file = match std::fs::symlink_metadata(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => {
            return Err(VsockError::Listen {
                path: path.to_owned(),
                source,
            });
        }
    };
    if !file.file_type().is_socket() {
        return Err(taken("it is not a socket"));
    }
    if file.uid() != rustix::process::geteuid().as_raw() {
        return Err(taken("it is another user's"));
    }
    match connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
        _ => return Err(taken("another program listens on it")),
    }
    std::fs::remove_file(path).map_err(|source| VsockError::Listen {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
#[path = "host_tests.rs"]
mod tests;
