//! The client against the real supervisor, in a thread, with a fake agent in another.

mod interfaces;

use std::collections::BTreeMap;
use std::io::BufRead;
use std::net::Shutdown;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use cube_guest::network::{InterfaceSpec, MacAddress, NetworkSpec};
use cube_guest::{HostRequest, PodSpec, ProcessSpec, VolumeSource, VolumeSpec};
use serde_json::{Value, json};

mod fake_agent;
mod lost;
mod no_log;
mod volumes;

use super::*;
use crate::pod::api::body::{
    ContainerState, ContainerStatus, CreateContainer, CreateExec, DiskFile, ExecCreated, Exit,
    PodStatus, Stats,
};
use crate::pod::api::described::Description;
use crate::pod::api::server::{Limits, Server};
use crate::pod::machinery::Machinery;
use crate::pod::supervisor::{PodFile, Supervisor, VSOCK_SOCKET};
use crate::vmm::command::Attendant;
use crate::vmm::exit::End;
use crate::vmm::own_memory::OwnMemory;
use crate::vmm::spec::DiskSpec;
use crate::vmm::timeline::{Entry, Stage};

/// Slots that are only counted.
#[derive(Default)]
struct Counted {
    given: AtomicUsize,
    taken: AtomicUsize,
}

impl Machinery for Arc<Counted> {
    fn attach(&self, _: &DiskSpec) -> Result<u16, String> {
        Ok(self.given.fetch_add(1, Ordering::SeqCst) as u16)
    }

    fn detach(&self, _: u16) {
        self.taken.fetch_add(1, Ordering::SeqCst);
    }

    fn takes_streams(&self) -> bool {
        false
    }

    fn timeline(&self) -> Vec<Entry> {
        let entry = |stage, monotonic_ns| Entry {
            stage,
            monotonic_ns,
            exits: BTreeMap::new(),
        };
        vec![
            entry(Stage::Exec, 5000),
            entry(Stage::KernelStarted, 12_000),
        ]
    }

    fn own_memory(&self) -> io::Result<OwnMemory> {
        Ok(OwnMemory {
            pss: 1,
            rss: 2,
            guest: 3,
        })
    }
}

struct TestPod {
    /// Requests that the agent was sent.
    asked: Arc<Mutex<Vec<HostRequest>>>,
    api: PodApi,
    slots: Arc<Counted>,
    directory: tempfile::TempDir,
    supervisor: JoinHandle<()>,
    agent: JoinHandle<()>,
}

/// A pod with an address and a volume of its own.
fn pod_spec() -> PodSpec {
    let interface = InterfaceSpec {
        name: "eth0".to_owned(),
        mac: MacAddress([2, 0, 0, 0, 0, 1]),
        mtu: None,
        addresses: vec![
            "10.88.0.5/16".parse().unwrap(),
            "fd00::5/64".parse().unwrap(),
        ],
        routes: Vec::new(),
        neighbours: Vec::new(),
    };
    PodSpec {
        network: Some(NetworkSpec {
            interfaces: vec![interface],
            ..NetworkSpec::default()
        }),
        volumes: vec![VolumeSpec {
            name: "config".to_owned(),
            source: VolumeSource::Files,
        }],
        ..PodSpec::default()
    }
}

