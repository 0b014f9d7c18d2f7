//! Bodies about network interfaces.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use cube_guest::network::{Cidr, MacAddress, NeighbourSpec, RouteSpec};
use serde::{Deserialize, Serialize};

use crate::vmm::spec::RateLimit;
use crate::vmm::virtio::net::counters::NetCountersSnapshot;

/// An interface to attach to the running pod: on a tap, or on a switch (`socket`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateInterface {
    /// What it is called in the guest, such as `eth1`: unique in the pod, 1 to 15 printable ASCII bytes.
    pub name: String,
    /// Its address, unique in the pod.
    pub mac: MacAddress,
    /// Name of a tap that is there, made with `vnet_hdr`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// Name of the network namespace that the tap is in; absent: the pod process's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Unix socket of a vhost-user backend.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// MTU in bytes; absent: the tap's, or 1500.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Drop frames of the guest with another source address than `mac`.
    #[serde(default)]
    pub check_source: bool,
    /// How much may pass.
    #[serde(default)]
    pub limits: InterfaceLimits,
    /// Its addresses.
    #[serde(default)]
    pub addresses: Vec<Cidr>,
    /// Routes through it.
    #[serde(default)]
    pub routes: Vec<RouteSpec>,
    /// Permanent entries of its neighbour table.
    #[serde(default)]
    pub neighbours: Vec<NeighbourSpec>,
}

/// How much may pass an interface; absent: any amount.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InterfaceLimits {
    /// Towards the guest.
    #[serde(default, skip_serializing_if = "RateLimit::is_none")]
    pub receive: RateLimit,
    /// From the guest.
    #[serde(default, skip_serializing_if = "RateLimit::is_none")]
    pub transmit: RateLimit,
}

/// Where an interface is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InterfaceState {
    /// The guest sets it up.
    Attaching,
    /// It is there.
    Attached,
    /// The guest lets go of it.
    Detaching,
}

/// An interface as the API shows it.
#[derive(Debug, Clone, Serialize)]
pub struct InterfaceStatus {
    /// Its name.
    pub name: String,
    /// Its address.
    pub mac: MacAddress,
    /// Where it is.
    pub state: InterfaceState,
    /// What passed and what was dropped; absent: a switch counts for itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub counters: Option<NetCountersSnapshot>,
}
