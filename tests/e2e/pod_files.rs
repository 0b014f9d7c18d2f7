//! Volumes of a running pod, files that are pushed into them and read back, through the API.

use cube::pod::api::body::{DiskFile, PodStatus, Stats};
use cube::pod::api::volume_body::{CreateVolume, NewVolume, VolumeStatus};
use cube_guest::{DeviceSpec, MountSource, MountSpec, SecuritySpec};
use serde_json::{Value, json};

use crate::background::{Background, background};

fn mount(path: &str, volume: &str) -> MountSpec {
    MountSpec {
        path: path.to_owned(),
        source: MountSource::Volume {
            volume: volume.to_owned(),
            sub_path: String::new(),
        },
        read_only: false,
    }
}

impl Background {
    fn make(&self, name: &str, source: NewVolume) -> VolumeStatus {
        let name = name.to_owned();
        let body = CreateVolume { name, source };
        self.api.call("POST", "/v1/volumes", &body).unwrap()
    }

    fn unmake(&self, name: &str) -> Result<(), String> {
        let path = format!("/v1/volumes/{name}");
        let result = self.api.call::<()>("DELETE", &path, &json!({}));
        result.map_err(|error| error.to_string())
    }

    fn push(&self, volume: &str, files: Value) -> Result<(), String> {
        let path = format!("/v1/volumes/{volume}/files");
        let result = self
            .api
            .call::<()>("PUT", &path, &json!({ "files": files }));
        result.map_err(|error| error.to_string())
    }

    /// An ext4 disk.
    fn disk(&self, name: &str) -> DiskFile {
        let path = self.machine.run_directory().join(format!(".{name}.volume"));
        self.store().writable().clone_to(64 << 20, &path).unwrap();
        DiskFile { path, size: None }
    }

    /// Runs a container to its end; what it said.
    fn run(&self, id: &str, script: &str, mounts: Vec<MountSpec>) -> String {
        let mut body = self.body(id, script);
        body.mounts = mounts;
        let _: Value = self.api.call("POST", "/v1/containers", &body).unwrap();
        self.post(&format!("/v1/containers/{id}/start"));
        assert_eq!(self.wait(id), 0, "{id}: {}", self.say(&["logs", "p", id]));
        self.say(&["logs", "p", id])
    }
}

#[test]
fn volumes_are_attached_to_a_running_pod_shared_and_taken_away() {
    let pod = background(&["sleep 1000000"]);
    let data = NewVolume::Disk {
        file: pod.disk("data"),
        file_system: "ext4".to_owned(),
        root_mode: Some(0o777),
        read_only: false,
    };
    pod.make("data", data);
    pod.make(
        "scratch",
        NewVolume::Memory {
            size_bytes: Some(1 << 20),
        },
    );
    let mounts = || vec![mount("/data", "data"), mount("/scratch", "scratch")];
    pod.run(
        "one",
        "echo kept > /data/file; echo also > /scratch/file",
        mounts(),
    );
    assert!(pod.unmake("data").is_err(), "a container has it");
    let said = pod.run(
        "two",
        "cat /data/file /scratch/file; stat -c %a /data",
        mounts(),
    );
    assert_eq!(said, "kept\nalso\n777\n");
    for id in ["one", "two"] {
        pod.remove(id);
    }
    for name in ["data", "scratch"] {
        pod.unmake(name).unwrap();
    }
    pod.stop();
}

#[test]
fn a_block_volume_is_a_device_in_a_container() {
    let pod = background(&["sleep 1000000"]);
    let block = NewVolume::Block {
        file: pod.disk("raw"),
        read_only: false,
    };
    let made = pod.make("raw", block);
    // 0xef53 at byte 1080 is ext4's magic number.
    let mut body = pod.body(
        "user",
        "dd if=/dev/raw bs=1 skip=1080 count=2 2>/dev/null | od -tx1 -An",
    );
    body.devices = vec![DeviceSpec {
        path: "/dev/raw".to_owned(),
        serial: made.serial.unwrap(),
        mode: 0o660,
        uid: 0,
        gid: 0,
    }];
    let _: Value = pod.api.call("POST", "/v1/containers", &body).unwrap();
    pod.post("/v1/containers/user/start");
    assert_eq!(pod.wait("user"), 0);
    assert_eq!(pod.say(&["logs", "p", "user"]).trim(), "53 ef");
    assert!(pod.unmake("raw").is_err(), "a container has it");
    pod.remove("user");
    pod.unmake("raw").unwrap();
    pod.stop();
}

