//! A pod's network: made in order, undone in reverse, also for a pod that was killed.
//!
//! ```text
//!  record ─▶ namespace ─▶ CNI ADD ─▶ tap ─▶ tc redirect
//!    ▲           ▲           ▲         └──────┴── gone with the namespace and the machine's descriptors
//!    └───────────┴── undo: ──┴ CNI DEL, namespace, record
//! ```
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use cube_guest::network::{Cidr, DnsSpec, InterfaceSpec, MacAddress};

use super::cni::{Endpoint, Plugins};
use super::record::{Owned, Record, Records};
use super::rtnetlink::Rtnetlink;
use super::{AboutInterface, NetError, NetworkConfig, PortMapping, namespace, redirect, tap};

/// What the pod's interface is called, in its namespace and in the guest.
pub const INTERFACE: &str = "eth0";
/// What its tap is called in its namespace.
const TAP: &str = "tap0";

/// The pod networks of this host.
#[derive(Debug, Clone)]
pub struct Networks {
    records: Records,
    plugins: Plugins,
}

/// A pod's network that lives. Dropping it undoes it; [`Attachment::undo`] also says what fails.
#[derive(Debug)]
pub struct Attachment {
    /// None once it is undone.
    owned: Option<Owned>,
    plugins: Plugins,
    interface: InterfaceSpec,
    mtu: u32,
    dns: Option<DnsSpec>,
    sysctls: BTreeMap<String, String>,
}

impl Networks {
    /// Those recorded in `directory`.
    pub fn new(directory: &Path, plugins: Plugins) -> Self {
        Self {
            records: Records::new(directory),
            plugins,
        }
    }

    /// Undoes what owners that were killed have left. What cannot be undone stays recorded for the next time.
    ///
    /// # Errors
    /// The first thing that could not be undone; everything was tried.
    pub fn sweep(&self) -> Result<(), NetError> {
        let abandoned = self.records.abandoned()?;
        let mut networks: Vec<NetworkConfig> = Vec::new();
        let mut first = Ok(());
        for owned in abandoned {
            if let Ok(network) = network(&owned.record)
                && !networks.iter().any(|known| known.name == network.name)
            {
                networks.push(network);
            }
            first = first.and(undo(owned, &self.plugins));
        }
        for network in networks {
            first = first.and(self.collect_garbage(&network));
        }
        first
    }

    /// Lets the plug-ins of a network remove what belongs to no pod that lives.
    fn collect_garbage(&self, network: &NetworkConfig) -> Result<(), NetError> {
        let records = self.records.list()?;
        let of_network = records.into_iter().filter(|(record, _)| {
            record.config.get("name").and_then(|name| name.as_str()) == Some(&network.name)
        });
        let valid: Vec<_> = of_network
            .map(|(record, _)| (record.pod, record.interface))
            .collect();
        Ok(self.plugins.collect_garbage(network, &valid)?)
    }

    /// Every network that is recorded, with whether its owner lives.
    ///
    /// # Errors
    /// A record that cannot be read.
    pub fn list(&self) -> Result<Vec<(Record, bool)>, NetError> {
        self.records.list()
    }

    /// Asks the plug-ins whether a pod's network is as they made it.
    ///
    /// # Errors
    /// The plug-in that finds something else.
    pub fn check(&self, record: &Record) -> Result<(), NetError> {
        let Some(result) = &record.result else {
            return Ok(());
        };
        let network = network(record)?;
        let path = namespace::path(&record.namespace);
        Ok(self
            .plugins
            .check(endpoint(record, &network, &path), result)?)
    }

    /// Makes the network of the pod `pod`, with a tap of `queues` queues. If it fails, what was made is undone.
    ///
    /// # Errors
    /// What could not be made, or the plug-in that failed.
    pub fn attach(
        &self,
        network: &NetworkConfig,
        pod: &str,
        ports: &[PortMapping],
        queues: usize,
    ) -> Result<(Attachment, Vec<OwnedFd>), NetError> {
        // Before anything is made that only a plug-in could undo.
        self.plugins.require(network)?;
        let sysctls = network.sysctls(INTERFACE)?;
        let owned = self.records.create(Record {
            pod: pod.to_owned(),
            config: network.source().clone(),
            config_path: network.path.clone(),
            namespace: format!("cube-{pod}"),
            interface: INTERFACE.to_owned(),
            capabilities: network.port_mappings(ports)?,
            result: None,
            complete: false,
        })?;
        let mut attachment = Attachment {
            owned: Some(owned),
            plugins: self.plugins.clone(),
            interface: InterfaceSpec {
                name: INTERFACE.to_owned(),
                mac: MacAddress([0; 6]),
                mtu: None,
                addresses: Vec::new(),
                routes: Vec::new(),
                neighbours: Vec::new(),
            },
            mtu: 0,
            dns: None,
            sysctls,
        };
        // Undone by its end if this fails.
        let queues = attachment.make(network, queues)?;
        Ok((attachment, queues))
    }
}

