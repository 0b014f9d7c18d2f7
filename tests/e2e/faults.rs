//! Bad input: a sentence that names the file and the fault, status 1 or 2, nothing left behind.

use std::fs;

use crate::fixture::{given, machine, text};

#[test]
fn a_kernel_that_is_none_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let whole = fs::read(given("CUBE_KERNEL")).unwrap();
    let cases = [
        ("truncated", &whole[..whole.len() / 2]),
        ("not-elf", b"#!/bin/sh\n"),
        ("empty", b""),
    ];
    for (name, content) in cases {
        let path = directory.path().join(name);
        fs::write(&path, content).unwrap();
        let output = machine().with("CUBE_KERNEL", &path).shell(&[], "true");
        let sentence = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{sentence}");
        assert!(sentence.contains(path.to_str().unwrap()), "{sentence}");
    }
}

#[test]
fn a_guest_that_panics_is_told_from_others() {
    // A file that no kernel can execute.
    let init = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    let output = machine().with("CUBE_INIT", init).shell(&[], "true");
    let sentence = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{sentence}");
    assert!(sentence.contains("kernel panicked"), "{sentence}");
}

#[test]
fn the_last_lines_of_the_console_tell_why_a_boot_failed() {
    let init = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    let directory = tempfile::tempdir().unwrap();
    let console = directory.path().join("console").display().to_string();
    let machine = machine().with("CUBE_INIT", init);
    let sentence = text(&machine.shell(&["--console", &console], "true").stderr);
    assert!(sentence.contains("Failed to execute /init"), "{sentence}");
    assert!(
        fs::read_to_string(console)
            .unwrap()
            .contains("Linux version")
    );
}

#[test]
fn what_is_wrong_on_the_command_line_is_status_2() {
    let cases: [(&[&str], &str); 6] = [
        (&["--memory", "0"], "needs memory"),
        (&["--memory", "100T"], "this host"),
        (&["--cpus", "0"], "0 is not in 1..=32"),
        (&["--cpus", "33"], "33 is not in 1..=32"),
        (&["--workdir", "here"], "not an absolute path"),
        (&["--env", "=x"], "has no name"),
    ];
    for (options, fault) in cases {
        let output = machine().shell(options, "true");
        assert_eq!(output.status.code(), Some(2), "{options:?}");
        assert!(
            text(&output.stderr).contains(fault),
            "{}",
            text(&output.stderr)
        );
    }
}

#[test]
fn an_image_that_is_not_there_is_named() {
    let output = machine().cube(&["run", "nowhere"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stderr).contains("nowhere"),
        "{}",
        text(&output.stderr)
    );
}
