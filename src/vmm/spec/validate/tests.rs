use super::*;
use serde_json::{Value, json};

const HOST: HostLimits = HostLimits { memory: 8 << 30 };

fn base() -> Value {
    json!({"kernel": {"path": "/k"}, "cpus": 1, "memory_mib": 128})
}

/// What is said of the base with `field` set to `value`.
fn error(field: &str, value: Value) -> String {
    let mut spec = base();
    spec[field] = value;
    let text = spec.to_string();
    match MachineSpec::from_json(text.as_bytes()).and_then(|spec| spec.validate(HOST)) {
        Ok(_) => panic!("{text} was taken"),
        Err(error) => error.to_string(),
    }
}

fn assert_faults<const N: usize>(cases: [(&str, Value, &str); N]) {
    for (field, value, expected) in cases {
        let error = error(field, value);
        assert!(
            error.contains(expected),
            "{error:?} does not say {expected:?}"
        );
    }
}

fn disk(serial: &str) -> Value {
    json!({"serial": serial, "parts": [{"file": {"path": "/d"}}]})
}

#[test]
fn a_small_spec_is_good() {
    let spec = MachineSpec::from_json(base().to_string().as_bytes()).unwrap();
    let valid = spec.validate(HOST).unwrap();
    assert_eq!((valid.memory_bytes(), valid.slots()), (128 << 20, 0));
}

#[test]
fn networks_are_checked() {
    let net = |change: Value| {
        let mut net = json!({"name": "eth0", "tap_fds": [3], "mac": "02:00:00:00:00:01"});
        for (field, value) in change.as_object().unwrap() {
            net[field] = value.clone();
        }
        json!([net])
    };
    let mut spec = base();
    spec["nets"] =
        net(json!({"mtu": 9000, "transmit_limit": {"frames": {"per_second": 9, "burst": 1}}}));
    let spec = MachineSpec::from_json(spec.to_string().as_bytes()).unwrap();
    assert_eq!(spec.validate(HOST).unwrap().slots(), 1);
    let twice = json!([
        net(json!({}))[0],
        net(json!({"tap_fds": [4], "mac": "02:00:00:00:00:02"}))[0]
    ]);
    let same_mac = json!([
        net(json!({}))[0],
        net(json!({"tap_fds": [4], "name": "eth1"}))[0]
    ]);
    assert_faults([
        (
            "nets",
            net(json!({"name": "a b"})),
            "`nets[0].name` is \"a b\"",
        ),
        (
            "nets",
            net(json!({"name": "sixteen-bytes-xx"})),
            "1 to 15 printable",
        ),
        (
            "nets",
            net(json!({"mac": "03:00:00:00:00:01"})),
            "`nets[0].mac` is 03:",
        ),
        ("nets", net(json!({"mac": "x"})), "is not a MAC address"),
        (
            "nets",
            net(json!({"mtu": 67})),
            "`nets[0].mtu` is 67; it must be 68 to 65521",
        ),
        ("nets", net(json!({"tap_fds": []})), "has 0 descriptors"),
        (
            "nets",
            net(json!({"tap_fds": [2]})),
            "`nets[0].tap_fds[0]` is descriptor 2",
        ),
        (
            "nets",
            net(json!({"tap_fds": [3, 3]})),
            "another field has already",
        ),
        (
            "nets",
            net(json!({"receive_limit": {"bytes": {"per_second": 0, "burst": 1}}})),
            "has a 0",
        ),
        ("nets", twice, "`nets[1].name` is \"eth0\", which another"),
        (
            "nets",
            same_mac,
            "`nets[1].mac` is 02:00:00:00:00:01, which another",
        ),
    ]);
}

#[test]
fn sizes_are_bounded() {
    assert_faults([
        ("colour", 1.into(), "unknown field `colour`"),
        ("cpus", 0.into(), "`cpus` is 0; it must be 1 to 32"),
        ("cpus", 33.into(), "`cpus` is 33"),
        ("cpus", 300.into(), "invalid value"),
        ("memory_mib", 0.into(), "`memory_mib` is 0"),
        (
            "memory_mib",
            8193.into(),
            "`memory_mib` is 8193; this host has only 8192 MiB",
        ),
        (
            "command_line",
            "a\nb".into(),
            "`command_line` contains '\\n'",
        ),
        (
            "command_line",
            "x".repeat(2048).into(),
            "`command_line` makes the kernel's",
        ),
        (
            "spare_slots",
            200.into(),
            "`spare_slots` brings the machine to 200",
        ),
    ]);
}

