//! Further processes in a running container.

use std::io::{Read, Write};

use cube_guest::{ExitStatus, HostRequest, ProcessId, TerminalSize};

use crate::guest::{Guest, container, guest, process, signal};

fn sleeping() -> Guest {
    let mut guest = guest();
    guest.start(container("c", "touch /here; sleep 1000000"));
    guest
}

#[test]
fn an_exec_is_in_the_container_as_who_and_where_it_was_asked_to_be() {
    let mut guest = sleeping();
    let mut asked =
        process("id -u; id -G; pwd; echo $A; ls /here; cat /proc/self/cgroup; echo no >&2; exit 3");
    asked.user = "1000:1001".into();
    asked.additional_gids = vec![7];
    asked.cwd = "/tmp".into();
    asked.env = vec!["A=1 2".into()];
    let ran = guest.exec("c", asked);
    assert_eq!(
        ran.stdout, "1000\n1001 7\n/tmp\n1 2\n/here\n0::/\n",
        "{ran:?}"
    );
    assert_eq!((ran.status, &*ran.stderr), (ExitStatus::Code(3), "no\n"));
    assert_eq!(
        guest.exec("c", process("kill -9 $$")).status,
        ExitStatus::Signal {
            signal: 9,
            oom_killed: false
        }
    );
    let mut missing = process("");
    missing.argv = vec!["no-such-program".into()];
    let status = guest.exec("c", missing).status;
    assert!(
        matches!(&status, ExitStatus::NotStarted { code: 127, reason } if reason.contains("no-such-program")),
        "{status:?}"
    );
    guest.shut_down();
}

#[test]
fn input_flows_through_an_exec_and_its_end_does_too() {
    let mut guest = sleeping();
    let mut running = guest.begin("c", "e", process("cat; echo end"));
    let mut stdin = running.stdin.take().unwrap();
    let line = "0123456789abcdef".repeat(4096) + "\n";
    (0..16).for_each(|_| stdin.write_all(line.as_bytes()).unwrap());
    drop(stdin);
    let status = guest.exec_exited("e");
    let ran = running.ran(status);
    assert!(
        ran.stdout == line.repeat(16) + "end\n",
        "{} bytes",
        ran.stdout.len()
    );
    guest.shut_down();
}

#[test]
fn an_exec_can_have_a_terminal_of_the_container() {
    let mut guest = sleeping();
    let (stdio, token) = guest.terminal();
    let mut asked = process("tty; stty size; read x; stty size; echo last");
    asked.stdio = stdio;
    let exec = || ProcessId::Exec("t".into());
    guest.must(HostRequest::Exec {
        container: "c".into(),
        exec: "t".into(),
        process: Box::new(asked),
    });
    let mut stream = guest.stream(token);
    let mut seen = String::new();
    while !seen.contains("24 80\r\n") {
        let mut piece = [0; 64];
        let read = stream.read(&mut piece).unwrap();
        seen.push_str(&String::from_utf8_lossy(&piece[..read]));
    }
    assert!(seen.starts_with("/dev/pts/0\r\n"), "{seen}");
    let size = TerminalSize {
        rows: 12,
        columns: 34,
    };
    guest.must(HostRequest::Resize {
        process: exec(),
        size,
    });
    stream.write_all(b"\r").unwrap();
    assert_eq!(guest.exec_exited("t"), ExitStatus::Code(0));
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.ends_with("12 34\r\nlast\r\n"), "{rest}");
    assert!(
        guest
            .ask(HostRequest::Resize {
                process: exec(),
                size
            })
            .is_err()
    );
    drop(stream);
    guest.shut_down();
}

#[test]
fn signals_reach_an_exec_alone_or_everybody() {
    let mut guest = sleeping();
    guest.shell("c", "mkfifo /ready");
    let running = guest.begin(
        "c",
        "e",
        process("trap 'echo got; exit 5' USR1; echo > /ready; while :; do sleep 1; done"),
    );
    guest.shell("c", "cat /ready");
    guest.must(HostRequest::Signal {
        process: ProcessId::Exec("e".into()),
        signal: 10,
        all: false,
    });
    let status = guest.exec_exited("e");
    assert_eq!(status, ExitStatus::Code(5));
    assert!(running.ran(status).stdout.ends_with("got\n"));
    let running = guest.begin("c", "f", process("echo > /ready; sleep 1000000"));
    guest.shell("c", "cat /ready");
    guest.must(signal("c", 9, true));
    let killed = ExitStatus::Signal {
        signal: 9,
        oom_killed: false,
    };
    assert_eq!(
        (guest.exited("c"), guest.exec_exited("f")),
        (killed.clone(), killed.clone())
    );
    running.ran(killed);
    let refused = guest.refused(HostRequest::Exec {
        container: "c".into(),
        exec: "g".into(),
        process: Box::new(process("true")),
    });
    assert!(refused.contains("has ended"), "{refused}");
    guest.shut_down();
}
