//! Which received frames the driver wants: its MAC addresses and VLANs (virtio 1.2, sections 5.1.6.5.1 to
//! 5.1.6.5.3). A frame that it does not want costs it neither a buffer nor an interrupt.
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

/// Addresses of each kind that the table holds; with more, all of that kind are let through.
pub const TABLE: usize = 64;

/// VLAN ids are below this (IEEE 802.1Q).
const VLANS: u16 = 4096;

/// The EtherTypes of a customer and of a service tag.
const TAGS: [[u8; 2]; 2] = [[0x81, 0x00], [0x88, 0xa8]];

/// The driver's receive filter.
#[derive(Debug, Clone)]
pub struct Filter {
    own: MacAddress,
    promiscuous: bool,
    all_multicast: bool,
    unicast: Addresses,
    multicast: Addresses,
    /// None: the driver cannot filter VLANs, and gets all.
    vlans: Option<BTreeSet<u16>>,
}

/// Addresses of one kind.
#[derive(Debug, Clone)]
pub enum Addresses {
    /// These.
    These(BTreeSet<MacAddress>),
    /// Every one: there were more than the table holds.
    All,
}

impl Addresses {
    fn none() -> Self {
        Self::These(BTreeSet::new())
    }

    fn contain(&self, address: MacAddress) -> bool {
        match self {
            Self::These(list) => list.contains(&address),
            Self::All => true,
        }
    }
}

impl Filter {
    /// The filter after a reset. `selective`: the driver says what it wants (CTRL_RX); without, everything
    /// passes. `with_vlans`: VLANs too (CTRL_VLAN).
    pub fn new(own: MacAddress, selective: bool, with_vlans: bool) -> Self {
        Self {
            own,
            promiscuous: !selective,
            all_multicast: false,
            unicast: Addresses::none(),
            // Until the driver says otherwise: neighbour discovery must not miss anything.
            multicast: Addresses::All,
            vlans: with_vlans.then(BTreeSet::new),
        }
    }

    /// PROMISC.
    pub fn set_promiscuous(&mut self, on: bool) {
        self.promiscuous = on;
    }

    /// ALLMULTI.
    pub fn set_all_multicast(&mut self, on: bool) {
        self.all_multicast = on;
    }

    /// MAC_TABLE_SET.
    pub fn set_table(&mut self, unicast: Addresses, multicast: Addresses) {
        self.unicast = unicast;
        self.multicast = multicast;
    }

    /// MAC_ADDR_SET.
    pub fn set_own(&mut self, own: MacAddress) {
        self.own = own;
    }

    /// VLAN_ADD and VLAN_DEL; whether there is such a VLAN.
    pub fn set_vlan(&mut self, id: u16, on: bool) -> bool {
        match &mut self.vlans {
            Some(vlans) if id < VLANS => {
                if on {
                    vlans.insert(id);
                } else {
                    vlans.remove(&id);
                }
                true
            }
            _ => false,
        }
    }

    /// Whether the driver wants the frame that begins with `frame`: its Ethernet header and, if it has one, its
    /// first VLAN tag.
    pub fn wants(&self, frame: &[u8]) -> bool {
        let Some(destination) = frame.first_chunk::<6>() else {
            return false;
        };
        self.wants_address(MacAddress(*destination)) && self.wants_vlan(frame)
    }

    fn wants_address(&self, address: MacAddress) -> bool {
        const BROADCAST: MacAddress = MacAddress([0xff; 6]);
        if self.promiscuous || address == self.own || address == BROADCAST {
            true
        } else if address.is_group() {
            self.all_multicast || self.multicast.contain(address)
        } else {
            self.unicast.contain(address)
        }
    }

    fn wants_vlan(&self, frame: &[u8]) -> bool {
        let (Some(vlans), false) = (&self.vlans, self.promiscuous) else {
            return true;
        };
        match frame.get(12..16) {
            Some(&[t0, t1, v0, v1]) if TAGS.contains(&[t0, t1]) => {
                // A tag with id 0 is a priority, no VLAN.
                let id = u16::from_be_bytes([v0, v1]) & 0x0fff;
                id == 0 || vlans.contains(&id)
            }
            _ => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);
    const OTHER: MacAddress = MacAddress([2, 0, 0, 0, 0, 2]);
    const GROUP: MacAddress = MacAddress([0x33, 0x33, 0, 0, 0, 1]);

    fn to(address: MacAddress) -> Vec<u8> {
        [&address.0[..], &OTHER.0, &[8, 0], &[0; 46]].concat()
    }

    fn tagged(vlan: u16) -> Vec<u8> {
        [
            &OWN.0[..],
            &OTHER.0,
            &[0x81, 0],
            &vlan.to_be_bytes(),
            &[8, 0],
        ]
        .concat()
    }

    #[test]
    fn a_driver_that_cannot_choose_gets_everything() {
        let filter = Filter::new(OWN, false, false);
        assert!(filter.wants(&to(OTHER)) && filter.wants(&to(GROUP)) && filter.wants(&tagged(7)));
    }

    #[test]
    fn addresses_are_chosen() {
        let mut filter = Filter::new(OWN, true, false);
        assert!(filter.wants(&to(OWN)) && filter.wants(&to(MacAddress([0xff; 6]))));
        assert!(filter.wants(&to(GROUP)) && !filter.wants(&to(OTHER)));
        filter.set_table(Addresses::These([OTHER].into()), Addresses::none());
        assert!(filter.wants(&to(OTHER)) && !filter.wants(&to(GROUP)));
        filter.set_all_multicast(true);
        assert!(filter.wants(&to(GROUP)));
        filter.set_own(GROUP);
        filter.set_table(Addresses::none(), Addresses::none());
        assert!(!filter.wants(&to(OWN)));
        filter.set_promiscuous(true);
        assert!(filter.wants(&to(OWN)));
        filter.set_promiscuous(false);
        filter.set_table(Addresses::All, Addresses::none());
        assert!(filter.wants(&to(OWN)));
    }

    #[test]
    fn vlans_are_chosen() {
        let mut filter = Filter::new(OWN, true, true);
        assert!(filter.wants(&to(OWN)) && filter.wants(&tagged(0)) && !filter.wants(&tagged(7)));
        assert!(filter.set_vlan(7, true) && filter.wants(&tagged(0xe007)));
        assert!(filter.set_vlan(7, false) && !filter.wants(&tagged(7)));
        assert!(!filter.set_vlan(4096, true));
        assert!(!Filter::new(OWN, true, false).set_vlan(1, true));
    }
}
