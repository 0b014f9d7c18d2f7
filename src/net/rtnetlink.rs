//! A blocking conversation with the kernel's rtnetlink, in the network namespace of the thread that opens it.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;

use cube_guest::network::MacAddress;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// The largest answer: a link with everything about it.
const ANSWER: usize = 64 << 10;

/// A socket.
pub struct Rtnetlink(OwnedFd);

/// What an interface is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// Its index.
    pub index: u32,
    /// Its address; all zero when it has none.
    pub mac: MacAddress,
    /// Its MTU in bytes.
    pub mtu: u32,
}

impl Rtnetlink {
    /// Opens a socket.
    ///
    /// # Errors
    /// The operating system's.
    pub fn open() -> io::Result<Self> {
        let family = AddressFamily::NETLINK;
        // No protocol is protocol 0, NETLINK_ROUTE.
        let socket = rustix::net::socket_with(family, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, 0))?;
        Ok(Self(socket))
    }

    /// Asks for something to be done.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn call(&self, message: RouteNetlinkMessage) -> io::Result<()> {
        self.send(message, NLM_F_REQUEST | NLM_F_ACK)?;
        self.receive().map(drop)
    }

    /// Asks for something new to be made.
    ///
    /// # Errors
    /// The kernel's answer; `AlreadyExists` when it is there.
    pub fn create(&self, message: RouteNetlinkMessage) -> io::Result<()> {
        self.send(
            message,
            NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL,
        )?;
        self.receive().map(drop)
    }

    /// Looks at the interface called `name`.
    ///
    /// # Errors
    /// There is none.
    pub fn link(&self, name: &str) -> io::Result<Link> {
        let mut message = LinkMessage::default();
        message
            .attributes
            .push(LinkAttribute::IfName(name.to_owned()));
        self.send(RouteNetlinkMessage::GetLink(message), NLM_F_REQUEST)?;
        let Some(RouteNetlinkMessage::NewLink(link)) = self.receive()? else {
            return Err(io::Error::other("the kernel answered something else"));
        };
        let mut found = Link {
            index: link.header.index,
            mac: MacAddress([0; 6]),
            mtu: 0,
        };
        for attribute in &link.attributes {
            match attribute {
                LinkAttribute::Address(address) => {
                    found.mac = MacAddress(address.as_slice().try_into().unwrap_or_default());
                }
                LinkAttribute::Mtu(mtu) => found.mtu = *mtu,
                _ => {}
            }
        }
        Ok(found)
    }

    /// Sets an interface's MTU and brings it up.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn bring_up(&self, index: u32, mtu: u32) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        message.attributes.push(LinkAttribute::Mtu(mtu));
        self.call(RouteNetlinkMessage::SetLink(message))
    }

    fn send(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        let mut message = NetlinkMessage::from(message);
        message.header.flags = flags;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        let kernel = SocketAddrNetlink::new(0, 0);
        rustix::net::sendto(&self.0, &bytes, SendFlags::empty(), &kernel)?;
        Ok(())
    }

    /// The next answer; none: it is done.
    fn receive(&self) -> io::Result<Option<RouteNetlinkMessage>> {
        let mut bytes = vec![0; ANSWER];
        let (length, _) = rustix::net::recv(&self.0, &mut bytes[..], RecvFlags::empty())?;
        let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&bytes[..length]);
        match message.map_err(io::Error::other)?.payload {
            NetlinkPayload::Error(answer) if answer.code.is_none() => Ok(None),
            NetlinkPayload::Error(answer) => Err(answer.to_io()),
            NetlinkPayload::InnerMessage(message) => Ok(Some(message)),
            _ => Ok(None),
        }
    }
}
