//! What the OCI runtime specification lets a container be and not be: privileges, limits, paths, devices.

use cube_guest::stats::ContainerStats;
use cube_guest::{
    Answer, Capabilities, ContainerSpec, DeviceSpec, ExitStatus, GuestEvent, HostRequest,
    ProcessSpec, Resources, Rlimit, Seccomp,
};

use crate::guest::{DISKS, Guest, container, guest, process, signal};

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// A container whose process was changed.
fn with(id: &str, script: &str, change: impl Fn(&mut ProcessSpec)) -> ContainerSpec {
    let mut spec = container(id, script);
    change(&mut spec.process);
    spec
}

const CAPABILITIES: &str = "grep -E 'Cap|NoNewPrivs' /proc/self/status | tr '\\n\\t' '  '";

#[test]
fn all_five_sets_of_capabilities_are_as_asked() {
    let mut guest = guest();
    let said = guest.say(with("a", CAPABILITIES, |process| {
        process.user = "1000".into();
        process.no_new_privileges = true;
        process.capabilities = Some(Capabilities {
            bounding: names(&["CAP_CHOWN", "CAP_NET_RAW", "CAP_KILL"]),
            permitted: names(&["CAP_CHOWN", "CAP_NET_RAW"]),
            effective: names(&["CAP_NET_RAW"]),
            inheritable: names(&["CAP_NET_RAW"]),
            ambient: names(&["CAP_NET_RAW"]),
        });
    }));
    // execve of a program without file capabilities leaves a user the ambient ones.
    let raw = "0000000000002000";
    let expected = format!(
        "CapInh: {raw} CapPrm: {raw} CapEff: {raw} CapBnd: 0000000000002021 CapAmb: {raw} NoNewPrivs: 1 "
    );
    assert_eq!(said, expected);
    let said = guest.say(container("b", CAPABILITIES));
    assert!(
        said.contains("CapEff: 00000000a80425fb CapBnd: 00000000a80425fb"),
        "{said}"
    );
    let mut all = container("c", CAPABILITIES);
    all.security.privileged = true;
    let said = guest.say(all);
    assert!(
        said.contains("CapEff: 000001ffffffffff CapBnd: 000001ffffffffff"),
        "{said}"
    );
    // Again and again: the process may be gone before the agent turns back to it.
    for number in 0..16 {
        let refused = guest.run(with(&format!("d{number}"), "true", |process| {
            process.capabilities = Some(Capabilities {
                bounding: names(&["CAP_FLY"]),
                ..Capabilities::default()
            });
        }));
        assert!(
            matches!(&refused.status, ExitStatus::NotStarted { reason, .. } if reason.contains("CAP_FLY")),
            "{refused:?}"
        );
    }
    guest.shut_down();
}

#[test]
fn limits_groups_and_the_oom_score_are_as_asked_and_execs_inherit_the_score() {
    let mut guest = guest();
    let script = "ulimit -n; ulimit -Hn; id -G; cat /proc/self/oom_score_adj";
    let spec = with("a", script, |process| {
        process.rlimits = vec![Rlimit {
            name: "RLIMIT_NOFILE".into(),
            soft: 100,
            hard: 200,
        }];
        process.additional_gids = vec![5, 6];
        process.oom_score_adj = Some(-500);
    });
    assert_eq!(guest.say(spec), "100\n200\n0 5 6\n-500\n");
    guest.start(with("b", "sleep 1000000", |process| {
        process.oom_score_adj = Some(900)
    }));
    assert_eq!(guest.shell("b", script), "1024\n524288\n0\n900\n");
    guest.shut_down();
}

