//! The boot: from the initramfs to a root in which containers can be started.
//!
//! ```text
//! initramfs (rootfs)  read and remove /cube/pod.json and /init
//!   └─ tmpfs, moved onto /: pivot_root does not work on the initramfs itself, but does on this
//!        ├─ /dev devtmpfs   ├─ /proc   ├─ /sys, /sys/fs/cgroup (controllers delegated)
//!        ├─ /run/root, /run/upper, /run/device: where a container's mounts are made, in its own namespace
//!        ├─ /run/namespace: held mount namespaces   ├─ /run/shm: the pod's /dev/shm
//!        └─ /run/disk, /run/volume: what is mounted here goes in every namespace when it goes here
//! ```
//! The UTS, IPC and network namespaces are the pod's. Every container has its own `/dev/pts`.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;

use cube_guest::{POD_SPEC_PATH, PodSpec};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::process::{Resource, Rlimit};

use crate::container::rootfs::SHM;
use crate::container::{NAMESPACES, cgroup};
use crate::disks::DISKS;
use crate::error::{Context, Error};
use crate::sys;
use crate::volumes::VOLUMES;

/// Where the new root is mounted before it becomes `/`.
const NEW_ROOT: &str = "/.root";
/// Magic numbers of the two file systems that an initramfs can be (`statfs(2)`).
const RAMFS_MAGIC: i64 = 0x8584_58f6;
const TMPFS_MAGIC: i64 = 0x0102_1994;
/// Open files of the agent: a dozen for each of many execs.
const OPEN_FILES: Rlimit = Rlimit {
    current: Some(524_288),
    maximum: Some(524_288),
};
/// Size of the pod's `/dev/shm` unless the specification says otherwise: Docker's default.
const SHM_BYTES: u64 = 64 << 20;
/// Directories of the new root.
const DIRECTORIES: [&str; 11] = [
    "/dev",
    "/proc",
    "/sys",
    "/run",
    "/run/root",
    "/run/upper",
    "/run/device",
    NAMESPACES,
    SHM,
    DISKS,
    VOLUMES,
];

/// Makes the machine ready for containers and returns what to run.
///
/// # Errors
/// A mount that failed, or a pod specification that is missing or malformed.
pub(crate) fn boot() -> Result<PodSpec, Error> {
    rustix::process::umask(Mode::WGRP | Mode::WOTH);
    let spec = read_spec();
    enter_root()?;
    open_standard_streams()?;
    cgroup::delegate()?;
    rustix::process::setrlimit(Resource::Nofile, OPEN_FILES)
        .context(|| "raise the limit of open files".into())?;
    sys::loopback_up().context(|| "bring the loopback interface up".into())?;
    let spec = spec?;
    if !spec.hostname.is_empty() {
        rustix::system::sethostname(spec.hostname.as_bytes())
            .context(|| format!("set the host name to `{}`", spec.hostname))?;
    }
    set_sysctls(&spec.sysctls)?;
    mount_shm(spec.shm_bytes.unwrap_or(SHM_BYTES))?;
    Ok(spec)
}

/// Reads the pod's specification, then removes it: it may hold secrets, and it takes memory.
fn read_spec() -> Result<PodSpec, Error> {
    let bytes = fs::read(POD_SPEC_PATH).context(|| format!("read {POD_SPEC_PATH}"))?;
    let removed = fs::remove_file(POD_SPEC_PATH);
    removed.context(|| format!("remove {POD_SPEC_PATH}"))?;
    // The place only: serde_json's own sentence may quote a value, and values may be secret.
    serde_json::from_slice(&bytes).map_err(|error| {
        let (line, column) = (error.line(), error.column());
        Error::Refused(format!(
            "{POD_SPEC_PATH} is malformed at line {line} column {column}"
        ))
    })
}

