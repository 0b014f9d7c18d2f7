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
