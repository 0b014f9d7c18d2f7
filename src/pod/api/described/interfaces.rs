//! Bodies about network interfaces.
use cube_guest::network::{MacAddress, NeighbourSpec, RouteSpec};

use super::Description;
use crate::pod::api::interface_body::{
    CreateInterface, InterfaceLimits, InterfaceState, InterfaceStatus,
};
use crate::vmm::spec::{Rate, RateLimit};
use crate::vmm::virtio::net::counters::NetCountersSnapshot;

const MAC: MacAddress = MacAddress([2, 0, 0, 0, 0, 2]);

pub(super) fn requests(description: &Description) {
    let rate = Rate {
        per_second: 1,
        burst: 1,
    };
    description.request("Rate", &rate);
    let limit = RateLimit {
        bytes: Some(rate),
        frames: Some(rate),
    };
    description.request("RateLimit", &limit);
    let limits = InterfaceLimits {
        receive: limit,
        transmit: limit,
    };
    description.request("InterfaceLimits", &limits);
    let route = RouteSpec {
        destination: "0.0.0.0/0".parse().unwrap(),
        gateway: "10.1.0.1".parse().ok(),
        priority: Some(1),
        table: Some(1),
        mtu: Some(1),
        advmss: Some(1),
    };
    description.request("Route", &route);
    let neighbour = NeighbourSpec {
        address: "10.1.0.1".parse().unwrap(),
        mac: MAC,
    };
    description.request("Neighbour", &neighbour);
    let interface = CreateInterface {
        name: "eth1".to_owned(),
        mac: MAC,
        tap: Some("tap1".to_owned()),
        namespace: Some("n".to_owned()),
        socket: Some("/s".into()),
        mtu: Some(1500),
        check_source: true,
        limits,
        addresses: vec!["10.1.0.2/24".parse().unwrap()],
        routes: vec![route],
        neighbours: vec![neighbour],
    };
    description.request("CreateInterface", &interface);
}

pub(super) fn answers(description: &Description) {
    let counters = NetCountersSnapshot::default();
    description.answer("InterfaceCounters", &counters, &counters);
    for state in [
        InterfaceState::Attaching,
        InterfaceState::Attached,
        InterfaceState::Detaching,
    ] {
        let status = InterfaceStatus {
            name: "eth1".to_owned(),
            mac: MAC,
            state,
            counters: Some(counters),
        };
        let least = InterfaceStatus {
            counters: None,
            ..status.clone()
        };
        description.answer("InterfaceStatus", &status, &least);
    }
}
