//! The pod's network: interfaces as the host asks for them, and the files by which containers resolve names.
//! Done at boot, before any container starts; further interfaces may come while they run.
#![forbid(unsafe_code)]

pub(crate) mod files;
mod netlink;

use std::fs;
use std::net::IpAddr;

use cube_guest::NetworkSpec;
use cube_guest::network::{Cidr, InterfaceSpec, MacAddress, NeighbourSpec, RouteSpec};
use rustix::io::Errno;

use crate::error::{Context, Error};
use netlink::{CREATE, Netlink, REPLACE, Request};

/// Message types (linux/rtnetlink.h).
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const RTM_NEWNEIGH: u16 = 28;
/// Attributes of links (linux/if_link.h).
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
/// Attributes of addresses (linux/if_addr.h).
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
/// Nobody else on the link has the address: the host gave it out. Without a second's wait for others to object.
const IFA_F_NODAD: u8 = 2;
/// Attributes of routes.
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_METRICS: u16 = 8;
const RTA_TABLE: u16 = 15;
const RTAX_MTU: u16 = 2;
const RTAX_ADVMSS: u16 = 8;
const RT_TABLE_MAIN: u8 = 254;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RT_SCOPE_LINK: u8 = 253;
const RTPROT_STATIC: u8 = 4;
const RTN_UNICAST: u8 = 1;
/// Attributes of neighbours (linux/neighbour.h).
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NUD_PERMANENT: u16 = 0x80;
/// `IFF_UP` (linux/if.h).
const IFF_UP: u32 = 1;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// Sets up everything in `spec`; `hostname` is the pod's.
///
/// # Errors
/// The interface, address or route that the kernel does not take, by name.
pub(crate) fn configure(spec: &NetworkSpec, hostname: &str) -> Result<(), Error> {
    let netlink = Netlink::open().context(|| "open a routing socket".into())?;
    for interface in &spec.interfaces {
        set_up(&netlink, interface)?;
    }
    for (path, value) in &spec.sysctls {
        set(path, value)?;
    }
    files::write(spec, hostname)
}

/// Writes a setting of the kernel's network.
fn set(path: &str, value: &str) -> Result<(), Error> {
    let inside =
        path.starts_with("net/") && path.split('/').all(|part| !["", "..", "."].contains(&part));
    if !inside {
        let sentence = format!("the sysctl `{path}` is not one of the network's");
        return Err(Error::Refused(sentence));
    }
    fs::write(format!("/proc/sys/{path}"), value)
        .context(|| format!("set the sysctl `{path}` to `{value}`"))
}

/// Sets up one interface more.
///
/// # Errors
/// What the kernel does not take, by name.
pub(crate) fn add(spec: &InterfaceSpec) -> Result<(), Error> {
    let netlink = Netlink::open().context(|| "open a routing socket".into())?;
    set_up(&netlink, spec)
}

fn set_up(netlink: &Netlink, spec: &InterfaceSpec) -> Result<(), Error> {
    let name = &spec.name;
    let index = find(spec.mac)?
        .ok_or_else(|| Error::Refused(format!("there is no interface {} for {name}", spec.mac)))?;
    // Named first, while it is down; only then may it come up.
    let mut request = link_request(index, 0);
    request.attribute(IFLA_IFNAME, &[name.as_bytes(), &[0]].concat());
    request.number(IFLA_MTU, spec.mtu);
    let named = netlink.call(&mut request);
    named.context(|| format!("name the interface {} {name}", spec.mac))?;
    ignore_routers(name);
    let up = netlink.call(&mut link_request(index, IFF_UP));
    up.context(|| format!("bring {name} up"))?;
    for address in &spec.addresses {
        let added = netlink.call(&mut address_request(index, *address));
        added.context(|| format!("give {name} the address {address}"))?;
    }
    for neighbour in &spec.neighbours {
        let added = netlink.call(&mut neighbour_request(index, neighbour));
        added.context(|| format!("add the neighbour {} of {name}", neighbour.address))?;
    }
    // Those on the link first: a gateway may be reached through one.
    for on_link in [true, false] {
        let routes = spec.routes.iter();
        for route in routes.filter(|route| route.gateway.is_none() == on_link) {
            match netlink.call(&mut route_request(index, route)) {
                // Given twice, or made by the kernel with the address.
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => {
                    let to = route.destination;
                    return Err(error).context(|| format!("add the route to {to} through {name}"));
                }
            }
        }
    }
    Ok(())
}

