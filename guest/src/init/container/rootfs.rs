//! The container's root and the file systems on it, made by the child in its own mount namespace.
//!
//! The root is an overlay: the EROFS image below, a directory of the writable disk (or of a tmpfs) above.
//! The child pivots into it first and mounts everything else from inside, so that no symbolic link of
//! the image can lead outside. The agent's mount namespace never sees any of it; the agent holds the
//! container's namespace until the container is removed, so that its files can still be read.
//!
//! Everything a container can write is `nodev`, a privileged one's `/dev` excepted. Its device files are
//! bind mounts of single files of the agent's `/dev`.
#![forbid(unsafe_code)]

use std::ffi::CString;
use std::os::fd::OwnedFd;

use cube_guest::SecuritySpec;
use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags};

use super::mounts::{self, Detached, Device, Wanted};
use crate::boot::make_directory;
use crate::error::{Context, Error};

/// Where the root is mounted before it is the root.
const ROOT: &str = "/run/root";
/// Where the tmpfs of a container without a writable disk is mounted.
const UPPER: &str = "/run/upper";
/// The pod's `/dev/shm`.
pub(crate) const SHM: &str = "/run/shm";

const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];
const DEVICE_LINKS: [(&str, &str); 5] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/ptmx", "pts/ptmx"),
];
/// Hidden from containers by Docker's and containerd's defaults.
const MASKED: [&str; 12] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];
/// Read-only by the same defaults.
const READ_ONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// What the root is made of.
#[derive(Debug)]
pub(crate) struct Layers {
    /// Where the image is mounted.
    pub(crate) image: String,
    /// Where the writable disk is mounted; absent: a tmpfs takes the writes.
    pub(crate) writable: Option<String>,
    /// Whether the container may write to its root.
    pub(crate) read_only: bool,
}

/// Everything that a container sees as files.
#[derive(Debug)]
pub(crate) struct Root<'a> {
    pub(crate) layers: Layers,
    pub(crate) mounts: Vec<Wanted<'a>>,
    pub(crate) devices: Vec<Device<'a>>,
    pub(crate) security: &'a SecuritySpec,
    /// Its `/dev/pts`.
    pub(crate) devpts: OwnedFd,
    /// Its first process has terminal 0 of that.
    pub(crate) has_terminal: bool,
}

/// Makes the container's root the root of this process, with every file system on it.
///
/// # Errors
/// The mount that failed, by name.
pub(crate) fn enter(root: &Root<'_>) -> Result<(), Error> {
    // What the agent unmounts must go here too, and nothing that is mounted here may go there.
    let propagation = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", propagation).context(|| "leave the agent's mounts".into())?;
    mount_overlay(&root.layers)?;
    let privileged = root.security.privileged;
    let devices = devices(privileged)?;
    let shm = mounts::clone_file(SHM).context(|| format!("clone {SHM}"))?;
    if !root.devices.is_empty() {
        mounts::prepare_devices()?;
    }
    let nodes = root.devices.iter().enumerate();
    let nodes = nodes.map(|(number, device)| mounts::make_device(device, number));
    let nodes: Vec<Detached<'_>> = nodes.collect::<Result<_, _>>()?;
    let trees = root.mounts.iter().map(mounts::detach);
    let trees: Vec<Option<Detached<'_>>> = trees.collect::<Result<_, _>>()?;
    let pivot = || {
        rustix::process::chdir(ROOT)?;
        rustix::process::pivot_root(".", ".")?;
        // The agent's root is now on top of the container's: off with it.
        rustix::mount::unmount(".", UnmountFlags::DETACH)?;
        rustix::process::chdir("/")
    };
    pivot().context(|| "pivot into the container's root".into())?;
    mount_kernel_file_systems(privileged)?;
    populate_dev(devices, &shm, &root.devpts, root.has_terminal)?;
    for (wanted, tree) in root.mounts.iter().zip(&trees) {
        match tree {
            Some(tree) => mounts::attach(tree)?,
            None => mounts::mount_tmpfs(wanted.spec)?,
        }
    }
    nodes.iter().try_for_each(mounts::attach)?;
    let paths = |asked: &Option<Vec<String>>, usual: &[&str]| match asked {
        _ if privileged => Vec::new(),
        Some(paths) => paths.clone(),
        None => usual.iter().map(|path| (*path).to_owned()).collect(),
    };
    for path in paths(&root.security.masked_paths, &MASKED) {
        mask(&path)?;
    }
    for path in paths(&root.security.read_only_paths, &READ_ONLY) {
        make_read_only(&path)?;
    }
    Ok(())
}

/// The usual device files, or all.
fn devices(privileged: bool) -> Result<Vec<(String, OwnedFd)>, Error> {
    if privileged {
        return mounts::every_device();
    }
    let clone = |name: &str| {
        let path = format!("/dev/{name}");
        let device = mounts::clone_file(&path);
        let device = device.context(|| format!("clone the device file {path}"))?;
        Ok((path, device))
    };
    DEVICES.into_iter().map(clone).collect()
}

/// Makes the root read-only, after everything that the start itself writes.
///
/// # Errors
/// The kernel's refusal.
pub(crate) fn seal() -> Result<(), Error> {
    let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NODEV;
    rustix::mount::mount_remount("/", flags, c"").context(|| "make the root read-only".into())
}

