//! Volumes, files that cross the machine's wall, and connections to ports of the pod.

use std::io::{Read, Write};
use std::net::Shutdown;

use cube_guest::{
    Answer, ContainerSpec, ExitStatus, HostRequest, MountSource, MountSpec, PodSpec, VolumeSource,
    VolumeSpec,
};

use crate::guest::{DISKS, Guest, container, guest};

fn volume(name: &str, source: VolumeSource) -> VolumeSpec {
    VolumeSpec {
        name: name.into(),
        source,
    }
}

fn mount(path: &str, volume: &str, sub_path: &str) -> MountSpec {
    MountSpec {
        path: path.into(),
        source: MountSource::Volume {
            volume: volume.into(),
            sub_path: sub_path.into(),
        },
        read_only: false,
    }
}

fn read_only(mount: MountSpec) -> MountSpec {
    MountSpec {
        read_only: true,
        ..mount
    }
}

fn with(id: &str, script: &str, mounts: Vec<MountSpec>) -> ContainerSpec {
    ContainerSpec {
        mounts,
        ..container(id, script)
    }
}

#[test]
fn a_volume_in_memory_is_shared_and_limited_and_goes() {
    let memory = VolumeSource::Memory {
        size_bytes: Some(1 << 20),
    };
    let mut guest = Guest::boot(&PodSpec {
        volumes: vec![volume("v", memory)],
        ..PodSpec::default()
    });
    guest.start(with(
        "a",
        "sleep 1000000",
        vec![mount("/v", "v", ""), mount("/deep/b", "v", "x/y")],
    ));
    guest.shell(
        "a",
        "echo one > /v/x/file; echo two > /deep/b/file; stat -c %a /v /v/x",
    );
    let spec = with(
        "b",
        "cat /v/file /w/y/file; echo no > /w/file; dd if=/dev/zero of=/v/big bs=1M count=2 2>&1 | grep -o 'No space'; true",
        vec![mount("/v", "v", "x"), read_only(mount("/w", "v", "x"))],
    );
    let ran = guest.run(spec);
    assert_eq!(ran.stdout, "one\ntwo\nNo space\n", "{ran:?}");
    assert!(ran.stderr.contains("Read-only"), "{ran:?}");
    let remove = || HostRequest::RemoveVolume { volume: "v".into() };
    let refused = guest.refused(remove());
    assert!(
        refused.contains("`a`") && refused.contains("`b`"),
        "{refused}"
    );
    guest.end("a");
    guest.must(HostRequest::Remove {
        container: "b".into(),
    });
    guest.must(remove());
    let gone = guest
        .run(with("c", "true", vec![mount("/v", "v", "")]))
        .status;
    assert!(
        matches!(&gone, ExitStatus::NotStarted { reason, .. } if reason.contains("no volume `v`")),
        "{gone:?}"
    );
    guest.shut_down();
}

#[test]
fn a_volume_on_a_disk_outlives_containers_and_its_links_lead_nowhere_else() {
    let mut guest = guest();
    let disk = || VolumeSource::Disk {
        serial: DISKS[0].into(),
        file_system: "ext4".into(),
        root_mode: Some(0o1777),
        read_only: false,
    };
    let add = |name: &str, source| HostRequest::AddVolume(volume(name, source));
    guest.must(add("v", disk()));
    assert!(guest.refused(add("w", disk())).contains("in use"));
    guest.must(add("secret", VolumeSource::Memory { size_bytes: None }));
    let script = "stat -c %a /v; echo kept > /v/file; ln -s ../../run/volume/secret /v/up; ln -s /run/volume/secret /v/abs; ln -s file /v/link";
    assert_eq!(
        guest.say(with("a", script, vec![mount("/v", "v", "")])),
        "1777\n"
    );
    assert_eq!(
        guest.say(with("b", "cat /f", vec![mount("/f", "v", "link")])),
        "kept\n"
    );
    for link in ["up", "abs", "up/x"] {
        let status = guest
            .run(with(
                link.rsplit('/').next().unwrap(),
                "true",
                vec![mount("/f", "v", link)],
            ))
            .status;
        assert!(
            matches!(&status, ExitStatus::NotStarted { .. }),
            "{link}: {status:?}"
        );
        guest.must(HostRequest::Remove {
            container: link.rsplit('/').next().unwrap().into(),
        });
    }
    guest.must(HostRequest::RemoveVolume { volume: "v".into() });
    let read = VolumeSource::Disk {
        serial: DISKS[0].into(),
        file_system: "ext4".into(),
        root_mode: None,
        read_only: true,
    };
    guest.must(add("r", read));
    let ran = guest.run(with(
        "c",
        "cat /r/file; touch /r/x",
        vec![mount("/r", "r", "")],
    ));
    assert_eq!(
        (ran.stdout.as_str(), ran.status),
        ("kept\n", ExitStatus::Code(1))
    );
    guest.shut_down();
}

#[test]
fn a_tmpfs_is_the_containers_own() {
    let mut guest = guest();
    let source = MountSource::Tmpfs {
        size_bytes: Some(65536),
        mode: 0o700,
    };
    let spec = with(
        "a",
        "stat -c %a /t; df -k /t | tail -n1 | tr -s ' ' | cut -d' ' -f2",
        vec![MountSpec {
            path: "/t".into(),
            source,
            read_only: false,
        }],
    );
    assert_eq!(guest.say(spec), "700\n64\n");
    guest.shut_down();
}

