//! virtio-mmio slots: the host fills or empties one, the guest binds or unbinds its driver.
//!
//! The kernel numbers its `virtio-mmio.N` devices in the order of the command line, as the host numbers
//! its slots. An empty slot's device has no driver; writing its name to `bind` probes it again, and
//! the write returns when the device behind it is there.
#![forbid(unsafe_code)]

use std::fs;

use crate::disks::Disks;
use crate::error::{Context, Error};

const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";

/// Binds the slot's device to its driver.
///
/// # Errors
/// The machine has no such slot, or it is empty, or it is bound.
pub(crate) fn bind(slot: u16) -> Result<(), Error> {
    check(slot)?;
    write("bind", slot)
}

/// Unbinds it; a disk in it is forgotten.
///
/// # Errors
/// Its disk is in use, or it is not bound.
pub(crate) fn unbind(slot: u16, disks: &mut Disks) -> Result<(), Error> {
    check(slot)?;
    for name in block_devices(slot) {
        disks.forget(&name)?;
    }
    write("unbind", slot)
}

fn check(slot: u16) -> Result<(), Error> {
    match rustix::fs::stat(device(slot)) {
        Ok(_) => Ok(()),
        Err(_) => Err(Error::Refused(format!(
            "the machine has no virtio slot {slot}"
        ))),
    }
}

fn write(file: &str, slot: u16) -> Result<(), Error> {
    fs::write(format!("{DRIVER}/{file}"), format!("virtio-mmio.{slot}"))
        .context(|| format!("{file} the device in the virtio slot {slot}"))
}

fn device(slot: u16) -> String {
    format!("/sys/bus/platform/devices/virtio-mmio.{slot}")
}

/// `virtioN/block/vdX` below the slot's device.
fn block_devices(slot: u16) -> Vec<String> {
    let names = |path: String| {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok())
    };
    names(device(slot))
        .filter(|name| name.starts_with("virtio"))
        .flat_map(|name| names(format!("{}/{name}/block", device(slot))))
        .collect()
}
