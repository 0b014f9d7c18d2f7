//! What the kernel shows after the set-up: in a network namespace of the test's own, which needs root.
use std::process::Command;

use cube_guest::network::{InterfaceSpec, NeighbourSpec};

use super::*;

const INSIDE: &str = "CUBE_TEST_NAMESPACE";

/// Runs the test `name` again, in namespaces of its own with an interface in them; false: this is that run.
fn enter(name: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return false;
    }
    let script = "mount -t sysfs sys /sys && mount -t tmpfs run /run && \
                  ip link add one address 02:00:00:00:00:01 type veth peer name two && \
                  ip link set two up mtu 9000 && exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--net", "--mount", "sh", "-c", script, "sh"]);
    command.arg(std::env::current_exe().unwrap());
    let status = command
        .args(["--exact", name, "--nocapture"])
        .env(INSIDE, "1")
        .status();
    assert!(status.unwrap().success(), "as root?");
    true
}

fn ip(words: &str) -> String {
    let output = Command::new("ip").args(words.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {words}");
    String::from_utf8(output.stdout).unwrap()
}

fn interface() -> InterfaceSpec {
    let cidr = |text: &str| text.parse().unwrap();
    let route = |destination, gateway: Option<&str>| RouteSpec {
        destination: cidr(destination),
        gateway: gateway.map(|gateway| gateway.parse().unwrap()),
        priority: None,
        table: None,
        mtu: None,
        advmss: None,
    };
    InterfaceSpec {
        name: "eth0".into(),
        mac: "02:00:00:00:00:01".parse().unwrap(),
        mtu: Some(8000),
        addresses: vec![cidr("10.1.2.3/16"), cidr("10.9.0.1/32"), cidr("fd00::3/64")],
        routes: vec![
            route("0.0.0.0/0", Some("169.254.1.1")),
            route("::/0", Some("fd00::1")),
            RouteSpec {
                priority: Some(7),
                table: Some(100),
                mtu: Some(1400),
                advmss: Some(1300),
                ..route("10.7.0.0/16", Some("10.1.0.9"))
            },
            route("fd07::/64", None),
            // On the link, and what the first one is reached through: the order here is not that of the set-up.
            route("169.254.1.1/32", None),
            route("169.254.1.1/32", None),
        ],
        neighbours: vec![NeighbourSpec {
            address: "169.254.1.1".parse().unwrap(),
            mac: "ee:ee:ee:ee:ee:ee".parse().unwrap(),
        }],
    }
}

#[test]
fn the_kernel_has_what_was_asked_for() {
    if enter("network::tests::the_kernel_has_what_was_asked_for") {
        return;
    }
    let spec = NetworkSpec {
        interfaces: vec![interface()],
        ..NetworkSpec::default()
    };
    configure(&spec, "pod").unwrap();
    let link = ip("-o link show eth0");
    assert!(link.contains("UP") && link.contains("mtu 8000") && link.contains("02:00:00:00:00:01"));
    let addresses = ip("-o addr show eth0 scope global");
    for part in ["10.1.2.3/16 brd 10.1.255.255", "10.9.0.1/32 ", "fd00::3/64"] {
        assert!(addresses.contains(part), "{part} in {addresses}");
    }
    assert!(!addresses.contains("tentative"), "{addresses}");
    let routes = ip("route") + &ip("-6 route") + &ip("route show table 100");
    for part in [
        "default via 169.254.1.1 dev eth0",
        "169.254.1.1 dev eth0 proto static scope link",
        "default via fd00::1 dev eth0",
        "fd07::/64 dev eth0",
        "10.7.0.0/16 via 10.1.0.9 dev eth0 proto static metric 7 mtu 1400 advmss 1300",
    ] {
        assert!(routes.contains(part), "{part} in {routes}");
    }
    assert!(ip("neigh show 169.254.1.1 dev eth0").contains("lladdr ee:ee:ee:ee:ee:ee PERMANENT"));
    let accept = std::fs::read_to_string("/proc/sys/net/ipv6/conf/eth0/accept_ra").unwrap();
    assert_eq!(accept, "0\n");
    let hosts = std::fs::read_to_string("/run/etc/hosts").unwrap();
    assert!(hosts.ends_with("10.1.2.3\tpod\nfd00::3\tpod\n"), "{hosts}");
}

#[test]
fn what_cannot_be_is_said_by_name() {
    if enter("network::tests::what_cannot_be_is_said_by_name") {
        return;
    }
    let said = |change: &dyn Fn(&mut InterfaceSpec)| {
        let mut interface = interface();
        change(&mut interface);
        let spec = NetworkSpec {
            interfaces: vec![interface],
            ..NetworkSpec::default()
        };
        configure(&spec, "pod").unwrap_err().to_string()
    };
    let absent = said(&|interface| interface.mac.0[5] = 9);
    assert_eq!(absent, "there is no interface 02:00:00:00:00:09 for eth0");
    let name = said(&|interface| interface.name = "a/b".into());
    assert!(
        name.starts_with("cannot name the interface 02:00:00:00:00:01 a/b"),
        "{name}"
    );
    let mtu = said(&|interface| interface.mtu = Some(1 << 20));
    assert!(mtu.starts_with("cannot name the interface"), "{mtu}");
    let route = said(&|interface| interface.routes[2].gateway = "10.99.0.1".parse().ok());
    assert!(
        route.starts_with("cannot add the route to 10.7.0.0/16 through eth0"),
        "{route}"
    );
}

#[test]
fn sysctls_are_the_networks_alone() {
    if enter("network::tests::sysctls_are_the_networks_alone") {
        return;
    }
    let with = |path: &str, value: &str| NetworkSpec {
        sysctls: [(path.to_owned(), value.to_owned())].into(),
        ..NetworkSpec::default()
    };
    let path = "net/ipv4/conf/one/arp_filter";
    configure(&with(path, "1"), "pod").unwrap();
    assert_eq!(
        fs::read_to_string(format!("/proc/sys/{path}")).unwrap(),
        "1\n"
    );
    for (path, words) in [
        ("kernel/panic", "is not one of the network's"),
        ("net/../kernel/panic", "is not one of the network's"),
        ("net//core", "is not one of the network's"),
        ("net/absent", "set the sysctl `net/absent` to `1`"),
    ] {
        let error = configure(&with(path, "1"), "pod").unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}
