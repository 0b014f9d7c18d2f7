//! The pod's volumes: each a directory that containers mount, alone or a part of it.
//!
//! All are below one shared mount, so that an unmount here is one in a child that was just forked, too.
#![forbid(unsafe_code)]

pub(crate) mod files;
pub(crate) mod nfs;

use std::ffi::CString;

use cube_guest::files::MAX_SET;
use cube_guest::{VolumeSource, VolumeSpec};
use rustix::fs::{Mode, OFlags};
use rustix::mount::{MountFlags, UnmountFlags};

use crate::boot::make_directory;
use crate::container::is_file_name;
use crate::disks::{self, Disks, FileSystem, Use};
use crate::error::{Context, Error};

/// Where volumes are mounted.
pub(crate) const VOLUMES: &str = "/run/volume";
/// What a volume of files takes at most: two sets while one replaces the other, their directories, and
/// the rest of each file's last page.
const FILES_SIZE: u64 = 3 * MAX_SET;

/// The volumes.
#[derive(Debug, Default)]
pub(crate) struct Volumes {
    volumes: Vec<Volume>,
}

#[derive(Debug)]
struct Volume {
    name: String,
    directory: String,
    kind: Kind,
    /// Which containers have it.
    users: Vec<String>,
    /// A job works on it: it is being mounted, written or removed.
    is_busy: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Memory,
    Disk,
    Files,
    Nfs,
}

/// What is left to do for a volume that was added.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Added {
    /// It is there.
    Ready,
    /// A job mounts it, for it may take its time.
    Mount(nfs::Export),
}

impl Volumes {
    /// Makes a volume.
    ///
    /// # Errors
    /// The name is taken or cannot be a file's, the disk is not to be had, the kernel refuses.
    pub(crate) fn add(&mut self, spec: &VolumeSpec, disks: &mut Disks) -> Result<Added, Error> {
        let name = &spec.name;
        is_file_name("volume name", name)?;
        if self.volumes.iter().any(|volume| volume.name == *name) {
            return Err(Error::Refused(format!(
                "the pod already has a volume `{name}`"
            )));
        }
        let mut volume = Volume {
            name: name.clone(),
            directory: format!("{VOLUMES}/{name}"),
            kind: Kind::Memory,
            users: Vec::new(),
            is_busy: false,
        };
        let mut added = Added::Ready;
        match &spec.source {
            VolumeSource::Memory { size_bytes } => {
                let size = size_bytes.map_or(String::new(), |bytes| format!(",size={bytes}"));
                volume.mount_tmpfs(&format!("mode=0777{size}"))?;
            }
            VolumeSource::Files => {
                volume.kind = Kind::Files;
                volume.mount_tmpfs(&format!("mode=0755,size={FILES_SIZE}"))?;
            }
            VolumeSource::Disk {
                serial,
                file_system,
                root_mode,
                read_only,
            } => {
                let wanted = Use::Volume {
                    file_system: FileSystem::named(file_system)?,
                    read_only: *read_only,
                };
                volume.kind = Kind::Disk;
                volume.directory = disks::directory(&disks.claim(serial, wanted, &user(name))?);
                if let Some(mode) = root_mode
                    && let Err(error) = set_mode(&volume.directory, *mode)
                {
                    disks.release(&user(name));
                    return Err(error);
                }
            }
            VolumeSource::Nfs {
                server,
                path,
                options,
                read_only,
            } => {
                volume.kind = Kind::Nfs;
                let export = nfs::Export::new(server, path, options, *read_only)?;
                make_directory(&volume.directory)?;
                volume.is_busy = true;
                added = Added::Mount(export.at(&volume.directory));
            }
        }
        self.volumes.push(volume);
        Ok(added)
    }

    /// Takes the volume `name` for `user`. Returns its directory.
    ///
    /// # Errors
    /// There is no such volume, or not yet.
    pub(crate) fn claim(&mut self, name: &str, user: &str) -> Result<String, Error> {
        let volume = self.idle(name, true)?;
        volume.users.push(user.to_owned());
        Ok(volume.directory.clone())
    }

    /// Lets go of everything that `user` took.
    pub(crate) fn release(&mut self, user: &str) {
        for volume in &mut self.volumes {
            volume.users.retain(|other| other != user);
        }
    }

