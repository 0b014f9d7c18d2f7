//! Volumes and files through the API.

use super::*;
use crate::pod::api::volume_body::{
    Content, CreateVolume, NewVolume, PutFile, PutFiles, VolumeState, VolumeStatus,
};

fn volume(name: &str, source: NewVolume) -> CreateVolume {
    CreateVolume {
        name: name.to_owned(),
        source,
    }
}

fn ext4() -> NewVolume {
    NewVolume::Disk {
        file: DiskFile::default(),
        file_system: "ext4".to_owned(),
        root_mode: None,
        read_only: false,
    }
}

fn file(path: &str, content: &[u8]) -> PutFile {
    PutFile {
        path: path.to_owned(),
        mode: 0o400,
        uid: 0,
        gid: 0,
        content: Content::Base64(content.to_vec()),
    }
}

impl TestPod {
    fn make(&self, name: &str, source: NewVolume) -> Result<VolumeStatus, ApiError> {
        self.api.call("POST", "/v1/volumes", &volume(name, source))
    }

    fn unmake(&self, name: &str) -> Result<(), ApiError> {
        let path = format!("/v1/volumes/{name}");
        self.api.call("DELETE", &path, &json!({}))
    }

    fn put(&self, volume: &str, files: Vec<PutFile>) -> Result<(), ApiError> {
        let path = format!("/v1/volumes/{volume}/files");
        self.api.call("PUT", &path, &PutFiles { files })
    }

    fn disks(&self) -> (usize, usize) {
        let slots = &self.slots;
        (
            slots.given.load(Ordering::SeqCst),
            slots.taken.load(Ordering::SeqCst),
        )
    }
}

#[test]
fn volumes_come_and_go_and_their_disks_with_them() {
    let pod = TestPod::start();
    let disk = pod.make("data", ext4()).unwrap();
    assert_eq!(
        (disk.kind.as_str(), disk.state),
        ("disk", VolumeState::Ready)
    );
    assert!(disk.serial.is_some());
    let block = NewVolume::Block {
        file: DiskFile::default(),
        read_only: true,
    };
    pod.make("raw", block).unwrap();
    pod.make(
        "scratch",
        NewVolume::Memory {
            size_bytes: Some(1),
        },
    )
    .unwrap();
    let twice = pod.make("data", NewVolume::Files {}).unwrap_err();
    assert!(twice.to_string().contains("of this name"), "{twice}");
    let bad = pod.make("../x", NewVolume::Files {}).unwrap_err();
    assert!(bad.to_string().starts_with("name: "), "{bad}");
    let all: Vec<VolumeStatus> = pod.api.get("/v1/volumes").unwrap();
    let names: Vec<&str> = all.iter().map(|volume| volume.name.as_str()).collect();
    assert_eq!(names, ["config", "data", "raw", "scratch"]);
    for name in ["data", "raw", "scratch"] {
        pod.unmake(name).unwrap();
    }
    assert_eq!(pod.disks(), (2, 2));
    assert!(
        pod.unmake("data")
            .unwrap_err()
            .to_string()
            .contains("no such volume")
    );
    pod.stop();
}

#[test]
fn a_volume_that_the_guest_refuses_leaves_no_disk() {
    let pod = TestPod::start();
    let refused = pod.make("bad", ext4()).unwrap_err();
    assert_eq!(refused.to_string(), "no such file system");
    pod.slots
        .given
        .store(usize::from(fake_agent::NO_DRIVER), Ordering::SeqCst);
    assert_eq!(pod.make("v", ext4()).unwrap_err().to_string(), "no driver");
    assert_eq!(pod.disks().1, 2);
    let all: Vec<VolumeStatus> = pod.api.get("/v1/volumes").unwrap();
    assert_eq!(all.len(), 1);
    pod.stop();
}

#[test]
fn a_block_volume_in_use_stays() {
    let pod = TestPod::start();
    let block = NewVolume::Block {
        file: DiskFile::default(),
        read_only: false,
    };
    pod.make("raw", block).unwrap();
    pod.create("user", &["stay"]).unwrap();
    pod.post("/v1/containers/user/start", json!({})).unwrap();
    assert_eq!(
        pod.unmake("raw").unwrap_err().to_string(),
        "a container has it"
    );
    let all: Vec<VolumeStatus> = pod.api.get("/v1/volumes").unwrap();
    assert_eq!(all[1].state, VolumeState::Ready);
    pod.post("/v1/containers/user/kill", json!({"signal": 9}))
        .unwrap();
    pod.unmake("raw").unwrap();
    pod.stop();
}

#[test]
fn files_are_pushed_whole_or_not_at_all() {
    let pod = TestPod::start();
    // More than a request's body may otherwise have, and a name that is a secret's.
    pod.put(
        "config",
        vec![file("big", &[7; 3 << 20]), file("a/b", b"x")],
    )
    .unwrap();
    pod.put("config", Vec::new()).unwrap();
    let refused = pod.put("config", vec![file("no", &[7; 3 << 20])]);
    assert_eq!(refused.unwrap_err().to_string(), "not this file");
    pod.make("scratch", NewVolume::Memory { size_bytes: None })
        .unwrap();
    let other = pod.put("scratch", Vec::new()).unwrap_err();
    assert!(other.to_string().contains("kind memory"), "{other}");
    let body = json!({"files": [{"path": "a", "content": {"base64": "hunter2!"}}]});
    let wrong = pod.api.call::<()>("PUT", "/v1/volumes/config/files", &body);
    let said = wrong.unwrap_err().to_string();
    assert!(
        said.starts_with("files[0].content") && !said.contains("hunter2"),
        "{said}"
    );
    pod.stop();
}

#[test]
fn a_files_end_is_read() {
    let pod = TestPod::start();
    pod.create("c", &["say", "x"]).unwrap();
    let read = |query: &str| pod.api.read(&format!("/v1/containers/c/file?{query}"));
    assert_eq!(
        read("path=/dev/termination-log").unwrap(),
        fake_agent::CONTENT
    );
    assert_eq!(read("path=/x&max_bytes=2").unwrap(), b"it");
    assert_eq!(read("path=/x&max_bytes=0").unwrap(), b"");
    let missing = read("path=%2Fmissing").unwrap_err().to_string();
    assert_eq!(missing, "there is no such file");
    for (query, field) in [
        ("", "path"),
        ("path=x", "path"),
        ("path=/x&max_bytes=99999999", "max_bytes"),
    ] {
        let said = read(query).unwrap_err().to_string();
        assert!(said.starts_with(field), "{said}");
    }
    pod.stop();
}
