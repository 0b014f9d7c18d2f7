//! The machine as the supervisor sees it: where disks go, and what it can tell of itself.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;

use super::interfaces::NetSlots;
use crate::vmm::machine::{NetPort, Running};
use crate::vmm::own_memory::OwnMemory;
use crate::vmm::spec::{DiskSpec, NetSpec};
use crate::vmm::timeline::Entry;

/// The machine, or what stands in for it in tests and after its end.
pub(crate) trait Machinery: NetSlots {
    /// Puts a disk into an empty slot.
    fn attach(&self, disk: &DiskSpec) -> Result<u16, String>;
    /// Takes a disk out of a slot.
    fn detach(&self, slot: u16);
    /// Whether its vsock device takes streams that are passed on.
    fn takes_streams(&self) -> bool;
    /// The stages of its life so far.
    fn timeline(&self) -> Vec<Entry>;
    /// What this process costs apart from the guest's memory.
    fn own_memory(&self) -> io::Result<OwnMemory>;
}

impl Machinery for Running {
    fn attach(&self, disk: &DiskSpec) -> Result<u16, String> {
        let slot = self.attach_disk(disk).map_err(|error| error.to_string())?;
        u16::try_from(slot).map_err(|error| error.to_string())
    }

    fn detach(&self, slot: u16) {
        drop(self.slots().detach(slot.into()));
    }

    fn takes_streams(&self) -> bool {
        true
    }

    fn timeline(&self) -> Vec<Entry> {
        Running::timeline(self)
    }

    fn own_memory(&self) -> io::Result<OwnMemory> {
        Running::own_memory(self)
    }
}

/// A machine that has ended.
pub(crate) struct Ended;

impl Machinery for Ended {
    fn attach(&self, _: &DiskSpec) -> Result<u16, String> {
        Err("the machine has ended".to_owned())
    }

    fn detach(&self, _: u16) {}

    fn takes_streams(&self) -> bool {
        false
    }

    fn timeline(&self) -> Vec<Entry> {
        Vec::new()
    }

    fn own_memory(&self) -> io::Result<OwnMemory> {
        Err(io::Error::other("the machine has ended"))
    }
}

impl NetSlots for Ended {
    fn first_nets(&self) -> Vec<NetPort> {
        Vec::new()
    }

    fn cpus(&self) -> usize {
        0
    }

    fn attach_net(&self, _: &NetSpec, _: Vec<OwnedFd>) -> Result<NetPort, String> {
        Err("the machine has ended".to_owned())
    }
}
