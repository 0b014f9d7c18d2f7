//! The pod's disks, found by virtio-blk serial, mounted once each and unmounted with their last user.
//!
//! The disks of the command line are probed before init starts, and attaching one later is a write to
//! the bus's `bind` file that returns when the probe is done: so a disk is there or it is not, and nothing
//! ever waits for one.
#![forbid(unsafe_code)]

use std::fs;

use rustix::mount::{MountFlags, UnmountFlags};

use crate::boot::make_directory;
use crate::error::{Context, Error, log_error};

/// Where disks are mounted.
pub(crate) const DISKS: &str = "/run/disk";

/// The disks seen so far.
#[derive(Debug, Default)]
pub(crate) struct Disks {
    disks: Vec<Disk>,
}

#[derive(Debug)]
struct Disk {
    /// The kernel's name, such as `vda`.
    name: String,
    serial: String,
    /// What it is used as, while it has users.
    used_as: Option<Use>,
    /// Who uses it, such as ``the container `web` ``.
    users: Vec<String>,
}

/// How a disk is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Use {
    /// An EROFS image, by any number of containers.
    Image,
    /// The ext4 file system for one container's changes.
    Writable,
    /// The file system of one volume.
    Volume {
        file_system: FileSystem,
        read_only: bool,
    },
    /// A device file, in any number of containers.
    Device,
}

/// What a volume's disk may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileSystem {
    Ext4,
    Erofs,
}

impl FileSystem {
    /// By the kernel's name.
    ///
    /// # Errors
    /// It is another.
    pub(crate) fn named(name: &str) -> Result<Self, Error> {
        match name {
            "ext4" => Ok(Self::Ext4),
            "erofs" => Ok(Self::Erofs),
            _ => Err(Error::Refused(format!(
                "the file system `{}` is not supported: ext4 and erofs are",
                name.escape_debug()
            ))),
        }
    }
}

impl Use {
    fn is_shared(self) -> bool {
        matches!(self, Self::Image | Self::Device)
    }

    /// What to mount; `None`: nothing.
    fn mount(self) -> Option<(&'static str, MountFlags)> {
        let read_only = MountFlags::RDONLY | MountFlags::NODEV;
        match self {
            Self::Image => Some(("erofs", read_only)),
            Self::Writable => Some(("ext4", MountFlags::NODEV | MountFlags::NOATIME)),
            Self::Volume {
                file_system,
                read_only: is_read_only,
            } => Some(match (file_system, is_read_only) {
                (FileSystem::Erofs, _) => ("erofs", read_only),
                (FileSystem::Ext4, true) => ("ext4", read_only),
                (FileSystem::Ext4, false) => ("ext4", MountFlags::NODEV),
            }),
            Self::Device => None,
        }
    }
}

impl Disks {
    /// Takes the disk `serial` for `user`, mounted if the use is one of its file system. Returns the
    /// kernel's name of it.
    ///
    /// # Errors
    /// No such disk, not the file system that it should have, or a use that excludes this one.
    pub(crate) fn claim(&mut self, serial: &str, wanted: Use, user: &str) -> Result<String, Error> {
        let index = self.find(serial)?;
        let disk = &mut self.disks[index];
        match disk.used_as {
            None => {
                disk.mount(wanted)?;
                disk.used_as = Some(wanted);
            }
            Some(now) if now == wanted && now.is_shared() => {}
            Some(_) => {
                return Err(Error::Refused(format!(
                    "the disk with the serial `{serial}` is in use by {}",
                    disk.users.join(", ")
                )));
            }
        }
        disk.users.push(user.to_owned());
        Ok(disk.name.clone())
    }

    /// Lets go of everything that `user` took; a disk without a user is unmounted.
    pub(crate) fn release(&mut self, user: &str) {
        for disk in &mut self.disks {
            disk.users.retain(|other| other != user);
            if disk.users.is_empty() {
                disk.unmount();
            }
        }
    }

    /// The directories of file systems that `user` alone can write: what to write back before
    /// [`Disks::release`], which would wait for it.
    pub(crate) fn written_by(&self, user: &str) -> Vec<String> {
        let written = self.disks.iter().filter(|disk| {
            let writes = match disk.used_as {
                Some(Use::Writable) => true,
                Some(Use::Volume { read_only, .. }) => !read_only,
                _ => false,
            };
            writes && disk.users.iter().any(|other| other == user)
        });
        written.map(|disk| directory(&disk.name)).collect()
    }

    /// Unmounts everything, so that the writable file systems are clean.
    pub(crate) fn unmount(&mut self) {
        for disk in &mut self.disks {
            disk.unmount();
        }
        rustix::fs::sync();
    }

