//! Interrupt lines: an eventfd per line (irqfd), and the routes by which KVM turns a line into a message
//! to a local APIC.
//!
//! The guest programs the routes through the I/O APIC. Owner: any vCPU thread, under the I/O APIC's lock.
#![forbid(unsafe_code)]

use std::io;
use std::sync::Arc;

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::vmm::kvm::KvmError;

/// A message to a local APIC (Intel SDM volume 3, section 11.11).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Message address: 0xfee…, destination and its mode.
    pub address: u32,
    /// Message data: vector, delivery mode, trigger.
    pub data: u32,
}

/// Where the I/O APIC puts its routes.
pub trait Routes: Send {
    /// Replaces all routes: pin and message.
    ///
    /// # Errors
    /// KVM refused.
    fn set(&mut self, routes: &[(u32, Message)]) -> io::Result<()>;
}

/// The routes of a VM.
pub struct KvmRoutes(pub Arc<VmFd>);

impl Routes for KvmRoutes {
    fn set(&mut self, routes: &[(u32, Message)]) -> io::Result<()> {
        let entries: Vec<_> = routes
            .iter()
            .map(|(gsi, message)| entry(*gsi, *message))
            .collect();
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(self.0.set_gsi_routing(&table)?)
    }
}

fn entry(gsi: u32, message: Message) -> kvm_irq_routing_entry {
    let msi = kvm_irq_routing_msi {
        address_lo: message.address,
        address_hi: 0,
        data: message.data,
        ..Default::default()
    };
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
        ..Default::default()
    }
}

/// An eventfd that raises interrupt line `line` whenever it is written to.
///
/// # Errors
/// No eventfd can be had, or KVM refused it.
pub fn irqfd(vm: &VmFd, line: u32) -> Result<EventFd, KvmError> {
    let action = "wire an interrupt line";
    let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)
        .map_err(|source| KvmError::Call { action, source })?;
    vm.register_irqfd(&event, line)
        .map_err(KvmError::call(action))?;
    Ok(event)
}