impl TestPod {
    fn start() -> Self {
        Self::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut Supervisor)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("p");
        std::fs::create_dir(&path).unwrap();
        let api = UnixListener::bind(path.join(API_SOCKET)).unwrap();
        let api = Server::new(api, Limits::default()).unwrap();
        let pod = PodFile {
            id: "p".to_owned(),
            directory: path.clone(),
            lock_fd: -1,
            api_fd: -1,
            network_lock_fd: None,
            guest: pod_spec(),
            containers: BTreeMap::new(),
            volume_slots: BTreeMap::new(),
        };
        let mut supervisor = Supervisor::new(pod, Vec::new(), api).unwrap();
        change(&mut supervisor);
        let (over, slots) = (Arc::new(AtomicBool::new(false)), Arc::<Counted>::default());
        let (seen, machine) = (over.clone(), slots.clone());
        let supervisor = thread::spawn(move || {
            while !seen.load(Ordering::SeqCst) {
                let ready = supervisor.wait(&[]).unwrap();
                // The agent's end is the machine's here.
                if supervisor.turn(&machine, &ready).unwrap().is_some() {
                    break;
                }
            }
            Box::new(supervisor).ended(&End::PowerOff);
        });
        let asked = Arc::<Mutex<Vec<HostRequest>>>::default();
        let noted = asked.clone();
        let agent = thread::spawn(move || fake_agent::run(path.join(VSOCK_SOCKET), over, &noted));
        let pod = Self {
            asked,
            api: PodApi::of(directory.path(), "p"),
            slots,
            directory,
            supervisor,
            agent,
        };
        let ready = pod
            .api
            .follow("/v1/events?follow=1")
            .unwrap()
            .lines()
            .next();
        assert!(ready.unwrap().unwrap().contains("\"ready\""));
        pod
    }

    fn create(&self, id: &str, argv: &[&str]) -> Result<ContainerStatus, ApiError> {
        let body = CreateContainer {
            id: id.to_owned(),
            image: vec![DiskFile::default()],
            writable: Some(DiskFile::default()),
            process: ProcessSpec {
                argv: argv.iter().map(|word| (*word).to_owned()).collect(),
                ..ProcessSpec::default()
            },
            ..CreateContainer::default()
        };
        self.api.call("POST", "/v1/containers", &body)
    }

    fn post(&self, path: &str, body: Value) -> Result<(), ApiError> {
        self.api.call("POST", path, &body)
    }

    /// Creates and starts a container that stays, and waits for its event, which follows the answer.
    fn stay(&self) {
        self.create("c", &["stay"]).unwrap();
        self.post("/v1/containers/c/start", json!({})).unwrap();
        let events = self.api.follow("/v1/events?follow=1").unwrap();
        let started = |line: io::Result<String>| line.unwrap().contains("\"started\"");
        assert!(events.lines().any(started));
    }

    fn log(&self, id: &str) -> String {
        let mut text = String::new();
        let path = format!("/v1/containers/{id}/logs?follow=1");
        let mut log = self.api.follow(&path).unwrap();
        log.read_to_string(&mut text).unwrap();
        text
    }

    fn stop(self) {
        let ended: Value = self.api.call("POST", "/v1/pod/stop", &json!({})).unwrap();
        assert_eq!(ended["ended"], "the guest powered off");
        self.supervisor.join().unwrap();
        self.agent.join().unwrap();
        let left: Vec<_> = std::fs::read_dir(self.directory.path()).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
        assert!(matches!(
            self.api.get::<Value>("/v1/pod"),
            Err(ApiError::NoPod(_))
        ));
    }
}

#[test]
fn a_container_lives_and_goes_and_its_disks_with_it() {
    let pod = TestPod::start();
    for _ in 0..100 {
        assert_eq!(
            pod.create("c", &["say", "words"]).unwrap().state,
            ContainerState::Created
        );
        pod.post("/v1/containers/c/start", json!({})).unwrap();
        let exit: Exit = pod.api.get("/v1/containers/c/wait").unwrap();
        assert_eq!((exit.exit_code, exit.signal), (3, None));
        assert!(pod.log("c").ends_with(" stdout F words\n"));
        pod.api
            .call::<()>("DELETE", "/v1/containers/c", &json!({}))
            .unwrap();
        // The slot whose binding fails is another test's.
        let next = pod.slots.given.load(Ordering::SeqCst);
        if next == 12 {
            pod.slots.given.store(14, Ordering::SeqCst);
        }
    }
    assert_eq!(pod.slots.taken.load(Ordering::SeqCst), 200);
    let status: PodStatus = pod.api.get("/v1/pod").unwrap();
    assert_eq!((status.containers.len(), &*status.state), (0, "ready"));
    pod.stop();
}

