//! Plug-ins that misbehave: each costs an error that names it and says what it said, and nothing is left.
use std::fs;
use std::time::Duration;

use crate::fixture::{Host, host};

/// Attaches a pod to the bridge with one more plug-in behind it, which fails; the error.
fn refused(host: &Host, plugin: &str, pod: &str) -> String {
    let config = host.bridge(&[], &[plugin]);
    let error = host.networks().attach(&config, pod, &[], 1).unwrap_err();
    error.to_string()
}

#[test]
fn one_that_fails_says_why_and_what_ran_before_is_undone() {
    let host = host();
    host.script(
        "picky",
        r#"[ $CNI_COMMAND = ADD ] || exit 0
           echo '{"cniVersion":"1.0.0","code":7,"msg":"no more addresses","details":"10.0.0.0/8 is full"}'; exit 1"#,
    );
    assert_eq!(
        refused(&host, "picky", "picky"),
        "the CNI plug-in `picky` (ADD, network `cube`): no more addresses: 10.0.0.0/8 is full (code 7)"
    );
    host.assert_nothing_left("picky");
}

#[test]
fn one_that_hangs_is_killed_with_its_children() {
    let mut host = host();
    let pids = host.path("pids");
    let script = "[ $CNI_COMMAND = ADD ] || exit 0; sleep 1000 & echo $$ $! > ";
    host.script("slow", &format!("{script}{}; wait", pids.display()));
    // Long enough for the real ones before it.
    host.plugins.deadline = Duration::from_secs(5);
    let error = refused(&host, "slow", "slow");
    assert!(
        error.contains("`slow` (ADD") && error.contains("did not end within 5 s"),
        "{error}"
    );
    for pid in fs::read_to_string(pids).unwrap().split_whitespace() {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        assert!(
            status.is_empty() || status.contains("State:\tZ"),
            "{pid} lives"
        );
    }
    host.assert_nothing_left("slow");
}

#[test]
fn one_that_prints_garbage_is_quoted() {
    let host = host();
    for (name, script, words) in [
        ("garbage", "echo 'hello world'", "it printed no result"),
        ("garbage", "echo 'hello world'", "`hello world`"),
        (
            "status",
            "echo oops >&2; exit 3",
            "ended with status 3 and printed no error object: `oops`",
        ),
        ("signal", "kill -9 $$", "was killed by signal 9"),
        ("endless", "yes", "printed more than 1 MiB"),
        (
            "old",
            r#"echo '{"cniVersion":"0.2.0","ip4":{}}'"#,
            "of version 0.2.0",
        ),
        (
            "ips",
            r#"echo '{"cniVersion":"1.0.0","ips":[{"address":"ten"}]}'"#,
            "`ten` is not an address",
        ),
    ] {
        host.script(
            name,
            &format!("[ $CNI_COMMAND = ADD ] || exit 0\ncat > /dev/null\n{script}"),
        );
        let error = refused(&host, name, "garbage");
        assert!(
            error.contains(words) && error.contains(&format!("`{name}`")),
            "{error}"
        );
        host.assert_nothing_left("garbage");
    }
}

#[test]
fn one_that_is_missing_stops_everything_before_it_begins() {
    let host = host();
    let error = refused(&host, "absent", "absent");
    assert!(
        error.contains("`absent` (ADD") && error.contains("/usr/lib/cni"),
        "{error}"
    );
    assert!(!host.path("records").exists());
    host.assert_nothing_left("absent");
}

#[test]
fn an_incompatible_version_is_explained() {
    let host = host();
    host.script(
        "versed",
        r#"[ $CNI_COMMAND = VERSION ] && echo '{"cniVersion":"1.0.0","supportedVersions":["0.3.1","0.4.0"]}' && exit 0
           [ $CNI_COMMAND = ADD ] || exit 0
           echo '{"code":1,"msg":"incompatible CNI versions"}'; exit 1"#,
    );
    let config = host.network("1.1.0", &["versed"]);
    let error = host
        .networks()
        .attach(&config, "versed", &[], 1)
        .unwrap_err()
        .to_string();
    assert!(
        error.ends_with("(code 1); asked for 1.1.0, it knows 0.3.1, 0.4.0"),
        "{error}"
    );
}

