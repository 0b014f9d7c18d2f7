//! The boot: from the initramfs to a root in which containers can be started.
//!
//! ```text
//! initramfs (rootfs)  read and remove /cube/pod.json and /init
//!   └─ tmpfs, moved onto /: pivot_root does not work on the initramfs itself, but does on this
//!        ├─ /dev devtmpfs   ├─ /proc   ├─ /sys, /sys/fs/cgroup (controllers delegated)
//!        └─ /run/root: where each container's mount namespace has its root; /run/disk: mounted disks
//! ```
//! Every container has its own `/dev/pts`, `/dev/shm` and `/dev/mqueue`; the agent needs none.
#![forbid(unsafe_code)]

use std::fs;

use cube_guest::{POD_SPEC_PATH, PodSpec};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::process::{Resource, Rlimit};

use crate::container::cgroup;
use crate::error::{Context, Error};
use crate::{network, sys};

/// Where the new root is mounted before it becomes `/`.
const NEW_ROOT: &str = "/.root";
/// Magic numbers of the two file systems that an initramfs can be (`statfs(2)`).
const RAMFS_MAGIC: i64 = 0x8584_58f6;
const TMPFS_MAGIC: i64 = 0x0102_1994;
/// Open files of a container's processes: systemd's and so containerd's default.
const OPEN_FILES: Rlimit = Rlimit {
    current: Some(1024),
    maximum: Some(524_288),
};

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
    if let Some(network) = &spec.network {
        network::configure(network, &spec.hostname)?;
    }
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
    for directory in [
        "/dev",
        "/proc",
        "/sys",
        "/run",
        "/run/root",
        "/run/upper",
        "/run/disk",
    ] {
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
    enter().context(|| "move the new root onto /".into())
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
