//! `--net` and `-p` of `cube run` and `cube pod run`: which network a pod gets, and making it.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use cube_guest::NetworkSpec;
use cube_guest::network::{DnsSpec, InterfaceSpec, MacAddress};

use super::failure::Failure;
use crate::client::{NamedFile, PodLink, PodNet};
use crate::net::attachment::INTERFACE;
use crate::net::cni::Plugins;
use crate::net::{Attachment, NetworkConfig, Networks, PortMapping, tap};
use crate::pod::new_token;

/// The most queues of a tap: one for each vCPU up to this.
const MAX_QUEUES: u8 = 8;
/// Where the base directory keeps the records of networks; hidden from what looks for pods there.
const RECORDS: &str = ".net";
/// The MTU of an interface on a switch, in bytes: Ethernet's.
const DEFAULT_MTU: u32 = 1500;
/// The largest MTU that the device takes.
const MAX_MTU: u32 = 65_521;

/// Options about the pod's network.
#[derive(Debug, clap::Args)]
pub(crate) struct NetArgs {
    /// The pod's network: `cni`, `none`, `tap=NAME` for an interface of yours, or `vhost-user=SOCKET` for a
    /// port of a switch such as DPDK's or VPP's. [default: `cni` for root,
    /// where there is a configuration in /etc/cni/net.d or the plug-ins for a bridge of Cube's own; else
    /// `none`]
    #[arg(long, env = "CUBE_NET", hide_env_values = true, value_name = "NETWORK", value_parser = parse_mode)]
    net: Option<Mode>,

    /// Publish a port of the pod on this host. May be given many times.
    #[arg(long, short, value_name = "[ADDRESS:]HOST:POD[/PROTOCOL]", value_parser = parse_port)]
    publish: Vec<PortMapping>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Mode {
    None,
    Cni,
    Tap(String),
    VhostUser(PathBuf),
}

/// What an interface that is attached to a running pod is on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Port {
    /// A tap of the user's.
    Tap(String),
    /// A switch's socket.
    VhostUser(PathBuf),
}

/// Those networks of `--net` that are a port of somebody else's.
pub(crate) fn parse_interface_port(text: &str) -> Result<Port, String> {
    match parse_mode(text) {
        Ok(Mode::Tap(name)) => Ok(Port::Tap(name)),
        Ok(Mode::VhostUser(path)) => Ok(Port::VhostUser(path)),
        _ => Err("it is `tap=NAME` or `vhost-user=SOCKET`".to_owned()),
    }
}

/// An address that nobody has, most likely: locally administered, of one station.
pub(crate) fn random_mac() -> Result<MacAddress, Failure> {
    let [.., a, b, c, d, e] = new_token().map_err(Failure::new)?.to_be_bytes();
    Ok(MacAddress([0x02, a, b, c, d, e]))
}

fn parse_mode(text: &str) -> Result<Mode, String> {
    match text.split_once('=') {
        None if text == "none" => Ok(Mode::None),
        None if text == "cni" => Ok(Mode::Cni),
        Some(("tap", name)) if !name.is_empty() => Ok(Mode::Tap(name.to_owned())),
        Some(("vhost-user", path)) if !path.is_empty() => Ok(Mode::VhostUser(path.into())),
        _ => Err("it is `cni`, `none`, `tap=NAME` or `vhost-user=SOCKET`".to_owned()),
    }
}

/// `8080:80`, `127.0.0.1:8080:80/tcp`, `[::1]:53:53/udp`.
fn parse_port(text: &str) -> Result<PortMapping, String> {
    let parse = || {
        let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let (rest, container) = ports.rsplit_once(':')?;
        let (address, host) = match rest.rsplit_once(':') {
            Some((address, host)) => (Some(address), host),
            None => (None, rest),
        };
        let address = address.map(|address| address.trim_start_matches('[').trim_end_matches(']'));
        let port = |text: &str| text.parse().ok().filter(|port| *port != 0);
        Some(PortMapping {
            host_port: port(host)?,
            container_port: port(container)?,
            protocol: ["tcp", "udp", "sctp"]
                .into_iter()
                .find(|p| *p == protocol)?
                .to_owned(),
            host_ip: address
                .map(|address| address.parse::<IpAddr>().ok())
                .map_or(Some(None), |a| a.map(Some))?,
        })
    };
    parse().ok_or_else(|| "it is HOST:POD, such as 8080:80 or 127.0.0.1:53:53/udp".to_owned())
}

/// A pod's network: what its machine and its guest are told.
pub(crate) struct PodNetwork {
    interface: InterfaceSpec,
    dns: Option<DnsSpec>,
    link: Link,
    mtu: u16,
    /// None for a tap or a switch of the user's.
    attachment: Option<Attachment>,
}