impl Attachment {
    fn make(&mut self, network: &NetworkConfig, queues: usize) -> Result<Vec<OwnedFd>, NetError> {
        let Some(owned) = &mut self.owned else {
            return Ok(Vec::new());
        };
        namespace::create(&owned.record.namespace)?;
        let path = namespace::path(&owned.record.namespace);
        let added = owned.shared(|owned| {
            let record = owned.record.clone();
            let mut noted = Ok(());
            let added = self
                .plugins
                .add(endpoint(&record, network, &path), |result| {
                    let written = owned.change(|record| record.result = Some(result.clone()));
                    noted = std::mem::replace(&mut noted, Ok(())).and(written);
                });
            noted.and(added.map_err(NetError::from))
        });
        let result = added?;
        self.interface.addresses = result.addresses(INTERFACE);
        self.interface.routes = result.routes(INTERFACE);
        self.dns = result.dns();
        let (link, queues) = namespace::run(&owned.record.namespace, || join(queues))?;
        self.interface.mac = link.mac;
        self.interface.mtu = Some(link.mtu);
        self.mtu = link.mtu;
        owned.change(|record| record.complete = true)?;
        Ok(queues)
    }

    /// What the guest sets up.
    pub fn interface(&self) -> &InterfaceSpec {
        &self.interface
    }

    /// MTU in bytes.
    pub fn mtu(&self) -> u32 {
        self.mtu
    }

    /// Name servers, if the network has any.
    pub fn dns(&self) -> Option<&DnsSpec> {
        self.dns.as_ref()
    }

    /// Settings of the guest's kernel: paths below `/proc/sys`, and their values.
    pub fn sysctls(&self) -> &BTreeMap<String, String> {
        &self.sysctls
    }

    /// Its addresses.
    pub fn addresses(&self) -> &[Cidr] {
        &self.interface.addresses
    }

    /// A copy of the lock that says that this network has an owner, for a process to inherit.
    ///
    /// # Errors
    /// This process has no descriptor left.
    pub fn lock_copy(&self) -> io::Result<OwnedFd> {
        let owned = self.owned.as_ref().map(Owned::lock_copy);
        owned.unwrap_or_else(|| Err(io::Error::other("the network is undone")))
    }

    /// Leaves the network to whoever holds a copy of its lock: when that process has gone, the next command
    /// undoes it.
    pub fn hand_over(mut self) {
        self.owned = None;
    }

    /// Undoes everything.
    ///
    /// # Errors
    /// What could not be undone; it stays recorded, and the next command tries again.
    pub fn undo(mut self) -> Result<(), NetError> {
        match self.owned.take() {
            Some(owned) => undo(owned, &self.plugins),
            None => Ok(()),
        }
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        if let Some(owned) = self.owned.take() {
            // What fails stays recorded.
            let _ = undo(owned, &self.plugins);
        }
    }
}

/// Makes the tap beside the interface that the plug-ins made, and joins the two.
fn join(queues: usize) -> Result<(super::rtnetlink::Link, Vec<OwnedFd>), NetError> {
    let queues = tap::create(TAP, queues)?;
    let netlink = Rtnetlink::open().about_interface("look at", INTERFACE)?;
    let interface = netlink
        .link(INTERFACE)
        .about_interface("look at", INTERFACE)?;
    let tap = netlink.link(TAP).about_interface("look at", TAP)?;
    // The kernel's own chatter on the tap is not the network's.
    let quiet = format!("/proc/sys/net/ipv6/conf/{TAP}/disable_ipv6");
    // A host without IPv6 is quiet already.
    let _ = std::fs::write(quiet, "1");
    let up = netlink.bring_up(tap.index, interface.mtu);
    up.about_interface("bring up", TAP)?;
    let joined = redirect::join(&netlink, interface.index, tap.index);
    joined.about_interface("redirect the traffic of", INTERFACE)?;
    Ok((interface, queues))
}

fn network(record: &Record) -> Result<NetworkConfig, NetError> {
    let network = NetworkConfig::from_value(record.config.clone(), &record.config_path);
    network.map_err(|fault| {
        NetError::Cni(super::cni::CniError::Config {
            path: record.config_path.clone(),
            fault,
        })
    })
}

fn endpoint<'a>(
    record: &'a Record,
    network: &'a NetworkConfig,
    namespace: &'a Path,
) -> Endpoint<'a> {
    Endpoint {
        network,
        container: &record.pod,
        namespace,
        interface: &record.interface,
        capabilities: &record.capabilities,
    }
}

/// DEL, whether ADD had begun or not; then the namespace, with what is left in it; then the record.
fn undo(mut owned: Owned, plugins: &Plugins) -> Result<(), NetError> {
    let network = network(&owned.record)?;
    let path = namespace::path(&owned.record.namespace);
    if !namespace::exists(&owned.record.namespace) {
        // The plug-ins know what to do about one that is not there, but not about half of one.
        namespace::remove(&owned.record.namespace)?;
    }
    let deleted = owned.shared(|owned| {
        let record = &owned.record;
        plugins.delete(endpoint(record, &network, &path), record.result.as_ref())
    });
    namespace::remove(&owned.record.namespace)?;
    deleted?;
    owned.remove()
}
