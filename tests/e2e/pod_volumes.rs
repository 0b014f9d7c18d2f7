//! Volumes of `cube pod run`: shared by the pod's containers, limited, read-only, gone.

use serde_json::{Value, json};

use crate::background::{Background, specified};
use crate::fixture::{BUSYBOX, machine, text};

/// A container that stays, with these `volumeMounts`.
pub(crate) fn staying(name: &str, mounts: Value) -> Value {
    json!({"name": name, "image": BUSYBOX, "command": ["sleep", "1000000"], "volumeMounts": mounts})
}

/// What `script` says on both its outputs in the container `name`.
pub(crate) fn shell(pod: &Background, name: &str, script: &str) -> String {
    let script = format!("exec 2>&1; {script}");
    let output = pod.cube(&["exec", "-c", name, "p", "--", "sh", "-c", &script]);
    text(&output.stdout) + &text(&output.stderr)
}

#[test]
fn containers_share_an_empty_dir_and_what_is_read_only_refuses() {
    let spec = json!({
        "volumes": [
            {"name": "disk", "emptyDir": {"sizeLimit": "8Mi"}},
            {"name": "memory", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
        ],
        "containers": [
            staying("a", json!([
                {"name": "memory", "mountPath": "/disk/memory"}, {"name": "disk", "mountPath": "/disk"},
            ])),
            staying("b", json!([
                {"name": "disk", "mountPath": "/sub", "subPath": "x/y"},
                {"name": "memory", "mountPath": "/m", "readOnly": true},
            ])),
        ],
    });
    let pod = specified(machine(), &[], &spec);
    let said = shell(
        &pod,
        "b",
        "stat -c %a /sub; echo of b > /sub/file; chmod 600 /sub/file",
    );
    assert_eq!(said, "777\n");
    assert_eq!(
        shell(&pod, "a", "cat /disk/x/y/file; echo of a > /disk/memory/f"),
        "of b\n"
    );
    let said = shell(&pod, "b", "cat /m/f; echo no > /m/f");
    assert!(
        said.starts_with("of a\n") && said.contains("Read-only file system"),
        "{said}"
    );
    let fill = "dd if=/dev/zero of=$f/big bs=1M count=9 2>&1 | grep -o 'No space left'; rm $f/big";
    let said = shell(
        &pod,
        "a",
        &format!("for f in /disk /disk/memory; do {fill}; done"),
    );
    assert_eq!(said, "No space left\n".repeat(2));
    pod.stop();
}

#[test]
fn a_volume_of_the_specification_can_be_taken_away_and_gives_its_disk_back() {
    let spec = json!({"volumes": [{"name": "v", "emptyDir": {}}],
        "containers": [staying("a", json!([]))]});
    let pod = specified(machine(), &["--disk-size", "64M"], &spec);
    let volumes: Value = pod.api.get("/v1/volumes").unwrap();
    assert_eq!(
        (&volumes[0]["kind"], &volumes[0]["serial"]),
        (&json!("disk"), &json!("volume0"))
    );
    pod.api
        .call::<()>("DELETE", "/v1/volumes/v", &json!({}))
        .unwrap();
    let said = shell(&pod, "a", "ls /sys/block | wc -l");
    assert_eq!(said, "2\n", "the image and the writable layer are left");
    pod.stop();
}

#[test]
fn a_volume_of_the_hosts_is_refused_and_nothing_is_left() {
    let machine = machine();
    let spec = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {
        "volumes": [{"name": "etc", "hostPath": {"path": "/etc"}}], "containers": [staying("a", json!([]))]}});
    let path = machine.run_directory().join(".spec.yaml");
    std::fs::write(&path, spec.to_string()).unwrap();
    let refused = machine.cube(&["pod", "run", path.to_str().unwrap()]);
    let said = text(&refused.stderr);
    assert!(
        refused.status.code() == Some(2) && said.contains("spec.volumes[0].hostPath"),
        "{said}"
    );
}