enum Link {
    Tap(Vec<OwnedFd>),
    VhostUser(PathBuf),
}

/// The pod networks recorded under `base`.
pub(crate) fn networks(base: &Path) -> Networks {
    Networks::new(&base.join(RECORDS), Plugins::default())
}

/// Undoes the networks of pods that are gone, whatever ended them.
pub(crate) fn sweep(base: &Path) {
    if let Err(error) = networks(base).sweep() {
        eprintln!("cube: a network that an earlier pod left is still there: {error}");
    }
}

impl PodNetwork {
    /// Makes the network that was asked for; none: none was.
    pub(crate) fn connect(
        arguments: &NetArgs,
        base: &Path,
        pod: &str,
        cpus: u8,
    ) -> Result<Option<Self>, Failure> {
        let queues = usize::from(cpus.min(MAX_QUEUES));
        let ports = &arguments.publish;
        let config = match &arguments.net {
            Some(Mode::None) => None,
            Some(Mode::Tap(_) | Mode::VhostUser(_)) if !ports.is_empty() => {
                return Err(Failure::usage(
                    "-p needs a network by CNI: a tap or a switch of yours has your rules",
                ));
            }
            Some(Mode::Tap(name)) => return Self::tap(name, queues).map(Some),
            Some(Mode::VhostUser(path)) => {
                // The machine looks for it again after it was away, from wherever that was started.
                let path = std::path::absolute(path).map_err(Failure::new)?;
                return Self::unconfigured(Link::VhostUser(path), DEFAULT_MTU).map(Some);
            }
            Some(Mode::Cni) => Some(configured_or_shipped()?),
            None => default_network().map_err(Failure::new)?,
        };
        let Some(config) = config else {
            return match ports.first() {
                None => Ok(None),
                Some(_) => Err(Failure::usage(
                    "-p needs a network, and this pod has none: see --net",
                )),
            };
        };
        sweep(base);
        let attached = networks(base).attach(&config, pod, ports, queues);
        let (attachment, queues) = attached.map_err(Failure::new)?;
        Ok(Some(Self {
            interface: attachment.interface().clone(),
            dns: attachment.dns().cloned().or_else(host_dns),
            link: Link::Tap(queues),
            mtu: attachment.mtu().min(MAX_MTU) as u16,
            attachment: Some(attachment),
        }))
    }

    fn tap(name: &str, queues: usize) -> Result<Self, Failure> {
        let (queues, mtu) = tap::open_existing(name, queues).map_err(Failure::new)?;
        Self::unconfigured(Link::Tap(queues), mtu.min(MAX_MTU))
    }

    /// An interface that nobody here knows an address for.
    fn unconfigured(link: Link, mtu: u32) -> Result<Self, Failure> {
        Ok(Self {
            interface: InterfaceSpec {
                name: INTERFACE.to_owned(),
                mac: random_mac()?,
                mtu: Some(mtu),
                addresses: Vec::new(),
                routes: Vec::new(),
                neighbours: Vec::new(),
            },
            dns: host_dns(),
            link,
            mtu: mtu as u16,
            attachment: None,
        })
    }

    /// What the guest sets up.
    pub(crate) fn spec(&self) -> NetworkSpec {
        NetworkSpec {
            interfaces: vec![self.interface.clone()],
            dns: self.dns.clone(),
            hosts: Vec::new(),
            sysctls: match &self.attachment {
                Some(attachment) => attachment.sysctls().clone(),
                None => BTreeMap::new(),
            },
        }
    }

    /// The machine's device, once.
    pub(crate) fn take_device(&mut self) -> PodNet {
        let link = std::mem::replace(&mut self.link, Link::Tap(Vec::new()));
        let queue = |queue| NamedFile {
            file: File::from(queue),
            path: PathBuf::from("the tap's queue"),
        };
        PodNet {
            name: self.interface.name.clone(),
            link: match link {
                Link::Tap(queues) => PodLink::Tap(queues.into_iter().map(queue).collect()),
                Link::VhostUser(path) => PodLink::VhostUser(path),
            },
            mac: self.interface.mac,
            mtu: self.mtu,
            // What CNI made belongs to this pod alone; who makes a tap may want anything on it.
            check_source: self.attachment.is_some(),
        }
    }

    /// What a pod process holds for as long as it lives, so that nobody undoes its network.
    pub(crate) fn lock_copy(&self) -> Result<Option<OwnedFd>, Failure> {
        let lock = self.attachment.as_ref().map(Attachment::lock_copy);
        lock.transpose().map_err(Failure::new)
    }

