//! Whatever is killed: nothing is left after the next command, and what was acknowledged is there.

use std::io::{BufRead, Read};
use std::process::{Child, Command, Stdio};

use cube::pod::api::body::{CreateExec, ExecCreated, Exit, PodStatus};
use cube::pod::event_log::{EventKind, PodEventRecord};
use cube_guest::{PidNamespace, SecuritySpec};
use serde_json::json;

use crate::background::{background, process, started};
use crate::fixture::{kill, machine};

#[test]
fn no_line_that_a_client_has_seen_is_lost_with_the_pod_process() {
    let logs = tempfile::tempdir().unwrap();
    let directory = logs.path().to_str().unwrap();
    let script = "n=0; while :; do echo line $n; n=$((n + 1)); done";
    let pod = started(machine(), &["--log-dir", directory], &[script]);
    let path = "/v1/containers/c0/attach/stdout";
    let mut attached = std::io::BufReader::new(pod.api.upgrade(path).unwrap());
    let mut followed = pod.api.follow("/v1/containers/c0/logs?follow=1").unwrap();
    let (mut last, mut seen) = (String::new(), String::new());
    for _ in 0..2000 {
        seen.clear();
        followed.read_line(&mut seen).unwrap();
        last.clear();
        attached.read_line(&mut last).unwrap();
    }
    kill(pod.pid());
    pod.assert_swept();
    let log = std::fs::read_to_string(logs.path().join("c0.log")).unwrap();
    assert!(log.contains(&format!(" stdout F {last}")), "{last}");
    assert!(log.contains(&seen), "{seen}");
    // None is missing; only the last one may have been cut.
    let whole = &log[..=log.rfind('\n').unwrap()];
    let numbers = whole.lines().map(|line| {
        let (_, number) = line.rsplit_once(' ').unwrap();
        number.parse::<usize>().unwrap()
    });
    assert!(numbers.eq(0..whole.lines().count()));
}