#[test]
fn a_disk_that_the_guest_refuses_leaves_no_container_and_no_disk() {
    let pod = TestPod::start();
    pod.slots.given.store(12, Ordering::SeqCst);
    let refused = pod.create("c", &["say", "words"]).unwrap_err();
    assert_eq!(refused.to_string(), "no driver");
    assert_eq!(pod.slots.taken.load(Ordering::SeqCst), 2);
    let all: Vec<ContainerStatus> = pod.api.get("/v1/containers").unwrap();
    assert!(all.is_empty());
    pod.stop();
}

#[test]
fn fifty_execs_at_once_get_their_bytes_back_and_their_status_after_the_last() {
    let pod = TestPod::start();
    pod.stay();
    thread::scope(|scope| {
        for n in 0..50_u8 {
            let api = &pod.api;
            scope.spawn(move || exec_cat(api, n));
        }
    });
    pod.post("/v1/containers/c/kill", json!({"signal": 9}))
        .unwrap();
    let exit: Exit = pod.api.get("/v1/containers/c/wait").unwrap();
    assert_eq!((exit.exit_code, exit.signal), (137, Some(9)));
    pod.stop();
}

fn exec_cat(api: &PodApi, seed: u8) {
    let body = CreateExec {
        process: ProcessSpec {
            argv: vec!["cat".to_owned()],
            ..ProcessSpec::default()
        },
        stdin: true,
        terminal: None,
    };
    let ExecCreated { exec } = api.call("POST", "/v1/containers/c/execs", &body).unwrap();
    let attach = |stream| {
        api.upgrade(&format!("/v1/execs/{exec}/attach/{stream}"))
            .unwrap()
    };
    let (mut input, mut output) = (attach("stdin"), attach("stdout"));
    let sent: Vec<u8> = (0..300_000_u32).map(|n| (n % 251) as u8 ^ seed).collect();
    let copy = sent.clone();
    let writer = thread::spawn(move || {
        input.write_all(&copy).unwrap();
        input.shutdown(Shutdown::Write).unwrap();
    });
    let mut received = Vec::new();
    output.read_to_end(&mut received).unwrap();
    writer.join().unwrap();
    assert!(received == sent, "exec {seed}");
    let exit: Exit = api.get(&format!("/v1/execs/{exec}/wait")).unwrap();
    assert_eq!(exit.exit_code, 3);
    let gone = api.get::<Exit>(&format!("/v1/execs/{exec}/wait"));
    assert!(matches!(gone, Err(ApiError::Refused { status: 404, .. })));
}

#[test]
fn what_is_wrong_is_refused_with_the_fields_name_and_the_pod_goes_on() {
    let pod = TestPod::start();
    pod.create("c", &["stay"]).unwrap();
    let refused = |path: &str, body: Value| pod.post(path, body).unwrap_err().to_string();
    assert!(
        refused(
            "/v1/containers",
            json!({"id": "../x", "image": [], "process": {"argv": []}})
        )
        .starts_with("id: ")
    );
    let secret = json!({"id": "n", "image": [], "process": {"argv": ["x"], "env": "hunter2"}});
    let said = refused("/v1/containers", secret);
    assert!(
        said.starts_with("process.env: ") && !said.contains("hunter2"),
        "{said}"
    );
    let stdio = json!({"id": "n", "image": [], "process": {"argv": ["x"], "stdio": {"terminal": {"token": 1, "size": {"rows": 1, "columns": 1}}}}});
    assert!(refused("/v1/containers", stdio).starts_with("process.stdio: "));
    assert!(refused("/v1/containers/c/kill", json!({"signal": 0})).starts_with("signal: "));
    assert!(
        refused(
            "/v1/containers/c/execs",
            json!({"process": {"argv": ["x"]}})
        )
        .contains("does not run")
    );
    let taken = pod.create("c", &["stay"]).unwrap_err();
    assert!(
        matches!(taken, ApiError::Refused { status: 409, .. }),
        "{taken}"
    );
    // Garbage, a client that says half a request, and one that says nothing.
    let connect = || UnixStream::connect(pod.directory.path().join("p").join(API_SOCKET)).unwrap();
    let mut answer = String::new();
    let mut garbage = connect();
    garbage.write_all(b"\x16\x03\x01\x02\r\n\r\n").unwrap();
    garbage.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    let (mut half, _silent) = (connect(), connect());
    half.write_all(b"POST /v1/pod/stop HTTP/1.1\r\nconte")
        .unwrap();
    drop(half);
    let status: PodStatus = pod.api.get("/v1/pod").unwrap();
    assert_eq!(status.state, "ready");
    pod.stop();
}

