//! Interfaces through the API: the supervisor's part, on a machine that only counts.
use std::os::fd::OwnedFd;

use cube_guest::network::MacAddress;

use super::*;
use crate::pod::interfaces::NetSlots;
use crate::vmm::machine::NetPort;
use crate::vmm::spec::{NetSpec, RateLimit};
use crate::vmm::virtio::net::tap::{Link, Offloads};
use crate::vmm::virtio::net::{Identity, Net};

const FIRST: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);

/// A link to nowhere.
struct Nowhere;

impl Link for Nowhere {
    fn queues(&self) -> &[OwnedFd] {
        &[]
    }

    fn offloads(&self) -> Offloads {
        Offloads::NONE
    }

    fn set_offloads(&self, _: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn use_queues(&mut self, _: usize) -> io::Result<()> {
        Ok(())
    }
}

impl NetSlots for Arc<Counted> {
    fn first_nets(&self) -> Vec<NetPort> {
        let identity = Identity {
            name: "eth0".to_owned(),
            mac: FIRST,
            mtu: 1500,
            check_source: true,
        };
        let limits = (RateLimit::default(), RateLimit::default());
        let device = Net::new(identity, Nowhere, limits).unwrap();
        vec![NetPort {
            name: "eth0".to_owned(),
            mac: FIRST,
            slot: 99,
            control: Some(device.control()),
        }]
    }

    fn cpus(&self) -> usize {
        1
    }

    fn attach_net(&self, net: &NetSpec, _: Vec<OwnedFd>) -> Result<NetPort, String> {
        if net.name == "full" {
            return Err("no virtio slot is free".to_owned());
        }
        Ok(NetPort {
            name: net.name.clone(),
            mac: net.mac,
            slot: self.given.fetch_add(1, Ordering::SeqCst),
            control: None,
        })
    }
}

impl TestPod {
    fn attach(&self, change: Value) -> Result<Value, ApiError> {
        let mut body = json!({"name": "eth1", "mac": "02:00:00:00:00:02", "socket": "/s"});
        for (field, value) in change.as_object().unwrap() {
            body[field] = value.clone();
        }
        self.api.call("POST", "/v1/interfaces", &body)
    }

    fn limit(&self, name: &str, limits: Value) -> Result<(), ApiError> {
        let path = format!("/v1/interfaces/{name}/limits");
        self.api.call("PUT", &path, &limits)
    }

    fn interfaces(&self) -> Vec<String> {
        let all: Vec<Value> = self.api.get("/v1/interfaces").unwrap();
        let line = |interface: Value| {
            let text = |field: &str| interface[field].as_str().unwrap().to_owned();
            format!("{} {} {}", text("name"), text("mac"), text("state"))
        };
        all.into_iter().map(line).collect()
    }
}

fn sentence<T: std::fmt::Debug>(result: Result<T, ApiError>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn an_interface_comes_and_goes() {
    let pod = TestPod::start();
    let first = "eth0 02:00:00:00:00:01 attached";
    assert_eq!(pod.interfaces(), [first]);
    let status = pod.attach(json!({"addresses": ["10.1.0.2/24"]})).unwrap();
    assert_eq!(
        (&status["name"], &status["state"]),
        (&json!("eth1"), &json!("attached"))
    );
    assert_eq!(pod.interfaces(), [first, "eth1 02:00:00:00:00:02 attached"]);
    let again = sentence(pod.attach(json!({})));
    assert!(again.contains("of this name"), "{again}");
    let again = sentence(pod.attach(json!({"name": "eth2", "mac": FIRST.to_string()})));
    assert!(again.contains("of this address"), "{again}");
    let delete = |name: &str| {
        let path = format!("/v1/interfaces/{name}");
        pod.api.call::<()>("DELETE", &path, &json!({}))
    };
    delete("eth1").unwrap();
    delete("eth0").unwrap();
    assert!(pod.interfaces().is_empty());
    assert_eq!(pod.slots.taken.load(Ordering::SeqCst), 2);
    assert_eq!(sentence(delete("eth1")), "the pod has no such interface");
    pod.stop();
}

#[test]
fn an_interface_that_cannot_be_is_not_there() {
    let pod = TestPod::start();
    // The slot whose binding fails.
    pod.slots.given.store(13, Ordering::SeqCst);
    assert_eq!(sentence(pod.attach(json!({}))), "no driver");
    assert_eq!(pod.slots.taken.load(Ordering::SeqCst), 1);
    for (change, words) in [
        (json!({"name": "full"}), "no virtio slot is free"),
        (json!({"name": "a b"}), "it is \"a b\""),
        (json!({"mac": "01:00:00:00:00:02"}), "names one station"),
        (json!({"mtu": 60}), "it is 60"),
        (json!({"socket": null}), "has a `tap` or a `socket`"),
        (json!({"tap": "t0"}), "has a `tap` or a `socket`"),
        (json!({"namespace": "n"}), "only a tap"),
        (
            json!({"socket": null, "tap": "t0", "namespace": "../n"}),
            "named as by",
        ),
        (json!({"socket": null, "tap": "absent0"}), "absent0"),
        (json!({"check_source": true}), "cannot be with `socket`"),
    ] {
        let said = sentence(pod.attach(change));
        assert!(said.contains(words), "{said}");
    }
    assert_eq!(pod.interfaces().len(), 1);
    pod.stop();
}

#[test]
fn limits_are_changed_where_frames_pass() {
    let pod = TestPod::start();
    let limits = json!({"receive": {"bytes": {"per_second": 1000, "burst": 1}}});
    pod.limit("eth0", limits.clone()).unwrap();
    pod.limit("eth0", json!({})).unwrap();
    let none = json!({"transmit": {"frames": {"per_second": 0, "burst": 1}}});
    let said = sentence(pod.limit("eth0", none));
    assert!(said.contains("has a 0"), "{said}");
    pod.attach(json!({})).unwrap();
    let said = sentence(pod.limit("eth1", limits.clone()));
    assert!(said.contains("the switch has the limits"), "{said}");
    let said = sentence(pod.limit("eth9", limits));
    assert_eq!(said, "the pod has no such interface");
    pod.stop();
}
