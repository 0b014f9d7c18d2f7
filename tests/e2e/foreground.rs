//! A pod of `cube run` for other commands: one like any other.

use rustix::process::Signal;

use crate::fixture::{Machine, machine, text};

/// Runs another command while the pod lives; returns its standard output.
fn say(machine: &Machine, arguments: &[&str]) -> String {
    let output = machine.command(arguments).output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    text(&output.stdout)
}

#[test]
fn other_commands_see_and_reach_it() {
    let machine = machine();
    let mut run = machine.start(&["-i"], "echo up; read line; echo $line; exit 6");
    assert_eq!(run.line(), "up\n");
    let pod = say(&machine, &["ps", "-q"]).trim().to_owned();
    assert_eq!(machine.pods(), [&*pod]);
    assert!(say(&machine, &["ps"]).contains("running"));
    assert_eq!(say(&machine, &["exec", &pod, "--", "echo", "in"]), "in\n");
    assert!(say(&machine, &["stats", "--json", &pod]).contains("main"));
    run.say("words");
    let output = run.finish();
    let end = (output.status.code(), text(&output.stdout));
    assert_eq!(end, (Some(6), "words\n".to_owned()));
}

#[test]
fn its_output_is_in_no_log() {
    let machine = machine();
    let mut run = machine.start(&["-i"], "echo up; read line");
    assert_eq!(run.line(), "up\n");
    let pod = machine.pods().remove(0);
    let logs = machine.command(&["logs", &pod]).output().unwrap();
    let sentence = text(&logs.stderr);
    assert!(sentence.contains("keeps no log"), "{sentence}");
    for entry in std::fs::read_dir(machine.run_directory().join(&pod)).unwrap() {
        let entry = entry.unwrap();
        assert!(!entry.file_type().unwrap().is_file(), "{entry:?}");
    }
    run.say("on");
    assert_eq!(run.finish().status.code(), Some(0));
}

#[test]
fn a_client_beside_it_takes_nothing_away() {
    let machine = machine();
    let mut run = machine.start(&["-i"], "echo up; read line; seq 20000");
    assert_eq!(run.line(), "up\n");
    let pod = machine.pods().remove(0);
    let mut attach = machine.command(&["attach", &pod]);
    let attached = attach.stdout(std::process::Stdio::piped()).spawn().unwrap();
    run.say("on");
    let expected: String = (1..=20_000).map(|n| format!("{n}\n")).collect();
    assert!(text(&run.finish().stdout) == expected);
    let seen = attached.wait_with_output().unwrap();
    // It may have come when some had been written.
    assert!(expected.ends_with(&text(&seen.stdout)));
}

#[test]
fn stopping_it_ends_the_command_that_started_it() {
    let machine = machine();
    let mut run = machine.start(
        &[],
        "trap 'exit 9' TERM; echo up; while :; do sleep 0.1; done",
    );
    assert_eq!(run.line(), "up\n");
    let pod = machine.pods().remove(0);
    say(&machine, &["stop", &pod]);
    assert_eq!(run.finish().status.code(), Some(9));
}

#[test]
fn its_directory_goes_with_a_command_that_is_killed() {
    let machine = machine();
    let mut run = machine.start(&[], "echo up; exec cat /dev/zero");
    assert_eq!(run.line(), "up\n");
    run.signal(Signal::KILL);
    run.finish();
    machine.wait_for_processes();
    machine.assert_nothing_left();
}
