//! Connections to ports of the pod: made here, then relayed as streams.
#![forbid(unsafe_code)]

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::error::{Context, Error};
use crate::events::{Poller, Source, Watched};
use crate::stream::{End, connection};
use crate::table::Table;

/// The connections that are being made.
#[derive(Debug, Default)]
pub(crate) struct Forwards(Table<Forward>);

#[derive(Debug)]
struct Forward {
    socket: Watched,
    port: u16,
    is_v6: bool,
    stream: u64,
    request: u64,
}

/// A connection that was made, or could not be.
#[derive(Debug)]
pub(crate) struct Connected {
    /// The request that asked for it.
    pub(crate) request: u64,
    /// The stream to relay it as.
    pub(crate) stream: u64,
    /// The connection.
    pub(crate) end: Result<End, Error>,
}

impl Forwards {
    /// Begins to connect to `port` of the loopback, by IPv4 and, if nobody listens there, by IPv6.
    ///
    /// # Errors
    /// No socket can be had.
    pub(crate) fn start(
        &mut self,
        port: u16,
        stream: u64,
        request: u64,
        poller: &Poller,
    ) -> Result<(), Error> {
        let name = Source::Forward(self.0.vacant());
        let begin = || connecting(port, false, name, poller);
        self.0.insert(Forward {
            socket: begin().context(|| format!("connect to the port {port}"))?,
            port,
            is_v6: false,
            stream,
            request,
        });
        Ok(())
    }

    /// Looks how the connection `index` is; `Some` when that is decided.
    pub(crate) fn turn(&mut self, index: u32, poller: &Poller) -> Option<Connected> {
        let forward = self.0.get_mut(index)?;
        let mut outcome = connection(&forward.socket);
        if outcome == Ok(false) {
            return None;
        }
        if outcome == Err(Errno::CONNREFUSED) && !forward.is_v6 {
            match connecting(forward.port, true, Source::Forward(index), poller) {
                Ok(socket) => {
                    std::mem::replace(&mut forward.socket, socket).close(poller);
                    forward.is_v6 = true;
                    return None;
                }
                // A kernel without IPv6 has nobody listening there either.
                Err(_) => outcome = Err(Errno::CONNREFUSED),
            }
        }
        let forward = self.0.take(index)?;
        let socket = forward.socket.release(poller);
        let end = outcome.and_then(|_| both_ways(socket));
        Some(Connected {
            request: forward.request,
            stream: forward.stream,
            end: end.context(|| format!("connect to the port {}", forward.port)),
        })
    }
}

fn both_ways(socket: OwnedFd) -> Result<End, Errno> {
    let again = rustix::io::fcntl_dupfd_cloexec(&socket, 3)?;
    Ok(End::Socket(socket, again))
}

fn connecting(
    port: u16,
    is_v6: bool,
    name: Source,
    poller: &Poller,
) -> rustix::io::Result<Watched> {
    let (family, address) = match is_v6 {
        false => (
            AddressFamily::INET,
            SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
        ),
        true => (
            AddressFamily::INET6,
            SocketAddr::from((Ipv6Addr::LOCALHOST, port)),
        ),
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, &address) {
        Ok(()) | Err(Errno::INPROGRESS) => {}
        // Reported by the event that comes at once.
        Err(Errno::CONNREFUSED) => {}
        Err(error) => return Err(error),
    }
    let mut socket = Watched::new(socket, name);
    socket.watch(poller, Some(EventFlags::OUT))?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;

    use super::*;

    fn decided(forwards: &mut Forwards, port: u16) -> Connected {
        let poller = Poller::new().unwrap();
        forwards.start(port, 7, 8, &poller).unwrap();
        loop {
            let sources = poller.wait().unwrap();
            assert_eq!(sources, [Source::Forward(0)]);
            if let Some(connected) = forwards.turn(0, &poller) {
                assert!(forwards.0.is_empty());
                return connected;
            }
        }
    }

    #[test]
    fn a_listener_is_reached_by_either_family() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = TcpListener::bind(address) else {
                continue; // No IPv6 here.
            };
            let port = listener.local_addr().unwrap().port();
            let connected = decided(&mut Forwards::default(), port);
            assert_eq!((connected.stream, connected.request), (7, 8));
            let Ok(End::Socket(ours, _)) = connected.end else {
                panic!("{:?}", connected.end)
            };
            let mut theirs = listener.accept().unwrap().0;
            rustix::io::write(&ours, b"x").unwrap();
            let mut byte = [0];
            theirs.read_exact(&mut byte).unwrap();
            theirs.write_all(b"y").unwrap();
            assert_eq!(&byte, b"x");
        }
    }

    #[test]
    fn a_port_without_a_listener_is_refused() {
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let connected = decided(&mut Forwards::default(), port);
        let refused = connected.end.unwrap_err().to_string();
        assert!(refused.contains(&format!("port {port}")), "{refused}");
    }
}
