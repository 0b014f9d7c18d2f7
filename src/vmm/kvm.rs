//! The virtual machine as KVM sees it: the VM, its memory, its interrupt controllers.
//!
//! The order of the calls is chosen by measurement. The interrupt chip is *split*: local APICs in the
//! kernel, the I/O APIC here (`ioapic`). Creating the whole chip in the kernel puts five devices on KVM's
//! buses, and each change of a bus or of the memory map then waits for a grace period: 7 ms or more
//! on some hosts. Split, only the memory map waits, and irqfds are MSIs, which KVM delivers without a detour.
//! That wait ends when a kernel thread of the first CPU has run, which waits itself for whoever is in the kernel
//! there: so the memory comes last, when no other thread of the machine has anything to do.
//!
//! Unsafe because the kernel is told where guest memory lies in this process.
#![allow(unsafe_code)]

use std::io;
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_MEM_READONLY, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use crate::vmm::layout;
use crate::vmm::memory::GuestMemory;
use crate::vmm::virtio::mmio::Windows;

/// What KVM refused.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// There is no `/dev/kvm`.
    #[error(
        "this host has no /dev/kvm: load the kvm_intel or kvm_amd module, and in a virtual machine turn \
         nested virtualization on"
    )]
    Missing,
    /// `/dev/kvm` is not for this user.
    #[error("no permission to open /dev/kvm: run as root or as a member of the group `kvm`")]
    Permission,
    /// `/dev/kvm` cannot be opened for another reason.
    #[error("cannot open /dev/kvm: {0}")]
    Open(io::Error),
    /// A call failed.
    #[error("KVM cannot {action}: {source}")]
    Call {
        /// What was asked, as a verb phrase.
        action: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl KvmError {
    /// For `map_err`: the call that was to do `action` failed.
    pub fn call(action: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |error| Self::Call {
            action,
            source: error.into(),
        }
    }
}

/// Opens `/dev/kvm`.
///
/// # Errors
/// A sentence for each of the usual reasons.
pub fn open() -> Result<Kvm, KvmError> {
    open_at(c"/dev/kvm")
}

fn open_at(path: &std::ffi::CStr) -> Result<Kvm, KvmError> {
    Kvm::new_with_path(path).map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => KvmError::Missing,
        libc::EACCES | libc::EPERM => KvmError::Permission,
        _ => KvmError::Open(error.into()),
    })
}

/// A VM with local APICs. It keeps the guest's memory alive as long as KVM may use it.
pub struct Vm {
    // Dropped in this order: KVM's hold on the memory ends before the memory does.
    fd: Arc<VmFd>,
    memory: GuestMemory,
    windows: Windows,
}

impl Vm {
    /// Creates the VM for a machine with that many virtio-mmio slots. KVM does not know its memory until
    /// [`Vm::set_memory`].
    ///
    /// # Errors
    /// The call that failed.
    pub fn create(kvm: &Kvm, memory: GuestMemory, slots: usize) -> Result<Self, KvmError> {
        let fd = kvm.create_vm().map_err(KvmError::call("create a VM"))?;
        let mut split = kvm_enable_cap {
            cap: KVM_CAP_SPLIT_IRQCHIP,
            ..Default::default()
        };
        split.args[0] = layout::ioapic_pins(slots).into();
        fd.enable_cap(&split)
            .map_err(KvmError::call("split the interrupt chip"))?;
        Ok(Self {
            fd: Arc::new(fd),
            memory,
            windows: Windows::new(slots),
        })
    }

    /// Gives the guest its memory, and the windows of its virtio-mmio slots to read: once, before a vCPU runs.
    ///
    /// # Errors
    /// The call that failed.
    pub fn set_memory(&self) -> Result<(), KvmError> {
        let memory = self.memory.iter().map(|region| {
            let start = region.start_addr().raw_value();
            (0, start, region.as_ptr().cast_const(), region.len())
        });
        let windows = (
            KVM_MEM_READONLY,
            layout::SLOTS,
            self.windows.address(),
            self.windows.length() as u64,
        );
        let ranges = memory.chain(std::iter::once(windows));
        let ranges = ranges.filter(|(.., length)| *length > 0);
        for (slot, (flags, guest_phys_addr, address, memory_size)) in (0..).zip(ranges) {
            let region = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr,
                memory_size,
                userspace_addr: address as u64,
            };
            // SAFETY: the range is a mapping that `self.memory` owns, or all of `self.windows`, and `Vm` drops
            // its VM before them. vCPUs, which keep the VM alive, are joined before the machine drops its
            // `Vm`. The mapping is only ever accessed as volatile memory, and the windows, which the guest
            // cannot write, are atomics.
            unsafe { self.fd.set_user_memory_region(region) }
                .map_err(KvmError::call("give the guest its memory"))?;
        }
        Ok(())
    }

    /// The windows of the virtio-mmio slots.
    pub fn windows(&self) -> &Windows {
        &self.windows
    }

    /// The VM's descriptor.
    pub fn fd(&self) -> &Arc<VmFd> {
        &self.fd
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_kvm_is_told_what_to_do() {
        let error = open_at(c"/nonexistent/kvm").unwrap_err().to_string();
        assert!(
            error.starts_with("this host has no /dev/kvm: load the kvm_intel"),
            "{error}"
        );
        let error = open_at(c"/").unwrap_err().to_string();
        assert!(error.starts_with("cannot open /dev/kvm: "), "{error}");
    }
}
