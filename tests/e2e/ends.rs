//! How containers end, and what `cube run` says of it.

use rustix::process::Signal;

use crate::fixture::{machine, say, text, wait_for_end};

#[test]
fn a_container_prints_its_output_from_inside_a_machine() {
    assert_eq!(say(&[], "echo hello"), "hello\n");
}

#[test]
fn the_exit_status_is_the_containers() {
    for code in [0, 1, 3, 125, 255] {
        let output = machine().shell(&[], &format!("exit {code}"));
        assert_eq!(output.status.code(), Some(code), "{}", text(&output.stderr));
        assert_eq!(text(&output.stderr), "");
    }
}

#[test]
fn a_container_killed_by_a_signal_is_128_and_its_number() {
    // The kernel's CPU limit: a container's first process is immune to most other signals.
    let output = machine().shell(&[], "ulimit -t 1; while :; do :; done");
    assert_eq!(
        output.status.code(),
        Some(128 + 9),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn a_command_that_cannot_run_is_127_or_126_with_a_sentence() {
    for (command, code) in [("no-such-program", 127), ("/etc", 126)] {
        let output = machine().cube(&["run", "busybox", "--", command]);
        let sentence = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{sentence}");
        assert!(sentence.contains(command), "{sentence}");
    }
}

#[test]
fn signals_reach_the_container() {
    let signals = [
        ("INT", Signal::INT),
        ("TERM", Signal::TERM),
        ("HUP", Signal::HUP),
        ("USR1", Signal::USR1),
    ];
    for (name, signal) in signals {
        let machine = machine();
        let script =
            format!("trap 'echo {name}; exit 9' {name}; echo up; while :; do sleep 0.1; done");
        let mut run = machine.start(&[], &script);
        assert_eq!(run.line(), "up\n");
        run.signal(signal);
        let output = run.finish();
        assert_eq!(
            (output.status.code(), text(&output.stdout)),
            (Some(9), format!("{name}\n"))
        );
    }
}

#[test]
fn a_container_without_memory_is_killed_and_says_so() {
    let output = machine().shell(&["--memory", "64M"], "exec tail /dev/zero");
    assert_eq!(output.status.code(), Some(137), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("ran out of memory"));
}

#[test]
fn a_container_cannot_end_the_machine() {
    let output = machine().shell(&[], "poweroff -f || reboot -f || echo still here");
    assert_eq!(text(&output.stdout), "still here\n");
}

#[test]
fn a_machine_that_is_killed_is_status_125_and_leaves_nothing() {
    let machine = machine();
    let mut run = machine.start(&[], "echo up; sleep 1000");
    assert_eq!(run.line(), "up\n");
    rustix::process::pidfd_send_signal(run.vmm(), Signal::KILL).unwrap();
    let output = run.finish();
    assert_eq!(output.status.code(), Some(125));
    assert!(
        text(&output.stderr).contains("killed by signal 9"),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn a_machine_ends_with_its_cube_and_the_next_one_cleans_up() {
    let machine = machine();
    let mut run = machine.start(&[], "echo up; sleep 1000");
    assert_eq!(run.line(), "up\n");
    let vmm = run.vmm();
    run.signal(Signal::KILL);
    run.finish();
    wait_for_end(&vmm);
    machine.shell(&[], "true");
}
