//! Pods whose interfaces are ports of a switch in another process (vhost-user).

use std::path::Path;
use std::sync::{Arc, OnceLock};

use crate::fixture::{Running, machine, text};
use crate::port::{FEATURES, Plugged, Port};

/// Two ports: what one guest sends, the other gets.
fn cable() -> (Port, Port) {
    let ends: [Arc<OnceLock<Port>>; 2] = Default::default();
    let port = |own: usize| {
        let other = ends[1 - own].clone();
        // By the first pair, which every driver has in use.
        let port = Port::new(2, FEATURES, move |_, _, frame| {
            if let Some(other) = other.get() {
                other.send(0, frame);
            }
        });
        ends[own].set(port.clone()).ok().unwrap();
        port
    };
    (port(0), port(1))
}

/// The option for a socket.
fn net(socket: &Path) -> String {
    format!("vhost-user={}", socket.display())
}

/// Says the pod's link-local address, once the kernel has given it one.
const ADDRESS: &str = "until ip -6 -o addr show dev eth0 scope link | grep -q inet6; do sleep 0.1; done; \
     ip -6 -o addr show dev eth0 scope link | sed 's|.*inet6 \\([^/]*\\)/.*|\\1|'";

/// Pings, once the kernel has an address of its own and has found that nobody else has it.
fn ping(address: &str) -> String {
    format!(
        "until ip -6 addr show dev eth0 | grep inet6 | grep -qv tentative; do sleep 0.1; done; \
         ping -c 5 -I eth0 {address} > /dev/null && echo reached"
    )
}

#[test]
fn pods_on_a_switch_reach_each_other() {
    let directory = tempfile::tempdir().unwrap();
    let sockets = ["a", "b"].map(|name| directory.path().join(name));
    let (a, b) = cable();
    let _plugged = [Plugged::new(&sockets[0], a), Plugged::new(&sockets[1], b)];
    let machine = machine();
    // Two processors: a second pair of queues, and a control queue to use it by.
    let options = ["-i", "--cpus", "2", "--net", &net(&sockets[0])];
    let mut pod = machine.start(&options, &format!("{ADDRESS}; cat"));
    let address = pod.line();
    let script = ping(address.trim());
    let arguments = [
        "run",
        "--net",
        &net(&sockets[1]),
        "busybox",
        "--",
        "sh",
        "-c",
        &script,
    ];
    let output = machine.command(&arguments).output().unwrap();
    assert_eq!(
        text(&output.stdout),
        "reached\n",
        "{}",
        text(&output.stderr)
    );
    pod.finish();
}

/// What the pod says after a line was given to its shell.
fn asked(pod: &mut Running<'_>, question: &str) -> String {
    pod.say(question);
    pod.line()
}

#[test]
fn a_switch_that_is_restarted_is_found_again() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("port");
    let plug = || Plugged::new(&socket, Port::echo(1, FEATURES));
    let plugged = plug();
    let machine = machine();
    let carrier = "cat /sys/class/net/eth0/carrier";
    // The shell asks for as long as it takes the kernel to hear of it.
    let wait = |up| format!("until [ $({carrier}) = {up} ]; do sleep 0.1; done; echo {up}");
    let mut pod = machine.start(&["-i", "--net", &net(&socket)], "sh");
    assert_eq!(asked(&mut pod, carrier), "1\n");
    drop(plugged);
    assert_eq!(asked(&mut pod, &wait(0)), "0\n");
    let _plugged = plug();
    assert_eq!(asked(&mut pod, &wait(1)), "1\n");
    pod.finish();
}

#[test]
fn a_switch_that_is_not_there_is_said_so() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("port");
    let output = machine().shell(&["--net", &net(&socket)], "true");
    let said = text(&output.stderr);
    let expected = format!(
        "network eth0: the vhost-user backend at {} cannot be reached",
        socket.display()
    );
    assert!(said.contains(&expected), "{said}");
}
