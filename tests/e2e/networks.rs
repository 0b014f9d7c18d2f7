//! Pods on networks that CNI plug-ins make: each other, the host, names, ports, what is left afterwards.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream, UdpSocket};
use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;
use sha2::Digest;

use crate::fixture::{Machine, Running, machine, text, wait_for_end};

/// A place whose pods are on a network, by the configuration that Cube brings.
pub(crate) fn networked() -> Machine {
    machine()
        .with("CUBE_NET", "cni")
        .with("NETCONFPATH", "/nonexistent")
}

/// The same with a configuration of one's own, in `directory`.
fn configured(directory: &Path, change: impl FnOnce(&mut serde_json::Value)) -> Machine {
    let mut config: serde_json::Value =
        serde_json::from_str(include_str!("../../resources/cni/cube.conflist")).unwrap();
    change(&mut config["plugins"][0]);
    fs::write(directory.join("10-test.conflist"), config.to_string()).unwrap();
    machine()
        .with("CUBE_NET", "cni")
        .with("NETCONFPATH", directory)
}

/// Says the pod's IPv4 and IPv6 address, a line each.
const ADDRESSES: &str = "for f in 4 6; do ip -$f -o addr show dev eth0 scope global | sed 's|.*inet6* \\([^/]*\\)/.*|\\1|'; done";

/// A pod that serves `hello` by HTTP until its standard input ends; its addresses.
fn server<'a>(machine: &'a Machine, options: &[&str]) -> (Running<'a>, String, String) {
    let script = format!("mkdir /w; echo hello > /w/x; httpd -p 80 -h /w; {ADDRESSES}; cat");
    let mut pod = machine.start(&[&["-i"], options].concat(), &script);
    let (v4, v6) = (pod.line().trim().to_owned(), pod.line().trim().to_owned());
    (pod, v4, v6)
}

pub(crate) fn assert_no_network_left(machine: &Machine) {
    let listed = machine.command(&["net", "ls", "--json"]).output().unwrap();
    assert_eq!(text(&listed.stdout), "[]\n", "{}", text(&listed.stderr));
}

#[test]
fn pods_reach_each_other_and_the_host_by_both_families() {
    let machine = networked();
    let (pod, v4, v6) = server(&machine, &[]);
    let script = format!(
        "wget -qO- http://{v4}/x; wget -qO- http://[{v6}]/x; \
         ping -c1 10.86.0.1 > /dev/null && ping -c1 fdc0:be00:c0be::1 > /dev/null && echo host"
    );
    let output = machine
        .command(&["run", "busybox", "--", "sh", "-c", &script])
        .output()
        .unwrap();
    assert_eq!(
        text(&output.stdout),
        "hello\nhello\nhost\n",
        "{}",
        text(&output.stderr)
    );
    let http = http_get(&format!("{v4}:80")) + &http_get(&format!("[{v6}]:80"));
    assert_eq!(http, "hello\nhello\n");
    pod.finish();
    assert_no_network_left(&machine);
}

/// The body of `/x`.
fn http_get(address: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"GET /x HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer.rsplit("\r\n\r\n").next().unwrap().to_owned()
}

#[test]
fn a_port_of_the_host_leads_to_the_pod() {
    let machine = networked();
    let (pod, ..) = server(&machine, &["-p", "18080:80"]);
    assert_eq!(http_get("10.86.0.1:18080"), "hello\n");
    assert_eq!(http_get("127.0.0.1:18080"), "hello\n");
    pod.finish();
    assert!(TcpStream::connect("127.0.0.1:18080").is_err());
    assert_no_network_left(&machine);
}

#[test]
fn names_are_resolved_as_the_network_says() {
    let directory = tempfile::tempdir().unwrap();
    let dns = serde_json::json!({"nameservers": ["10.86.0.1"], "search": ["pods.test"]});
    let machine = configured(directory.path(), |bridge| bridge["dns"] = dns);
    let server = UdpSocket::bind("0.0.0.0:53").unwrap();
    std::thread::spawn(move || answer_names(&server));
    let script = "cat /etc/resolv.conf /etc/hostname; hostname; grep -c $(hostname) /etc/hosts; nslookup -type=a db";
    let output = machine.shell(&["--hostname", "pod"], script);
    let said = text(&output.stdout);
    let files = "nameserver 10.86.0.1\nsearch pods.test\npod\npod\n2\n";
    assert!(
        said.starts_with(files) && said.contains("10.9.8.7"),
        "{said}{}",
        text(&output.stderr)
    );
}

/// A name server that knows one address (RFC 1035, section 4.1).
fn answer_names(socket: &UdpSocket) {
    let mut query = [0; 512];
    while let Ok((len, from)) = socket.recv_from(&mut query) {
        let mut answer = query[..len].to_vec();
        // A response, recursion available, with one answer: the name of the question, A, IN, 60 s, 4 bytes.
        answer[2..4].copy_from_slice(&[0x81, 0x80]);
        answer[7] = 1;
        answer[8..12].fill(0);
        answer.truncate(12 + query[12..len].iter().position(|b| *b == 0).unwrap() + 5);
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 10, 9, 8, 7]);
        socket.send_to(&answer, from).unwrap();
    }
}

