//! Pods that outlive the command that started them, and their API.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Output, Stdio};
use std::sync::{Arc, Mutex};

use cube::client::PodApi;
use cube::image::Store;
use cube::pod::api::body::{
    ContainerState, ContainerStatus, CreateContainer, CreateExec, DiskFile, ExecCreated, Exit,
    PodStatus,
};
use cube_guest::ProcessSpec;
use rustix::process::{Pid, Signal};
use serde_json::{Value, json};

use crate::fixture::{BUSYBOX, Machine, kill, machine, text};

/// A pod that runs in the background, its end the test's to bring about.
pub(crate) struct Background {
    pub(crate) machine: Machine,
    pub(crate) api: PodApi,
    last_event: Arc<Mutex<String>>,
}

pub(crate) fn process(script: &str) -> ProcessSpec {
    ProcessSpec {
        argv: ["sh", "-c", script].map(str::to_owned).into(),
        ..ProcessSpec::default()
    }
}

/// Starts a pod `p` with a container for each script.
pub(crate) fn background(scripts: &[&str]) -> Background {
    started(machine(), &[], scripts)
}

/// The same in a place and with options of one's own.
pub(crate) fn started(machine: Machine, options: &[&str], scripts: &[&str]) -> Background {
    let containers: Vec<_> = scripts
        .iter()
        .enumerate()
        .map(|(n, script)| json!({"name": format!("c{n}"), "image": BUSYBOX, "command": ["sh", "-c", script]}))
        .collect();
    specified(machine, options, &json!({ "containers": containers }))
}

/// The same with a `spec` of one's own.
pub(crate) fn specified(machine: Machine, options: &[&str], spec: &Value) -> Background {
    let spec = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": spec});
    let path = machine.run_directory().join(".spec.yaml");
    std::fs::write(&path, spec.to_string()).unwrap();
    let path = path.to_str().unwrap();
    let arguments = [&["pod", "run"], options, &[path]].concat();
    let output = machine.command(&arguments).output().unwrap();
    assert_eq!(text(&output.stdout), "p\n", "{}", text(&output.stderr));
    let api = PodApi::of(machine.run_directory(), "p");
    let last_event = Arc::<Mutex<String>>::default();
    let mut events = BufReader::new(api.follow("/v1/events?follow=1").unwrap());
    let last = Arc::clone(&last_event);
    std::thread::spawn(move || {
        let mut line = String::new();
        while events.read_line(&mut line).is_ok_and(|length| length > 0) {
            *last.lock().unwrap() = std::mem::take(&mut line);
        }
    });
    Background {
        machine,
        api,
        last_event,
    }
}

impl Drop for Background {
    /// A failed test says what it heard last, of a pod that has ended, why, and leaves no pod behind.
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("last event: {}", self.last_event.lock().unwrap());
            for (pid, _) in self.machine.processes() {
                let _ = rustix::process::kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
            }
        }
    }
}

impl Background {
    pub(crate) fn cube(&self, arguments: &[&str]) -> Output {
        self.machine.command(arguments).output().unwrap()
    }

    pub(crate) fn say(&self, arguments: &[&str]) -> String {
        let output = self.cube(arguments);
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout)
    }

    pub(crate) fn stop(&self) {
        self.say(&["stop", "--time", "1", "p"]);
        self.machine.wait_for_processes();
        self.machine.assert_nothing_left();
    }

    pub(crate) fn image(&self) -> Vec<DiskFile> {
        let parts = self.store().resolve(BUSYBOX).unwrap().disk_parts();
        let file = |(path, size)| DiskFile {
            path,
            size: Some(size),
        };
        parts.into_iter().map(file).collect()
    }

    pub(crate) fn store(&self) -> Store {
        Store::open(self.machine.store().to_owned()).unwrap()
    }

    /// A container to create, with a writable disk of its own.
    pub(crate) fn body(&self, id: &str, script: &str) -> CreateContainer {
        let path = self.machine.run_directory().join(format!(".{id}.disk"));
        let _ = std::fs::remove_file(&path);
        self.store().writable().clone_to(64 << 20, &path).unwrap();
        CreateContainer {
            id: id.to_owned(),
            image: self.image(),
            writable: Some(DiskFile { path, size: None }),
            process: process(script),
            ..CreateContainer::default()
        }
    }

    pub(crate) fn create(&self, id: &str, script: &str) {
        let body = self.body(id, script);
        let made: ContainerStatus = self.api.call("POST", "/v1/containers", &body).unwrap();
        assert_eq!(made.state, ContainerState::Created);
    }

    pub(crate) fn post(&self, path: &str) {
        self.api.call("POST", path, &json!({})).unwrap()
    }

    /// Forgets a container that has ended.
    pub(crate) fn remove(&self, id: &str) {
        let path = format!("/v1/containers/{id}");
        self.api.call::<()>("DELETE", &path, &json!({})).unwrap();
    }

    /// The process of the pod.
    pub(crate) fn pid(&self) -> Pid {
        let status: PodStatus = self.api.get("/v1/pod").unwrap();
        Pid::from_raw(status.pid.cast_signed()).unwrap()
    }

    /// The pod was killed: the next command leaves nothing of it.
    pub(crate) fn assert_swept(&self) {
        self.machine.wait_for_processes();
        assert_eq!(self.say(&["ps", "-q"]), "");
        self.machine.assert_nothing_left();
    }

    pub(crate) fn wait(&self, id: &str) -> u8 {
        let exit: Exit = self.api.get(&format!("/v1/containers/{id}/wait")).unwrap();
        exit.exit_code
    }
}

