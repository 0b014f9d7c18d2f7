//! An owner that is killed between any two steps leaves nothing after the next command.
use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use cube::net::cni::Plugins;
use cube::net::{NetworkConfig, Networks};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Signal, getpid, kill_process};

use crate::fixture::{Host, PLUGINS, host};

/// No test by itself: what [`owner_is_killed`] runs in a process of its own.
#[test]
fn owner() {
    let Some(directory) = std::env::var_os("CUBE_TEST_OWNER").map(PathBuf::from) else {
        return;
    };
    let plugins = Plugins {
        path: vec![directory.join("bin"), PLUGINS.into()],
        deadline: Duration::from_secs(60),
    };
    let config = fs::read_to_string(directory.join("config")).unwrap();
    let config = NetworkConfig::parse(&config, "/test.conflist".as_ref()).unwrap();
    let networks = Networks::new(&directory.join("records"), plugins);
    let pod = std::env::var("CUBE_TEST_POD").unwrap();
    let _attached = networks.attach(&config, &pod, &[], 1).unwrap();
    kill_process(getpid(), Signal::KILL).unwrap();
}

/// An owner makes the pod's network and is killed: by one of the plug-ins, or when everything is made.
pub(crate) fn owner_is_killed(host: &Host, config: &NetworkConfig, pod: &str) {
    fs::write(host.path("config"), config.source().to_string()).unwrap();
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "killed::owner", "--nocapture"])
        .env("CUBE_TEST_OWNER", host.directory.path())
        .env("CUBE_TEST_POD", pod)
        .status()
        .unwrap();
    assert_eq!(
        status.signal(),
        Some(9),
        "the owner was not killed: {status}"
    );
}

/// Waits until the record's lock is free: the plug-in that killed its parent has ended, too.
fn wait_for_lock(host: &Host, pod: &str) {
    let record = File::open(host.path("records").join(pod)).unwrap();
    flock(&record, FlockOperation::LockExclusive).unwrap();
}

fn assassin(host: &Host) {
    host.script(
        "assassin",
        "[ $CNI_COMMAND = ADD ] || exit 0; kill -9 $PPID",
    );
}

#[test]
fn before_the_first_plugin() {
    let host = host();
    assassin(&host);
    owner_is_killed(&host, &host.bridge(&["assassin"], &[]), "k1");
    wait_for_lock(&host, "k1");
    assert_ne!(host.traces("k1"), "[] [] ");
    host.networks().sweep().unwrap();
    host.assert_nothing_left("k1");
}

#[test]
fn between_any_two_plugins() {
    let host = host();
    assassin(&host);
    for at in 1..=3 {
        let mut config = host.bridge(&[], &[]).source().clone();
        let plugins = config["plugins"].as_array_mut().unwrap();
        plugins.insert(at, serde_json::json!({"type": "assassin"}));
        let path = "/test.conflist".as_ref();
        let config = NetworkConfig::from_value(config, path).unwrap();
        owner_is_killed(&host, &config, "k2");
        wait_for_lock(&host, "k2");
        assert_ne!(host.traces("k2"), "[] [] ");
        host.networks().sweep().unwrap();
        host.assert_nothing_left("k2");
    }
}

#[test]
fn when_everything_is_made() {
    let host = host();
    owner_is_killed(&host, &host.bridge(&[], &[]), "k3");
    let listed = host.networks().list().unwrap();
    assert_eq!(listed.len(), 1);
    assert!(!listed[0].1, "the owner is dead");
    host.networks().sweep().unwrap();
    host.assert_nothing_left("k3");
}

#[test]
fn before_and_after_the_record_is_written() {
    let host = host();
    fs::create_dir_all(host.path("records/k4")).unwrap();
    host.networks().sweep().unwrap();
    host.assert_nothing_left("k4");
    // Written, and nothing made yet.
    let record = cube::net::Record {
        pod: "k5".into(),
        config: host.bridge(&[], &[]).source().clone(),
        config_path: "/test.conflist".into(),
        namespace: "cube-k5".into(),
        interface: "eth0".into(),
        capabilities: Default::default(),
        result: None,
        complete: false,
    };
    let write = || {
        fs::create_dir_all(host.path("records/k5")).unwrap();
        let text = serde_json::to_vec(&record).unwrap();
        fs::write(host.path("records/k5/network.json"), text).unwrap();
    };
    write();
    host.networks().sweep().unwrap();
    host.assert_nothing_left("k5");
    // A namespace that was begun: the file is there, and nothing mounted on it.
    write();
    fs::write("/run/netns/cube-k5", "").unwrap();
    host.networks().sweep().unwrap();
    host.assert_nothing_left("k5");
}

#[test]
fn what_a_plugin_still_does_is_left_alone_until_it_ends() {
    let host = host();
    let fifo = host.path("fifo");
    host.run(&format!("mkfifo {}", fifo.display()));
    host.script(
        "survivor",
        &format!(
            "[ $CNI_COMMAND = ADD ] || exit 0; kill -9 $PPID; cat {} > /dev/null",
            fifo.display()
        ),
    );
    owner_is_killed(&host, &host.bridge(&[], &["survivor"]), "k6");
    host.networks().sweep().unwrap();
    assert_ne!(host.traces("k6"), "[] [] ", "undone under a plug-in's feet");
    assert!(host.networks().list().unwrap()[0].1);
    fs::write(&fifo, "go").unwrap();
    wait_for_lock(&host, "k6");
    host.networks().sweep().unwrap();
    host.assert_nothing_left("k6");
}

#[test]
fn what_cannot_be_undone_is_tried_again() {
    let host = host();
    let broken = host.path("broken");
    let script = format!(
        "[ ! -e {} ] || {{ echo '{{\"code\":9,\"msg\":\"not now\"}}'; exit 1; }}",
        broken.display()
    );
    let config = host.bridge(&["moody"], &[]);
    host.script(
        "moody",
        &format!(
            "[ $CNI_COMMAND = DEL ] || {{ echo '{{\"cniVersion\":\"1.0.0\"}}'; exit 0; }}\n{script}"
        ),
    );
    let (attachment, _taps) = host.networks().attach(&config, "k7", &[], 1).unwrap();
    fs::write(&broken, "").unwrap();
    let error = attachment.undo().unwrap_err().to_string();
    assert!(
        error.contains("`moody` (DEL, network `cube`): not now"),
        "{error}"
    );
    assert_eq!(host.networks().list().unwrap().len(), 1);
    assert!(host.networks().sweep().is_err());
    fs::remove_file(&broken).unwrap();
    host.networks().sweep().unwrap();
    host.assert_nothing_left("k7");
}
