//! What `cube-vmm` refuses: a sentence, a status, nothing left behind.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::payload;
use crate::process::spec;

/// Status and standard error of `cube-vmm ARGUMENTS` with `input` as its standard input.
fn run(arguments: &[&str], input: &str) -> (i32, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_cube-vmm"))
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It may have ended without reading.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    (
        output.status.code().unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

fn assert_refused(spec: &str, status: i32, sentence: &str) {
    let (actual, message) = run(&["--spec", "-"], spec);
    assert_eq!(actual, status, "{message}");
    assert!(
        message.starts_with("cube-vmm: ") && message.contains(sentence),
        "{message:?}"
    );
    assert_eq!(message.lines().count(), 1, "{message:?}");
}

fn write(directory: &Path, name: &str, content: &[u8]) -> String {
    let path = directory.join(name);
    std::fs::write(&path, content).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_wrong_spec_is_status_2() {
    assert_refused("", 2, "the machine spec is not valid: EOF");
    assert_refused(&spec("/k", r#""memory_mib": 0"#), 2, "`memory_mib` is 0");
    assert_refused(
        &spec("/k", r#""memory_mib": 4000000000"#),
        2,
        "this host has only",
    );
    assert_refused(
        &spec("/k", r#""cpus": 33"#),
        2,
        "`cpus` is 33; it must be 1 to 32",
    );
    assert_refused(&spec("/k", r#""colour": 1"#), 2, "unknown field `colour`");
    let long = format!(r#""command_line": "{}""#, "x".repeat(2000));
    assert_refused(
        &spec("/k", &long),
        2,
        "`command_line` makes the kernel's command line",
    );
}

#[test]
fn a_wrong_kernel_is_status_1_and_named() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("missing");
    let kernel = missing.to_str().unwrap();
    assert_refused(
        &spec(kernel, ""),
        1,
        &format!("cannot open the kernel {kernel}: No such file"),
    );
    let whole = payload::elf(payload::RESET);
    let kernel = write(directory.path(), "truncated", &whole[..whole.len() - 1]);
    assert_refused(
        &spec(&kernel, ""),
        1,
        &format!("the kernel {kernel} is truncated"),
    );
    let kernel = write(directory.path(), "text", &[b'x'; 4096]);
    assert_refused(
        &spec(&kernel, ""),
        1,
        &format!("the kernel {kernel} is not an x86_64 ELF"),
    );
    let kernel = write(directory.path(), "good", &whole);
    assert_refused(&spec(&kernel, r#""memory_mib": 1"#), 1, "does not fit");
    assert_refused(
        &spec(&kernel, r#""kernel": {"fd": 99}"#),
        1,
        "/proc/self/fd/99: Bad file",
    );
    let init = r#""initramfs": {"init": {"path": "/nonexistent/init"}}"#;
    assert_refused(
        &spec(&kernel, init),
        1,
        "cannot open the init /nonexistent/init",
    );
    let console = r#""console": "/nonexistent/console""#;
    assert_refused(
        &spec(&kernel, console),
        1,
        "the console file /nonexistent/console",
    );
}

#[test]
fn wrong_arguments_are_status_2() {
    for (arguments, sentence) in [
        (&[][..], "no spec was given"),
        (&["--colour"], "unknown argument \"--colour\""),
        (
            &["--spec-fd", "3", "--timeline-fd", "3"],
            "descriptor 3 was given for two things",
        ),
    ] {
        let (status, message) = run(arguments, "");
        assert_eq!(status, 2, "{message}");
        assert!(
            message.contains(sentence) && message.contains("--help"),
            "{message}"
        );
    }
    let (status, message) = run(&["--spec-fd", "99"], "");
    assert_eq!(status, 1);
    assert!(
        message.contains("cannot read the machine spec from descriptor 99"),
        "{message}"
    );
}

#[test]
fn a_check_runs_nothing() {
    assert_eq!(
        run(&["--check", "--spec", "-"], &spec("/nonexistent", "")),
        (0, String::new())
    );
    assert_eq!(
        run(
            &["--check", "--spec", "-"],
            &spec("/nonexistent", r#""cpus": 0"#)
        )
        .0,
        2
    );
}

#[test]
fn a_disk_that_cannot_be_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = write(directory.path(), "kernel", &payload::elf(payload::RESET));
    let small = write(directory.path(), "small", &[0; 4096]);
    let disk = |file: &str, more: &str| {
        format!(
            r#""disks": [{{"serial": "d", "parts": [{{"file": {{"path": "{file}"}}{more}}}]}}]"#
        )
    };
    let missing = spec(&kernel, &disk("/nonexistent/disk", ""));
    assert_refused(
        &missing,
        1,
        "cannot open the file of disk d /nonexistent/disk: No such file",
    );
    assert_refused(
        &spec(&kernel, &disk(&small, r#", "size": 8192"#)),
        1,
        &small,
    );
    let socket = r#""vsock": {"cid": 3, "path": "/nonexistent/vsock"}"#;
    assert_refused(&spec(&kernel, socket), 1, "/nonexistent/vsock");
}
