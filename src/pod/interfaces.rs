//! Network interfaces of a running pod: attached, limited, detached.
//!
//! ```text
//!   POST ─▶ tap or switch, slot ─▶ guest: bind, set up ─▶ attached ─ DELETE ─▶ guest: unbind ─▶ slot empty
//!                                          │ cannot                                 ▲
//!                                          └────────────────────────────────────────┘
//! ```
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use cube_guest::HostRequest;
use cube_guest::network::{InterfaceSpec, MacAddress};
use serde_json::{Value, json};

use super::api::http::Refusal;
use super::api::interface_body::{
    CreateInterface, InterfaceLimits, InterfaceState, InterfaceStatus,
};
use super::api::server::ConnectionId;
use super::machinery::Machinery;
use super::pending::Then;
use super::supervisor::Supervisor;
use crate::net::{namespace, tap};
use crate::vmm::machine::{NetPort, Running};
use crate::vmm::spec::{NetSpec, SpecError};

/// Queues of an interface at most; a machine with fewer processors uses as many as those.
const MAX_QUEUES: usize = 8;
/// The MTU of an interface on a switch, in bytes: Ethernet's.
const DEFAULT_MTU: u32 = 1500;

/// What is sent at once; `None`: the answer comes later.
type Served = Result<Option<(u16, Value)>, Refusal>;

/// Where interfaces are attached: the machine, or what stands in for it.
pub(crate) trait NetSlots {
    /// Those that the machine began with.
    fn first_nets(&self) -> Vec<NetPort>;
    /// Number of processors.
    fn cpus(&self) -> usize;
    /// Puts an interface into an empty slot.
    fn attach_net(&self, net: &NetSpec, queues: Vec<OwnedFd>) -> Result<NetPort, String>;
}

impl NetSlots for Running {
    fn first_nets(&self) -> Vec<NetPort> {
        self.nets().to_vec()
    }

    fn cpus(&self) -> usize {
        Running::cpus(self)
    }

    fn attach_net(&self, net: &NetSpec, queues: Vec<OwnedFd>) -> Result<NetPort, String> {
        Running::attach_net(self, net, queues).map_err(|error| error.to_string())
    }
}

/// The pod's interfaces, by name.
#[derive(Default)]
pub(crate) struct Interfaces {
    known: BTreeMap<String, Interface>,
    /// Those that the machine began with are among them.
    complete: bool,
}

struct Interface {
    port: NetPort,
    state: InterfaceState,
}

/// What follows when the guest has answered.
#[derive(Debug)]
pub(crate) enum NetStep {
    /// An interface was bound and set up, or not.
    SetUp(ConnectionId, String),
    /// It was unbound. With a sentence: why it could not be set up.
    Unbound(ConnectionId, String, Option<String>),
}

impl Interfaces {
    fn known(&mut self, machine: &dyn NetSlots) -> &mut BTreeMap<String, Interface> {
        if !std::mem::replace(&mut self.complete, true) {
            for port in machine.first_nets() {
                let state = InterfaceState::Attached;
                let interface = Interface { port, state };
                self.known.insert(interface.port.name.clone(), interface);
            }
        }
        &mut self.known
    }

    /// The one called `name`, if nothing is under way with it.
    fn attached(&mut self, name: &str, machine: &dyn NetSlots) -> Result<&mut Interface, Refusal> {
        let interface = self.known(machine).get_mut(name);
        let interface =
            interface.ok_or_else(|| Refusal::new(404, "the pod has no such interface"))?;
        match interface.state {
            InterfaceState::Attached => Ok(interface),
            InterfaceState::Attaching => {
                Err(Refusal::new(409, "the interface is still being attached"))
            }
            InterfaceState::Detaching => Err(Refusal::new(409, "the interface is being detached")),
        }
    }

    fn check_new(
        &mut self,
        name: &str,
        mac: MacAddress,
        machine: &dyn NetSlots,
    ) -> Result<(), Refusal> {
        let known = self.known(machine);
        if known.contains_key(name) {
            return Err(Refusal::new(409, "the pod has an interface of this name"));
        }
        if known.values().any(|interface| interface.port.mac == mac) {
            return Err(Refusal::new(
                409,
                "the pod has an interface of this address",
            ));
        }
        Ok(())
    }
}

impl Interface {
    fn status(&self) -> InterfaceStatus {
        let control = self.port.control.as_ref();
        InterfaceStatus {
            name: self.port.name.clone(),
            mac: self.port.mac,
            state: self.state,
            counters: control.map(|control| control.counters()),
        }
    }

    fn slot(&self) -> u16 {
        // A machine has a few dozen.
        u16::try_from(self.port.slot).unwrap_or(u16::MAX)
    }
}

impl Supervisor {
    pub(super) fn list_interfaces(&mut self, machine: &dyn NetSlots) -> Value {
        let known = self.interfaces.known(machine).values();
        json!(known.map(Interface::status).collect::<Vec<_>>())
    }