#[test]
fn filters_are_installed_and_the_guard_of_vsock_is_in_all_but_privileged_ones() {
    let mut guest = guest();
    // mkdir(2), number 83, fails with EDOM: ld nr; jeq 83, 0, 1; ret ERRNO|33; ret ALLOW.
    let program = vec![
        0x20,
        0x53_0100_0015,
        0x0005_0021_0000_0006,
        0x7fff_0000_0000_0006,
    ];
    let mut spec = container(
        "a",
        "mkdir /x || echo refused; grep Seccomp_filters /proc/self/status",
    );
    spec.security.seccomp = Seccomp::Programs(vec![program]);
    let said = guest.say(spec);
    assert!(said.contains("refused\nSeccomp_filters:\t2"), "{said}");
    let mut spec = container("b", "grep Seccomp_filters /proc/self/status");
    spec.security.seccomp = Seccomp::Unconfined;
    assert_eq!(guest.say(spec), "Seccomp_filters:\t1\n");
    let mut spec = container("c", "grep Seccomp: /proc/self/status");
    spec.security.privileged = true;
    assert_eq!(guest.say(spec), "Seccomp:\t0\n");
    guest.shut_down();
}

#[test]
fn paths_are_hidden_and_read_only_unless_asked_otherwise() {
    let mut guest = guest();
    let script = "wc -c < /proc/interrupts; echo 1 > /proc/sys/kernel/msgmax && echo written; touch /sys/x /file; ls /file; true";
    let ran = guest.run(container("a", script));
    assert_eq!(ran.stdout, "0\n/file\n", "{ran:?}");
    let mut spec = container("b", script);
    spec.security.masked_paths = Some(names(&["/etc", "/no/such/path"]));
    spec.security.read_only_paths = Some(names(&["/tmp"]));
    spec.rootfs.read_only = true;
    spec.process.argv[2] =
        "ls /etc; grep -q . /proc/interrupts && echo seen; touch /file; touch /tmp/x; true".into();
    let ran = guest.run(spec);
    assert_eq!(ran.stdout, "seen\n", "{ran:?}");
    assert_eq!(ran.stderr.matches("Read-only").count(), 2, "{ran:?}");
    let mut spec = container(
        "c",
        "grep -q . /proc/interrupts && test -b /dev/vda && mkdir /m && mount -t tmpfs x /m && grep -q '/sys sysfs rw' /proc/mounts && echo all",
    );
    spec.security.privileged = true;
    let ran = guest.run(spec);
    assert_eq!(ran.stdout, "all\n", "{ran:?}");
    guest.shut_down();
}

#[test]
fn a_disk_can_be_a_device_with_its_own_mode_and_owner() {
    let mut guest = guest();
    let mut spec = container(
        "a",
        "stat -c '%F %a %u:%g' /dev/disk0; echo data > /dev/disk0; head -c 5 /dev/disk0",
    );
    spec.process.user = "1000".into();
    spec.devices = vec![DeviceSpec {
        path: "/dev/disk0".into(),
        serial: DISKS[1].into(),
        mode: 0o600,
        uid: 1000,
        gid: 8,
    }];
    let ran = guest.run(spec.clone());
    assert_eq!(
        ran.stdout, "block special file 600 1000:8\ndata\n",
        "{ran:?}"
    );
    let refused = guest.refused(HostRequest::UnbindSlot { slot: 2 });
    assert!(refused.contains("`rw2`"), "{refused}");
    spec.id = "b".into();
    spec.devices.clear();
    spec.process = process("mknod /d b 254 0; cat /d; cat /dev/disk0");
    let ran = guest.run(spec);
    assert_ne!(ran.status, ExitStatus::Code(0));
    assert!(
        ran.stderr.contains("/d: Permission denied") || ran.stderr.contains("/d'"),
        "{ran:?}"
    );
    guest.shut_down();
}