    /// Leaves it to the pod process that inherited its lock.
    pub(crate) fn hand_over(self) {
        if let Some(attachment) = self.attachment {
            attachment.hand_over();
        }
    }

    /// Undoes what was made. What fails is for the next command.
    pub(crate) fn disconnect(self) {
        if let Some(Err(error)) = self.attachment.map(Attachment::undo) {
            eprintln!("cube: the pod's network is not gone, the next command tries again: {error}");
        }
    }
}

fn configured_or_shipped() -> Result<NetworkConfig, Failure> {
    let configured = NetworkConfig::first().map_err(Failure::new)?;
    configured.map_or_else(|| NetworkConfig::shipped().map_err(Failure::new), Ok)
}

/// The network of a pod that nobody said anything about.
fn default_network() -> Result<Option<NetworkConfig>, crate::net::cni::CniError> {
    // Anybody else cannot make one.
    if !rustix::process::geteuid().is_root() || !tap::is_available() {
        return Ok(None);
    }
    if let Some(configured) = NetworkConfig::first()? {
        return Ok(Some(configured));
    }
    let shipped = NetworkConfig::shipped()?;
    let usable = Plugins::default().require(&shipped).is_ok() && has_iptables();
    Ok(usable.then_some(shipped))
}

/// The plug-ins of the shipped configuration call it.
fn has_iptables() -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join("iptables").is_file())
}

/// The host's own name servers; none: it has none that a pod can reach.
fn host_dns() -> Option<DnsSpec> {
    let text = fs::read_to_string("/etc/resolv.conf").ok()?;
    parse_resolv_conf(&text)
}

fn parse_resolv_conf(text: &str) -> Option<DnsSpec> {
    let mut dns = DnsSpec::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let keyword = words.next();
        let rest = || words.map(str::to_owned);
        match keyword {
            // A stub resolver on the host's loopback is not the pod's.
            Some("nameserver") => {
                let server = rest().next().and_then(|word| word.parse::<IpAddr>().ok());
                dns.nameservers
                    .extend(server.filter(|server| !server.is_loopback()));
            }
            Some("search") => dns.search = rest().collect(),
            Some("options") => dns.options = rest().collect(),
            _ => {}
        }
    }
    (!dns.nameservers.is_empty()).then_some(dns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_have_names() {
        assert_eq!(parse_mode("none"), Ok(Mode::None));
        assert_eq!(parse_mode("cni"), Ok(Mode::Cni));
        assert_eq!(parse_mode("tap=t0"), Ok(Mode::Tap("t0".into())));
        let switch = Mode::VhostUser("/run/vpp.sock".into());
        assert_eq!(parse_mode("vhost-user=/run/vpp.sock"), Ok(switch));
        for wrong in ["", "tap", "tap=", "vhost-user=", "bridge", "none=1"] {
            assert!(parse_mode(wrong).is_err(), "{wrong}");
        }
        assert_eq!(parse_interface_port("tap=t0"), Ok(Port::Tap("t0".into())));
        for wrong in ["none", "cni", "tap="] {
            assert!(parse_interface_port(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn ports_are_read_as_people_write_them() {
        let port = |text: &str| {
            let port = parse_port(text).unwrap();
            (
                port.host_port,
                port.container_port,
                port.protocol,
                port.host_ip,
            )
        };
        assert_eq!(port("8080:80"), (8080, 80, "tcp".into(), None));
        assert_eq!(port("1:2/udp"), (1, 2, "udp".into(), None));
        assert_eq!(
            port("127.0.0.1:53:54/tcp"),
            (53, 54, "tcp".into(), Some([127, 0, 0, 1].into()))
        );
        assert_eq!(port("[::1]:53:54").3, "::1".parse().ok());
        for wrong in [
            "80",
            "0:80",
            "80:0",
            "70000:80",
            "a:80",
            "80:80/icmp",
            "x:80:80",
            ":80:80",
            "80:80:",
        ] {
            assert!(parse_port(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn name_servers_on_the_hosts_loopback_are_not_the_pods() {
        let dns = parse_resolv_conf(
            "# x\nnameserver 127.0.0.53\nnameserver 10.0.0.1 \nsearch a b\noptions ndots:2\n",
        );
        let dns = dns.unwrap();
        assert_eq!(dns.nameservers, ["10.0.0.1".parse::<IpAddr>().unwrap()]);
        assert_eq!((dns.search.len(), dns.options.len()), (2, 1));
        assert_eq!(parse_resolv_conf("nameserver 127.0.0.53\nsearch a\n"), None);
    }
}
