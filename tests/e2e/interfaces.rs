//! Interfaces that come to a running pod and go.

use std::process::Command;

use cube::client::PodApi;
use serde_json::{Value, json};

use crate::fixture::{BUSYBOX, Machine, machine, text};

const TAP: &str = "cubetest1";

/// A tap of the host's with an address, gone at the end.
struct Tap(&'static str);

impl Tap {
    fn new(name: &'static str, address: &str) -> Self {
        ip(&format!("tuntap add {name} mode tap vnet_hdr"));
        ip(&format!("addr add {address} dev {name}"));
        ip(&format!("link set {name} up"));
        Self(name)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        ip(&format!("link del {}", self.0));
    }
}

fn ip(words: &str) {
    let status = Command::new("ip").args(words.split(' ')).status().unwrap();
    assert!(status.success(), "ip {words}");
}

/// A pod without a network, in the background.
fn pod(machine: &Machine) -> PodApi {
    let container = json!({"name": "c", "image": BUSYBOX, "command": ["sleep", "1000"]});
    let spec = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"},
        "spec": {"containers": [container]}});
    let path = machine.run_directory().join(".spec.yaml");
    std::fs::write(&path, spec.to_string()).unwrap();
    let arguments = ["pod", "run", path.to_str().unwrap()];
    let output = machine.command(&arguments).output().unwrap();
    assert_eq!(text(&output.stdout), "p\n", "{}", text(&output.stderr));
    PodApi::of(machine.run_directory(), "p")
}

fn say(machine: &Machine, script: &str) -> String {
    let arguments = ["exec", "p", "--", "sh", "-c", script];
    let output = machine.command(&arguments).output().unwrap();
    text(&output.stdout) + &text(&output.stderr)
}

#[test]
fn an_interface_is_attached_limited_and_detached_while_the_pod_runs() {
    let machine = machine();
    let _tap = Tap::new(TAP, "10.87.0.1/24");
    let api = pod(&machine);
    let body = json!({"name": "eth1", "mac": "02:00:00:00:00:07", "tap": TAP, "mtu": 1400,
        "addresses": ["10.87.0.2/24"], "routes": [{"destination": "10.99.0.0/16", "gateway": "10.87.0.1"}]});
    // Twice: what was detached can come again.
    for _ in 0..2 {
        api.call::<Value>("POST", "/v1/interfaces", &body).unwrap();
        let script = "ping -c1 10.87.0.1 > /dev/null && cat /sys/class/net/eth1/mtu; ip route | grep -o 10.99.0.0";
        assert_eq!(say(&machine, script), "1400\n10.99.0.0\n");
        let limits = json!({"receive": {"frames": {"per_second": 1000, "burst": 10}}});
        let path = "/v1/interfaces/eth1/limits";
        api.call::<Value>("PUT", path, &limits).unwrap();
        assert_eq!(
            say(&machine, "ping -c1 10.87.0.1 > /dev/null && echo ok"),
            "ok\n"
        );
        let all: Vec<Value> = api.get("/v1/interfaces").unwrap();
        assert!(
            all[0]["counters"]["received_frames"].as_u64() > Some(0),
            "{all:?}"
        );
        api.call::<Value>("DELETE", "/v1/interfaces/eth1", &json!({}))
            .unwrap();
        assert_eq!(say(&machine, "ls /sys/class/net"), "lo\n");
    }
    let absent = json!({"name": "eth2", "mac": "02:00:00:00:00:08", "tap": "absent0"});
    let refused = api
        .call::<Value>("POST", "/v1/interfaces", &absent)
        .unwrap_err();
    assert!(refused.to_string().contains("absent0"), "{refused}");
    let private = json!({"name": "eth2", "mac": "02:00:00:00:00:08", "socket": "/absent"});
    let refused = api
        .call::<Value>("POST", "/v1/interfaces", &private)
        .unwrap_err();
    assert!(
        refused
            .to_string()
            .contains("the guest's memory is private"),
        "{refused}"
    );
    let stopped = machine.command(&["stop", "p"]).output().unwrap();
    assert!(stopped.status.success(), "{}", text(&stopped.stderr));
    machine.wait_for_processes();
    machine.assert_nothing_left();
}

#[test]
fn a_person_attaches_and_detaches_an_interface() {
    let machine = machine();
    let _tap = Tap::new("cubetest2", "10.89.0.1/24");
    let api = pod(&machine);
    let net = |words: &str| {
        let words = ["net"].into_iter().chain(words.split(' '));
        let output = machine
            .command(&words.collect::<Vec<_>>())
            .output()
            .unwrap();
        text(&output.stdout) + &text(&output.stderr)
    };
    let options = "--address 10.89.0.2/24 --mtu 1400 --route 10.98.0.0/16,10.89.0.1";
    let attach = format!("attach p tap=cubetest2 {options}");
    assert_eq!(net(&attach), "eth1\n");
    let script = "ping -c1 10.89.0.1 > /dev/null && cat /sys/class/net/eth1/mtu; ip route | grep -o 10.98.0.0";
    assert_eq!(say(&machine, script), "1400\n10.98.0.0\n");
    let all: Vec<Value> = api.get("/v1/interfaces").unwrap();
    assert_eq!((all.len(), &all[0]["name"]), (1, &json!("eth1")));
    assert_eq!(net("detach p eth1"), "");
    assert_eq!(say(&machine, "ls /sys/class/net"), "lo\n");
    assert!(net("detach p eth1").contains("eth1: the pod has no such interface"));
    assert!(net("attach p tap=absent0").contains("absent0"));
    let stopped = machine.command(&["stop", "p"]).output().unwrap();
    assert!(stopped.status.success(), "{}", text(&stopped.stderr));
    machine.wait_for_processes();
    machine.assert_nothing_left();
}
