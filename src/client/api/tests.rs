//! The client against the real supervisor, in a thread, with a fake agent in another.

mod interfaces;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufRead;
use std::net::Shutdown;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use cube_guest::frame;
use cube_guest::{
    Answer, CONTROL_PORT, ExitStatus, GuestEvent, GuestMessage, HostMessage, HostRequest,
    PROTOCOL_VERSION, PodSpec, ProcessId, ProcessSpec, STREAM_PORT, Stdio,
};
use serde_json::{Value, json};

use super::*;
use crate::pod::api::body::{
    ContainerState, ContainerStatus, CreateContainer, CreateExec, DiskFile, ExecCreated, Exit,
    PodStatus,
};
use crate::pod::api::server::Server;
use crate::pod::listen::port_path;
use crate::pod::supervisor::{DiskSlots, PodFile, Supervisor, VSOCK_SOCKET};
use crate::vmm::command::Attendant;
use crate::vmm::exit::End;
use crate::vmm::spec::DiskSpec;

/// Slots that are only counted.
#[derive(Default)]
struct Counted {
    given: AtomicUsize,
    taken: AtomicUsize,
}

impl DiskSlots for Arc<Counted> {
    fn attach(&self, _: &DiskSpec) -> Result<u16, String> {
        Ok(self.given.fetch_add(1, Ordering::SeqCst) as u16)
    }

    fn detach(&self, _: u16) {
        self.taken.fetch_add(1, Ordering::SeqCst);
    }
}

struct TestPod {
    api: PodApi,
    slots: Arc<Counted>,
    directory: tempfile::TempDir,
    supervisor: JoinHandle<()>,
    agent: JoinHandle<()>,
}

/// What the agent does with a process: its first word.
fn run(process: &ProcessSpec, vsock: &Path) -> (ExitStatus, Vec<UnixStream>) {
    let dial = |token: u64| {
        let mut stream = UnixStream::connect(port_path(vsock, STREAM_PORT)).unwrap();
        stream.write_all(&token.to_le_bytes()).unwrap();
        stream
    };
    let Stdio::Pipes {
        stdin,
        stdout,
        stderr,
    } = process.stdio
    else {
        panic!("{:?}", process.stdio);
    };
    let (mut out, err) = (dial(stdout.unwrap()), dial(stderr.unwrap()));
    let input = stdin.map(dial);
    let mut open = vec![err];
    match process.argv[0].as_str() {
        "say" => out.write_all(process.argv[1].as_bytes()).unwrap(),
        "cat" => {
            let copy = thread::spawn(move || io::copy(&mut input.unwrap(), &mut out).unwrap());
            open.clear();
            copy.join().unwrap();
        }
        _ => open.push(out),
    }
    (ExitStatus::Code(3), open)
}

/// An agent whose containers and execs end by themselves, unless they are to `stay`.
fn agent(vsock: PathBuf, over: Arc<AtomicBool>) {
    let control = UnixStream::connect(port_path(&vsock, CONTROL_PORT)).unwrap();
    let sender = Arc::new(Mutex::new(control.try_clone().unwrap()));
    let say = move |message: GuestMessage| {
        frame::write(&mut *sender.lock().unwrap(), &message).unwrap();
    };
    let version = "9.9.9".to_owned();
    say(GuestMessage::Hello {
        protocol: PROTOCOL_VERSION,
        version,
    });
    let mut staying = BTreeMap::new();
    let mut control = control;
    while let Some(HostMessage { id, request }) = frame::read(&mut control).unwrap() {
        let done = || GuestMessage::Reply {
            id,
            result: Ok(Answer::Done),
        };
        match request {
            HostRequest::Start(spec) => {
                say(done());
                let container = spec.id.clone();
                say(GuestMessage::Event(GuestEvent::Started {
                    container: container.clone(),
                }));
                let (status, open) = run(&spec.process, &vsock);
                if spec.process.argv[0] == "stay" {
                    staying.insert(container, open);
                } else {
                    say(GuestMessage::Event(GuestEvent::Exited {
                        container,
                        status,
                    }));
                }
            }
            HostRequest::Exec { exec, process, .. } => {
                say(done());
                let (say, vsock) = (say.clone(), vsock.clone());
                thread::spawn(move || {
                    let (status, _) = run(&process, &vsock);
                    say(GuestMessage::Event(GuestEvent::ExecExited { exec, status }));
                });
            }
            HostRequest::Signal {
                process: ProcessId::Container(container),
                signal,
                ..
            } => {
                say(done());
                staying.remove(&container);
                let status = ExitStatus::Signal {
                    signal,
                    oom_killed: false,
                };
                say(GuestMessage::Event(GuestEvent::Exited {
                    container,
                    status,
                }));
            }
            HostRequest::BindSlot { slot: 13 } => say(GuestMessage::Reply {
                id,
                result: Err("no driver".to_owned()),
            }),
            HostRequest::Shutdown { .. } => {
                say(done());
                over.store(true, Ordering::SeqCst);
                control.shutdown(Shutdown::Both).unwrap();
                return;
            }
            _ => say(done()),
        }
    }
}

impl TestPod {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("p");
        std::fs::create_dir(&path).unwrap();
        let api = Server::new(UnixListener::bind(path.join(API_SOCKET)).unwrap()).unwrap();
        let pod = PodFile {
            id: "p".to_owned(),
            directory: path.clone(),
            lock_fd: -1,
            api_fd: -1,
            guest: PodSpec::default(),
            containers: BTreeMap::new(),
        };
        let lock = File::open(&path).unwrap().into();
        let mut supervisor = Supervisor::new(pod, lock, api).unwrap();
        let (over, slots) = (Arc::new(AtomicBool::new(false)), Arc::<Counted>::default());
        let (seen, machine) = (over.clone(), slots.clone());
        let supervisor = thread::spawn(move || {
            while !seen.load(Ordering::SeqCst) {
                supervisor.wait(&[]).unwrap();
                // The agent's end is the machine's here.
                if supervisor.turn(&machine).unwrap().is_some() {
                    break;
                }
            }
            Box::new(supervisor).ended(&End::PowerOff);
        });
        let agent = thread::spawn(move || agent(path.join(VSOCK_SOCKET), over));
        let pod = Self {
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