/// `cube pod run` of a pod that stays, with its name on standard output.
fn pod_run(machine: &crate::fixture::Machine) -> Child {
    let container = json!({"name": "c0", "image": "busybox", "command": ["sleep", "1000000"]});
    let spec = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"},
        "spec": {"containers": [container]}});
    let path = machine.run_directory().join(".spec.yaml");
    std::fs::write(&path, spec.to_string()).unwrap();
    let mut command: Command = machine.command(&["pod", "run", path.to_str().unwrap()]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

#[test]
fn a_cube_that_is_killed_while_it_starts_a_pod_leaves_a_pod_or_nothing() {
    for stage in ["", "p", "p/api.sock", "p/vsock.sock_1024"] {
        let machine = machine();
        let mut cube = pod_run(&machine);
        let reached = machine.run_directory().join(stage);
        while !stage.is_empty() && !reached.exists() && cube.try_wait().unwrap().is_none() {
            std::thread::yield_now();
        }
        cube.kill().unwrap();
        cube.wait().unwrap();
        let say = |arguments: &[&str]| {
            let output = machine.command(arguments).output().unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        // Either its process took the directory over, or nobody has it.
        if say(&["ps", "-q"]) == "p\n" {
            machine
                .command(&["stop", "--time", "0", "p"])
                .output()
                .unwrap();
        }
        machine.wait_for_processes();
        assert_eq!(say(&["ps", "-q"]), "", "{stage}");
        machine.assert_nothing_left();
    }
}

#[test]
fn killing_everything_in_a_container_ends_that_container_alone() {
    let pod = background(&["sleep 1000000"]);
    let mut body = pod.body("shared", "sleep 1000000 & sleep 1000000");
    body.pid_namespace = PidNamespace::Pod;
    body.security = SecuritySpec {
        privileged: true,
        ..SecuritySpec::default()
    };
    let _: serde_json::Value = pod.api.call("POST", "/v1/containers", &body).unwrap();
    pod.post("/v1/containers/shared/start");
    // As root and privileged, in the namespace that the pod's containers share.
    let exec = CreateExec {
        process: process("kill -9 -1"),
        stdin: false,
        terminal: None,
    };
    let path = "/v1/containers/shared/execs";
    let ExecCreated { exec } = loop {
        // It is refused until the container's start was reported.
        match pod.api.call("POST", path, &exec) {
            Ok(created) => break created,
            Err(error) => assert!(error.to_string().contains("does not run"), "{error}"),
        }
    };
    let _: Exit = pod.api.get(&format!("/v1/execs/{exec}/wait")).unwrap();
    assert_eq!(pod.wait("shared"), 128 + 9);
    pod.remove("shared");
    assert_eq!(
        pod.say(&["exec", "-c", "c0", "p", "--", "echo", "up"]),
        "up\n"
    );
    pod.stop();
}

#[test]
fn a_guest_whose_kernel_ends_ends_the_pod_with_a_sentence() {
    let pod = background(&["sleep 1000000"]);
    let mut body = pod.body(
        "evil",
        "echo 2 > /proc/sys/vm/panic_on_oom && exec tail /dev/zero",
    );
    body.security = SecuritySpec {
        privileged: true,
        ..SecuritySpec::default()
    };
    let _: serde_json::Value = pod.api.call("POST", "/v1/containers", &body).unwrap();
    let mut events = pod.api.follow("/v1/events?follow=1").unwrap();
    pod.post("/v1/containers/evil/start");
    let mut text = String::new();
    events.read_to_string(&mut text).unwrap();
    let last: PodEventRecord = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    let sentence = last.message.unwrap_or_default();
    assert!(
        last.kind == EventKind::Ended && sentence.contains("panicked"),
        "{sentence}"
    );
    pod.assert_swept();
}

#[test]
fn secrets_are_in_no_log_answer_or_argument() {
    let logs = tempfile::tempdir().unwrap();
    let directory = logs.path().to_str().unwrap();
    let pod = started(machine(), &["--log-dir", directory], &["sleep 1000000"]);
    let volume = json!({"name": "secret", "source": {"files": {}}});
    let _: serde_json::Value = pod.api.call("POST", "/v1/volumes", &volume).unwrap();
    let mut said = String::new();
    let put = |path: &str, content: serde_json::Value| {
        let body = json!({"files": [{"path": path, "content": content}]});
        pod.api.call::<()>("PUT", "/v1/volumes/secret/files", &body)
    };
    put("token", json!({"text": "hunter2"})).unwrap();
    for (path, content) in [
        ("../token", json!({"text": "hunter2"})),
        ("token", json!({"base64": "hunter2"})),
        ("token", json!("hunter2")),
    ] {
        said += &put(path, content).unwrap_err().to_string();
    }
    for (argv, env) in [
        (json!(["/nonexistent"]), json!(["SECRET=hunter2"])),
        (json!(["sh"]), json!(["hunter2"])),
        (json!(["sh"]), json!({"SECRET": "hunter2"})),
        (json!("sh"), json!(["SECRET=hunter2"])),
    ] {
        let mut body = json!(pod.body("c", ""));
        body["process"] = json!({"argv": argv, "env": env});
        match pod
            .api
            .call::<serde_json::Value>("POST", "/v1/containers", &body)
        {
            Err(error) => said += &error.to_string(),
            Ok(made) => {
                said += &made.to_string();
                let start = "/v1/containers/c/start";
                match pod.api.call::<()>("POST", start, &json!({})) {
                    Ok(()) => {
                        said += &format!("{:?}", pod.api.get::<Exit>("/v1/containers/c/wait"))
                    }
                    Err(error) => said += &error.to_string(),
                }
                pod.remove("c");
            }
        }
    }
    let status: PodStatus = pod.api.get("/v1/pod").unwrap();
    said += &json!(status).to_string();
    for path in ["/v1/events", "/metrics", "/v1/stats", "/v1/volumes"] {
        said += &String::from_utf8(pod.api.read(path).unwrap()).unwrap();
    }
    for file in ["cmdline", "environ"] {
        let bytes = std::fs::read(format!("/proc/{}/{file}", status.pid)).unwrap();
        said += &String::from_utf8_lossy(&bytes);
    }
    for entry in std::fs::read_dir(logs.path()).unwrap() {
        said += &std::fs::read_to_string(entry.unwrap().path()).unwrap();
    }
    assert!(!said.contains("hunter2"), "{said}");
    pod.stop();
}
