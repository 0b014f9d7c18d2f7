//! What a container finds: environment, directory, user, processors, memory, file system.

use crate::fixture::{machine, say, text};

#[test]
fn environment_directory_and_user_are_as_asked() {
    let options = [
        "--env",
        "A=1 2",
        "--env=B=",
        "--workdir",
        "/made/here",
        "--user",
        "1000:1001",
    ];
    let script = "echo \"$A,$B,\"; pwd; id -u; id -g";
    assert_eq!(say(&options, script), "1 2,,\n/made/here\n1000\n1001\n");
}

#[test]
fn the_machine_has_as_many_processors_as_asked() {
    assert_eq!(say(&["--cpus", "4"], "nproc"), "4\n");
}

/// MemTotal of a machine with `--memory size`, in MiB.
fn memory_mib(size: &str) -> u64 {
    let total = say(&["--memory", size], "grep MemTotal /proc/meminfo");
    let kib = total
        .split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap();
    kib / 1024
}

#[test]
fn sixty_four_mib_are_enough() {
    assert!((40..64).contains(&memory_mib("64M")));
}

#[test]
fn four_gib_reach_across_the_hole_below_four_gib() {
    assert!((3900..4096).contains(&memory_mib("4G")));
}

#[test]
fn the_root_is_writable_and_fresh_each_time() {
    let machine = machine();
    for _ in 0..2 {
        let output = machine.shell(&[], "test ! -e /new && echo x > /new && cat /new");
        assert_eq!(text(&output.stdout), "x\n", "{}", text(&output.stderr));
    }
}

#[test]
fn a_read_only_root_refuses_writes() {
    let output = machine().shell(&["--read-only"], "echo x > /new || echo refused");
    assert_eq!(text(&output.stdout), "refused\n");
}

#[test]
fn the_container_is_alone_with_its_host_name() {
    let script = "hostname; echo $$; ls -d /proc/[0-9]* | wc -l";
    let said = say(&["--hostname", "box"], script);
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines[..2], ["box", "1"]);
    assert!(
        lines[2].parse::<u32>().unwrap() <= 3,
        "its shell, ls and wc: {said}"
    );
}

#[test]
fn a_seccomp_profile_is_kept_in_the_guest() {
    let profile = tempfile::NamedTempFile::new().unwrap();
    let rules = r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
        {"names": ["rmdir"], "action": "SCMP_ACT_ERRNO"}]}"#;
    std::fs::write(profile.path(), rules).unwrap();
    let options = ["--seccomp", profile.path().to_str().unwrap()];
    let said = say(&options, "mkdir /d 2>&1; rmdir /tmp 2>&1; echo on");
    let lines: Vec<&str> = said.lines().collect();
    assert!(lines[0].ends_with("Function not implemented"), "{said}");
    assert!(lines[1].ends_with("Operation not permitted"), "{said}");
    assert_eq!(lines[2..], ["on"]);
}

#[test]
fn the_timeline_tells_every_stage_in_order() {
    let output = machine().shell(&["--timeline=json"], "true");
    let json: serde_json::Value = serde_json::from_slice(&output.stderr).unwrap();
    let stages: Vec<&str> = json["timeline"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| s["stage"].as_str().unwrap())
        .collect();
    let expected = [
        "cube started",
        "image resolved",
        "machine spawned",
        "kernel started",
        "init started",
        "container started",
        "container exited",
        "output complete",
        "ended",
    ];
    let mut rest = stages.iter();
    assert!(
        expected.iter().all(|stage| rest.any(|s| s == stage)),
        "{stages:?}"
    );
}