    /// Forgets the block device `name`, which is about to go.
    ///
    /// # Errors
    /// It is in use.
    pub(crate) fn forget(&mut self, name: &str) -> Result<(), Error> {
        let Some(index) = self.disks.iter().position(|disk| disk.name == name) else {
            return Ok(());
        };
        let disk = &self.disks[index];
        if !disk.users.is_empty() {
            return Err(Error::Refused(format!(
                "the disk with the serial `{}` is in use by {}",
                disk.serial,
                disk.users.join(", ")
            )));
        }
        self.disks.remove(index);
        Ok(())
    }

    fn find(&mut self, serial: &str) -> Result<usize, Error> {
        let known = |disks: &[Disk]| disks.iter().position(|disk| disk.serial == serial);
        if let Some(index) = known(&self.disks) {
            return Ok(index);
        }
        self.scan()?;
        known(&self.disks).ok_or_else(|| {
            let serials: Vec<&str> = self.disks.iter().map(|disk| &*disk.serial).collect();
            Error::Refused(format!(
                "no disk has the serial `{serial}`; the machine's disks are: {}",
                serials.join(", ")
            ))
        })
    }

    /// Asks each block device not seen before for its serial: one request to the device each.
    fn scan(&mut self) -> Result<(), Error> {
        let entries = fs::read_dir("/sys/block").context(|| "list /sys/block".into())?;
        for entry in entries {
            let name = entry.context(|| "list /sys/block".into())?.file_name();
            let Ok(name) = name.into_string() else {
                continue;
            };
            if self.disks.iter().any(|disk| disk.name == name) {
                continue;
            }
            // Devices that are not virtio-blk have no such file.
            if let Ok(serial) = fs::read_to_string(format!("/sys/block/{name}/serial")) {
                self.disks.push(Disk {
                    name,
                    serial: serial.trim_end_matches('\n').to_owned(),
                    used_as: None,
                    users: Vec::new(),
                });
            }
        }
        Ok(())
    }
}

impl Disk {
    fn mount(&self, wanted: Use) -> Result<(), Error> {
        let Some((file_system, flags)) = wanted.mount() else {
            return Ok(());
        };
        let directory = directory(&self.name);
        make_directory(&directory)?;
        let device = format!("/dev/{}", self.name);
        rustix::mount::mount(device, &directory, file_system, flags, c"").context(|| {
            format!(
                "mount the disk with the serial `{}` as {file_system}",
                self.serial
            )
        })
    }

    fn unmount(&mut self) {
        if self.used_as.take().and_then(Use::mount).is_some()
            && let Err(error) = rustix::mount::unmount(directory(&self.name), UnmountFlags::empty())
        {
            log_error(&format!(
                "cannot unmount the disk `{}`: {error}",
                self.serial
            ));
        }
    }
}

/// Where the file system of the block device `name` is mounted. The kernel's name, so that no byte of a
/// serial can mean something to overlayfs.
pub(crate) fn directory(name: &str) -> String {
    format!("{DISKS}/{name}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disks() -> Disks {
        let disk = |name: &str, serial: &str| Disk {
            name: name.into(),
            serial: serial.into(),
            used_as: None,
            users: Vec::new(),
        };
        Disks {
            disks: vec![disk("vda", "a"), disk("vdb", "b")],
        }
    }

    #[test]
    fn a_device_is_shared_with_its_like_and_with_nothing_else() {
        let mut disks = disks();
        assert_eq!(disks.claim("a", Use::Device, "x").unwrap(), "vda");
        assert_eq!(disks.claim("a", Use::Device, "y").unwrap(), "vda");
        let refused = disks
            .claim("a", Use::Writable, "z")
            .unwrap_err()
            .to_string();
        assert_eq!(refused, "the disk with the serial `a` is in use by x, y");
        assert!(disks.forget("vda").is_err());
        disks.release("x");
        assert!(disks.forget("vda").is_err());
        disks.release("y");
        assert_eq!(disks.disks[0].used_as, None);
        disks.forget("vda").unwrap();
        assert_eq!(disks.disks.len(), 1);
        disks.forget("vdz").unwrap();
    }

    #[test]
    fn what_was_written_is_what_to_write_back() {
        let mut disks = disks();
        disks.disks[0].used_as = Some(Use::Writable);
        disks.disks[0].users.push("x".into());
        disks.disks[1].used_as = Some(Use::Image);
        disks.disks[1].users.push("x".into());
        assert_eq!(disks.written_by("x"), ["/run/disk/vda"]);
        assert!(disks.written_by("y").is_empty());
    }

    #[test]
    fn other_file_systems_are_refused_by_name() {
        let refused = FileSystem::named("xfs").unwrap_err().to_string();
        assert!(refused.contains("`xfs`"), "{refused}");
    }
}
