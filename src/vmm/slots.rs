//! The virtio-mmio slots of a machine: a window, an interrupt line and, while a device is in it, an
//! ioeventfd for its notifications.
//!
//! Empty slots are there from the start (the kernel's command line declares them), so that a device can be
//! attached while the machine runs, without changing a bus that vCPU threads read.
#![forbid(unsafe_code)]

use std::io;
use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};

use crate::vmm::bus::BusBuilder;
use crate::vmm::devices::DeviceError;
use crate::vmm::irq;
use crate::vmm::kvm::{KvmError, Vm};
use crate::vmm::layout;
use crate::vmm::virtio::mmio::{INTERRUPT_ACK, MmioTransport, QUEUE_NOTIFY};
use crate::vmm::virtio::{Counters, INTERRUPT_USED_BUFFER, VirtioDevice};
use crate::vmm::worker::Worker;

/// All slots, filled and empty.
pub struct Slots {
    vm: Arc<VmFd>,
    slots: Vec<Arc<MmioTransport>>,
}

/// Where a device went.
pub struct Attached {
    /// Number of the slot.
    pub slot: usize,
    /// What the device has done.
    pub counters: Arc<Counters>,
}

impl Slots {
    /// That many empty slots, each wired to its interrupt line. Without a worker there are none.
    ///
    /// # Errors
    /// KVM refused, or no eventfd can be had.
    pub fn new(vm: &Vm, worker: Option<&Worker>, count: usize) -> Result<Self, KvmError> {
        let mut slots = Vec::new();
        if let Some(worker) = worker {
            for slot in 0..count {
                let line = irq::irqfd(vm.fd(), layout::slot_irq(slot))?;
                let made = match vm.windows().of_slot(slot) {
                    Some(window) => {
                        MmioTransport::new(vm.memory().clone(), worker.handle(), line, window)
                    }
                    None => Err(io::Error::other("the machine was made for fewer")),
                };
                slots.push(Arc::new(made.map_err(|source| KvmError::Call {
                    action: "make a virtio slot",
                    source,
                })?));
            }
        }
        Ok(Self {
            vm: vm.fd().clone(),
            slots,
        })
    }

    /// Puts every slot on the bus.
    pub fn add_to(&self, bus: &mut BusBuilder) {
        for (slot, transport) in self.slots.iter().enumerate() {
            bus.add(
                layout::slot_address(slot),
                layout::SLOT_SIZE,
                transport.clone(),
            );
        }
    }

    /// Puts a device into the first empty slot.
    ///
    /// # Errors
    /// All slots are taken, or KVM refused the ioeventfd.
    pub fn attach(&self, device: Box<dyn VirtioDevice>) -> Result<Attached, DeviceError> {
        let name = device.name();
        let mut device = device;
        for (slot, transport) in self.slots.iter().enumerate() {
            match transport.attach(device) {
                Ok(counters) => {
                    return match self.listen(slot, transport) {
                        Ok(()) => Ok(Attached { slot, counters }),
                        Err(source) => {
                            // What KVM watches already, it watches no more.
                            drop(self.detach(slot));
                            Err(DeviceError::Notify { name, source })
                        }
                    };
                }
                Err(refused) => device = refused,
            }
        }
        Err(DeviceError::NoSlot { name })
    }

    /// Takes the device out of a slot, stopped; the guest's driver was unbound before.
    pub fn detach(&self, slot: usize) -> Option<Box<dyn VirtioDevice>> {
        let transport = self.slots.get(slot)?;
        let ack = transport.acknowledged();
        let device = transport.detach()?;
        // If KVM has forgotten one, nothing is left to forget.
        if let Some(ack) = ack {
            let (address, used) = (acknowledge_address(slot), INTERRUPT_USED_BUFFER);
            let _ = self.vm.unregister_ioevent(ack, &address, used);
        }
        let address = notify_address(slot);
        if device.kicks().is_empty() {
            let _ = self
                .vm
                .unregister_ioevent(transport.kick(), &address, NoDatamatch);
        }
        for (queue, kick) in (0_u32..).zip(device.kicks()) {
            let _ = self.vm.unregister_ioevent(kick, &address, queue);
        }
        Some(device)
    }

    fn listen(&self, slot: usize, transport: &MmioTransport) -> io::Result<()> {
        if let Some(acknowledged) = transport.acknowledged() {
            let address = acknowledge_address(slot);
            self.vm
                .register_ioevent(acknowledged, &address, INTERRUPT_USED_BUFFER)?;
        }
        let address = notify_address(slot);
        let kicks = transport.queue_kicks()?;
        if kicks.is_empty() {
            return Ok(self
                .vm
                .register_ioevent(transport.kick(), &address, NoDatamatch)?);
        }
        for (queue, kick) in (0_u32..).zip(&kicks) {
            self.vm.register_ioevent(kick, &address, queue)?;
        }
        Ok(())
    }
}

fn acknowledge_address(slot: usize) -> IoEventAddress {
    IoEventAddress::Mmio(layout::slot_address(slot) + INTERRUPT_ACK)
}

fn notify_address(slot: usize) -> IoEventAddress {
    IoEventAddress::Mmio(layout::slot_address(slot) + QUEUE_NOTIFY)
}
