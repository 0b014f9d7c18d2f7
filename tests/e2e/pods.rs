//! What the containers of a pod share and what they do not, and that a pod can go on for ever.

use cube_guest::stats::PodStats;
use cube_guest::{Answer, ExitStatus, HostRequest, PidNamespace, PodSpec, RootFs};

use crate::guest::{DISKS, Guest, container, guest, signal};

fn sleeper(id: &str) -> cube_guest::ContainerSpec {
    container(id, "sleep 1000000")
}

#[test]
fn containers_share_host_name_ipc_and_network_and_nothing_else() {
    let mut guest = Guest::boot(&PodSpec {
        hostname: "box".into(),
        sysctls: [("kernel.msgmax".to_owned(), "4321".to_owned())].into(),
        shm_bytes: Some(1 << 20),
        ..PodSpec::default()
    });
    guest.start(sleeper("a"));
    guest.start(sleeper("b"));
    let namespaces =
        |kinds: &str| format!("cd /proc/self/ns; for n in {kinds}; do readlink $n; done");
    let shared = namespaces("uts ipc net");
    assert_eq!(guest.shell("a", &shared), guest.shell("b", &shared));
    let own = namespaces("mnt pid cgroup");
    let (a, b) = (guest.shell("a", &own), guest.shell("b", &own));
    assert!(a.lines().zip(b.lines()).all(|(a, b)| a != b), "{a}{b}");
    guest.shell("a", "echo x > /dev/shm/file; touch /tmp/file");
    assert_eq!(guest.shell("b", "cat /dev/shm/file; ls /tmp"), "x\n");
    let said = guest.shell(
        "b",
        "hostname; cat /proc/sys/kernel/msgmax; df -k /dev/shm | tail -n1",
    );
    assert!(
        said.starts_with("box\n4321\nshm") || said.starts_with("box\n4321\ntmpfs"),
        "{said}"
    );
    assert!(said.contains(" 1024 "), "{said}");
    guest.shut_down();
}

#[test]
fn a_shared_pid_namespace_ends_with_nobody_and_each_container_ends_whole() {
    let mut guest = guest();
    let shared = |id: &str, script: &str| cube_guest::ContainerSpec {
        pid_namespace: PidNamespace::Pod,
        ..container(id, script)
    };
    guest.start(shared("a", "sleep 1000001"));
    guest.start(shared("b", "sleep 1000002 & sleep 1000003 & wait"));
    let said = guest.shell("a", "ps -o args");
    assert!(
        said.contains("sleep 1000001") && said.contains("sleep 1000003"),
        "{said}"
    );
    assert!(!said.contains("kthreadd"), "{said}");
    guest.must(signal("b", 9, false));
    guest.exited("b");
    guest.must(HostRequest::Remove {
        container: "b".into(),
    });
    let said = guest.shell("a", "ps -o args");
    assert!(
        said.contains("sleep 1000001") && !said.contains("100000[23]"),
        "{said}"
    );
    assert!(
        !said.contains("sleep 1000002") && !said.contains("sleep 1000003"),
        "{said}"
    );
    guest.start(sleeper("c"));
    assert!(!guest.shell("c", "ps -o args").contains("1000001"));
    guest.shut_down();
}

#[test]
fn a_disk_leaves_when_nothing_uses_it_and_comes_back() {
    let mut guest = guest();
    let on_disk = |id: &str, script: &str| cube_guest::ContainerSpec {
        rootfs: RootFs {
            image: "image0".into(),
            writable: Some(DISKS[0].into()),
            read_only: false,
        },
        ..container(id, script)
    };
    assert_eq!(
        guest.run(on_disk("a", "echo kept > /file")).status,
        ExitStatus::Code(0)
    );
    let refused = guest.refused(HostRequest::UnbindSlot { slot: 1 });
    assert!(
        refused.contains("`rw1`") && refused.contains("container `a`"),
        "{refused}"
    );
    let taken = guest.run(on_disk("b", "true")).status;
    assert!(
        matches!(&taken, ExitStatus::NotStarted { reason, .. } if reason.contains("`a`")),
        "{taken:?}"
    );
    for id in ["a", "b"] {
        guest.must(HostRequest::Remove {
            container: id.into(),
        });
    }
    guest.must(HostRequest::UnbindSlot { slot: 1 });
    let gone = guest.run(on_disk("c", "true")).status;
    assert!(
        matches!(&gone, ExitStatus::NotStarted { reason, .. } if reason.contains("no disk")),
        "{gone:?}"
    );
    guest.must(HostRequest::BindSlot { slot: 1 });
    assert_eq!(guest.say(on_disk("d", "cat /file")), "kept\n");
    for slot in [7, 300] {
        assert!(guest.ask(HostRequest::BindSlot { slot }).is_err(), "{slot}");
    }
    guest.shut_down();
}

fn measure(guest: &mut Guest) -> PodStats {
    match guest.ask(HostRequest::Stats) {
        Ok(Answer::Stats(stats)) => *stats,
        other => panic!("no statistics: {other:?}"),
    }
}

/// What a guest holds when no container is left: open files, cgroups, and `cube-init`'s memory.
fn held(guest: &mut Guest) -> (u64, u64, u64) {
    let script =
        "cat /proc/sys/fs/file-nr; grep memory /proc/cgroups; echo 3 > /proc/sys/vm/drop_caches";
    let mut spec = container("probe", script);
    spec.security.privileged = true;
    let said = guest.say(spec);
    let number = |line: usize, word: usize| {
        let line = said.lines().nth(line).unwrap();
        line.split_whitespace().nth(word).unwrap().parse().unwrap()
    };
    (number(0, 0), number(1, 2), measure(guest).usage.rss)
}

#[test]
fn containers_that_come_and_go_leave_nothing_behind() {
    let mut guest = guest();
    let cycle = |guest: &mut Guest, number: u32| {
        let mut spec = container(&format!("c{number}"), "echo x > /x; cat /x");
        spec.rootfs.writable = Some(DISKS[number as usize % 4].into());
        assert_eq!(guest.say(spec), "x\n");
    };
    (0..20).for_each(|number| cycle(&mut guest, number));
    let before = held(&mut guest);
    (20..80).for_each(|number| cycle(&mut guest, number));
    let after = held(&mut guest);
    println!("open files, cgroups, cube-init's bytes: {before:?} before, {after:?} after");
    assert!(after.0 <= before.0 + 16, "open files: {before:?} {after:?}");
    assert!(after.1 <= before.1 + 4, "cgroups: {before:?} {after:?}");
    assert!(
        after.2 <= before.2 + (64 << 10),
        "memory: {before:?} {after:?}"
    );
    assert_eq!(measure(&mut guest).containers, []);
    guest.shut_down();
}