fn enter_root() -> Result<(), Error> {
    forget_initramfs();
    make_directory(NEW_ROOT)?;
    let mount = |source: &str, target: &str, flags: MountFlags, data: &std::ffi::CStr| {
        rustix::mount::mount(source, format!("{NEW_ROOT}{target}"), source, flags, data)
            .context(|| format!("mount {source} on {target}/"))
    };
    let plain = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount(
        "tmpfs",
        "",
        MountFlags::NOSUID | MountFlags::NODEV,
        c"mode=0755",
    )?;
    for directory in DIRECTORIES {
        make_directory(&format!("{NEW_ROOT}{directory}"))?;
    }
    // Not noexec: programs map /dev/zero executable, and a bind mount keeps its source's flags.
    mount("devtmpfs", "/dev", MountFlags::NOSUID, c"mode=0755")?;
    mount("proc", "/proc", plain, c"")?;
    mount("sysfs", "/sys", plain, c"")?;
    mount("cgroup2", "/sys/fs/cgroup", plain, c"")?;
    let enter = || {
        rustix::process::chdir(NEW_ROOT)?;
        rustix::mount::mount_move(".", "/")?;
        rustix::process::chroot(".")?;
        rustix::process::chdir("/")?;
        rustix::mount::mount_change(
            "/",
            MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
        )
    };
    enter().context(|| "move the new root onto /".into())?;
    for directory in [DISKS, VOLUMES] {
        share(directory).context(|| format!("share the mounts in {directory}"))?;
    }
    Ok(())
}

/// Makes a directory a mount whose mounts go in every copy of it when they go here: a child that was just
/// forked must not keep a disk in use.
fn share(directory: &str) -> rustix::io::Result<()> {
    rustix::mount::mount_bind(directory, directory)?;
    rustix::mount::mount_change(directory, MountPropagationFlags::SHARED)
}

/// Sets the pod's kernel parameters.
fn set_sysctls(sysctls: &BTreeMap<String, String>) -> Result<(), Error> {
    for (name, value) in sysctls {
        let path = sysctl_path(name)?;
        fs::write(&path, value).context(|| format!("set {name} to `{}`", value.escape_debug()))?;
    }
    Ok(())
}

/// The file of a kernel parameter, whose parts are separated by `.` or `/`: by what comes first, as for
/// sysctl(8), so that a name with the other one in it can be written.
fn sysctl_path(name: &str) -> Result<String, Error> {
    let path = match name.find(['.', '/']) {
        Some(at) if name[at..].starts_with('.') => name
            .chars()
            .map(|c| match c {
                '.' => '/',
                '/' => '.',
                c => c,
            })
            .collect(),
        _ => name.to_owned(),
    };
    match path.split('/').any(|part| matches!(part, "" | "." | "..")) {
        true => Err(Error::Refused(format!(
            "`{}` is not the name of a kernel parameter",
            name.escape_debug()
        ))),
        false => Ok(format!("/proc/sys/{path}")),
    }
}

fn mount_shm(bytes: u64) -> Result<(), Error> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let options = CString::new(format!("mode=1777,size={bytes}")).unwrap_or_default();
    rustix::mount::mount("tmpfs", SHM, "tmpfs", flags, &*options)
        .context(|| format!("mount the pod's /dev/shm of {bytes} bytes"))
}

/// Removes `/init` from the initramfs (the running program stays in memory), so that nothing is left
/// there to be found. Only if this really is one.
fn forget_initramfs() {
    let is_initramfs =
        rustix::fs::statfs("/").is_ok_and(|fs| [RAMFS_MAGIC, TMPFS_MAGIC].contains(&fs.f_type));
    if is_initramfs {
        let _ = fs::remove_file("/init");
    }
}

/// The kernel starts init with the three standard descriptors closed if there is no console.
fn open_standard_streams() -> Result<(), Error> {
    let open = || {
        let null = rustix::fs::openat(
            CWD,
            "/dev/null",
            OFlags::RDWR | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        // Kept away from the numbers that it is about to be copied to.
        let null = rustix::io::fcntl_dupfd_cloexec(null, 3)?;
        rustix::stdio::dup2_stdin(&null)?;
        rustix::stdio::dup2_stdout(&null)?;
        rustix::stdio::dup2_stderr(&null)
    };
    open().context(|| "open /dev/null as the standard streams".into())
}

/// Makes a directory, mode 0755, unless there is one.
pub(crate) fn make_directory(path: &str) -> Result<(), Error> {
    match rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error).context(|| format!("make the directory {path}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_separator_of_a_parameter_counts() {
        let path = |name: &str| sysctl_path(name).unwrap();
        assert_eq!(path("net.core.somaxconn"), "/proc/sys/net/core/somaxconn");
        assert_eq!(path("net/core/somaxconn"), "/proc/sys/net/core/somaxconn");
        assert_eq!(
            path("net.ipv4.conf.eth0/1.forwarding"),
            "/proc/sys/net/ipv4/conf/eth0.1/forwarding"
        );
        for name in ["", ".", "../x", "a..b", "net/../../etc", "/etc"] {
            assert!(sysctl_path(name).is_err(), "{name}");
        }
    }
}