#[test]
fn files_are_swapped_at_once_and_read_back() {
    let pod = background(&["sleep 1000000"]);
    pod.make("config", NewVolume::Files {});
    let set = |word: &str| {
        json!([{"path": "a", "content": {"text": word}},
            {"path": "sub/b", "mode": 0o400, "content": {"text": word}}])
    };
    pod.push("config", set("old")).unwrap();
    // Reads both through one directory until the new set is there: never a mixture. What goes may be half gone.
    let script = "until [ \"$(cat /config/a)\" = new ]; do cd -P /config/..data; \
        x=$(cat a); y=$(cat sub/b); [ -z \"$x\" ] || [ -z \"$y\" ] || [ $x = $y ] || exit 9; done; \
        stat -c %a /config/sub/b; printf 'the last words' > /dev/termination-log";
    let mut body = pod.body("reader", script);
    body.mounts = vec![mount("/config", "config")];
    let _: Value = pod.api.call("POST", "/v1/containers", &body).unwrap();
    pod.post("/v1/containers/reader/start");
    let refused = pod.push(
        "config",
        json!([{"path": "../x", "content": {"text": "x"}}]),
    );
    assert!(refused.unwrap_err().contains("../x"));
    pod.push("config", set("new")).unwrap();
    assert_eq!(pod.wait("reader"), 0);
    assert_eq!(pod.say(&["logs", "p", "reader"]), "400\n");
    // Of a container that has ended, from the end.
    let read = |query: &str| {
        pod.api
            .read(&format!("/v1/containers/reader/file?path={query}"))
    };
    assert_eq!(read("/dev/termination-log").unwrap(), b"the last words");
    assert_eq!(read("/dev/termination-log&max_bytes=5").unwrap(), b"words");
    assert!(
        read("/nowhere")
            .unwrap_err()
            .to_string()
            .contains("/nowhere")
    );
    pod.stop();
}

#[test]
fn a_set_of_files_may_have_16_mib_and_no_more() {
    let pod = background(&["sleep 1000000"]);
    let held = || -> u64 {
        let stats: Stats = pod.api.get("/v1/stats").unwrap();
        stats.vmm.unwrap().rss
    };
    let before = held();
    pod.make("big", NewVolume::Files {});
    let text = "x".repeat(8 << 20);
    let file = |path: &str, text: &str| json!({"path": path, "content": {"text": text}});
    pod.push("big", json!([file("a", &text), file("b", &text)]))
        .unwrap();
    let more = pod.push(
        "big",
        json!([file("a", &text), file("b", &text), file("c", "x")]),
    );
    assert!(more.unwrap_err().contains("16777216 bytes"));
    let said = pod.run(
        "reader",
        "wc -c < /big/a; wc -c < /big/b",
        vec![mount("/big", "big")],
    );
    assert_eq!(said, "8388608\n8388608\n");
    // Nothing of them stays in the pod process.
    let after = held();
    assert!(after < before + (2 << 20), "{before} {after}");
    pod.stop();
}

#[test]
fn a_seccomp_profile_limits_a_container_that_is_created_later() {
    let pod = background(&["sleep 1000000"]);
    let mut body = json!(pod.body("c", "mkdir /x && echo made; sethostname=1; echo went on"));
    body["seccomp_profile"] = json!({"defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]});
    body["process"]["no_new_privileges"] = json!(true);
    body["security"] = json!(SecuritySpec::default());
    let _: Value = pod.api.call("POST", "/v1/containers", &body).unwrap();
    pod.post("/v1/containers/c/start");
    assert_eq!(pod.wait("c"), 0);
    let log = pod.cube(&["logs", "p", "c"]);
    assert_eq!(log.stdout, b"went on\n");
    let errors = String::from_utf8(log.stderr).unwrap();
    assert!(errors.contains("not permitted"), "{errors}");
    pod.stop();
}

#[test]
fn a_container_restarts_with_what_it_wrote() {
    let pod = background(&["sleep 1000000"]);
    pod.create("c", "echo run >> /runs; wc -l < /runs");
    for round in 1..=3 {
        pod.post("/v1/containers/c/start");
        assert_eq!(pod.wait("c"), 0);
        let log = pod.say(&["logs", "p", "c"]);
        assert_eq!(log.lines().last(), Some(&*round.to_string()));
    }
    let events = String::from_utf8(pod.api.read("/v1/events").unwrap()).unwrap();
    assert_eq!(events.matches("\"restarted\"").count(), 2, "{events}");
    pod.remove("c");
    pod.stop();
}

#[test]
fn the_pod_tells_what_it_and_its_containers_use() {
    let pod = background(&["dd if=/dev/zero of=/file bs=1M count=8; sync; sleep 1000000"]);
    let stats = loop {
        let stats: Stats = pod.api.get("/v1/stats").unwrap();
        let fs = stats.guest.containers[0].writable.clone().unwrap();
        if fs.used_bytes > 8 << 20 {
            break stats;
        }
    };
    let container = &stats.guest.containers[0];
    assert!(container.usage.cpu_us > 0 && container.usage.pids > 0);
    assert!(container.usage.memory >= container.usage.working_set);
    let vmm = stats.vmm.unwrap();
    assert!(vmm.pss > 0 && vmm.guest > 10 << 20, "{vmm:?}");
    let status: PodStatus = pod.api.get("/v1/pod").unwrap();
    let stages: Vec<String> = status
        .timeline
        .iter()
        .map(|s| format!("{:?}", s.stage))
        .collect();
    assert_eq!(stages.first().map(String::as_str), Some("Exec"));
    assert!(
        stages.contains(&"ContainerStarted".to_owned()),
        "{stages:?}"
    );
    let metrics = String::from_utf8(pod.api.read("/metrics").unwrap()).unwrap();
    for name in [
        "cube_container_cpu_seconds_total",
        "cube_vmm_memory_pss_bytes",
    ] {
        assert!(
            metrics.contains(&format!("\n{name}{{pod=\"p\"")),
            "{metrics}"
        );
    }
    pod.stop();
}
