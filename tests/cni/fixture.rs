//! A host: a network namespace of the test's own, records and leases in a directory, plug-ins.
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use cube::net::cni::Plugins;
use cube::net::{Attachment, NetworkConfig, Networks, namespace};
use rustix::thread::LinkNameSpaceType;

/// Where Debian puts the plug-ins.
pub(crate) const PLUGINS: &str = "/usr/lib/cni";

pub(crate) struct Host {
    pub(crate) directory: tempfile::TempDir,
    namespace: String,
    pub(crate) plugins: Plugins,
}

/// Moves this thread, and the processes that it starts, to a host of its own.
pub(crate) fn host() -> Host {
    assert!(
        rustix::process::geteuid().is_root(),
        "these tests make network namespaces: run them as root"
    );
    let directory = tempfile::tempdir().unwrap();
    let unique = directory.path().file_name().unwrap().to_string_lossy();
    let namespace = format!("cube-test-{}", unique.trim_start_matches('.'));
    namespace::create(&namespace).unwrap();
    let file = fs::File::open(namespace::path(&namespace)).unwrap();
    let kind = Some(LinkNameSpaceType::Network);
    rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(&file), kind).unwrap();
    let host = Host {
        plugins: Plugins {
            path: vec![directory.path().join("bin"), PLUGINS.into()],
            deadline: Duration::from_secs(60),
        },
        directory,
        namespace,
    };
    fs::create_dir(host.path("bin")).unwrap();
    host.run("ip link set lo up");
    host
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = namespace::remove(&self.namespace);
    }
}

impl Host {
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn networks(&self) -> Networks {
        Networks::new(&self.path("records"), self.plugins.clone())
    }

    /// Runs a command on this host; what it says.
    pub(crate) fn run(&self, script: &str) -> String {
        let output = Command::new("sh").args(["-ec", script]).output().unwrap();
        assert!(
            output.status.success(),
            "{script}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// A plug-in that is a shell script.
    pub(crate) fn script(&self, name: &str, script: &str) {
        let path = self.path("bin").join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// The shipped network, with its leases here, and further plug-ins before and after its own.
    pub(crate) fn bridge(&self, before: &[&str], after: &[&str]) -> NetworkConfig {
        let mut config = NetworkConfig::shipped().unwrap().source().clone();
        config["plugins"][0]["ipam"]["dataDir"] = self.path("leases").to_str().unwrap().into();
        let plugins = config["plugins"].as_array().unwrap().clone();
        let extra = |kinds: &[&str]| -> Vec<_> {
            kinds
                .iter()
                .map(|kind| serde_json::json!({"type": kind}))
                .collect()
        };
        config["plugins"] = [extra(before), plugins, extra(after)].concat().into();
        NetworkConfig::from_value(config, Path::new("/test.conflist")).unwrap()
    }

    /// A network of the scripts `kinds`.
    pub(crate) fn network(&self, version: &str, kinds: &[&str]) -> NetworkConfig {
        let plugins: Vec<_> = kinds
            .iter()
            .map(|kind| serde_json::json!({"type": kind}))
            .collect();
        let config = serde_json::json!({"cniVersion": version, "name": "test", "plugins": plugins});
        NetworkConfig::from_value(config, Path::new("/test.conflist")).unwrap()
    }

    /// Everything that a pod's network may leave behind: links, rules, leases, namespaces, records.
    pub(crate) fn traces(&self, pod: &str) -> String {
        let links = self.run("ip -o link | sed 's/^[0-9]*: \\([^:@]*\\).*/\\1/' | sort");
        // The bridge is the host's once it is there; so are the chains that the plug-ins keep for all pods.
        let links: Vec<_> = links
            .lines()
            .filter(|link| !["cube0", "lo"].contains(link))
            .collect();
        let rules = self.run("iptables-save; ip6tables-save");
        let rules: Vec<_> = rules
            .lines()
            .filter(|rule| rule.contains(pod) || rule.contains("10.86."))
            .collect();
        let leases = self.run(&format!(
            "find {} -type f ! -name lock ! -name 'last_reserved_ip*' 2>/dev/null || true",
            self.path("leases").display()
        ));
        let records = self.run(&format!(
            "ls {} 2>/dev/null || true",
            self.path("records").display()
        ));
        let namespaces = self.run(&format!("ls /run/netns | grep -x cube-{pod} || true"));
        format!("{links:?} {rules:?} {leases}{records}{namespaces}")
    }

    pub(crate) fn assert_nothing_left(&self, pod: &str) {
        assert_eq!(self.traces(pod), "[] [] ", "left behind");
    }
}

/// The first IPv4 address of a pod, without its prefix.
pub(crate) fn v4(attachment: &Attachment) -> String {
    let mut addresses = attachment.addresses().iter().map(|cidr| cidr.address);
    addresses
        .find(|address| address.is_ipv4())
        .unwrap()
        .to_string()
}