/// The index of the interface with this address.
fn find(mac: MacAddress) -> Result<Option<u32>, Error> {
    const INTERFACES: &str = "/sys/class/net";
    let entries = fs::read_dir(INTERFACES).context(|| format!("read {INTERFACES}"))?;
    for entry in entries.flatten() {
        let read = |file| fs::read_to_string(entry.path().join(file)).unwrap_or_default();
        if read("address").trim().parse() == Ok(mac) {
            return Ok(read("ifindex").trim().parse().ok());
        }
    }
    Ok(None)
}

/// Addresses and routes are the host's to give, not whoever sends router advertisements.
fn ignore_routers(interface: &str) {
    // A kernel without IPv6 has nothing to be told.
    let _ = fs::write(
        format!("/proc/sys/net/ipv6/conf/{interface}/accept_ra"),
        "0",
    );
}

/// `struct ifinfomsg`: family, padding, type, index, flags, the flags to change.
fn link_request(index: u32, flags: u32) -> Request {
    let header = [
        &[0; 4][..],
        &index.to_ne_bytes(),
        &flags.to_ne_bytes(),
        &flags.to_ne_bytes(),
    ];
    Request::new(RTM_NEWLINK, 0, &header.concat())
}

/// `struct ifaddrmsg`: family, prefix length, flags, scope, index.
fn address_request(index: u32, address: Cidr) -> Request {
    let family = family(address.address);
    let header = [
        &[family, address.prefix, IFA_F_NODAD, RT_SCOPE_UNIVERSE][..],
        &index.to_ne_bytes(),
    ];
    let mut request = Request::new(RTM_NEWADDR, CREATE | REPLACE, &header.concat());
    let bytes = octets(address.address);
    request
        .attribute(IFA_LOCAL, &bytes)
        .attribute(IFA_ADDRESS, &bytes);
    if let IpAddr::V4(v4) = address.address
        && address.prefix < 31
    {
        let host_part = u32::MAX >> address.prefix;
        request.attribute(IFA_BROADCAST, &(v4.to_bits() | host_part).to_be_bytes());
    }
    request
}

/// `struct rtmsg`: family, lengths of destination and source prefix, TOS, table, protocol, scope, type, flags.
fn route_request(index: u32, route: &RouteSpec) -> Request {
    let scope = match route.gateway {
        None if route.destination.address.is_ipv4() => RT_SCOPE_LINK,
        _ => RT_SCOPE_UNIVERSE,
    };
    let header = [
        family(route.destination.address),
        route.destination.prefix,
        0,
        0,
        RT_TABLE_MAIN,
        RTPROT_STATIC,
        scope,
        RTN_UNICAST,
        0,
        0,
        0,
        0,
    ];
    let mut request = Request::new(RTM_NEWROUTE, CREATE, &header);
    if route.destination.prefix > 0 {
        request.attribute(RTA_DST, &octets(route.destination.address));
    }
    if let Some(gateway) = route.gateway {
        request.attribute(RTA_GATEWAY, &octets(gateway));
    }
    request.number(RTA_OIF, Some(index));
    request.number(RTA_PRIORITY, route.priority);
    request.number(RTA_TABLE, route.table);
    request.nested(
        RTA_METRICS,
        &[(RTAX_MTU, route.mtu), (RTAX_ADVMSS, route.advmss)],
    );
    request
}

/// `struct ndmsg`: family, padding, index, state, flags, type.
fn neighbour_request(index: u32, neighbour: &NeighbourSpec) -> Request {
    let header = [
        &[family(neighbour.address), 0, 0, 0][..],
        &index.to_ne_bytes(),
        &NUD_PERMANENT.to_ne_bytes(),
        &[0; 2],
    ];
    let mut request = Request::new(RTM_NEWNEIGH, CREATE | REPLACE, &header.concat());
    request.attribute(NDA_DST, &octets(neighbour.address));
    request.attribute(NDA_LLADDR, &neighbour.mac.0);
    request
}

fn family(address: IpAddr) -> u8 {
    if address.is_ipv4() { AF_INET } else { AF_INET6 }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests;