#[test]
fn a_pod_outlives_its_command_and_every_command_finds_it() {
    let pod = background(&["echo out; echo err >&2; sleep 1000000", "hostname; exit 7"]);
    assert_eq!(pod.wait("c1"), 7);
    let table = pod.say(&["ps"]);
    assert!(
        table.contains("running") && table.contains("exited (7)"),
        "{table}"
    );
    assert_eq!(pod.say(&["logs", "p", "c1"]), "p\n");
    let log = pod.cube(&["logs", "p", "c0"]);
    assert_eq!(
        (text(&log.stdout), text(&log.stderr)),
        ("out\n".into(), "err\n".into())
    );
    assert_eq!(pod.say(&["exec", "-c", "c0", "p", "--", "hostname"]), "p\n");
    let failed = pod.cube(&[
        "exec",
        "-c",
        "c0",
        "p",
        "--",
        "sh",
        "-c",
        "echo no >&2; exit 3",
    ]);
    assert_eq!(
        (failed.status.code(), text(&failed.stderr)),
        (Some(3), "no\n".into())
    );
    let missing = pod.cube(&["exec", "-c", "c0", "p", "--", "nope"]);
    assert_eq!(
        missing.status.code(),
        Some(127),
        "{}",
        text(&missing.stderr)
    );
    pod.stop();
}

#[test]
fn an_execs_input_comes_back_whole_to_a_slow_reader_while_others_run() {
    let pod = background(&["sleep 1000000"]);
    let slow = pod
        .machine
        .command(&["exec", "p", "--", "sh", "-c", "yes"])
        .stdout(Stdio::piped())
        .spawn();
    let mut slow = slow.unwrap();
    let mut cat = pod
        .machine
        .command(&["exec", "-i", "p", "--", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let bytes: Vec<u8> = (0..4_000_000_u32).map(|n| (n % 251) as u8).collect();
    let (sent, mut stdin) = (bytes.clone(), cat.stdin.take().unwrap());
    let writer = std::thread::spawn(move || stdin.write_all(&sent).unwrap());
    let mut received = Vec::new();
    cat.stdout
        .take()
        .unwrap()
        .read_to_end(&mut received)
        .unwrap();
    writer.join().unwrap();
    assert!(received == bytes && cat.wait().unwrap().success());
    slow.kill().unwrap();
    slow.wait().unwrap();
    pod.stop();
}

#[test]
fn containers_come_and_go_in_a_running_pod() {
    let pod = background(&["sleep 1000000"]);
    for round in 0..20 {
        let id = format!("later{}", round % 3);
        pod.create(&id, "echo hello > /file; cat /file; exit 5");
        pod.post(&format!("/v1/containers/{id}/start"));
        assert_eq!(pod.wait(&id), 5);
        assert!(pod.say(&["logs", "p", &id]).ends_with("hello\n"));
        pod.remove(&id);
    }
    let status: PodStatus = pod.api.get("/v1/pod").unwrap();
    assert_eq!(status.containers.len(), 1);
    pod.stop();
}

#[test]
fn eight_containers_are_added_to_a_running_pod_and_run_at_once() {
    let pod = background(&["sleep 1000000"]);
    let ids: Vec<String> = (0..8).map(|n| format!("more{n}")).collect();
    for id in &ids {
        pod.create(id, "sleep 1000000");
        pod.post(&format!("/v1/containers/{id}/start"));
    }
    for id in &ids {
        assert_eq!(
            pod.say(&["exec", "-c", id, "p", "--", "echo", "here"]),
            "here\n"
        );
    }
    pod.stop();
}

#[test]
fn what_the_pod_does_not_do_is_a_sentence_and_not_its_end() {
    let pod = background(&["sleep 1000000"]);
    let refused = |path: &str, body: serde_json::Value| {
        let result = pod.api.call::<serde_json::Value>("POST", path, &body);
        result.unwrap_err().to_string()
    };
    assert!(refused("/v1/containers/x/kill", json!({"signal": 9})).contains("no such container"));
    assert!(refused("/v1/containers/c0/kill", json!({"signal": 99})).starts_with("signal: "));
    assert!(refused("/v1/containers/c0/start", json!({})).contains("created"));
    let process = json!({"argv": ["x"], "env": ["A=hunter2", 7]});
    let said = refused("/v1/containers/c0/execs", json!({ "process": process }));
    assert!(
        said.contains("process.env[1]") && !said.contains("hunter2"),
        "{said}"
    );
    let disk = json!({"id": "n", "image": [{"path": "/nonexistent"}], "process": {"argv": ["x"]}});
    assert!(refused("/v1/containers", disk).contains("/nonexistent"));
    pod.stop();
}

#[test]
fn a_killed_pod_process_leaves_nothing_after_the_next_command() {
    let pod = background(&["sleep 1000000"]);
    kill(pod.pid());
    pod.assert_swept();
}

#[test]
fn streams_upgrade_for_any_client() {
    let pod = background(&["sleep 1000000"]);
    let body = CreateExec {
        process: process("echo by curl; exit 4"),
        stdin: false,
        terminal: None,
    };
    let made: ExecCreated = pod
        .api
        .call("POST", "/v1/containers/c0/execs", &body)
        .unwrap();
    let curl = |path: &str, more: &[&str]| {
        let socket = pod.machine.run_directory().join("p/api.sock");
        let curl = std::process::Command::new("curl")
            .args(["-sN", "--unix-socket"])
            .arg(socket)
            .args(more)
            .arg(format!("http://pod/v1/execs/{}/{path}", made.exec))
            .output();
        text(&curl.unwrap().stdout)
    };
    let upgrade = ["-H", "Connection: Upgrade", "-H", "Upgrade: cube-stream"];
    assert_eq!(curl("attach/stdout", &upgrade), "by curl\n");
    assert!(curl("wait", &[]).contains("\"exit_code\":4"));
    pod.stop();
}