    /// Begins a write of a volume of files. Returns its directory.
    ///
    /// # Errors
    /// There is no such volume, it is of another kind, or it is being written.
    pub(crate) fn begin_write(&mut self, name: &str) -> Result<String, Error> {
        let volume = self.idle(name, false)?;
        if volume.kind != Kind::Files {
            return Err(Error::Refused(format!(
                "the volume `{name}` is not one of files that the host writes"
            )));
        }
        volume.is_busy = true;
        Ok(volume.directory.clone())
    }

    /// Begins the removal of a volume. Returns the directory to unmount or, for one on a disk, to write back.
    ///
    /// # Errors
    /// There is no such volume, or something uses it.
    pub(crate) fn begin_removal(&mut self, name: &str) -> Result<Leaving, Error> {
        let volume = self.idle(name, false)?;
        if !volume.users.is_empty() {
            return Err(Error::Refused(format!(
                "the volume `{name}` is in use by {}",
                volume.users.join(", ")
            )));
        }
        volume.is_busy = true;
        Ok(Leaving {
            directory: volume.directory.clone(),
            is_disk: volume.kind == Kind::Disk,
        })
    }

    /// The job on a volume is done.
    pub(crate) fn end_job(&mut self, name: &str) {
        if let Some(volume) = self.volumes.iter_mut().find(|volume| volume.name == name) {
            volume.is_busy = false;
        }
    }

    /// Forgets a volume that was unmounted, or never was mounted.
    pub(crate) fn forget(&mut self, name: &str, disks: &mut Disks) {
        self.volumes.retain(|volume| volume.name != name);
        let _ = rustix::fs::rmdir(format!("{VOLUMES}/{name}"));
        disks.release(&user(name));
    }

    /// Unmounts what would keep a server waiting; the rest goes with the machine, or is a disk.
    pub(crate) fn unmount(&self) {
        let remote = self
            .volumes
            .iter()
            .filter(|volume| volume.kind == Kind::Nfs);
        for volume in remote.filter(|volume| !volume.is_busy) {
            let flags = UnmountFlags::FORCE | UnmountFlags::DETACH;
            let _ = rustix::mount::unmount(&*volume.directory, flags);
        }
    }

    /// The volume, if no job is at work on it; a write does not keep containers from it (`even_written`).
    fn idle(&mut self, name: &str, even_written: bool) -> Result<&mut Volume, Error> {
        let volume = self.volumes.iter_mut().find(|volume| volume.name == name);
        let volume =
            volume.ok_or_else(|| Error::Refused(format!("the pod has no volume `{name}`")))?;
        if volume.is_busy && !(even_written && volume.kind == Kind::Files) {
            return Err(Error::Refused(format!(
                "the volume `{name}` is being mounted, written or removed"
            )));
        }
        Ok(volume)
    }
}

/// What a removal has to do first.
#[derive(Debug)]
pub(crate) struct Leaving {
    pub(crate) directory: String,
    is_disk: bool,
}

impl Leaving {
    /// Does it: what may wait for a disk or a server, so in a process of its own.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub(crate) fn perform(&self) -> Result<(), Error> {
        match self.is_disk {
            true => write_back(&self.directory),
            false => rustix::mount::unmount(&*self.directory, UnmountFlags::empty())
                .context(|| format!("unmount {}", self.directory)),
        }
    }
}

/// Writes a file system back to its disk.
///
/// # Errors
/// The disk's.
pub(crate) fn write_back(directory: &str) -> Result<(), Error> {
    let write_back = || {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(directory, flags, Mode::empty())?;
        rustix::fs::syncfs(directory)
    };
    write_back().context(|| format!("write {directory} back to its disk"))
}

impl Volume {
    fn mount_tmpfs(&self, options: &str) -> Result<(), Error> {
        make_directory(&self.directory)?;
        let options = CString::new(options).unwrap_or_default();
        let flags = MountFlags::NODEV;
        rustix::mount::mount("tmpfs", &*self.directory, "tmpfs", flags, &*options)
            .context(|| format!("mount the volume `{}` as a tmpfs", self.name))
    }
}

fn set_mode(directory: &str, mode: u32) -> Result<(), Error> {
    rustix::fs::chmod(directory, Mode::from_raw_mode(mode & 0o7777))
        .context(|| format!("set the mode of {directory} to {mode:o}"))
}

/// Who a volume is to the disks.
fn user(name: &str) -> String {
    format!("the volume `{name}`")
}