#[test]
fn a_late_client_gets_the_events_that_it_missed() {
    let pod = TestPod::start();
    pod.create("c", &["say", "x"]).unwrap();
    pod.post("/v1/containers/c/start", json!({})).unwrap();
    let _: Exit = pod.api.get("/v1/containers/c/wait").unwrap();
    let events = pod.api.follow("/v1/events?since=1").unwrap();
    let kinds: Vec<String> = events
        .lines()
        .map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap())
        .map(|event| format!("{} {}", event["sequence"], event["type"]))
        .collect();
    assert_eq!(kinds, ["2 \"started\"", "3 \"exited\""]);
    pod.stop();
}

#[test]
fn a_container_that_has_ended_starts_again_with_its_disks_and_its_log() {
    let pod = TestPod::start();
    pod.create("c", &["say", "once"]).unwrap();
    for round in 0..3_u32 {
        pod.post("/v1/containers/c/start", json!({})).unwrap();
        let exit: Exit = pod.api.get("/v1/containers/c/wait").unwrap();
        assert_eq!(exit.exit_code, 3);
        let status: ContainerStatus = pod.api.get("/v1/containers/c").unwrap();
        assert_eq!(
            (status.restarts, status.state),
            (round, ContainerState::Exited)
        );
    }
    assert_eq!(pod.log("c").lines().count(), 3);
    let events = pod.api.read("/v1/events").unwrap();
    let events = String::from_utf8(events).unwrap();
    let count = |kind: &str| events.matches(&format!("\"type\":\"{kind}\"")).count();
    assert_eq!(
        (count("started"), count("restarted"), count("exited")),
        (1, 2, 3)
    );
    assert_eq!(pod.slots.given.load(Ordering::SeqCst), 2);
    pod.stop();
}

#[test]
fn every_answer_is_as_described() {
    let (pod, description) = (TestPod::start(), Description::read());
    pod.stay();
    let volume = json!({"name": "v", "source": {"memory": {}}});
    let made: Value = pod.api.call("POST", "/v1/volumes", &volume).unwrap();
    description.check_answer("POST", "/v1/volumes", 201, &made);
    for path in ["/v1/pod", "/v1/stats", "/v1/containers", "/v1/volumes"] {
        description.check_answer("GET", path, 200, &pod.api.get(path).unwrap());
    }
    let status: Value = pod.api.get("/v1/containers/c").unwrap();
    description.check_answer("GET", "/v1/containers/{container}", 200, &status);
    let process = json!({"process": {"argv": ["say", "x"]}});
    let path = "/v1/containers/c/execs";
    let exec: Value = pod.api.call("POST", path, &process).unwrap();
    description.check_answer("POST", "/v1/containers/{container}/execs", 201, &exec);
    let path = format!("/v1/execs/{}/wait", exec["exec"].as_str().unwrap());
    let exit: Value = pod.api.get(&path).unwrap();
    description.check_answer("GET", "/v1/execs/{exec}/wait", 200, &exit);
    let events = String::from_utf8(pod.api.read("/v1/events").unwrap()).unwrap();
    for line in events.lines() {
        let event: Value = serde_json::from_str(line).unwrap();
        description.check_answer("GET", "/v1/events", 200, &event);
    }
    pod.stop();
}

#[test]
fn the_pod_tells_its_addresses_its_timeline_and_its_costs() {
    let pod = TestPod::start();
    let status: PodStatus = pod.api.get("/v1/pod").unwrap();
    assert_eq!(
        status
            .addresses
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>(),
        ["10.88.0.5", "fd00::5"]
    );
    let after: Vec<u64> = status.timeline.iter().map(|stage| stage.after_us).collect();
    assert_eq!(after, [0, 7]);
    let stats: Stats = pod.api.get("/v1/stats").unwrap();
    let vmm = stats.vmm.unwrap();
    assert_eq!((vmm.pss, vmm.rss, vmm.guest), (1, 2, 3));
    let metrics = String::from_utf8(pod.api.read("/metrics").unwrap()).unwrap();
    assert!(metrics.contains("cube_vmm_memory_pss_bytes{pod=\"p\"} 1\n"));
    assert!(metrics.contains("cube_container_pids{pod=\"p\",container=\"measured\"} 4\n"));
    pod.stop();
}

