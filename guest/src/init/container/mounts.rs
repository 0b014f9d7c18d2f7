//! What is mounted in a container besides its root: volumes, tmpfs, disks as device files.
//!
//! A volume's content is a tenant's, and another container may change it at this moment. So it is resolved
//! once, beneath the volume's root, into a mount that is attached nowhere; that mount is made read-only if
//! it must be, and only then attached, by descriptor.
#![forbid(unsafe_code)]

use std::ffi::CString;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use cube_guest::{DeviceSpec, MountSource, MountSpec};
use rustix::fs::{AtFlags, CWD, Dev, FileType, Gid, Mode, OFlags, ResolveFlags, Uid};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MoveMountFlags, OpenTreeFlags};

use super::rootfs::mount;
use crate::error::{Context, Error};
use crate::sys;

/// Where the child makes device files before it pivots: a tmpfs of its own mount namespace.
const NODES: &str = "/run/device";
/// A symbolic link in a volume may lead to another place in it, and nowhere else.
const BENEATH: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_MAGICLINKS);

/// A mount that was asked for, with the directory of the volume in it.
#[derive(Debug)]
pub(crate) struct Wanted<'a> {
    pub(crate) spec: &'a MountSpec,
    /// Where the volume is mounted; `None` for a tmpfs.
    pub(crate) volume: Option<String>,
}

/// A device file that was asked for, with the block device behind it.
#[derive(Debug)]
pub(crate) struct Device<'a> {
    pub(crate) spec: &'a DeviceSpec,
    /// The kernel's name of the disk.
    pub(crate) name: String,
}

/// A mount that is attached nowhere yet.
#[derive(Debug)]
pub(crate) struct Detached<'a> {
    path: &'a str,
    tree: OwnedFd,
    is_directory: bool,
}

/// Checks the paths of a specification.
///
/// # Errors
/// A sentence that names the path.
pub(crate) fn validate(mounts: &[MountSpec], devices: &[DeviceSpec]) -> Result<(), Error> {
    let paths = mounts.iter().map(|mount| &mount.path);
    for path in paths.chain(devices.iter().map(|device| &device.path)) {
        if !path.starts_with('/') || path.split('/').any(|part| part == "..") {
            return Err(Error::Refused(format!(
                "`{}` is not an absolute path without `..` to mount at",
                path.escape_debug()
            )));
        }
    }
    for mount in mounts {
        if let MountSource::Volume { sub_path, .. } = &mount.source
            && (sub_path.starts_with('/') || sub_path.split('/').any(|part| part == ".."))
        {
            return Err(Error::Refused(format!(
                "`{}` is not a relative path without `..` in a volume",
                sub_path.escape_debug()
            )));
        }
    }
    Ok(())
}

/// Resolves a mount of a volume, before the pivot; `None` for a tmpfs, which is mounted after it.
///
/// # Errors
/// The path leads out of the volume, or the kernel refuses.
pub(crate) fn detach<'a>(wanted: &Wanted<'a>) -> Result<Option<Detached<'a>>, Error> {
    let (
        Some(volume),
        MountSource::Volume {
            sub_path,
            volume: name,
        },
    ) = (&wanted.volume, &wanted.spec.source)
    else {
        return Ok(None);
    };
    let resolve = || {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(volume, flags, Mode::empty())?;
        let place = open_beneath(&root, sub_path)?;
        let clone = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH;
        let tree = rustix::mount::open_tree(&place, "", clone)?;
        if wanted.spec.read_only {
            sys::make_mount_read_only(tree.as_fd())?;
        }
        detached(&wanted.spec.path, tree)
    };
    resolve().map(Some).context(|| match &**sub_path {
        "" => format!("mount the volume `{name}`"),
        path => format!("mount `{path}` of the volume `{name}`"),
    })
}

fn detached(path: &str, tree: OwnedFd) -> rustix::io::Result<Detached<'_>> {
    let what = rustix::fs::fstat(&tree)?;
    Ok(Detached {
        path,
        tree,
        is_directory: FileType::from_raw_mode(what.st_mode) == FileType::Directory,
    })
}

