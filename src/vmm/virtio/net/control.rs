//! Commands of the control queue (virtio 1.2, section 5.1.6.5), parsed by copy.
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

use std::collections::BTreeSet;

use cube_guest::network::MacAddress;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET, VIRTIO_NET_CTRL_MAC_TABLE_SET,
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_CTRL_RX,
    VIRTIO_NET_CTRL_RX_ALLMULTI, VIRTIO_NET_CTRL_RX_PROMISC, VIRTIO_NET_CTRL_VLAN,
    VIRTIO_NET_CTRL_VLAN_ADD, VIRTIO_NET_CTRL_VLAN_DEL,
};

use super::filter::{Addresses, TABLE};
use crate::vmm::memory::GuestMemory;
use crate::vmm::virtio::chain::Segments;

/// Bytes of class and command.
const HEADER: u32 = 2;

/// What the driver wants.
#[derive(Debug, Clone)]
pub enum Command {
    /// Every frame, or not.
    Promiscuous(bool),
    /// Every multicast frame, or not.
    AllMulticast(bool),
    /// Frames to these addresses.
    MacTable {
        /// Stations.
        unicast: Addresses,
        /// Groups.
        multicast: Addresses,
    },
    /// Another address of its own.
    MacAddress(MacAddress),
    /// Frames of a VLAN, or not.
    Vlan {
        /// Its id.
        id: u16,
        /// Whether its frames are wanted.
        on: bool,
    },
    /// That many queue pairs.
    QueuePairs(u16),
}

impl Command {
    /// Reads a command; none: malformed, or not one that this device offers.
    pub fn parse(memory: &GuestMemory, command: &Segments) -> Option<Self> {
        let [class, kind] = read(memory, command, 0)?;
        let data = HEADER;
        match (u32::from(class), u32::from(kind)) {
            (VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC) => {
                Some(Self::Promiscuous(flag(memory, command)?))
            }
            (VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI) => {
                Some(Self::AllMulticast(flag(memory, command)?))
            }
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET) => {
                let (unicast, next) = addresses(memory, command, data)?;
                let (multicast, _) = addresses(memory, command, next)?;
                Some(Self::MacTable { unicast, multicast })
            }
            (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET) => {
                let address = MacAddress(read(memory, command, data)?);
                address.is_station().then_some(Self::MacAddress(address))
            }
            (VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD | VIRTIO_NET_CTRL_VLAN_DEL) => {
                Some(Self::Vlan {
                    id: u16::from_le_bytes(read(memory, command, data)?),
                    on: u32::from(kind) == VIRTIO_NET_CTRL_VLAN_ADD,
                })
            }
            (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET) => {
                let pairs = u16::from_le_bytes(read(memory, command, data)?);
                Some(Self::QueuePairs(pairs))
            }
            _ => None,
        }
    }
}

fn read<const N: usize>(memory: &GuestMemory, command: &Segments, at: u32) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    command.read(memory, at, &mut bytes).ok()?;
    Some(bytes)
}

fn flag(memory: &GuestMemory, command: &Segments) -> Option<bool> {
    read(memory, command, HEADER).map(|[byte]| byte != 0)
}

/// `struct virtio_net_ctrl_mac`: a number of addresses, then those; returns also where it ends.
fn addresses(memory: &GuestMemory, command: &Segments, at: u32) -> Option<(Addresses, u32)> {
    let count = u32::from_le_bytes(read(memory, command, at)?);
    let first = at.checked_add(4)?;
    let end = count.checked_mul(6)?.checked_add(first)?;
    if end > command.len() {
        return None;
    }
    if count as usize > TABLE {
        return Some((Addresses::All, end));
    }
    let mut list = BTreeSet::new();
    for at in (first..end).step_by(6) {
        list.insert(MacAddress(read(memory, command, at)?));
    }
    Some((Addresses::These(list), end))
}
