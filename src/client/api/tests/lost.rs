//! Streams that the guest promised and that do not come, or come late.

use std::time::Duration;

use super::*;

fn impatient() -> TestPod {
    TestPod::with(|supervisor| supervisor.set_stream_patience(Duration::from_millis(1)))
}

fn exec(pod: &TestPod, argv: &[&str]) -> String {
    let body = CreateExec {
        process: ProcessSpec {
            argv: argv.iter().map(|word| (*word).to_owned()).collect(),
            ..ProcessSpec::default()
        },
        stdin: true,
        terminal: None,
    };
    let path = "/v1/containers/c/execs";
    let ExecCreated { exec } = pod.api.call("POST", path, &body).unwrap();
    exec
}

fn attached(pod: &TestPod, exec: &str, stream: &str) -> String {
    let mut text = String::new();
    let path = format!("/v1/execs/{exec}/attach/{stream}");
    let mut stream = pod.api.upgrade(&path).unwrap();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn an_exec_whose_streams_are_lost_ends_for_all_who_wait() {
    let pod = impatient();
    pod.stay();
    let exec = exec(&pod, &["mute"]);
    assert_eq!(attached(&pod, &exec, "stdout"), "");
    let exit: Exit = pod.api.get(&format!("/v1/execs/{exec}/wait")).unwrap();
    assert_eq!(exit.exit_code, 3);
    pod.stop();
}

#[test]
fn a_container_whose_streams_are_lost_ends_and_so_does_its_log() {
    let pod = impatient();
    pod.create("c", &["mute"]).unwrap();
    pod.post("/v1/containers/c/start", json!({})).unwrap();
    let exit: Exit = pod.api.get("/v1/containers/c/wait").unwrap();
    assert_eq!((exit.exit_code, &*pod.log("c")), (3, ""));
    pod.stop();
}

#[test]
fn a_forwarded_port_whose_stream_is_lost_is_closed() {
    let pod = impatient();
    let mut port = pod.api.upgrade("/v1/ports/82").unwrap();
    assert_eq!(port.read(&mut [0]).unwrap(), 0);
    pod.stop();
}

#[test]
fn what_comes_after_the_end_of_its_process_is_not_lost() {
    let pod = TestPod::start();
    pod.stay();
    let exec = exec(&pod, &["late", "words"]);
    assert_eq!(attached(&pod, &exec, "stdout"), "words\n");
    let exit: Exit = pod.api.get(&format!("/v1/execs/{exec}/wait")).unwrap();
    assert_eq!(exit.exit_code, 3);
    pod.stop();
}
