//! `cube run` from one end to the other, but for the guest.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::Child;

use rustix::process::{Pid, Signal, kill_process};

use crate::fake_machine::MODE;
use crate::fixture::{Cube, text};

fn send(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

/// Waits until there is a pod directory: it comes after the signals are caught.
fn wait_for_pod(cube: &Cube) {
    let entries = || fs::read_dir(cube.path().join("run")).into_iter().flatten();
    let hidden = |name: OsString| name.as_encoded_bytes().starts_with(b".");
    while entries().all(|entry| hidden(entry.unwrap().file_name())) {
        std::thread::yield_now();
    }
}

/// Reads a line from one of the child's outputs.
fn line(from: &mut impl BufRead) -> String {
    let mut line = String::new();
    from.read_line(&mut line).unwrap();
    line
}

#[test]
fn output_and_exit_status_are_the_containers() {
    let cube = Cube::new("run");
    for code in [0, 1, 125, 255] {
        let output = cube.shell(&[], &format!("echo out; echo err >&2; exit {code}"));
        assert_eq!(output.status.code(), Some(code));
        assert_eq!(
            (text(&output.stdout), text(&output.stderr)),
            ("out\n".into(), "err\n".into())
        );
    }
    let output = cube.shell(&[], "kill -9 $$");
    assert_eq!(output.status.code(), Some(137));
}

#[test]
fn the_images_command_runs_if_no_other_is_given() {
    let output = Cube::new("run").run(&["run", "img"]);
    assert_eq!(
        text(&output.stdout),
        "the image's command\n",
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn large_output_is_complete_before_the_end() {
    let output = Cube::new("run").shell(&[], "seq 2000000; seq 100000 >&2");
    let expected = |n: u32| (1..=n).map(|n| format!("{n}\n")).collect::<String>();
    assert!(
        text(&output.stdout) == expected(2_000_000),
        "{} bytes",
        output.stdout.len()
    );
    assert!(
        text(&output.stderr) == expected(100_000),
        "{} bytes",
        output.stderr.len()
    );
}

#[test]
fn input_passes_through_and_ends() {
    let cube = Cube::new("run");
    let mut child = cube.start(&["-i"], "cat");
    let bytes: Vec<u8> = (0..4_000_000_u32).map(|i| (i * 7 / 3) as u8).collect();
    let mut stdin = child.stdin.take().unwrap();
    let sent = bytes.clone();
    let feeding = std::thread::spawn(move || stdin.write_all(&sent).unwrap());
    let output = child.wait_with_output().unwrap();
    feeding.join().unwrap();
    assert!(
        output.stdout == bytes,
        "{} bytes: {}",
        output.stdout.len(),
        text(&output.stderr)
    );
}

#[test]
fn a_container_that_ends_does_not_wait_for_input() {
    let cube = Cube::new("run");
    let mut child = cube.start(&["-i"], "exit 4");
    assert_eq!(child.wait().unwrap().code(), Some(4));
}

#[test]
fn signals_are_the_containers() {
    for (name, signal) in [
        ("INT", Signal::INT),
        ("TERM", Signal::TERM),
        ("USR2", Signal::USR2),
    ] {
        let cube = Cube::new("run");
        let script = format!("trap 'exit 9' {name}; echo up; while :; do sleep 0.01; done");
        let mut child = cube.start(&[], &script);
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        assert_eq!(line(&mut stdout), "up\n");
        send(&child, signal);
        assert_eq!(child.wait().unwrap().code(), Some(9));
        cube.assert_nothing_left();
    }
}

#[test]
fn a_guest_that_never_answers_is_ended_by_the_second_interrupt() {
    let cube = Cube::new("silent");
    let mut child = cube.start(&[], "true");
    wait_for_pod(&cube);
    send(&child, Signal::INT);
    // Two that are waiting at once are one: the second is another.
    send(&child, Signal::TERM);
    let status = child.wait().unwrap().code().unwrap();
    assert!([130, 143].contains(&status), "{status}");
    cube.assert_nothing_left();
}

#[test]
fn a_reader_that_goes_away_ends_the_writer() {
    let cube = Cube::new("run");
    let mut child = cube.start(&[], "exec yes");
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    assert_eq!(line(&mut stdout), "y\n");
    drop(stdout);
    assert_eq!(child.wait().unwrap().code(), Some(128 + 13));
    cube.assert_nothing_left();
}

#[test]
fn what_goes_wrong_before_the_container_runs_is_status_1() {
    let cases = [
        ("panic", "the guest's kernel panicked\n  last words"),
        ("other version", "cube-init 9.9.9"),
        ("garbage", "control connection broke"),
        ("failed", "could not set the pod up: no disk image0"),
    ];
    for (mode, sentence) in cases {
        let output = Cube::new(mode).shell(&[], "true");
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{mode}: {said}");
        assert!(
            said.starts_with("cube: ") && said.contains(sentence),
            "{mode}: {said}"
        );
    }
}

#[test]
fn a_machine_that_dies_under_its_container_is_status_125() {
    let output = Cube::new("dies").shell(&[], "true");
    assert_eq!(output.status.code(), Some(125));
    assert_eq!(text(&output.stdout), "so far");
    assert!(
        text(&output.stderr).contains("vCPU 0 triple-faulted"),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn a_killed_cube_takes_its_machine_along_and_the_next_cleans_up() {
    let cube = Cube::new("silent");
    // Inherited by all that come after: it ends with the last of them.
    let (mut all_ended, writer) = std::io::pipe().unwrap();
    rustix::io::fcntl_setfd(&writer, rustix::io::FdFlags::empty()).unwrap();
    let mut child = cube.start(&[], "true");
    drop(writer);
    wait_for_pod(&cube);
    send(&child, Signal::KILL);
    child.wait().unwrap();
    all_ended.read_to_end(&mut Vec::new()).unwrap();
    let next = cube.command(&["run", "img"]).env(MODE, "panic").output();
    assert_eq!(next.unwrap().status.code(), Some(1));
    cube.assert_nothing_left();
}

#[test]
fn the_machine_and_the_pod_are_as_asked() {
    let options = [
        "--cpus",
        "3",
        "--memory",
        "96MiB",
        "--env",
        "A=b=c",
        "--workdir",
        "/w",
        "--hostname",
        "h",
        "--read-only",
        "--disk-size",
        "16M",
        "--entrypoint",
        "prog",
    ];
    let arguments = [&["run"], &options[..], &["img", "--", "arg"]].concat();
    let output = Cube::new("describe").run(&arguments);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let machine = &json["machine"];
    assert_eq!(
        (&machine["cpus"], &machine["memory_mib"]),
        (&3.into(), &96.into())
    );
    assert_eq!(machine["disks"][1]["parts"][0]["size"], 16 << 20);
    let container = &json["pod"]["containers"][0];
    assert_eq!(
        container["process"]["argv"],
        serde_json::json!(["prog", "arg"])
    );
    assert_eq!(
        container["process"]["env"],
        serde_json::json!(["FROM_IMAGE=yes", "A=b=c"])
    );
    assert_eq!(
        (&container["process"]["cwd"], &container["process"]["user"]),
        (&"/w".into(), &"7:8".into())
    );
    assert_eq!(
        (&json["pod"]["hostname"], &container["rootfs"]["read_only"]),
        (&"h".into(), &true.into())
    );
}

#[test]
fn a_pod_whose_cube_was_killed_goes_by_itself() {
    let cube = Cube::new("run");
    let (mut all_ended, writer) = std::io::pipe().unwrap();
    rustix::io::fcntl_setfd(&writer, rustix::io::FdFlags::empty()).unwrap();
    let mut child = cube.start(&[], "echo up; exec cat /dev/zero");
    drop(writer);
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    assert_eq!(line(&mut stdout), "up\n");
    send(&child, Signal::KILL);
    child.wait().unwrap();
    drop(stdout);
    all_ended.read_to_end(&mut Vec::new()).unwrap();
    cube.assert_nothing_left();
}

#[test]
fn other_commands_see_the_pod_and_its_output_is_in_no_file() {
    let cube = Cube::new("run");
    let mut child = cube.start(&["-i"], "echo up; read line; exit 6");
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    assert_eq!(line(&mut stdout), "up\n");
    let say = |arguments: &[&str]| cube.command(arguments).output().unwrap();
    let pod = text(&say(&["ps", "-q"]).stdout).trim().to_owned();
    let listed = text(&say(&["ps"]).stdout);
    assert!(listed.contains(&pod) && listed.contains("main"), "{listed}");
    let logs = say(&["logs", &pod]);
    assert_eq!(logs.status.code(), Some(1));
    let sentence = text(&logs.stderr);
    assert!(sentence.contains("keeps no log"), "{sentence}");
    for entry in fs::read_dir(cube.path().join("run").join(&pod)).unwrap() {
        let kind = entry.unwrap().file_type().unwrap();
        assert!(!kind.is_file(), "sockets and nothing else");
    }
    child.stdin.take().unwrap().write_all(b"on\n").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(6));
    cube.assert_nothing_left();
}
