//! The pod's network as the guest sets it up: what the host's CNI plug-ins decided, and the names that the
//! pod's containers resolve by.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Interfaces and names of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkSpec {
    /// Interfaces besides the loopback, in order; the first default route of the first one that has one wins.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<InterfaceSpec>,
    /// `/etc/resolv.conf` of the containers; absent: their images' own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dns: Option<DnsSpec>,
    /// Lines of `/etc/hosts` besides those for localhost and for the pod itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<HostEntry>,
    /// Settings of the kernel, set when the interfaces are up: paths below `/proc/sys` that begin with `net/`, and
    /// their values.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub sysctls: BTreeMap<String, String>,
}

/// One interface, found by its MAC address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InterfaceSpec {
    /// What it is called, such as `eth0`: 1 to 15 bytes without `/` and space.
    pub name: String,
    /// By what it is found.
    pub mac: MacAddress,
    /// Its MTU in bytes; absent: as the device says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// Its addresses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<Cidr>,
    /// Routes through it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<RouteSpec>,
    /// Permanent entries of its neighbour table.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub neighbours: Vec<NeighbourSpec>,
}

/// A route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouteSpec {
    /// Where it leads; prefix length 0: everywhere.
    pub destination: Cidr,
    /// The next hop; absent: the destination is on the link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// Metric, the lower the better; absent: the kernel's default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub priority: Option<u32>,
    /// Routing table; absent: main (254).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table: Option<u32>,
    /// MTU along the route in bytes; absent: the interface's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// The MSS that TCP advertises, in bytes; absent: from the MTU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advmss: Option<u32>,
}

/// A permanent neighbour.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NeighbourSpec {
    /// Its IP address.
    pub address: IpAddr,
    /// Its MAC address.
    pub mac: MacAddress,
}

/// What `/etc/resolv.conf` says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DnsSpec {
    /// `nameserver` lines, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nameservers: Vec<IpAddr>,
    /// The `search` line.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    /// The `options` line.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

/// A line of `/etc/hosts`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostEntry {
    /// The address.
    pub address: IpAddr,
    /// Its names, the canonical one first.
    pub names: Vec<String>,
}

/// An IP address and the length of its network's prefix, such as `10.88.0.5/16`; in JSON that text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cidr {
    /// The address, with its host part.
    pub address: IpAddr,
    /// Bits of the prefix: at most 32, or 128 for IPv6.
    pub prefix: u8,
}

/// A text is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not {what}")]
pub struct MalformedAddress {
    text: String,
    what: &'static str,
}

impl FromStr for Cidr {
    type Err = MalformedAddress;

    fn from_str(text: &str) -> Result<Self, MalformedAddress> {
        let parse = || {
            let (address, prefix) = text.split_once('/')?;
            let address: IpAddr = address.parse().ok()?;
            let prefix: u8 = prefix.parse().ok()?;
            let most = if address.is_ipv4() { 32 } else { 128 };
            (prefix <= most).then_some(Self { address, prefix })
        };
        parse().ok_or_else(|| MalformedAddress {
            text: text.to_owned(),
            what: "an address with a prefix length, such as 10.88.0.5/16",
        })
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

/// An Ethernet address; in JSON as text, such as `02:00:00:00:00:01`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// Whether it names a group of stations: multicast, broadcast included.
    pub fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// Whether a station may have it: neither a group's nor all zeroes.
    pub fn is_station(self) -> bool {
        !self.is_group() && self.0 != [0; 6]
    }
}

impl FromStr for MacAddress {
    type Err = MalformedAddress;

    fn from_str(text: &str) -> Result<Self, MalformedAddress> {
        let parse = || {
            let mut bytes = [0; 6];
            let mut parts = text.split(':');
            for byte in &mut bytes {
                let part = parts.next()?;
                let plain = part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
                *byte = u8::from_str_radix(part, 16).ok().filter(|_| plain)?;
            }
            parts.next().is_none().then_some(Self(bytes))
        };
        parse().ok_or_else(|| MalformedAddress {
            text: text.to_owned(),
            what: "a MAC address, such as 02:00:00:00:00:01",
        })
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Text in JSON for what has `Display` and `FromStr`.
macro_rules! as_text {
    ($type:ty) => {
        impl Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

as_text!(Cidr);
as_text!(MacAddress);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_their_text() {
        for text in [
            "10.88.0.5/16",
            "fd00::5/64",
            "0.0.0.0/0",
            "::/0",
            "fe80::1/128",
        ] {
            assert_eq!(text.parse::<Cidr>().unwrap().to_string(), text);
        }
        for text in [
            "10.88.0.5",
            "10.88.0.5/33",
            "::/129",
            "10.88.0/8",
            "/8",
            "1.1.1.1/-1",
        ] {
            assert!(text.parse::<Cidr>().is_err(), "{text}");
        }
        let mac: MacAddress = "02:00:5E:00:00:ff".parse().unwrap();
        assert_eq!(mac.to_string(), "02:00:5e:00:00:ff");
        for text in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:01:02",
            "02:00:00:00:00:+1",
            "0200:0:0:0:0",
        ] {
            assert!(text.parse::<MacAddress>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_network_survives_json() {
        let json = r#"{"interfaces":[{"name":"eth0","mac":"02:00:00:00:00:01","mtu":9000,
            "addresses":["10.88.0.5/16","fd00::5/64"],
            "routes":[{"destination":"0.0.0.0/0","gateway":"10.88.0.1"}],
            "neighbours":[{"address":"10.88.0.1","mac":"02:00:00:00:00:02"}]}],
            "dns":{"nameservers":["10.88.0.1"],"search":["example.org"]},
            "hosts":[{"address":"10.88.0.9","names":["db"]}]}"#;
        let spec: NetworkSpec = serde_json::from_str(json).unwrap();
        let again = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<NetworkSpec>(&again).unwrap(), spec);
        assert!(
            serde_json::from_str::<NetworkSpec>(r#"{"interfaces":[{"name":"a","mac":"x"}]}"#)
                .is_err()
        );
    }
}
