//! The pod's disks, found by virtio-blk serial and mounted once each.
//!
//! The disks of the command line are probed before init starts, and attaching one later is a write to
//! the bus's `bind` file that returns when the probe is done: so a disk is there or it is not, and nothing
//! ever waits for one.
#![forbid(unsafe_code)]

use std::fs;

use rustix::mount::{MountFlags, UnmountFlags};

use crate::boot::make_directory;
use crate::error::{Context, Error, log_error};

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
    /// What it is mounted as.
    mounted: Option<Use>,
    /// The container that writes to it.
    writer: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    Image,
    Writable,
}

impl Disks {
    /// The directory on which the image disk `serial` is mounted.
    ///
    /// # Errors
    /// No such disk, or it is not an EROFS image, or it is another container's writable disk.
    pub(crate) fn image(&mut self, serial: &str) -> Result<String, Error> {
        let index = self.find(serial)?;
        self.mount(index, Use::Image)
    }

    /// The directory on which the writable disk `serial` is mounted, for `container` alone.
    ///
    /// # Errors
    /// No such disk, or it is not ext4, or it is in use.
    pub(crate) fn writable(&mut self, serial: &str, container: &str) -> Result<String, Error> {
        let index = self.find(serial)?;
        if let Some(writer) = &self.disks[index].writer {
            return Err(Error::Refused(format!(
                "the disk with the serial `{serial}` is in use by the container `{writer}`"
            )));
        }
        let directory = self.mount(index, Use::Writable)?;
        self.disks[index].writer = Some(container.to_owned());
        Ok(directory)
    }

    /// Lets go of what `container` wrote to. The disk stays mounted for the next one.
    pub(crate) fn release(&mut self, container: &str) {
        for disk in &mut self.disks {
            if disk.writer.as_deref() == Some(container) {
                disk.writer = None;
            }
        }
    }

    /// Unmounts everything, so that the writable file systems are clean.
    pub(crate) fn unmount(&mut self) {
        for (index, disk) in self.disks.iter_mut().enumerate() {
            if disk.mounted.take().is_some()
                && let Err(error) = rustix::mount::unmount(directory(index), UnmountFlags::empty())
            {
                log_error(&format!(
                    "cannot unmount the disk `{}`: {error}",
                    disk.serial
                ));
            }
        }
        rustix::fs::sync();
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

    /// Asks each block device not seen before for its serial.
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
                    mounted: None,
                    writer: None,
                });
            }
        }
        Ok(())
    }

    fn mount(&mut self, index: usize, wanted: Use) -> Result<String, Error> {
        let disk = &mut self.disks[index];
        let directory = directory(index);
        match disk.mounted {
            Some(mounted) if mounted == wanted => return Ok(directory),
            Some(_) => {
                return Err(Error::Refused(format!(
                    "the disk with the serial `{}` cannot be an image and writable at once",
                    disk.serial
                )));
            }
            None => {}
        }
        let (file_system, flags) = match wanted {
            Use::Image => ("erofs", MountFlags::RDONLY | MountFlags::NODEV),
            Use::Writable => ("ext4", MountFlags::NODEV | MountFlags::NOATIME),
        };
        make_directory(&directory)?;
        rustix::mount::mount(
            format!("/dev/{}", disk.name),
            &directory,
            file_system,
            flags,
            c"",
        )
        .context(|| {
            format!(
                "mount the disk with the serial `{}` as {file_system}",
                disk.serial
            )
        })?;
        disk.mounted = Some(wanted);
        Ok(directory)
    }
}

/// Numbered, so that no byte of a serial can mean something to overlayfs.
fn directory(index: usize) -> String {
    format!("/run/disk/{index}")
}
