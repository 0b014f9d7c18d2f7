//! Debian packages: which are missing, and installing them.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Doing, Error, Result};
use crate::run;

/// To compile and link everything.
pub(crate) const BUILD: &[&str] = &["gcc", "libc6-dev", "ca-certificates"];
/// To build the slim kernel.
pub(crate) const KERNEL: &[&str] = &[
    "linux-source-6.1",
    "make",
    "gcc",
    "libc6-dev",
    "flex",
    "bison",
    "bc",
    "libelf-dev",
    "libssl-dev",
    "xz-utils",
    "binutils",
    "patch",
];
/// To run the testbed.
pub(crate) const TESTBED: &[&str] = &["qemu-system-x86", "busybox-static", "cpio", "kmod"];
/// To benchmark: a peer, the counter of system calls, charts as PNG.
pub(crate) const BENCH: &[&str] = &[
    "qemu-system-x86",
    "strace",
    "librsvg2-bin",
    "fonts-dejavu-core",
];
/// To benchmark networks: the host's end.
pub(crate) const BENCH_NET: &[&str] = &["iperf3", "iproute2", "iputils-ping"];
/// To make pod networks, and to look at them in tests.
pub(crate) const NETWORKS: &[&str] = &["containernetworking-plugins", "iproute2", "iptables"];
/// To serve NFS to a pod in a test: an NFS server that needs nothing of the kernel.
pub(crate) const NFS: &[&str] = &["nfs-ganesha", "nfs-ganesha-vfs"];
/// To make images and to check what Cube made of them.
pub(crate) const IMAGES: &[&str] = &["umoci", "erofs-utils", "e2fsprogs"];

/// Those of `wanted` that are not installed, sorted.
pub(crate) fn missing(wanted: &[&[&str]]) -> Result<Vec<String>> {
    let output = Command::new("dpkg-query")
        .args(["-W", "-f", "${Package} ${db:Status-Status}\n"])
        .output()
        .map_err(|_| {
            Error::Said(
                "dpkg-query is not here: the set-up knows Debian 12 and its kin; install by hand \
                 what the lists in xtask/src/apt.rs name, and use the other subcommands"
                    .into(),
            )
        })?;
    Ok(absent(
        &installed(&String::from_utf8_lossy(&output.stdout)),
        wanted,
    ))
}

/// The names that dpkg reports as installed; removed packages with configuration left are not.
fn installed(report: &str) -> BTreeSet<&str> {
    report
        .lines()
        .filter_map(|line| line.trim().strip_suffix(" installed"))
        .collect()
}

fn absent(installed: &BTreeSet<&str>, wanted: &[&[&str]]) -> Vec<String> {
    let absent: BTreeSet<&str> = wanted
        .iter()
        .copied()
        .flatten()
        .copied()
        .filter(|name| !installed.contains(name))
        .collect();
    absent.into_iter().map(str::to_owned).collect()
}

/// Installs what is missing of `wanted`, with apt's own output; says whether there was anything to do.
///
/// # Errors
/// [`Error::Packages`] when something is missing and this is not root.
pub(crate) fn ensure(wanted: &[&[&str]]) -> Result<bool> {
    let names = missing(wanted)?;
    if names.is_empty() {
        return Ok(false);
    }
    if !rustix::process::geteuid().is_root() {
        return Err(Error::Packages(names));
    }
    eprintln!("  installing {}", names.join(" "));
    update()?;
    run::shown(
        apt_get()
            .args(["install", "--yes", "--no-install-recommends"])
            .args(&names),
    )?;
    Ok(true)
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(["-q", "-o", "Dpkg::Use-Pty=0"]);
    command
}

/// Reads the package lists anew.
fn update() -> Result<()> {
    run::shown(apt_get().arg("update"))
}

/// The version that would be installed, or is.
pub(crate) fn version(package: &str) -> Result<String> {
    if let Some(version) = policy(package)? {
        return Ok(version);
    }
    if rustix::process::geteuid().is_root() {
        update()?;
        if let Some(version) = policy(package)? {
            return Ok(version);
        }
    }
    Err(Error::Said(format!(
        "apt knows no package {package}: run `apt-get update` as root, and see that \
         /etc/apt/sources.list names a Debian 12 mirror"
    )))
}

fn policy(package: &str) -> Result<Option<String>> {
    let text = run::captured(
        Command::new("apt-cache")
            .env("LC_ALL", "C")
            .args(["policy", "--", package]),
    )?;
    Ok(policy_version(&text))
}

/// The installed version, else the candidate.
fn policy_version(policy: &str) -> Option<String> {
    let field = |name: &str| {
        policy
            .lines()
            .find_map(|line| line.trim().strip_prefix(name))
            .map(str::trim)
            .filter(|version| *version != "(none)" && !version.is_empty())
    };
    field("Installed:")
        .or_else(|| field("Candidate:"))
        .map(str::to_owned)
}

/// The package that the metapackage `name` depends on and whose name starts with `prefix`.
pub(crate) fn dependency(name: &str, prefix: &str) -> Result<String> {
    version(name)?;
    let text = run::captured(
        Command::new("apt-cache")
            .env("LC_ALL", "C")
            .args(["depends", "--", name]),
    )?;
    depends(&text, prefix).ok_or_else(|| {
        Error::Said(format!(
            "the package {name} depends on nothing called {prefix}*"
        ))
    })
}

fn depends(text: &str, prefix: &str) -> Option<String> {
    text.lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with(prefix))
        .map(str::to_owned)
}

/// Downloads `packages` into `directory` and unpacks them into `tree`, without installing them.
pub(crate) fn unpack(packages: &[&str], directory: &Path, tree: &Path) -> Result<()> {
    unpack_with(unconfined(), packages, directory, tree)
}