#[test]
fn a_seccomp_profile_is_compiled_for_the_guest() {
    let pod = TestPod::start();
    let body = |profile: Value| {
        json!({"id": "c", "image": [{"path": "/x"}], "process": {"argv": ["stay"]},
            "seccomp_profile": profile})
    };
    let create = |body: &Value| pod.api.call::<Value>("POST", "/v1/containers", body);
    let wrong = create(&body(json!({"defaultAction": "SCMP_ACT_NOTIFY"}))).unwrap_err();
    assert!(
        wrong.to_string().starts_with("seccomp_profile: "),
        "{wrong}"
    );
    let mut both = body(json!({"defaultAction": "SCMP_ACT_ALLOW"}));
    both["security"] = json!({"seccomp": "unconfined"});
    assert!(create(&both).unwrap_err().to_string().contains("exclude"));
    create(&body(json!({"defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}]})))
    .unwrap();
    pod.post("/v1/containers/c/start", json!({})).unwrap();
    let asked = pod.asked.lock().unwrap();
    let started = asked.iter().find_map(|request| match request {
        HostRequest::Start(spec) => Some(spec.security.seccomp.clone()),
        _ => None,
    });
    drop(asked);
    assert!(matches!(started, Some(cube_guest::Seccomp::Programs(p)) if p.len() == 1));
    pod.stop();
}

#[test]
fn forwarded_ports_are_connections_of_their_own() {
    let pod = TestPod::start();
    let ask = |number: usize| {
        let mut port = pod.api.upgrade("/v1/ports/80").unwrap();
        port.write_all(format!("{number}\n").as_bytes()).unwrap();
        let mut answer = String::new();
        port.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, format!("got {number}\n"));
    };
    (0..100).for_each(ask);
    thread::scope(|scope| {
        for number in 0..40 {
            scope.spawn(move || ask(number));
        }
    });
    let refused = pod.api.upgrade("/v1/ports/81").unwrap_err();
    assert_eq!(refused.to_string(), "nobody listens");
    assert!(
        pod.api
            .upgrade("/v1/ports/0")
            .unwrap_err()
            .to_string()
            .contains("1 to 65535")
    );
    pod.stop();
}

#[test]
fn many_cycles_leave_no_descriptor_open_and_no_memory() {
    let pod = TestPod::start();
    pod.slots
        .given
        .store(usize::from(fake_agent::NO_DRIVER) + 1, Ordering::SeqCst);
    let cycle = || {
        pod.create("c", &["say", "words"]).unwrap();
        pod.post("/v1/containers/c/start", json!({})).unwrap();
        let _: Exit = pod.api.get("/v1/containers/c/wait").unwrap();
        let path = "/v1/containers/c";
        pod.api.call::<()>("DELETE", path, &json!({})).unwrap();
        // What the test itself keeps.
        *pod.asked.lock().unwrap() = Vec::new();
    };
    // All of it is in this process: the supervisor, the agent, the client.
    let count = || {
        // When this is answered, the connections before it are closed.
        let held = pod.api.follow("/v1/events?follow=1").unwrap();
        let count = std::fs::read_dir("/proc/self/fd").unwrap().count();
        drop(held);
        count
    };
    let memory = || {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"));
        let kib = line.unwrap().trim().trim_end_matches(" kB");
        kib.parse::<usize>().unwrap()
    };
    // So many that the log of events is full.
    (0..750).for_each(|_| cycle());
    let before = (count(), memory());
    (0..1500).for_each(|_| cycle());
    let after = (count(), memory());
    assert_eq!(after.0, before.0);
    // An event, a container or a request kept each cycle would be more.
    assert!(after.1 <= before.1 + 256, "{before:?} {after:?} KiB");
    pod.stop();
}
