//! `/etc/resolv.conf`, `/etc/hosts` and `/etc/hostname` of the pod's containers: written once by the agent,
//! mounted over the image's own in each container.
#![forbid(unsafe_code)]

use std::fmt::Write;
use std::os::fd::OwnedFd;

use cube_guest::NetworkSpec;
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags};

use crate::boot::make_directory;
use crate::error::{Context, Error};

/// Where the agent keeps them.
const DIRECTORY: &str = "/run/etc";
const NAMES: [&str; 3] = ["resolv.conf", "hosts", "hostname"];

/// Writes the pod's files.
///
/// # Errors
/// A name that would be more than one word in a file, or the file that cannot be written.
pub(super) fn write(spec: &NetworkSpec, hostname: &str) -> Result<(), Error> {
    make_directory(DIRECTORY)?;
    if let Some(resolv_conf) = resolv_conf(spec)? {
        write_file("resolv.conf", &resolv_conf)?;
    }
    write_file("hosts", &hosts(spec, hostname)?)?;
    write_file("hostname", &format!("{hostname}\n"))
}

fn write_file(name: &str, content: &str) -> Result<(), Error> {
    let path = format!("{DIRECTORY}/{name}");
    std::fs::write(&path, content).context(|| format!("write {path}"))
}

/// The content of `/etc/resolv.conf` (`resolv.conf(5)`).
fn resolv_conf(spec: &NetworkSpec) -> Result<Option<String>, Error> {
    let Some(dns) = &spec.dns else {
        return Ok(None);
    };
    let mut text = String::new();
    // A String takes everything.
    for server in &dns.nameservers {
        let _ = writeln!(text, "nameserver {server}");
    }
    for (keyword, list) in [("search", &dns.search), ("options", &dns.options)] {
        if !list.is_empty() {
            let _ = writeln!(text, "{keyword} {}", words(list)?);
        }
    }
    Ok(Some(text))
}

/// The content of `/etc/hosts`: localhost, the pod by its first address of each family, what else was given.
fn hosts(spec: &NetworkSpec, hostname: &str) -> Result<String, Error> {
    let mut text =
        String::from("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    let addresses = || {
        spec.interfaces
            .iter()
            .flat_map(|i| &i.addresses)
            .map(|a| a.address)
    };
    let firsts = [
        addresses().find(|a| a.is_ipv4()),
        addresses().find(|a| a.is_ipv6()),
    ];
    for address in firsts
        .into_iter()
        .flatten()
        .filter(|_| !hostname.is_empty())
    {
        let _ = writeln!(text, "{address}\t{}", words(&[hostname.to_owned()])?);
    }
    for entry in &spec.hosts {
        let _ = writeln!(text, "{}\t{}", entry.address, words(&entry.names)?);
    }
    Ok(text)
}

fn words(list: &[String]) -> Result<String, Error> {
    let is_word = |word: &&String| !word.is_empty() && word.bytes().all(|b| b.is_ascii_graphic());
    match list.iter().find(|word| !is_word(word)) {
        Some(odd) => Err(Error::Refused(format!(
            "the name `{}` is not one word",
            odd.escape_debug()
        ))),
        None => Ok(list.join(" ")),
    }
}

/// The pod's files as mounts attached nowhere; called while the agent's root is the root.
pub(crate) fn clone() -> Vec<(&'static str, Result<OwnedFd, Errno>)> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let files = NAMES.into_iter().map(|name| {
        let path = format!("{DIRECTORY}/{name}");
        (name, rustix::mount::open_tree(CWD, path, flags))
    });
    // A pod without a network has none, and keeps its images'.
    files
        .filter(|(_, file)| !matches!(file, Err(Errno::NOENT)))
        .collect()
}

/// Lays them over the image's; called in the container's root, before anything else is mounted there.
///
/// # Errors
/// The file that cannot be mounted.
pub(crate) fn attach(files: Vec<(&'static str, Result<OwnedFd, Errno>)>) -> Result<(), Error> {
    if !files.is_empty() {
        make_directory("/etc")?;
    }
    for (name, file) in files {
        let path = format!("/etc/{name}");
        let attach = || {
            let file = file?;
            make_target(&path)?;
            let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
            rustix::mount::move_mount(file, "", CWD, &*path, flags)
        };
        attach().context(|| format!("lay the pod's file over {path}"))?;
    }
    Ok(())
}

/// Makes sure of a regular file to mount over. A symbolic link in the image leads to something that is made
/// at run time by nobody here: it gives way, in the container's writable layer.
fn make_target(path: &str) -> Result<(), Errno> {
    match rustix::fs::lstat(path) {
        Ok(found) if FileType::from_raw_mode(found.st_mode) == FileType::Symlink => {
            rustix::fs::unlink(path)?;
        }
        Ok(_) => return Ok(()),
        Err(Errno::NOENT) => {}
        Err(error) => return Err(error),
    }
    let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    rustix::fs::open(path, flags, Mode::from_raw_mode(0o644)).map(drop)
}

#[cfg(test)]
mod tests {
    use cube_guest::network::{DnsSpec, HostEntry, InterfaceSpec, MacAddress};

    use super::*;

    fn spec() -> NetworkSpec {
        NetworkSpec {
            interfaces: vec![InterfaceSpec {
                name: "eth0".into(),
                mac: MacAddress([2, 0, 0, 0, 0, 1]),
                mtu: None,
                addresses: ["10.1.0.5/16", "10.1.0.6/16", "fd00::5/64"]
                    .map(|a| a.parse().unwrap())
                    .into(),
                routes: Vec::new(),
                neighbours: Vec::new(),
            }],
            dns: Some(DnsSpec {
                nameservers: ["10.1.0.1", "fd00::1"].map(|a| a.parse().unwrap()).into(),
                search: vec!["a.example".into(), "b.example".into()],
                options: vec!["ndots:5".into()],
            }),
            hosts: vec![HostEntry {
                address: "10.9.9.9".parse().unwrap(),
                names: vec!["db".into(), "db.example".into()],
            }],
            ..NetworkSpec::default()
        }
    }

    #[test]
    fn files_are_what_a_resolver_reads() {
        assert_eq!(
            resolv_conf(&spec()).unwrap().unwrap(),
            "nameserver 10.1.0.1\nnameserver fd00::1\nsearch a.example b.example\noptions ndots:5\n"
        );
        assert_eq!(
            hosts(&spec(), "pod").unwrap(),
            "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n\
             10.1.0.5\tpod\nfd00::5\tpod\n10.9.9.9\tdb db.example\n"
        );
        assert_eq!(resolv_conf(&NetworkSpec::default()).unwrap(), None);
    }

    #[test]
    fn a_name_is_one_word() {
        for odd in ["", "a b", "a\nnameserver 6.6.6.6", "ä"] {
            let mut spec = spec();
            spec.hosts[0].names.push(odd.into());
            assert!(hosts(&spec, "pod").is_err(), "{odd:?}");
            assert!(hosts(&NetworkSpec::default(), "pod").is_ok());
            spec.dns.as_mut().unwrap().search.push(odd.into());
            assert!(resolv_conf(&spec).is_err(), "{odd:?}");
        }
    }
}