/// A plug-in that notes how it is called, and passes the result on.
fn noting(host: &Host, name: &str) {
    let log = host.path("log").display().to_string();
    let script = format!(
        r#"config=$(cat)
           echo "{name} $CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME $config" >> {log}
           [ $CNI_COMMAND = ADD ] && ip netns exec ${{CNI_NETNS##*/}} ip link add eth0 type veth peer name other 2> /dev/null
           [ $CNI_COMMAND = ADD ] && echo '{{"cniVersion":"1.1.0","ips":[{{"address":"10.0.0.2/24"}}]}}'
           exit 0"#
    );
    host.script(name, &script);
}

#[test]
fn a_chain_passes_results_and_is_undone_in_reverse() {
    let host = host();
    noting(&host, "first");
    noting(&host, "second");
    let config = host.network("1.1.0", &["first", "second"]);
    let (attachment, taps) = host.networks().attach(&config, "chain", &[], 1).unwrap();
    let record = host.networks().list().unwrap().remove(0).0;
    host.networks().check(&record).unwrap();
    drop(taps);
    attachment.undo().unwrap();
    let log = fs::read_to_string(host.path("log")).unwrap();
    let lines: Vec<_> = log.lines().collect();
    let calls: Vec<_> = lines
        .iter()
        .map(|line| line.split(" {").next().unwrap())
        .collect();
    assert_eq!(
        calls,
        [
            "first ADD chain eth0",
            "second ADD chain eth0",
            "first CHECK chain eth0",
            "second CHECK chain eth0",
            "second DEL chain eth0",
            "first DEL chain eth0",
        ]
    );
    for (line, has_result) in lines.iter().zip([false, true, true, true, true, true]) {
        assert_eq!(line.contains("\"prevResult\":{"), has_result, "{line}");
        assert!(
            line.contains(r#""name":"test""#) && line.contains(r#""cniVersion":"1.1.0""#),
            "{line}"
        );
    }
    host.assert_nothing_left("chain");
}

#[test]
fn capabilities_reach_only_those_that_have_them() {
    let host = host();
    noting(&host, "deaf");
    noting(&host, "ports");
    let config = serde_json::json!({
        "cniVersion": "1.1.0", "name": "test",
        "plugins": [{"type": "deaf"}, {"type": "ports", "capabilities": {"portMappings": true}}],
    });
    let path = std::path::Path::new("/test.conflist");
    let config = cube::net::NetworkConfig::from_value(config, path).unwrap();
    let port = cube::net::PortMapping {
        host_port: 8080,
        container_port: 80,
        protocol: "tcp".into(),
        host_ip: None,
    };
    let (attachment, _taps) = host.networks().attach(&config, "caps", &[port], 1).unwrap();
    attachment.undo().unwrap();
    let log = fs::read_to_string(host.path("log")).unwrap();
    for line in log.lines() {
        let told = line
            .contains(r#""runtimeConfig":{"portMappings":[{"containerPort":80,"hostPort":8080,"#);
        assert_eq!(told, line.starts_with("ports"), "{line}");
    }
    assert_eq!(log.lines().count(), 4);
}

#[test]
fn garbage_is_collected_with_what_lives_named() {
    let host = host();
    noting(&host, "keeper");
    let config = host.network("1.1.0", &["keeper"]);
    let (_living, _taps) = host.networks().attach(&config, "living", &[], 1).unwrap();
    crate::killed::owner_is_killed(&host, &config, "dead");
    host.networks().sweep().unwrap();
    let log = fs::read_to_string(host.path("log")).unwrap();
    let last = log.lines().last().unwrap();
    assert!(last.starts_with("keeper GC"), "{last}");
    let valid = r#""cni.dev/valid-attachments":[{"containerID":"living","ifname":"eth0"}]"#;
    assert!(last.contains(valid), "{last}");
}
