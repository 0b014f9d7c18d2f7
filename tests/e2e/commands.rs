//! The commands that find a pod again: attach, rm, stats, port-forward; and its network.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::Stdio;
use std::sync::{Mutex, MutexGuard, PoisonError};

use cube::pod::api::body::PodStatus;
use rustix::process::{Pid, Signal};
use serde_json::Value;

use crate::background::{Background, background, started};
use crate::fixture::{kill, machine, text};

/// Serves `hello` by HTTP at port 80.
const SERVER: &str = "mkdir /w; echo hello > /w/x; exec httpd -f -p 80 -h /w";

/// The body of `/x`; empty if nobody serves it.
fn get(address: &str) -> String {
    let Ok(mut stream) = TcpStream::connect(address) else {
        return String::new();
    };
    let mut answer = String::new();
    // A server that is not there yet closes the connection.
    let _ = stream.write_all(b"GET /x HTTP/1.0\r\n\r\n");
    let _ = stream.read_to_string(&mut answer);
    answer.rsplit("\r\n\r\n").next().unwrap().to_owned()
}

impl Background {
    /// Waits until something in the pod listens at port 80.
    fn wait_for_server(&self) {
        let script = "until grep -q ' 0A ' /proc/net/tcp6 /proc/net/tcp; do :; done";
        self.say(&["exec", "p", "--", "sh", "-c", script]);
    }
}

#[test]
fn attach_passes_input_on_and_ends_with_the_container() {
    let pod = background(&["sleep 1000000"]);
    let mut body = pod.body("echo", "while read line; do echo got $line; done; exit 6");
    (body.stdin, body.stdin_once) = (true, true);
    let _: Value = pod.api.call("POST", "/v1/containers", &body).unwrap();
    // Before the start, so that nothing it says is missed.
    let mut attached = pod
        .machine
        .command(&["attach", "-i", "p", "echo"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = attached.stdin.take().unwrap();
    input.write_all(b"one\ntwo\n").unwrap();
    drop(input);
    pod.post("/v1/containers/echo/start");
    let output = attached.wait_with_output().unwrap();
    assert_eq!(text(&output.stdout), "got one\ngot two\n");
    assert_eq!(output.status.code(), Some(6));
    pod.stop();
}

#[test]
fn leaving_by_a_signal_leaves_the_container_as_it_is() {
    let pod = background(&["while :; do echo tick; sleep 0.1; done"]);
    let mut attached = pod
        .machine
        .command(&["attach", "p"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(attached.stdout.as_mut().unwrap())
        .read_line(&mut line)
        .unwrap();
    assert_eq!(line, "tick\n");
    rustix::process::kill_process(Pid::from_child(&attached), Signal::INT).unwrap();
    assert_eq!(attached.wait().unwrap().code(), Some(128 + 2));
    assert!(pod.say(&["ps"]).contains("running"));
    pod.stop();
}

#[test]
fn rm_removes_what_has_ended_and_by_force_what_runs() {
    let pod = background(&["sleep 1000000", "exit 0", "exit 1"]);
    pod.wait("c1");
    pod.wait("c2");
    let refused = pod.cube(&["rm", "p", "c0"]);
    assert_eq!(refused.status.code(), Some(1));
    let sentence = text(&refused.stderr);
    assert!(
        sentence.contains("c0: ") && sentence.contains("has not ended"),
        "{sentence}"
    );
    pod.say(&["rm", "p"]);
    let status: PodStatus = pod.api.get("/v1/pod").unwrap();
    assert_eq!(status.containers.len(), 1);
    pod.say(&["rm", "--force", "p", "c0"]);
    let status: PodStatus = pod.api.get("/v1/pod").unwrap();
    assert_eq!(status.containers.len(), 0);
    pod.stop();
}

#[test]
fn stats_are_a_table_and_json() {
    let pod = background(&["sleep 1000000"]);
    let table = pod.say(&["stats"]);
    assert!(table.starts_with("POD ") && table.contains("c0"), "{table}");
    let json: Value = serde_json::from_str(&pod.say(&["stats", "--json", "p"])).unwrap();
    assert!(json[0]["stats"]["vmm"]["pss"].as_u64() > Some(0), "{json}");
    assert_eq!(json[0]["stats"]["guest"]["containers"][0]["id"], "c0");
    pod.stop();
}

#[test]
fn a_forwarded_port_leads_into_the_pod_without_a_network() {
    let pod = background(&[SERVER]);
    pod.wait_for_server();
    let mut forward = pod
        .machine
        .command(&["port-forward", "p", "0:80", "0:81"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(forward.stdout.take().unwrap()).lines();
    let mut address = || {
        let line = lines.next().unwrap().unwrap();
        line.split(' ').next().unwrap().to_owned()
    };
    let (served, nobody) = (address(), address());
    for _ in 0..20 {
        assert_eq!(get(&served), "hello\n");
    }
    assert_eq!(get(&nobody), "");
    pod.say(&["stop", "--time", "0", "p"]);
    let output = forward.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output.stderr);
    assert!(
        said.contains("port 81: ") && said.contains("has ended"),
        "{said}"
    );
    pod.machine.wait_for_processes();
    pod.machine.assert_nothing_left();
}

/// There is one host, with one port 18081 and one network namespace for a pod `p`.
static HOST: Mutex<()> = Mutex::new(());

fn host() -> MutexGuard<'static, ()> {
    HOST.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A pod that serves at port 18081 of the host, on the network that Cube brings.
fn networked() -> Background {
    let machine = machine()
        .with("CUBE_NET", "cni")
        .with("NETCONFPATH", "/nonexistent");
    let pod = started(machine, &["-p", "18081:80"], &[SERVER]);
    pod.wait_for_server();
    pod
}

fn assert_no_network_left(pod: &Background) {
    let listed = pod
        .machine
        .command(&["net", "ls", "--json"])
        .output()
        .unwrap();
    assert_eq!(text(&listed.stdout), "[]\n");
    assert!(TcpStream::connect("127.0.0.1:18081").is_err());
}

#[test]
fn a_pod_in_the_background_has_a_network_until_it_is_stopped() {
    let _host = host();
    let pod = networked();
    let status: PodStatus = pod.api.get("/v1/pod").unwrap();
    let [v4, v6] = status.addresses[..] else {
        panic!("{:?}", status.addresses);
    };
    for address in [
        format!("{v4}:80"),
        format!("[{v6}]:80"),
        "127.0.0.1:18081".into(),
    ] {
        assert_eq!(get(&address), "hello\n", "{address}");
    }
    assert!(pod.say(&["net", "ls"]).contains(" up"));
    pod.say(&["stop", "--time", "0", "p"]);
    // Not by `net ls`, which sweeps too.
    let left = std::fs::read_dir(pod.machine.run_directory().join(".net")).unwrap();
    let left: Vec<_> = left
        .flatten()
        .filter(|entry| entry.path().is_dir())
        .collect();
    assert!(left.is_empty(), "{left:?}");
    assert_no_network_left(&pod);
    pod.machine.wait_for_processes();
    pod.machine.assert_nothing_left();
}

#[test]
fn the_network_of_a_killed_pod_is_undone_by_the_next_command() {
    let _host = host();
    let pod = networked();
    kill(pod.pid());
    pod.assert_swept();
    assert_no_network_left(&pod);
}
