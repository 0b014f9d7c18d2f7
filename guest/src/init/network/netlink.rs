//! As much of rtnetlink (`rtnetlink(7)`) as a pod's network takes: requests with attributes, each answered by
//! an acknowledgement.
#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;

use rustix::io::{Errno, Result};
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// `NLM_F_REQUEST | NLM_F_ACK`.
const REQUEST: u16 = 0x1 | 0x4;
/// `NLM_F_REPLACE`.
pub(super) const REPLACE: u16 = 0x100;
/// `NLM_F_CREATE`.
pub(super) const CREATE: u16 = 0x400;
/// `NLMSG_ERROR`: an error, or with 0 the acknowledgement.
const ERROR: u16 = 2;
/// Bytes of `struct nlmsghdr`.
const HEADER: usize = 16;
/// `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;

/// A request being written: `struct nlmsghdr`, the type's own header, attributes.
pub(super) struct Request {
    bytes: Vec<u8>,
}

impl Request {
    /// A request of this type with its own header; `flags` besides `NLM_F_REQUEST` and `NLM_F_ACK`.
    pub(super) fn new(kind: u16, flags: u16, header: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(REQUEST | flags).to_ne_bytes());
        bytes.extend(header);
        Self { bytes }
    }

    /// Adds an attribute.
    pub(super) fn attribute(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let length = (4 + value.len()) as u16;
        self.bytes.extend(length.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }

    /// Adds an attribute that is a number, if there is one.
    pub(super) fn number(&mut self, kind: u16, value: Option<u32>) -> &mut Self {
        match value {
            Some(value) => self.attribute(kind, &value.to_ne_bytes()),
            None => self,
        }
    }

    /// Adds an attribute whose value is numbers as attributes; those that there are.
    pub(super) fn nested(&mut self, kind: u16, numbers: &[(u16, Option<u32>)]) -> &mut Self {
        let mut inner = Self { bytes: Vec::new() };
        for (kind, value) in numbers {
            inner.number(*kind, *value);
        }
        if inner.bytes.is_empty() {
            return self;
        }
        self.attribute(kind | NESTED, &inner.bytes)
    }

    fn finish(&mut self) -> &[u8] {
        let length = self.bytes.len() as u32;
        self.bytes[..4].copy_from_slice(&length.to_ne_bytes());
        &self.bytes
    }
}

/// A socket to the kernel's routing.
pub(super) struct Netlink(OwnedFd);

impl Netlink {
    pub(super) fn open() -> Result<Self> {
        let flags = SocketFlags::CLOEXEC;
        let family = AddressFamily::NETLINK;
        // No protocol is protocol 0, NETLINK_ROUTE.
        let socket = rustix::net::socket_with(family, SocketType::RAW, flags, None)?;
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, 0))?;
        Ok(Self(socket))
    }

    /// Makes a request and returns its answer.
    pub(super) fn call(&self, request: &mut Request) -> Result<()> {
        let kernel = SocketAddrNetlink::new(0, 0);
        rustix::net::sendto(&self.0, request.finish(), SendFlags::empty(), &kernel)?;
        let mut buffer = [0; 4096];
        let (length, _) = rustix::net::recv(&self.0, &mut buffer, RecvFlags::empty())?;
        parse_answer(&buffer[..length])
    }
}

/// The kernel's answer to one request: it says 0 or an error.
fn parse_answer(bytes: &[u8]) -> Result<()> {
    let kind = bytes.get(4..6).and_then(|b| b.try_into().ok());
    let error = bytes
        .get(HEADER..HEADER + 4)
        .and_then(|b| b.try_into().ok());
    match (kind.map(u16::from_ne_bytes), error.map(i32::from_ne_bytes)) {
        (Some(ERROR), Some(0)) => Ok(()),
        (Some(ERROR), Some(error)) => Err(Errno::from_raw_os_error(error.saturating_neg())),
        _ => Err(Errno::PROTO),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_laid_out_as_the_kernel_wants_it() {
        let mut request = Request::new(16, CREATE, &[9; 8]);
        request
            .attribute(3, b"eth0\0")
            .number(4, Some(9000))
            .number(5, None);
        request
            .nested(8, &[(2, Some(1)), (8, None)])
            .nested(9, &[(1, None)]);
        let expected = [
            &52u32.to_ne_bytes()[..],
            &16u16.to_ne_bytes(),
            &0x405u16.to_ne_bytes(),
            &[0; 8],
            &[9; 8],
            &9u16.to_ne_bytes(),
            &3u16.to_ne_bytes(),
            b"eth0\0\0\0\0",
            &8u16.to_ne_bytes(),
            &4u16.to_ne_bytes(),
            &9000u32.to_ne_bytes(),
            &12u16.to_ne_bytes(),
            &0x8008u16.to_ne_bytes(),
            &8u16.to_ne_bytes(),
            &2u16.to_ne_bytes(),
            &1u32.to_ne_bytes(),
        ]
        .concat();
        let length = expected.len();
        assert_eq!(request.finish()[4..], expected[4..]);
        assert_eq!(request.finish()[..4], (length as u32).to_ne_bytes());
    }

    #[test]
    fn the_kernel_answers() {
        let netlink = Netlink::open().unwrap();
        // RTM_SETLINK of an interface that cannot be: index -1.
        let header = [&[0; 4][..], &(-1i32).to_ne_bytes(), &[0; 8]].concat();
        assert!(netlink.call(&mut Request::new(19, 0, &header)).is_err());
        assert_eq!(parse_answer(&[0; 20]), Err(Errno::PROTO));
        assert_eq!(parse_answer(&[]), Err(Errno::PROTO));
    }
}