/// As root, apt drops its privileges for a download unless the directory refuses: then it warns.
fn unconfined() -> Command {
    let mut apt = apt_get();
    apt.args(["-o", "APT::Sandbox::User=root"]);
    apt
}

fn unpack_with(mut apt: Command, packages: &[&str], directory: &Path, tree: &Path) -> Result<()> {
    run::captured(apt.arg("download").args(packages).current_dir(directory))?;
    for package in packages {
        let archive = downloaded(directory, package)?;
        run::captured(Command::new("dpkg").arg("-x").arg(&archive).arg(tree))?;
    }
    Ok(())
}

/// The suite of newer packages for this Debian release, which need not be among the machine's own sources.
pub(crate) struct Backports {
    /// The mirror that the release itself comes from.
    mirror: String,
    name: String,
}

impl Backports {
    /// # Errors
    /// The release has no name, or none of apt's sources has it.
    pub(crate) fn of_this_release() -> Result<Self> {
        let path = Path::new("/etc/os-release");
        let release = std::fs::read_to_string(path).doing("read", path)?;
        let targets = run::captured(Command::new("apt-get").args([
            "indextargets",
            "--format",
            "$(SITE) $(CODENAME)",
            "Created-By: Packages",
        ]))?;
        Self::of(&release, &targets).ok_or_else(|| {
            Error::Said("none of apt's sources is that of the release in /etc/os-release".into())
        })
    }

    fn of(os_release: &str, targets: &str) -> Option<Self> {
        let codename = os_release
            .lines()
            .find_map(|line| line.strip_prefix("VERSION_CODENAME="))?;
        let mirror = targets
            .lines()
            .filter_map(|line| line.split_once(' '))
            .find_map(|(site, of)| (of == codename).then_some(site))?;
        Some(Self {
            mirror: mirror.to_owned(),
            name: format!("{codename}-backports"),
        })
    }

    /// The suite's name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Downloads `packages` and unpacks them into `tree`, without installing them and without a change to the machine's
    /// own sources.
    pub(crate) fn unpack(&self, packages: &[&str], tree: &Path) -> Result<()> {
        let scratch = tempfile::tempdir().doing("create a directory in", &std::env::temp_dir())?;
        let at = |name: &str| scratch.path().join(name);
        for name in ["lists", "cache"] {
            std::fs::create_dir(at(name)).doing("create", &at(name))?;
        }
        let sources = format!("deb {} {} main\n", self.mirror, self.name);
        std::fs::write(at("sources"), sources).doing("write", &at("sources"))?;
        let apt = || {
            let mut apt = unconfined();
            for (option, value) in [
                ("Dir::Etc::sourcelist", at("sources")),
                ("Dir::Etc::sourceparts", at("none")),
                ("Dir::State::lists", at("lists")),
                ("Dir::Cache", at("cache")),
            ] {
                apt.arg("-o").arg(format!("{option}={}", value.display()));
            }
            apt
        };
        run::captured(apt().arg("update"))?;
        unpack_with(apt(), packages, &at("cache"), tree)
    }
}

fn downloaded(directory: &Path, package: &str) -> Result<PathBuf> {
    let prefix = format!("{package}_");
    std::fs::read_dir(directory)
        .ok()
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with(&prefix) && name.ends_with(".deb")
        })
        .ok_or_else(|| {
            Error::Said(format!(
                "apt-get downloaded no {package} into {}: is the package name right?",
                directory.display()
            ))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_installed_counts() {
        let report = "gcc installed\nbc config-files\nflex installed\nlibc6-dev installed\nlibc6-dev installed\n";
        let installed = installed(report);
        assert_eq!(
            absent(&installed, &[&["gcc", "flex"], &["libc6-dev"]]),
            Vec::<String>::new()
        );
        assert_eq!(
            absent(&installed, &[&["bc", "gcc"], &["bison", "bc"]]),
            ["bc", "bison"]
        );
    }

    #[test]
    fn backports_are_of_the_release_and_from_its_mirror() {
        let release = "ID=debian\nVERSION_CODENAME=bookworm\n";
        let targets =
            "http://deb.example/security bookworm-security\nhttp://deb.example/debian bookworm\n";
        let suite = Backports::of(release, targets).unwrap();
        assert_eq!(suite.mirror, "http://deb.example/debian");
        assert_eq!(suite.name(), "bookworm-backports");
        assert!(Backports::of(release, "http://deb.example/debian trixie\n").is_none());
        assert!(Backports::of("ID=other\n", targets).is_none());
    }

    #[test]
    fn the_installed_version_goes_before_the_candidate() {
        let text = "gcc:\n  Installed: 4:12.2.0-3\n  Candidate: 4:13\n  Version table:\n";
        assert_eq!(policy_version(text).unwrap(), "4:12.2.0-3");
        let text = "umoci:\n  Installed: (none)\n  Candidate: 0.4.7\n";
        assert_eq!(policy_version(text).unwrap(), "0.4.7");
        assert_eq!(
            policy_version("x:\n  Installed: (none)\n  Candidate: (none)\n"),
            None
        );
        assert_eq!(policy_version(""), None);
    }

    #[test]
    fn a_metapackage_names_the_real_one() {
        let text = "linux-image-amd64\n  Depends: linux-image-6.1.0-40-amd64\n  Breaks: x\n";
        assert_eq!(
            depends(text, "linux-image-").unwrap(),
            "linux-image-6.1.0-40-amd64"
        );
        assert_eq!(depends(text, "linux-headers-"), None);
    }

    #[test]
    fn the_error_for_other_users_is_a_command_to_paste() {
        let text = Error::Packages(vec!["bc".into(), "flex".into()]).to_string();
        assert!(
            text.ends_with("apt-get install --no-install-recommends bc flex"),
            "{text}"
        );
    }
}
