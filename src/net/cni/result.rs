//! What ADD returns: interfaces, addresses, routes, name servers.
#![forbid(unsafe_code)]

use std::net::IpAddr;

use cube_guest::network::{Cidr, DnsSpec, RouteSpec};
use serde::Deserialize;
use serde_json::Value;

/// The result of a chain (CNI specification, "ADD Success"), versions 0.3.0 to 1.1.0.
#[derive(Debug, Clone, Default, Deserialize)]
pub struct AddResult {
    #[serde(default)]
    interfaces: Vec<Interface>,
    #[serde(default)]
    ips: Vec<Ip>,
    #[serde(default)]
    routes: Vec<Route>,
    #[serde(default)]
    dns: Dns,
}

#[derive(Debug, Clone, Deserialize)]
struct Interface {
    name: String,
    #[serde(default)]
    sandbox: String,
}

#[derive(Debug, Clone, Deserialize)]
struct Ip {
    address: Cidr,
    #[serde(default)]
    gateway: Option<IpAddr>,
    /// Index into `interfaces`.
    #[serde(default)]
    interface: Option<usize>,
}

#[derive(Debug, Clone, Deserialize)]
struct Route {
    dst: Cidr,
    #[serde(default)]
    gw: Option<IpAddr>,
    #[serde(default)]
    mtu: Option<u32>,
    #[serde(default)]
    advmss: Option<u32>,
    #[serde(default)]
    priority: Option<u32>,
    #[serde(default)]
    table: Option<u32>,
    #[serde(default)]
    scope: Option<u32>,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct Dns {
    #[serde(default)]
    nameservers: Vec<IpAddr>,
    #[serde(default)]
    domain: String,
    #[serde(default)]
    search: Vec<String>,
    #[serde(default)]
    options: Vec<String>,
}

/// `RT_SCOPE_LINK`: a route whose destination is on the link.
const SCOPE_LINK: u32 = 253;

impl AddResult {
    /// Reads a result.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(value: &Value) -> Result<Self, String> {
        let version = value
            .get("cniVersion")
            .and_then(Value::as_str)
            .unwrap_or("0.2.0");
        if ["0.1.0", "0.2.0"].contains(&version) {
            return Err(format!(
                "its result is of version {version}; Cube reads 0.3.0 and later"
            ));
        }
        Self::deserialize(value).map_err(|error| format!("its result is malformed: {error}"))
    }

    /// Addresses of the interface called `name` in the namespace.
    pub fn addresses(&self, name: &str) -> Vec<Cidr> {
        self.ips_of(name).map(|ip| ip.address).collect()
    }

    fn ips_of<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Ip> {
        self.ips.iter().filter(move |ip| match ip.interface {
            Some(index) => {
                let interface = self.interfaces.get(index);
                interface.is_some_and(|i| i.name == name && !i.sandbox.is_empty())
            }
            None => true,
        })
    }

    /// Its routes. One without a gateway leads to that of the address of its family, if there is one and the
    /// destination is not on the link.
    pub fn routes(&self, name: &str) -> Vec<RouteSpec> {
        let gateway = |v4: bool| {
            let mut gateways = self.ips_of(name).filter_map(|ip| ip.gateway);
            gateways.find(|gateway| gateway.is_ipv4() == v4)
        };
        let routes = self.routes.iter().map(|route| RouteSpec {
            destination: route.dst,
            gateway: match route.scope {
                Some(SCOPE_LINK) => None,
                _ => route.gw.or_else(|| gateway(route.dst.address.is_ipv4())),
            },
            priority: route.priority,
            table: route.table,
            mtu: route.mtu,
            advmss: route.advmss,
        });
        routes.collect()
    }

    /// Its name servers; none: it says nothing.
    pub fn dns(&self) -> Option<DnsSpec> {
        let Dns {
            nameservers,
            domain,
            search,
            options,
        } = self.dns.clone();
        let domain = Some(domain).filter(|domain| !domain.is_empty() && search.is_empty());
        let spec = DnsSpec {
            nameservers,
            search: search.into_iter().chain(domain).collect(),
            options,
        };
        (spec != DnsSpec::default()).then_some(spec)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn result() -> Value {
        json!({
            "cniVersion": "1.1.0",
            "interfaces": [
                {"name": "cube0", "mac": "aa:aa:aa:aa:aa:aa"},
                {"name": "veth1", "mac": "aa:aa:aa:aa:aa:ab"},
                {"name": "eth0", "mac": "aa:aa:aa:aa:aa:ac", "sandbox": "/run/netns/a", "mtu": 1500}
            ],
            "ips": [
                {"interface": 2, "address": "10.1.0.5/16", "gateway": "10.1.0.1"},
                {"interface": 2, "address": "fd00::5/64", "gateway": "fd00::1"},
                {"interface": 0, "address": "10.1.0.1/16"}
            ],
            "routes": [
                {"dst": "0.0.0.0/0"},
                {"dst": "10.9.0.0/16", "gw": "10.1.0.9", "mtu": 1400, "advmss": 1300, "priority": 7, "table": 100},
                {"dst": "169.254.0.0/16", "scope": 253},
                {"dst": "::/0"}
            ],
            "dns": {"nameservers": ["10.1.0.1"], "domain": "example.org"}
        })
    }

    #[test]
    fn the_guest_gets_what_is_its_interfaces() {
        let result = AddResult::parse(&result()).unwrap();
        let addresses = result.addresses("eth0").into_iter().map(|a| a.to_string());
        assert_eq!(addresses.collect::<Vec<_>>(), ["10.1.0.5/16", "fd00::5/64"]);
        let gateways: Vec<_> = result
            .routes("eth0")
            .into_iter()
            .map(|r| r.gateway)
            .collect();
        let expected = ["10.1.0.1", "10.1.0.9", "", "fd00::1"].map(|a| a.parse().ok());
        assert_eq!(gateways, expected);
        let second = &result.routes("eth0")[1];
        let numbers = (second.mtu, second.advmss, second.priority, second.table);
        assert_eq!(numbers, (Some(1400), Some(1300), Some(7), Some(100)));
        assert_eq!(result.dns().unwrap().search, ["example.org"]);
    }

    #[test]
    fn what_is_no_result_is_refused() {
        for value in [
            json!({"cniVersion": "0.2.0", "ip4": {}}),
            json!({}),
            json!({"cniVersion": "1.0.0", "ips": [{"address": "10.1.0.5"}]}),
            json!({"cniVersion": "1.0.0", "routes": {}}),
            json!([]),
        ] {
            assert!(AddResult::parse(&value).is_err(), "{value}");
        }
        let empty = AddResult::parse(&json!({"cniVersion": "1.0.0"})).unwrap();
        assert_eq!((empty.addresses("eth0"), empty.dns()), (vec![], None));
    }
}