fn mount_overlay(layers: &Layers) -> Result<(), Error> {
    let base = match &layers.writable {
        Some(directory) => directory,
        None => {
            mount("tmpfs", UPPER, MountFlags::NODEV, c"mode=0755")?;
            UPPER
        }
    };
    let upper = format!("{base}/upper");
    make_upper(&layers.image, &upper)?;
    make_directory(&format!("{base}/work"))?;
    let options = format!(
        "lowerdir={},upperdir={upper},workdir={base}/work",
        layers.image
    );
    let options =
        CString::new(options).map_err(|_| Error::Refused("a mount option has a NUL".into()))?;
    mount("overlay", ROOT, MountFlags::NODEV, &options)
}

/// A new upper directory takes mode, owner and times of the image's root: overlayfs shows the upper one's.
fn make_upper(image: &str, upper: &str) -> Result<(), Error> {
    let make = || {
        match rustix::fs::mkdir(upper, Mode::RWXU) {
            Ok(()) => {}
            Err(Errno::EXIST) => return Ok(()),
            Err(error) => return Err(error),
        }
        let root = rustix::fs::stat(image)?;
        let owner = (Uid::from_raw(root.st_uid), Gid::from_raw(root.st_gid));
        rustix::fs::chown(upper, Some(owner.0), Some(owner.1))?;
        rustix::fs::chmod(upper, Mode::from_raw_mode(root.st_mode))?;
        let time = |seconds, nanoseconds: u64| Timespec {
            tv_sec: seconds,
            tv_nsec: nanoseconds as i64,
        };
        let times = Timestamps {
            last_access: time(root.st_atime, root.st_atime_nsec),
            last_modification: time(root.st_mtime, root.st_mtime_nsec),
        };
        rustix::fs::utimensat(CWD, upper, &times, AtFlags::empty())
    };
    make().context(|| format!("make the upper directory {upper}"))
}

fn mount_kernel_file_systems(privileged: bool) -> Result<(), Error> {
    let plain = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    for path in ["/proc", "/sys", "/dev"] {
        make_mount_point(path)?;
    }
    let mut sys = plain;
    sys.set(MountFlags::RDONLY, !privileged);
    mount("proc", "/proc", plain, c"")?;
    mount("sysfs", "/sys", sys, c"")?;
    mount("cgroup2", "/sys/fs/cgroup", sys, c"")?;
    let mut dev = MountFlags::NOSUID;
    dev.set(MountFlags::NODEV, !privileged);
    mount("tmpfs", "/dev", dev, c"mode=755,size=65536k")?;
    for path in ["/dev/pts", "/dev/shm", "/dev/mqueue"] {
        make_directory(path)?;
    }
    // One for each IPC namespace, and the pod's containers have the agent's.
    match mount("mqueue", "/dev/mqueue", plain, c"") {
        // A kernel without message queues: nobody there can use one.
        Err(Error::System {
            source: Errno::NODEV,
            ..
        }) => Ok(()),
        mounted => mounted,
    }
}

/// A symbolic link here would put the kernel's files over some other part of the image.
fn make_mount_point(path: &str) -> Result<(), Error> {
    make_directory(path)?;
    let what = rustix::fs::lstat(path).context(|| format!("look at {path}"))?;
    match FileType::from_raw_mode(what.st_mode) {
        FileType::Directory => Ok(()),
        _ => Err(Error::Refused(format!(
            "{path} in the image is not a directory"
        ))),
    }
}

fn populate_dev(
    devices: Vec<(String, OwnedFd)>,
    shm: &OwnedFd,
    devpts: &OwnedFd,
    has_terminal: bool,
) -> Result<(), Error> {
    for (path, device) in devices {
        make_file(&path)?;
        attach(&device, &path)?;
    }
    for (link, target) in DEVICE_LINKS {
        rustix::fs::symlink(target, link).context(|| format!("make the link {link}"))?;
    }
    attach(shm, "/dev/shm")?;
    attach(devpts, "/dev/pts")?;
    if has_terminal {
        // The terminal's only user so far: number 0.
        make_file("/dev/console")?;
        rustix::mount::mount_bind("/dev/pts/0", "/dev/console")
            .context(|| "bind the terminal to /dev/console".into())?;
    }
    Ok(())
}

fn make_file(path: &str) -> Result<(), Error> {
    let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let made = rustix::fs::open(path, flags, Mode::from_raw_mode(0o644));
    made.map(drop).context(|| format!("make the file {path}"))
}

fn attach(mount: &OwnedFd, path: &str) -> Result<(), Error> {
    rustix::mount::move_mount(
        mount,
        "",
        CWD,
        path,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .context(|| format!("attach a mount to {path}"))
}

/// Hides `path`: a file behind `/dev/null`, a directory behind an empty one.
fn mask(path: &str) -> Result<(), Error> {
    let Ok(what) = rustix::fs::stat(path) else {
        return Ok(());
    };
    let plain = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RDONLY;
    match FileType::from_raw_mode(what.st_mode) {
        FileType::Directory => mount("tmpfs", path, plain, c"size=0k,nr_inodes=2"),
        _ => rustix::mount::mount_bind("/dev/null", path).context(|| format!("hide {path}")),
    }
}

fn make_read_only(path: &str) -> Result<(), Error> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let remount = || {
        match rustix::mount::mount_bind(path, path) {
            Err(Errno::NOENT) => return Ok(()),
            bound => bound?,
        }
        rustix::mount::mount_remount(path, MountFlags::BIND | MountFlags::RDONLY | flags, c"")
    };
    remount().context(|| format!("make {path} read-only"))
}

pub(super) fn mount(
    kind: &str,
    target: &str,
    flags: MountFlags,
    data: &std::ffi::CStr,
) -> Result<(), Error> {
    rustix::mount::mount(kind, target, kind, flags, data)
        .context(|| format!("mount {kind} on {target}"))
}