/// Opens `path` below `root`; makes it a directory if it is absent, with the mode of the root.
fn open_beneath(root: &OwnedFd, path: &str) -> rustix::io::Result<OwnedFd> {
    let open = |path: &str| {
        let path = if path.is_empty() { "." } else { path };
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        rustix::fs::openat2(root, path, flags, Mode::empty(), BENEATH)
    };
    match open(path) {
        Err(Errno::NOENT) => {}
        opened => return opened,
    }
    let mode = Mode::from_raw_mode(rustix::fs::fstat(root)?.st_mode & 0o7777);
    let mut place = open("")?;
    let mut prefix = String::new();
    for part in path.split('/').filter(|part| !matches!(*part, "" | ".")) {
        prefix.push_str(part);
        let made = rustix::fs::mkdirat(&place, part, mode);
        match made {
            // The umask took some of it.
            Ok(()) => rustix::fs::chmodat(&place, part, mode, AtFlags::empty())?,
            Err(Errno::EXIST) => {}
            Err(error) => return Err(error),
        }
        place = open(&prefix)?;
        prefix.push('/');
    }
    Ok(place)
}

/// Makes a device file for a disk, before the pivot: with a mode and an owner of its own, on a file
/// system that allows devices.
///
/// # Errors
/// The kernel's refusal.
pub(crate) fn make_device<'a>(device: &Device<'a>, number: usize) -> Result<Detached<'a>, Error> {
    let make = || {
        let disk = rustix::fs::stat(format!("/dev/{}", device.name))?;
        let node = format!("{NODES}/device{number}");
        let (mode, spec) = (Mode::from_raw_mode(device.spec.mode & 0o777), device.spec);
        make_node(&node, mode, disk.st_rdev)?;
        let owner = (Uid::from_raw(spec.uid), Gid::from_raw(spec.gid));
        rustix::fs::chown(&node, Some(owner.0), Some(owner.1))?;
        detached(&spec.path, clone_file(&node)?)
    };
    make().context(|| {
        format!(
            "make the device file {} for the disk `{}`",
            device.spec.path, device.spec.serial
        )
    })
}

/// Mounts the tmpfs on which [`make_device`] works.
///
/// # Errors
/// The kernel's refusal.
pub(crate) fn prepare_devices() -> Result<(), Error> {
    let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
    mount("tmpfs", NODES, flags, c"mode=0755,size=64k")
}

fn make_node(path: &str, mode: Mode, device: Dev) -> rustix::io::Result<()> {
    rustix::fs::mknodat(CWD, path, FileType::BlockDevice, mode, device)?;
    rustix::fs::chmod(path, mode)
}

/// A mount of one file, attached nowhere.
pub(crate) fn clone_file(path: &str) -> rustix::io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    rustix::mount::open_tree(CWD, path, flags)
}

/// Attaches a mount at its path in the container, which is made if it is absent.
///
/// # Errors
/// The path cannot be made or is of the wrong kind.
pub(crate) fn attach(mount: &Detached<'_>) -> Result<(), Error> {
    let path = mount.path;
    let place = make_place(path, mount.is_directory)?;
    move_to(&mount.tree, &place).context(|| format!("mount something at {path}"))
}

/// Attaches the mount `tree` at the file or directory `place`.
pub(crate) fn move_to(tree: &OwnedFd, place: &OwnedFd) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(tree, "", place, "", flags)
}

/// Mounts a tmpfs of the container's own, after the pivot.
///
/// # Errors
/// The kernel's refusal.
pub(crate) fn mount_tmpfs(spec: &MountSpec) -> Result<(), Error> {
    let MountSource::Tmpfs { size_bytes, mode } = &spec.source else {
        return Ok(());
    };
    let size = size_bytes.map_or(String::new(), |bytes| format!(",size={bytes}"));
    let options = CString::new(format!("mode={:o}{size}", mode & 0o7777)).unwrap_or_default();
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV;
    flags.set(MountFlags::RDONLY, spec.read_only);
    make_place(&spec.path, true)?;
    mount("tmpfs", &spec.path, flags, &options)
}