#[test]
fn limits_are_the_cgroups_and_can_be_changed() {
    let mut guest = guest();
    let limits = Resources {
        memory_max: Some(64 << 20),
        memory_high: Some(32 << 20),
        memory_low: Some(4096),
        cpu_quota_us: Some(50_000),
        cpu_weight: Some(50),
        cpuset_cpus: Some("0".into()),
        pids_max: Some(20),
        cpu_period_us: None,
        hugepages: [("2MB".to_owned(), 4 << 20)].into(),
    };
    let mut spec = container("a", "sleep 1000000");
    spec.resources = limits;
    guest.start(spec);
    let files = "cd /sys/fs/cgroup; cat memory.max memory.high memory.low cpu.max cpu.weight cpuset.cpus pids.max hugetlb.2MB.max";
    assert_eq!(
        guest.shell("a", files),
        "67108864\n33554432\n4096\n50000 100000\n50\n0\n20\n4194304\n"
    );
    let resources = Resources {
        memory_max: Some(128 << 20),
        cpu_period_us: Some(200_000),
        ..Resources::default()
    };
    guest.must(HostRequest::Update {
        container: "a".into(),
        resources,
    });
    assert_eq!(
        guest.shell("a", files),
        "134217728\n33554432\n4096\n50000 200000\n50\n0\n20\n4194304\n"
    );
    let resources = Resources {
        cpuset_cpus: Some("77".into()),
        ..Resources::default()
    };
    let refused = guest.refused(HostRequest::Update {
        container: "a".into(),
        resources,
    });
    assert!(refused.contains("cpuset.cpus"), "{refused}");
    guest.shut_down();
}

fn statistics(guest: &mut Guest) -> ContainerStats {
    match guest.ask(HostRequest::Stats) {
        Ok(Answer::Stats(mut stats)) => stats.containers.remove(0),
        other => panic!("no statistics: {other:?}"),
    }
}

#[test]
fn a_paused_container_does_nothing_until_it_is_resumed() {
    let mut guest = guest();
    guest.start(container("a", "while :; do :; done"));
    let pause = || HostRequest::Pause {
        container: "a".into(),
    };
    guest.must(pause());
    guest.must(pause());
    let before = statistics(&mut guest);
    assert!(
        before.usage.cpu_us > 0 && before.usage.pids == 1,
        "{before:?}"
    );
    let refused = guest.refused(HostRequest::Exec {
        container: "a".into(),
        exec: "e".into(),
        process: Box::new(process("true")),
    });
    assert!(refused.contains("paused"), "{refused}");
    assert_eq!(statistics(&mut guest).usage.cpu_us, before.usage.cpu_us);
    guest.must(HostRequest::Resume {
        container: "a".into(),
    });
    assert_eq!(guest.shell("a", "echo on"), "on\n");
    guest.must(pause());
    guest.end("a");
    guest.shut_down();
}

#[test]
fn the_oom_killer_is_reported_whoever_it_ends() {
    let mut guest = guest();
    let hog = "dd if=/dev/zero of=/dev/null bs=64M count=1";
    let mut spec = container("a", &format!("{hog}; echo survived"));
    spec.resources.memory_max = Some(16 << 20);
    assert_eq!(guest.run(spec.clone()).stdout, "survived\n");
    let oom = |event: &GuestEvent| {
        matches!(event, GuestEvent::OomKilled { container } if container == "a").then_some(())
    };
    guest.event(oom);
    guest.must(HostRequest::Remove {
        container: "a".into(),
    });
    spec.process = process(&format!("exec {hog}"));
    assert_eq!(
        guest.run(spec).status,
        ExitStatus::Signal {
            signal: 9,
            oom_killed: true
        }
    );
    guest.event(oom);
    guest.shut_down();
}

#[test]
fn what_makes_no_sense_is_refused_with_a_sentence() {
    let mut guest = guest();
    guest.start(container("a", "sleep 1000000"));
    let remove = |id: &str| HostRequest::Remove {
        container: id.into(),
    };
    for (request, words) in [
        (remove("a"), "has not ended"),
        (remove("b"), "no container `b`"),
        (
            HostRequest::Start(Box::new(container("a", ""))),
            "already has a container `a`",
        ),
        (
            HostRequest::Start(Box::new(container("..", ""))),
            "`..` is not a file name",
        ),
        (signal("a", 65, false), "65 is not a signal"),
        (
            HostRequest::RemoveVolume { volume: "v".into() },
            "no volume `v`",
        ),
    ] {
        let refused = guest.refused(request);
        assert!(refused.contains(words), "{refused}");
    }
    guest.shut_down();
}
