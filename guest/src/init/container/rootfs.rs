//! The container's root and the file systems on it, made by the child in its own mount namespace.
//!
//! The root is an overlay: the EROFS image below, a directory of the writable disk (or of a tmpfs) above.
//! The child pivots into it first and mounts everything else from inside, so that no symbolic link of
//! the image can lead outside. The agent's mount namespace never sees any of it, and the kernel unmounts
//! it with the container's last process.
//!
//! Everything a container can write is `nodev`. Its device files are bind mounts of single files of the
//! agent's `/dev`.
#![forbid(unsafe_code)]

use std::ffi::CString;
use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};

use crate::boot::make_directory;
use crate::error::{Context, Error};
use crate::stdio::DEVPTS_OPTIONS;

/// Where the root is mounted before it is the root.
const ROOT: &str = "/run/root";
/// Where the tmpfs of a container without a writable disk is mounted.
const UPPER: &str = "/run/upper";

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

/// Makes the container's root the root of this process, with every file system on it. `devpts` is the one
/// of its terminal; absent: it gets a fresh one.
///
/// # Errors
/// The mount that failed, by name.
pub(crate) fn enter(layers: &Layers, devpts: Option<OwnedFd>) -> Result<(), Error> {
    mount_overlay(layers)?;
    let devices = DEVICES.map(clone_device);
    let pivot = || {
        rustix::process::chdir(ROOT)?;
        rustix::process::pivot_root(".", ".")?;
        // The agent's root is now on top of the container's: off with it.
        rustix::mount::unmount(".", UnmountFlags::DETACH)?;
        rustix::process::chdir("/")
    };
    pivot().context(|| "pivot into the container's root".into())?;
    mount_kernel_file_systems()?;
    populate_dev(devices, devpts)?;
    MASKED.iter().try_for_each(|path| mask(path))?;
    READ_ONLY.iter().try_for_each(|path| make_read_only(path))
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

fn mount_kernel_file_systems() -> Result<(), Error> {
    let plain = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    for path in ["/proc", "/sys", "/dev"] {
        make_mount_point(path)?;
    }
    mount("proc", "/proc", plain, c"")?;
    mount("sysfs", "/sys", plain | MountFlags::RDONLY, c"")?;
    mount("cgroup2", "/sys/fs/cgroup", plain | MountFlags::RDONLY, c"")?;
    mount(
        "tmpfs",
        "/dev",
        MountFlags::NOSUID | MountFlags::NODEV,
        c"mode=755,size=65536k",
    )?;
    for path in ["/dev/pts", "/dev/shm", "/dev/mqueue"] {
        make_directory(path)?;
    }
    mount("tmpfs", "/dev/shm", plain, c"mode=1777,size=65536k")?;
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

/// A mount of one device file, attached nowhere.
fn clone_device(name: &str) -> Result<OwnedFd, Error> {
    let path = format!("/dev/{name}");
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    rustix::mount::open_tree(CWD, &*path, flags).context(|| format!("clone the device file {path}"))
}

fn populate_dev(
    devices: [Result<OwnedFd, Error>; DEVICES.len()],
    devpts: Option<OwnedFd>,
) -> Result<(), Error> {
    for (name, device) in DEVICES.iter().zip(devices) {
        let path = format!("/dev/{name}");
        make_file(&path)?;
        attach(&device?, &path)?;
    }
    for (link, target) in DEVICE_LINKS {
        rustix::fs::symlink(target, link).context(|| format!("make the link {link}"))?;
    }
    match devpts {
        Some(devpts) => {
            attach(&devpts, "/dev/pts")?;
            // The terminal's only user so far: number 0.
            make_file("/dev/console")?;
            rustix::mount::mount_bind("/dev/pts/0", "/dev/console")
                .context(|| "bind the terminal to /dev/console".into())
        }
        None => {
            let options = DEVPTS_OPTIONS
                .map(|(key, value)| format!("{key}={value}"))
                .join(",");
            let options = CString::new(options).unwrap_or_default();
            mount(
                "devpts",
                "/dev/pts",
                MountFlags::NOSUID | MountFlags::NOEXEC,
                &options,
            )
        }
    }
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

fn mount(kind: &str, target: &str, flags: MountFlags, data: &std::ffi::CStr) -> Result<(), Error> {
    rustix::mount::mount(kind, target, kind, flags, data)
        .context(|| format!("mount {kind} on {target}"))
}