#[test]
fn a_network_on_a_switch_is_the_switchs_to_limit() {
    let net = |change: Value| {
        let mut net = json!({"name": "eth0", "socket": "/s", "mac": "02:00:00:00:00:01"});
        for (field, value) in change.as_object().unwrap() {
            net[field] = value.clone();
        }
        json!([net])
    };
    let mut spec = base();
    spec["nets"] = net(json!({}));
    let spec = MachineSpec::from_json(spec.to_string().as_bytes()).unwrap();
    assert!(spec.validate(HOST).unwrap().shares_memory());
    let limit = json!({"bytes": {"per_second": 1, "burst": 1}});
    for (change, expected) in [
        (json!({"socket": ""}), "`nets[0].socket` is 0 bytes"),
        (
            json!({"socket": "s".repeat(108)}),
            "`nets[0].socket` is 108 bytes",
        ),
        (
            json!({"tap_fds": [3]}),
            "`nets[0].tap_fds` cannot be with `socket`",
        ),
        (
            json!({"check_source": true}),
            "`nets[0].check_source` cannot",
        ),
        (
            json!({"receive_limit": limit.clone()}),
            "`nets[0].receive_limit` cannot",
        ),
        (
            json!({"transmit_limit": limit.clone()}),
            "`nets[0].transmit_limit` cannot",
        ),
    ] {
        assert_faults([("nets", net(change), expected)]);
    }
}

#[test]
fn a_disk_has_a_name_of_its_own_and_files() {
    let two = json!({"serial": "a", "parts": [{"file": {"path": "/d"}}, {"file": {"path": "/e"}}]});
    let none = json!({"serial": "a", "parts": []});
    assert_faults([
        ("disks", json!([disk("")]), "`disks[0].serial` is \"\""),
        ("disks", json!([disk(&"s".repeat(21))]), "`disks[0].serial`"),
        ("disks", json!([disk("a b")]), "`disks[0].serial`"),
        (
            "disks",
            json!([disk("a"), disk("a")]),
            "`disks[1].serial` is \"a\", which",
        ),
        ("disks", json!([none]), "`disks[0].parts` is empty"),
        (
            "disks",
            json!([two]),
            "`disks[0].parts` has more than one file",
        ),
    ]);
}

#[test]
fn files_and_sockets_have_usable_names() {
    let initramfs =
        |path: &str| json!({"init": {"path": "/i"}, "files": [{"path": path, "content": ""}]});
    assert_faults([
        ("kernel", json!({"fd": 1}), "`kernel` is descriptor 1"),
        ("kernel", json!({"path": ""}), "`kernel` is an empty path"),
        (
            "initramfs",
            initramfs("../x"),
            "`initramfs.files[0].path` is \"../x\"",
        ),
        (
            "initramfs",
            initramfs("/x"),
            "`initramfs.files[0].path` is \"/x\"",
        ),
        (
            "initramfs",
            initramfs("init"),
            "`initramfs.files[0].path` is \"init\", which",
        ),
        ("vsock", json!({"cid": 2, "path": "/v"}), "`vsock.cid` is 2"),
        (
            "vsock",
            json!({"cid": 3, "path": "v".repeat(108)}),
            "`vsock.path` is 108 bytes",
        ),
    ]);
}

#[test]
fn one_descriptor_is_one_file() {
    let mut spec = base();
    spec["kernel"] = json!({"fd": 5});
    spec["initramfs"] = json!({"init": {"fd": 5}});
    let spec = MachineSpec::from_json(spec.to_string().as_bytes()).unwrap();
    let error = spec.validate(HOST).unwrap_err().to_string();
    assert!(
        error.contains("`initramfs.init` is descriptor 5, which"),
        "{error}"
    );
}
