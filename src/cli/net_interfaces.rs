//! `cube net attach` and `cube net detach`: interfaces of a pod that runs.
#![forbid(unsafe_code)]

use std::net::IpAddr;
use std::process::ExitCode;

use clap::Args;
use cube_guest::network::{Cidr, MacAddress, RouteSpec};
use serde_json::{Value, json};

use super::failure::Failure;
use super::images::print;
use super::pod_net::{Port, parse_interface_port, random_mac};
use crate::client::{PodApi, base_directory};
use crate::pod::api::interface_body::{CreateInterface, InterfaceLimits};

/// Attach another interface to a pod that runs, and set it up in the guest.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cube net attach web tap=tap7 --address 10.7.0.2/24
  cube net attach web tap=tap7 --namespace blue --name data --mtu 9000
  cube net attach web vhost-user=/run/vpp/web.sock --route 10.9.0.0/16,10.7.0.1

Prints the interface's name. The tap is yours: made with `vnet_hdr`, it stays when the interface goes.")]
pub(crate) struct AttachArgs {
    /// The pod.
    pod: String,

    /// What it is on: `tap=NAME` for a tap of yours, `vhost-user=SOCKET` for a port of a switch.
    #[arg(value_name = "tap=NAME|vhost-user=SOCKET", value_parser = parse_interface_port)]
    port: Port,

    /// What it is called in the guest. [default: the first of eth1, eth2, … that is free]
    #[arg(long)]
    name: Option<String>,

    /// Its MAC address. [default: a random one]
    #[arg(long)]
    mac: Option<MacAddress>,

    /// Its MTU in bytes. [default: the tap's, or 1500]
    #[arg(long, value_name = "BYTES")]
    mtu: Option<u16>,

    /// An address of it, such as 10.7.0.2/24. May be given many times.
    #[arg(long = "address", value_name = "ADDRESS/PREFIX")]
    addresses: Vec<Cidr>,

    /// A route through it, and its next hop. May be given many times.
    #[arg(long = "route", value_name = "NETWORK/PREFIX[,GATEWAY]", value_parser = parse_route)]
    routes: Vec<RouteSpec>,

    /// The network namespace that the tap is in. [default: the pod process's]
    #[arg(long)]
    namespace: Option<String>,

    /// Drop frames of the guest that come from another MAC address.
    #[arg(long)]
    check_source: bool,
}

/// Detach an interface from a pod that runs; its tap or switch stays.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cube net detach web eth1")]
pub(crate) struct DetachArgs {
    /// The pod.
    pod: String,

    /// What the interface is called in the guest.
    name: String,
}

/// Runs `cube net attach`.
pub(crate) fn attach(arguments: AttachArgs) -> Result<ExitCode, Failure> {
    let api = PodApi::of(&base_directory().map_err(Failure::new)?, &arguments.pod);
    let name = match arguments.name {
        Some(name) => name,
        None => free_name(
            &api.get::<Vec<Value>>("/v1/interfaces")
                .map_err(Failure::new)?,
        ),
    };
    let mac = arguments.mac.map_or_else(random_mac, Ok)?;
    let (tap, socket) = match arguments.port {
        Port::Tap(tap) => (Some(tap), None),
        Port::VhostUser(path) => {
            // The pod process looks for it from wherever that was started.
            let path = std::path::absolute(path).map_err(Failure::new)?;
            (None, Some(path))
        }
    };
    let body = CreateInterface {
        name: name.clone(),
        mac,
        tap,
        namespace: arguments.namespace,
        socket,
        mtu: arguments.mtu,
        check_source: arguments.check_source,
        limits: InterfaceLimits::default(),
        addresses: arguments.addresses,
        routes: arguments.routes,
        neighbours: Vec::new(),
    };
    let attached = api.call::<Value>("POST", "/v1/interfaces", &body);
    attached.map_err(Failure::new)?;
    Ok(print(&format!("{name}\n")))
}

/// Runs `cube net detach`.
pub(crate) fn detach(arguments: &DetachArgs) -> Result<ExitCode, Failure> {
    let api = PodApi::of(&base_directory().map_err(Failure::new)?, &arguments.pod);
    let path = format!("/v1/interfaces/{}", arguments.name);
    let detached = api.call::<()>("DELETE", &path, &json!({}));
    detached.map_err(|error| Failure::new(format!("{}: {error}", arguments.name)))?;
    Ok(ExitCode::SUCCESS)
}

/// The first of eth1, eth2, … that none of the pod's interfaces is called. The pod refuses one that somebody else
/// has taken meanwhile.
fn free_name(interfaces: &[Value]) -> String {
    let taken = |name: &String| interfaces.iter().any(|taken| taken["name"] == **name);
    let mut names = (1..).map(|number: usize| format!("eth{number}"));
    names.find(|name| !taken(name)).unwrap_or_default()
}

/// `10.9.0.0/16` or `10.9.0.0/16,10.7.0.1`.
fn parse_route(text: &str) -> Result<RouteSpec, String> {
    let (destination, gateway) = match text.split_once(',') {
        Some((destination, gateway)) => (destination, Some(gateway)),
        None => (text, None),
    };
    let destination: Cidr = destination.parse().map_err(|error| format!("{error}"))?;
    let gateway = gateway.map(str::parse::<IpAddr>).transpose();
    let gateway =
        gateway.map_err(|_| "the gateway is an IP address, such as 10.7.0.1".to_owned())?;
    if gateway.is_some_and(|gateway| gateway.is_ipv4() != destination.address.is_ipv4()) {
        return Err("the gateway and the network are of one family".to_owned());
    }
    Ok(RouteSpec {
        destination,
        gateway,
        priority: None,
        table: None,
        mtu: None,
        advmss: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_free_name_is_taken() {
        let taken = |names: &[&str]| names.iter().map(|n| json!({"name": n})).collect::<Vec<_>>();
        assert_eq!(free_name(&[]), "eth1");
        assert_eq!(free_name(&taken(&["eth0", "eth1", "eth3"])), "eth2");
    }

    #[test]
    fn routes_are_read_as_people_write_them() {
        let route = parse_route("10.9.0.0/16,10.7.0.1").unwrap();
        assert_eq!(route.destination, "10.9.0.0/16".parse().unwrap());
        assert_eq!(route.gateway, "10.7.0.1".parse().ok());
        assert_eq!(parse_route("fd00::/8").unwrap().gateway, None);
        for (wrong, why) in [
            ("10.9.0.0", "prefix length"),
            ("10.9.0.0/33", "prefix length"),
            ("10.9.0.0/16,", "the gateway is"),
            ("10.9.0.0/16,gw", "the gateway is"),
            ("10.9.0.0/16,fd00::1", "of one family"),
        ] {
            let said = parse_route(wrong).unwrap_err();
            assert!(said.contains(why), "{wrong}: {said}");
        }
    }
}