#[test]
fn a_stream_arrives_with_the_right_checksum_at_both_mtus() {
    let mib = 4;
    for mtu in [1500, 9000] {
        let directory = tempfile::tempdir().unwrap();
        let machine = configured(directory.path(), |bridge| bridge["mtu"] = mtu.into());
        let script = format!("cat /sys/class/net/eth0/mtu; {ADDRESSES}; nc -l -p 5000 | sha256sum");
        // Its input stays open: at its end `nc` would close the connection.
        let mut sink = machine.start(&["-i"], &script);
        assert_eq!(sink.line(), format!("{mtu}\n"));
        let (v4, _) = (sink.line().trim().to_owned(), sink.line());
        let script = format!("yes 0123456789abcde | head -c {} | nc {v4} 5000", mib << 20);
        let source = machine
            .command(&["run", "busybox", "--", "sh", "-c", &script])
            .output()
            .unwrap();
        let sum = format!("{}  -\n", checksum(mib));
        assert_eq!(sink.line(), sum, "{}", text(&source.stderr));
        sink.finish();
    }
}

/// Between the host and a pod, whose `sha256sum` and `cat` have the connection itself.
#[test]
fn what_is_sent_either_way_arrives_at_both_mtus() {
    // A soak sends a whole GiB: CUBE_E2E_STREAM_MIB=1024 cargo xtask test --filter what_is_sent_either_way.
    let mib: usize = std::env::var("CUBE_E2E_STREAM_MIB").map_or(16, |mib| mib.parse().unwrap());
    let (block, expected) = (BLOCK.repeat(1 << 16), checksum(mib));
    for mtu in [1500, 9000] {
        let directory = tempfile::tempdir().unwrap();
        let machine = configured(directory.path(), |bridge| bridge["mtu"] = mtu.into());
        let script = format!(
            "cat /sys/class/net/eth0/mtu; {ADDRESSES}; block=/dev/shm/block; \
             yes 0123456789abcde | head -c 1048576 > $block; nc -l -p 5000 -e sha256sum; \
             nc -l -p 5001 -e cat $(yes $block | head -n {mib})"
        );
        let mut pod = machine.start(&[], &script);
        assert_eq!(pod.line(), format!("{mtu}\n"));
        let (v4, _) = (pod.line().trim().to_owned(), pod.line());
        let mut to = connected(&v4, 5000);
        (0..mib).for_each(|_| to.write_all(block.as_bytes()).unwrap());
        to.shutdown(Shutdown::Write).unwrap();
        let mut sum = String::new();
        to.read_to_string(&mut sum).unwrap();
        assert_eq!(sum, format!("{expected}  -\n"));
        let (mut from, mut hash) = (connected(&v4, 5001), sha2::Sha256::new());
        std::io::copy(&mut from, &mut hash).unwrap();
        assert_eq!(hex::encode(hash.finalize()), expected);
        pod.finish();
    }
}

/// A connection to a pod that is about to listen.
fn connected(address: &str, port: u16) -> TcpStream {
    loop {
        match TcpStream::connect((address, port)) {
            Ok(stream) => return stream,
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                std::thread::sleep(Duration::from_millis(100));
            }
            Err(error) => panic!("{address}:{port}: {error}"),
        }
    }
}

/// What is sent, over and over: 16 bytes.
const BLOCK: &str = "0123456789abcde\n";

/// SHA-256 of that many MiB of a line of 16 bytes.
fn checksum(mib: usize) -> String {
    let block = BLOCK.repeat(1 << 16);
    let mut hash = sha2::Sha256::new();
    (0..mib).for_each(|_| hash.update(&block));
    hex::encode(hash.finalize())
}

#[test]
fn each_processor_has_a_queue_pair() {
    let script = "ls /sys/class/net/eth0/queues; ping -c1 10.86.0.1 > /dev/null && echo ok";
    let output = networked().shell(&["--cpus", "4"], script);
    let expected = "rx-0\nrx-1\nrx-2\nrx-3\ntx-0\ntx-1\ntx-2\ntx-3\nok\n";
    assert_eq!(text(&output.stdout), expected, "{}", text(&output.stderr));
}

#[test]
fn a_pod_without_a_network_has_the_loopback_alone() {
    let output = machine().shell(&["--net", "none"], "ls /sys/class/net; ls /etc/resolv.conf");
    assert_eq!(text(&output.stdout), "lo\n");
    let refused = machine().shell(&["--net", "none", "-p", "1:1"], "true");
    assert!(
        refused.status.code() == Some(2) && text(&refused.stderr).contains("-p needs a network")
    );
}

#[test]
fn a_container_cannot_change_its_interface() {
    let script = "ip link set eth0 address 02:00:00:00:00:99 2>&1 | grep -o 'not permitted'; \
                  ip addr add 10.86.255.1/16 dev eth0 2>&1 | grep -o 'not permitted'";
    let output = networked().shell(&[], script);
    assert_eq!(
        text(&output.stdout),
        "not permitted\nnot permitted\n",
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn what_a_killed_pod_leaves_is_removed_by_the_next_command() {
    let machine = networked();
    let (pod, v4, _) = server(&machine, &[]);
    let vmm = pod.vmm();
    pod.signal(Signal::KILL);
    wait_for_end(&vmm);
    pod.finish();
    assert_no_network_left(&machine);
    assert!(TcpStream::connect((v4.as_str(), 80)).is_err());
}

#[test]
fn a_tap_of_the_users_is_the_pods() {
    let ip = |words: &str| {
        let status = std::process::Command::new("ip")
            .args(words.split(' '))
            .status()
            .unwrap();
        assert!(status.success(), "ip {words}");
    };
    ip("tuntap add cubetest0 mode tap vnet_hdr");
    ip("link set cubetest0 up mtu 1400");
    let script = "cat /sys/class/net/eth0/mtu /sys/class/net/eth0/carrier";
    let output = machine().shell(&["--net", "tap=cubetest0"], script);
    ip("link del cubetest0");
    assert_eq!(
        text(&output.stdout),
        "1400\n1\n",
        "{}",
        text(&output.stderr)
    );
}