    pub(super) fn attach_interface(
        &mut self,
        connection: ConnectionId,
        body: CreateInterface,
        machine: &dyn Machinery,
    ) -> Served {
        self.interfaces.check_new(&body.name, body.mac, machine)?;
        let (queues, mtu) = open(&body, machine.cpus().min(MAX_QUEUES))?;
        let net = NetSpec {
            name: body.name.clone(),
            tap_fds: Vec::new(),
            socket: body.socket,
            mac: body.mac,
            mtu: body.mtu.unwrap_or(mtu.min(u16::MAX.into()) as u16),
            check_source: body.check_source,
            receive_limit: body.limits.receive,
            transmit_limit: body.limits.transmit,
        };
        net.check(queues.len()).map_err(refusal)?;
        let port = machine.attach_net(&net, queues);
        let port = port.map_err(|sentence| Refusal::new(409, sentence))?;
        let state = InterfaceState::Attaching;
        let interface = Interface { port, state };
        let slot = interface.slot();
        let set_up = InterfaceSpec {
            name: body.name.clone(),
            mac: body.mac,
            mtu: Some(net.mtu.into()),
            addresses: body.addresses,
            routes: body.routes,
            neighbours: body.neighbours,
        };
        let requests = vec![
            HostRequest::BindSlot { slot },
            HostRequest::SetUpInterface(Box::new(set_up)),
        ];
        self.interfaces.known.insert(body.name.clone(), interface);
        let step = NetStep::SetUp(connection, body.name.clone());
        let asked = self.ask(requests, Then::Interface(step));
        if asked.is_err() {
            self.forget_interface(&body.name, machine);
        }
        asked
    }

    /// Empties the slot of an interface that the guest has let go of.
    fn forget_interface(&mut self, name: &str, machine: &dyn Machinery) {
        if let Some(interface) = self.interfaces.known.remove(name) {
            machine.detach(interface.slot());
        }
    }

    pub(super) fn detach_interface(
        &mut self,
        connection: ConnectionId,
        name: &str,
        machine: &dyn NetSlots,
    ) -> Served {
        let interface = self.interfaces.attached(name, machine)?;
        let slot = interface.slot();
        let step = NetStep::Unbound(connection, name.to_owned(), None);
        let asked = self.ask(
            vec![HostRequest::UnbindSlot { slot }],
            Then::Interface(step),
        )?;
        self.interfaces.attached(name, machine)?.state = InterfaceState::Detaching;
        Ok(asked)
    }

    pub(super) fn limit_interface(
        &mut self,
        name: &str,
        limits: InterfaceLimits,
        machine: &dyn NetSlots,
    ) -> Served {
        let interface = self.interfaces.attached(name, machine)?;
        for (field, limit) in [("receive", limits.receive), ("transmit", limits.transmit)] {
            limit.check(field).map_err(refusal)?;
        }
        let control = interface.port.control.as_ref();
        let control = control.ok_or_else(|| {
            Refusal::new(
                409,
                "frames go past the pod process: the switch has the limits",
            )
        })?;
        control.set_limits(limits.receive, limits.transmit);
        Ok(Some((204, Value::Null)))
    }

    /// Goes on when the guest has answered.
    pub(super) fn interface_step(
        &mut self,
        step: NetStep,
        failure: Option<String>,
        machine: &dyn Machinery,
    ) {
        match (step, failure) {
            (NetStep::SetUp(connection, name), None) => {
                if let Some(interface) = self.interfaces.known.get_mut(&name) {
                    interface.state = InterfaceState::Attached;
                    let status = json!(interface.status());
                    self.server.respond(connection, 201, Some(&status));
                }
            }
            (NetStep::SetUp(connection, name), why @ Some(_)) => {
                let Some(interface) = self.interfaces.known.get_mut(&name) else {
                    return;
                };
                interface.state = InterfaceState::Detaching;
                let slot = interface.slot();
                let step = NetStep::Unbound(connection, name.clone(), why);
                let unbind = vec![HostRequest::UnbindSlot { slot }];
                if let Err(refusal) = self.ask(unbind, Then::Interface(step)) {
                    self.forget_interface(&name, machine);
                    self.server.refuse(connection, &refusal);
                }
            }
            // The guest keeps it.
            (NetStep::Unbound(connection, name, None), failure @ Some(_)) => {
                if let Some(interface) = self.interfaces.known.get_mut(&name) {
                    interface.state = InterfaceState::Attached;
                }
                self.tell(connection, failure);
            }
            // One that could not be bound cannot be unbound either.
            (NetStep::Unbound(connection, name, why), _) => {
                self.forget_interface(&name, machine);
                self.tell(connection, why);
            }
        }
    }
}

/// Opens up to `most` queues of the tap that `body` names, and asks for its MTU; none for a switch.
fn open(body: &CreateInterface, most: usize) -> Result<(Vec<OwnedFd>, u32), Refusal> {
    let name = match (&body.tap, &body.socket) {
        (Some(name), None) => name,
        (None, Some(_)) if body.namespace.is_some() => {
            let sentence = "only a tap is in a network namespace";
            return Err(Refusal::field("namespace", sentence));
        }
        (None, Some(_)) => return Ok((Vec::new(), DEFAULT_MTU)),
        _ => {
            return Err(Refusal::field(
                "tap",
                "an interface has a `tap` or a `socket`",
            ));
        }
    };
    let opened = match &body.namespace {
        None => tap::open_existing(name, most),
        Some(namespace) if namespace.contains('/') || namespace.starts_with('.') => {
            let sentence = "a network namespace is named as by `ip netns`";
            return Err(Refusal::field("namespace", sentence));
        }
        Some(namespace) => namespace::run(namespace, || tap::open_existing(name, most)),
    };
    opened.map_err(|error| Refusal::field("tap", error.to_string()))
}

/// Says what is wrong with a field as the API calls it.
fn refusal(error: SpecError) -> Refusal {
    match error {
        SpecError::Field { field, fault } => {
            let field = match field.split_once('.') {
                Some(("receive_limit", rest)) => format!("limits.receive.{rest}"),
                Some(("transmit_limit", rest)) => format!("limits.transmit.{rest}"),
                _ => field,
            };
            Refusal::field(field, format!("it {fault}"))
        }
        error @ SpecError::Json(_) => Refusal::new(400, error.to_string()),
    }
}
