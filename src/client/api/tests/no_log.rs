//! Containers that keep no log.

use super::*;

fn create(pod: &TestPod, no_log: bool, log_path: Option<PathBuf>) -> Result<Value, ApiError> {
    let body = CreateContainer {
        id: "c".to_owned(),
        image: vec![DiskFile::default()],
        process: ProcessSpec {
            argv: ["say", "words"].map(str::to_owned).into(),
            ..ProcessSpec::default()
        },
        no_log,
        log_path,
        ..CreateContainer::default()
    };
    pod.api.call("POST", "/v1/containers", &body)
}

/// Runs the container while somebody is attached to it; returns what that saw.
fn seen_by_a_client(pod: &TestPod) -> String {
    let path = "/v1/containers/c/attach/stdout";
    let mut attached = pod.api.upgrade(path).unwrap();
    pod.post("/v1/containers/c/start", json!({})).unwrap();
    let mut seen = String::new();
    attached.read_to_string(&mut seen).unwrap();
    let exit: Exit = pod.api.get("/v1/containers/c/wait").unwrap();
    assert_eq!(exit.exit_code, 3);
    seen
}

#[test]
fn a_container_without_a_log_writes_none_and_says_so() {
    let pod = TestPod::start();
    let status = create(&pod, true, None).unwrap();
    assert_eq!(status.get("log_path"), None);
    assert_eq!(seen_by_a_client(&pod), "words\n");
    assert!(!pod.directory.path().join("p/c.log").exists());
    let logs = pod.api.follow("/v1/containers/c/logs").err();
    let reopen = pod.post("/v1/containers/c/logs/reopen", json!({})).err();
    for error in [logs, reopen].map(Option::unwrap) {
        assert!(
            matches!(&error, ApiError::Refused { status: 409, sentence } if sentence.contains("keeps no log")),
            "{error}"
        );
    }
    pod.stop();
}

#[test]
fn a_container_has_a_log_unless_it_asks_for_none() {
    let pod = TestPod::start();
    let status = create(&pod, false, None).unwrap();
    let path = pod.directory.path().join("p/c.log");
    assert_eq!(status["log_path"].as_str(), path.to_str());
    assert_eq!(seen_by_a_client(&pod), "words\n");
    let log = std::fs::read_to_string(path).unwrap();
    assert!(log.ends_with(" stdout F words\n"), "{log}");
    pod.stop();
}

#[test]
fn what_waits_for_a_client_is_there_for_one_that_comes_late() {
    let pod = TestPod::start();
    create(&pod, true, None).unwrap();
    pod.post("/v1/containers/c/start", json!({})).unwrap();
    let events = pod.api.follow("/v1/events?follow=1").unwrap();
    let exited = |line: io::Result<String>| line.unwrap().contains("\"exited\"");
    assert!(events.lines().any(exited));
    let path = "/v1/containers/c/attach/stdout";
    let mut seen = String::new();
    let mut attached = pod.api.upgrade(path).unwrap();
    attached.read_to_string(&mut seen).unwrap();
    assert_eq!(seen, "words\n");
    pod.stop();
}

#[test]
fn a_place_for_a_log_that_is_not_kept_is_refused() {
    let pod = TestPod::start();
    let path = pod.directory.path().join("log");
    let refused = create(&pod, true, Some(path)).unwrap_err();
    assert!(refused.to_string().starts_with("log_path: "), "{refused}");
    pod.stop();
}
