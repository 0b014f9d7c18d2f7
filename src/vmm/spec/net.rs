//! Network devices of a machine.
#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use cube_guest::network::MacAddress;
use serde::{Deserialize, Serialize};

use super::SpecError;
use super::validate::fault;
use crate::vmm::virtio::net::MAX_PAIRS;

/// The smallest MTU (RFC 791: every link carries 68 bytes).
const MIN_MTU: u16 = 68;
/// The largest MTU: what an Ethernet header in front makes of it still fits 16 bits.
const MAX_MTU: u16 = 65_521;
/// A Unix socket's path holds 107 bytes.
const MAX_SOCKET_PATH: usize = 107;
/// Longest interface name, in bytes (Linux, `IFNAMSIZ` less the NUL).
const MAX_NAME: usize = 15;

/// One virtio-net device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetSpec {
    /// What messages call it, such as `eth0`: 1 to 15 printable ASCII bytes.
    pub name: String,
    /// Queues of one tap interface, inherited and open; one queue pair each, at most 8. Opened with
    /// `IFF_TAP`, `IFF_NO_PI`, `IFF_VNET_HDR` and a virtio header of 12 bytes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tap_fds: Vec<i32>,
    /// Instead of a tap: the Unix socket of a vhost-user backend, such as a DPDK or VPP switch. Guest memory
    /// is then shared with that process. What is limited and checked is the switch's business.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// The guest's address. The guest finds the interface by it.
    pub mac: MacAddress,
    /// MTU in bytes.
    #[serde(default = "default_mtu")]
    pub mtu: u16,
    /// Drop frames of the guest whose source address is not `mac`.
    #[serde(default)]
    pub check_source: bool,
    /// Limit towards the guest.
    #[serde(default, skip_serializing_if = "RateLimit::is_none")]
    pub receive_limit: RateLimit,
    /// Limit from the guest.
    #[serde(default, skip_serializing_if = "RateLimit::is_none")]
    pub transmit_limit: RateLimit,
}

/// How much may pass in one direction; absent: any amount.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// Bytes of Ethernet frames.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<Rate>,
    /// Ethernet frames; one that is segmented later counts as its segments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frames: Option<Rate>,
}

impl RateLimit {
    /// Whether there is no limit.
    pub fn is_none(&self) -> bool {
        self.bytes.is_none() && self.frames.is_none()
    }

    /// Checks a limit that messages call `field`.
    ///
    /// # Errors
    /// The rate that cannot be used.
    pub fn check(&self, field: &str) -> Result<(), SpecError> {
        for (name, rate) in [("bytes", self.bytes), ("frames", self.frames)] {
            if rate.is_some_and(|rate| rate.per_second == 0 || rate.burst == 0) {
                let text = "has a 0; `per_second` and `burst` are at least 1 (to cut a pod off, take its link down)";
                return fault(format!("{field}.{name}"), text);
            }
        }
        Ok(())
    }
}

/// A token bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// Tokens added per second, at least 1.
    pub per_second: u64,
    /// Tokens that it holds, at least 1.
    pub burst: u64,
}

const fn default_mtu() -> u16 {
    1500
}

/// Checks the network devices.
pub(super) fn check_nets(nets: &[NetSpec]) -> Result<(), SpecError> {
    let mut seen = (HashSet::new(), HashSet::new());
    for (i, net) in nets.iter().enumerate() {
        let field = |name: &str| format!("nets[{i}].{name}");
        check_net(net, net.tap_fds.len(), &field)?;
        let name = &net.name;
        if !seen.0.insert(name) {
            let text = format!("is {name:?}, which another has already");
            return fault(field("name"), text);
        }
        if !seen.1.insert(net.mac) {
            let text = format!("is {}, which another interface has already", net.mac);
            return fault(field("mac"), text);
        }
    }
    Ok(())
}

impl NetSpec {
    /// Checks a device for a machine that runs, with `queues` of a tap, which are handed over by themselves.
    ///
    /// # Errors
    /// The field that cannot be used.
    pub fn check(&self, queues: usize) -> Result<(), SpecError> {
        check_net(self, queues, &|name| name.to_owned())
    }
}

fn check_net(
    net: &NetSpec,
    queues: usize,
    field: &impl Fn(&str) -> String,
) -> Result<(), SpecError> {
    let name = &net.name;
    let plain = name.bytes().all(|b| b.is_ascii_graphic() && b != b'/');
    if name.is_empty() || name.len() > MAX_NAME || !plain {
        let text =
            format!("is {name:?}; it must be 1 to {MAX_NAME} printable ASCII bytes without `/`");
        return fault(field("name"), text);
    }
    if !net.mac.is_station() {
        let text = format!("is {}; an interface's address names one station", net.mac);
        return fault(field("mac"), text);
    }
    match &net.socket {
        Some(socket) => check_socket(field, net, queues, socket)?,
        None if (1..=MAX_PAIRS).contains(&queues) => {}
        None => {
            let text = format!(
                "has {queues} descriptors; an interface has 1 to {MAX_PAIRS} queues, or a `socket`"
            );
            return fault(field("tap_fds"), text);
        }
    }
    if !(MIN_MTU..=MAX_MTU).contains(&net.mtu) {
        let text = format!("is {}; it must be {MIN_MTU} to {MAX_MTU}", net.mtu);
        return fault(field("mtu"), text);
    }
    net.receive_limit.check(&field("receive_limit"))?;
    net.transmit_limit.check(&field("transmit_limit"))
}

fn check_socket(
    field: &impl Fn(&str) -> String,
    net: &NetSpec,
    queues: usize,
    socket: &Path,
) -> Result<(), SpecError> {
    let len = socket.as_os_str().len();
    if len == 0 || len > MAX_SOCKET_PATH {
        let text = format!("is {len} bytes long; a socket's path is 1 to {MAX_SOCKET_PATH}");
        return fault(field("socket"), text);
    }
    let others = [
        ("tap_fds", queues > 0),
        ("check_source", net.check_source),
        ("receive_limit", !net.receive_limit.is_none()),
        ("transmit_limit", !net.transmit_limit.is_none()),
    ];
    match others.into_iter().find(|(_, set)| *set) {
        Some((other, _)) => {
            let text = "cannot be with `socket`: frames go past this program, to the switch";
            fault(field(other), text)
        }
        None => Ok(()),
    }
}
