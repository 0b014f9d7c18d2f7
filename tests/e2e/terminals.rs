//! `cube run -it` on a real terminal.

use crate::fixture::{machine, text};

#[test]
fn the_terminal_has_its_size_and_follows_a_resize() {
    let machine = machine();
    let script = "trap 'stty size; exit 7' WINCH; stty size; while :; do sleep 0.1; done";
    let mut terminal = machine.terminal(script);
    terminal.expect("24 80\r\n");
    terminal.resize(40, 100);
    terminal.expect("40 100\r\n");
    assert_eq!(terminal.finish(), Some(7));
}

#[test]
fn keys_reach_the_container_and_control_c_is_its_own() {
    let machine = machine();
    let mut terminal =
        machine.terminal("trap 'echo in''terrupted' INT; tty; read line; echo got $line");
    terminal.expect("/dev/pts/0\r\n");
    terminal.keys("\x03");
    terminal.expect("interrupted\r\n");
    terminal.keys("words\r");
    terminal.finish();
}

#[test]
fn the_terminal_is_as_it_was_afterwards() {
    let machine = machine();
    let mut terminal = machine.terminal("echo up; read line; exit 3");
    terminal.expect("up\r\n");
    assert!(!terminal.is_cooked(), "raw while the container runs");
    terminal.keys("\r");
    assert_eq!(terminal.finish(), Some(3));
    assert!(terminal.is_cooked());
}

#[test]
fn it_without_a_terminal_is_refused() {
    let output = machine().shell(&["-it"], "true");
    assert_eq!(output.status.code(), Some(2));
    assert!(
        text(&output.stderr).contains("needs a terminal"),
        "{}",
        text(&output.stderr)
    );
}
