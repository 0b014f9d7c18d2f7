//! `cube run -it` on a pseudo-terminal.

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Command, Stdio};

use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use crate::fixture::{Cube, text};

/// Reads until `wanted` was there.
fn expect(master: &mut File, wanted: &str) {
    let mut seen = String::new();
    while !seen.contains(wanted) {
        let mut byte = [0];
        master.read_exact(&mut byte).unwrap();
        seen.push(byte[0] as char);
    }
}

#[test]
fn the_terminal_is_raw_follows_its_size_and_is_restored() {
    let cube = Cube::new("run");
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let slave = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    let resize = |rows, columns| {
        let (ws_row, ws_col, ws_xpixel, ws_ypixel) = (rows, columns, 0, 0);
        tcsetwinsize(
            &slave,
            Winsize {
                ws_row,
                ws_col,
                ws_xpixel,
                ws_ypixel,
            },
        )
        .unwrap();
    };
    let cooked = || {
        let modes = tcgetattr(&slave).unwrap().local_modes;
        modes.contains(LocalModes::ICANON | LocalModes::ECHO)
    };
    resize(24, 80);

    let mut command = Command::new("setsid");
    command.arg("--ctty").arg(env!("CARGO_BIN_EXE_cube"));
    command.args(cube.arguments(&["-it"], "read line; printf 'got %s.' \"$line\"; exit 5"));
    cube.set_up(&mut command);
    let stdio = || Stdio::from(slave.try_clone().unwrap());
    let mut child = command
        .stdin(stdio())
        .stdout(stdio())
        .stderr(stdio())
        .spawn()
        .unwrap();
    let mut master = File::from(master);
    expect(&mut master, "24 80");
    expect(&mut master, "resized 24 80");
    assert!(!cooked(), "raw while the container runs");
    resize(50, 132);
    expect(&mut master, "resized 50 132");
    // In raw mode these are bytes like any other.
    master.write_all(b"\x03\x1a\x1cx\n").unwrap();
    expect(&mut master, "got \x03\x1a\x1cx.");
    assert_eq!(child.wait().unwrap().code(), Some(5));
    assert!(cooked(), "as it was");
}

#[test]
fn it_without_a_terminal_is_a_usage_error() {
    let output = Cube::new("run").shell(&["-it"], "true");
    assert_eq!(output.status.code(), Some(2));
    assert!(
        text(&output.stderr).contains("needs a terminal"),
        "{}",
        text(&output.stderr)
    );
}