/// Opens the file or directory to mount over.
fn make_place(path: &str, is_directory: bool) -> Result<OwnedFd, Error> {
    let open = || {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        rustix::fs::open(path, flags, Mode::empty())
    };
    let make = || {
        match open() {
            Err(Errno::NOENT) => {}
            opened => return Ok(opened?),
        }
        fs::create_dir_all(Path::new(path).parent().unwrap_or(Path::new("/")))?;
        match is_directory {
            true => fs::create_dir(path)?,
            false => {
                let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
                drop(rustix::fs::open(path, flags, Mode::from_raw_mode(0o644))?);
            }
        }
        Ok(open()?)
    };
    make()
        .map_err(|error: std::io::Error| error)
        .context(|| format!("make {path} to mount something there"))
}

/// The device files of a privileged container: all that the kernel has made.
///
/// # Errors
/// They cannot be listed.
pub(crate) fn every_device() -> Result<Vec<(String, OwnedFd)>, Error> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/dev")
        .context(|| "list /dev".into())?
        .flatten()
    {
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let path = format!("/dev/{name}");
        let what = rustix::fs::lstat(&path).context(|| format!("look at {path}"))?;
        let is_device = matches!(
            FileType::from_raw_mode(what.st_mode),
            FileType::CharacterDevice | FileType::BlockDevice
        );
        // Its terminals, the console among them, come from its own devpts.
        if is_device && !matches!(&*name, "ptmx" | "console") {
            let device = clone_file(&path).context(|| format!("clone the device file {path}"))?;
            found.push((path, device));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume() -> (std::path::PathBuf, OwnedFd) {
        static NUMBER: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let name = format!("cube-mounts-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).unwrap();
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let root = rustix::fs::open(&path, flags, Mode::empty()).unwrap();
        (path, root)
    }

    #[test]
    fn a_sub_path_is_made_with_the_mode_of_the_volume() {
        let (path, root) = volume();
        rustix::fs::chmod(&path, Mode::from_raw_mode(0o1777)).unwrap();
        open_beneath(&root, "a/b/./c/").unwrap();
        let what = rustix::fs::stat(path.join("a/b/c")).unwrap();
        assert_eq!(what.st_mode & 0o7777, 0o1777);
        open_beneath(&root, "a/b").unwrap();
        fs::remove_dir_all(path).unwrap();
    }

    #[test]
    fn a_symbolic_link_leads_within_the_volume_or_nowhere() {
        let (path, root) = volume();
        fs::write(path.join("file"), "x").unwrap();
        std::os::unix::fs::symlink("file", path.join("inside")).unwrap();
        open_beneath(&root, "inside").unwrap();
        // Above the volume there may be anything: a name of this test's own.
        let new = format!("new-{}", path.file_name().unwrap().to_string_lossy());
        for (name, target) in [("up", ".."), ("etc", "/etc"), ("self", "/proc/self/root")] {
            std::os::unix::fs::symlink(target, path.join(name)).unwrap();
            for sub_path in [name.to_owned(), format!("{name}/{new}")] {
                let opened = open_beneath(&root, &sub_path);
                assert_eq!(opened.unwrap_err(), Errno::XDEV, "{sub_path}");
            }
        }
        assert!(!path.join("..").join(new).exists());
        fs::remove_dir_all(path).unwrap();
    }

    #[test]
    fn paths_that_climb_are_refused() {
        let mount = |path: &str, sub_path: &str| MountSpec {
            path: path.into(),
            source: MountSource::Volume {
                volume: "v".into(),
                sub_path: sub_path.into(),
            },
            read_only: false,
        };
        assert!(validate(&[mount("/a", ""), mount("/a/b", "c/d")], &[]).is_ok());
        for (path, sub_path) in [("a", ""), ("/a/../b", ""), ("/a", "/b"), ("/a", "b/../..")] {
            assert!(validate(&[mount(path, sub_path)], &[]).is_err());
        }
    }
}