#[test]
fn files_are_swapped_at_once_for_a_container_that_runs() {
    let mut guest = guest();
    guest.must(HostRequest::AddVolume(volume("v", VolumeSource::Files)));
    assert_eq!(
        guest.write_files("v", &[("key", "one"), ("dir/key", "two")]),
        Ok(Answer::Done)
    );
    let key = MountSpec {
        ..mount("/key", "v", "key")
    };
    guest.start(with(
        "a",
        "sleep 1000000",
        vec![read_only(mount("/v", "v", "")), key],
    ));
    assert_eq!(
        guest.shell("a", "cat /v/key /v/dir/key /key; readlink /v/key"),
        "onetwoone..data/key\n"
    );
    assert_eq!(
        guest.write_files("v", &[("key", "three")]),
        Ok(Answer::Done)
    );
    assert_eq!(guest.shell("a", "cat /v/key; ls /v"), "threekey\n");
    let refused = guest.write_files("v", &[("../key", "four")]).unwrap_err();
    assert!(refused.contains("`../key`"), "{refused}");
    let (volume, token) = ("nothing".into(), guest.number());
    let refused = guest.refused(HostRequest::WriteFiles { volume, token });
    assert!(refused.contains("`nothing`"), "{refused}");
    assert_eq!(guest.shell("a", "cat /v/key; ls -A /v | wc -l"), "three3\n");
    guest.shut_down();
}

#[test]
fn a_file_is_read_while_the_container_runs_and_after_it_has_ended() {
    let mut guest = guest();
    let memory = VolumeSource::Memory { size_bytes: None };
    guest.must(HostRequest::AddVolume(volume("v", memory)));
    let script = "printf 0123456789 > /file; ln -s /proc/self/root/etc/passwd /magic; echo bye > /dev/termination-log; printf in > /v/f; mkfifo /fifo; exit 3";
    let ran = guest.run(with("a", script, vec![mount("/v", "v", "")]));
    assert_eq!(ran.status, ExitStatus::Code(3));
    assert_eq!(
        guest.read_file("a", "/file", 100),
        Ok((10, "0123456789".into()))
    );
    assert_eq!(guest.read_file("a", "/file", 4), Ok((10, "6789".into())));
    assert_eq!(
        guest.read_file("a", "/dev/termination-log", 4096),
        Ok((4, "bye\n".into()))
    );
    assert_eq!(guest.read_file("a", "/v/f", 4096), Ok((2, "in".into())));
    for (path, words) in [
        ("/none", "/none"),
        ("/fifo", "regular"),
        ("/dev", "regular"),
        ("/magic", "/magic"),
        ("file", "absolute"),
    ] {
        let refused = guest.read_file("a", path, 10).unwrap_err();
        assert!(refused.contains(words), "{refused}");
    }
    guest.start(container("b", "echo live > /file; sleep 1000000"));
    guest.shell("b", "until test -s /file; do :; done");
    assert_eq!(guest.read_file("b", "/file", 100), Ok((5, "live\n".into())));
    guest.must(HostRequest::Remove {
        container: "a".into(),
    });
    assert!(guest.read_file("a", "/file", 1).is_err());
    guest.shut_down();
}

#[test]
fn a_port_of_the_pod_is_reached_and_a_closed_one_is_refused() {
    let mut guest = guest();
    guest.start(container("a", "mkfifo /ready; nc -l -p 8080 -e sh -c 'echo hi; cat; echo end' & until netstat -ltn | grep -q 8080; do :; done; echo > /ready; wait"));
    guest.shell("a", "until test -p /ready; do :; done; cat /ready");
    let token = guest.number();
    guest.must(HostRequest::Forward { port: 8080, token });
    let mut stream = guest.stream(token);
    stream.write_all(&[b'x'; 100_000]).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut said = String::new();
    stream.read_to_string(&mut said).unwrap();
    assert!(
        said.starts_with("hi\nxxx") && said.ends_with("xend\n") && said.len() == 100_007,
        "{}",
        said.len()
    );
    drop(stream);
    let refused = guest.refused(HostRequest::Forward { port: 9, token });
    assert!(refused.contains("port 9"), "{refused}");
    guest.shut_down();
}

#[test]
fn nfs_says_what_is_wrong_and_keeps_nobody_waiting() {
    let mut guest = guest();
    let nfs = |server: &str| VolumeSource::Nfs {
        server: server.into(),
        path: "/data".into(),
        options: "soft,timeo=10,retrans=1".into(),
        read_only: false,
    };
    let add = |server: &str| HostRequest::AddVolume(volume("v", nfs(server)));
    let refused = guest.refused(add("files.example"));
    assert!(refused.contains("files.example"), "{refused}");
    let mounting = guest.send(add("127.0.0.1"));
    assert_eq!(guest.say(container("a", "echo meanwhile")), "meanwhile\n");
    let refused = guest.reply(mounting).unwrap_err();
    assert!(
        refused.contains("mount 127.0.0.1:/data by NFS"),
        "{refused}"
    );
    guest.must(HostRequest::AddVolume(volume("v", VolumeSource::Files)));
    guest.shut_down();
}
