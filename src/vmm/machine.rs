//! Puts a machine together and runs it.
//!
//! ```text
//! ValidSpec ──build──▶ Machine ──start──▶ Running ──stop──▶ End
//!                      (no vCPU has run)  (threads: worker, vcpu-N)
//! ```
//!
//! `main` owns all of it: it polls [`Running::ended`] and [`Running::device_failure`] and may stop the
//! machine at any time. Dropping a [`Running`] stops it as well.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use cube_guest::network::MacAddress;
use kvm_ioctls::VcpuFd;

use crate::vmm::boot::{self, BootError, BootFiles, EntryPoint};
use crate::vmm::bus::{BusBuilder, Overlap};
use crate::vmm::cpu::{self, CpuModel};
use crate::vmm::devices::{self, DeviceError, Devices, NetDevice};
use crate::vmm::exit::{End, Ending};
use crate::vmm::files::FileError;
use crate::vmm::ioapic::IoApic;
use crate::vmm::irq::{self, KvmRoutes};
use crate::vmm::kvm::{self, KvmError, Vm};
use crate::vmm::layout;
use crate::vmm::memory;
use crate::vmm::ports::Ports;
use crate::vmm::seccomp;
use crate::vmm::serial::{self, Serial};
use crate::vmm::slots::Slots;
use crate::vmm::spec::{DiskSpec, NetSpec, ValidSpec};
use crate::vmm::stats::Stats;
use crate::vmm::thread::{self, Role};
use crate::vmm::timeline::{Stage, Timeline};
use crate::vmm::vcpu::{self, Platform, VcpuThread};
use crate::vmm::virtio::VirtioDevice;
use crate::vmm::virtio::blk::Blk;
use crate::vmm::virtio::net::NetControl;
use crate::vmm::virtio::vhost_user;
use crate::vmm::worker::{Worker, WorkerError};

/// Why a machine could not be built or started. All are the host's faults or the spec's, not the guest's.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// A file of the spec cannot be opened.
    #[error(transparent)]
    File(#[from] FileError),
    /// The guest's memory could not be filled.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A device could not be made.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The guest's memory could not be reserved.
    #[error("cannot reserve {0} MiB of guest memory: {1}")]
    Memory(u32, vm_memory::mmap::FromRangesError),
    /// The console's file could not be created.
    #[error("cannot create the console file {path}: {source}")]
    Console {
        /// The file.
        path: std::path::PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
    /// The worker could not be started.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// The layout is contradictory.
    #[error(transparent)]
    Layout(#[from] Overlap),
    /// A thread or an eventfd could not be had.
    #[error("cannot start the machine's threads: {0}")]
    Threads(#[source] io::Error),
}

/// A network device in its slot.
#[derive(Clone)]
pub struct NetPort {
    /// The network's name.
    pub name: String,
    /// The guest's address on it.
    pub mac: MacAddress,
    /// Number of the slot.
    pub slot: usize,
    /// The way to change and watch it; none: its frames do not pass through this process.
    pub control: Option<NetControl>,
}

/// A machine that is ready to start.
pub struct Machine {
    // In the order in which they must go: what uses KVM, then the VM with its memory.
    vcpus: Vec<VcpuFd>,
    platform: Platform,
    slots: Slots,
    nets: Vec<NetPort>,
    worker: Option<Worker>,
    vm: Vm,
}

impl Machine {
    /// Builds a machine: all files opened, all memory filled, all devices in their slots. With
    /// `count_exits`, the timeline's later stages carry the exits of all vCPUs.
    ///
    /// The kernel is loaded by a second thread while this one talks to KVM, whose calls sleep.
    ///
    /// # Errors
    /// [`MachineError`]; nothing is left behind.
    pub fn build(
        spec: &ValidSpec,
        timeline: &Arc<Timeline>,
        count_exits: bool,
    ) -> Result<Self, MachineError> {
        let files = BootFiles::open(spec)?;
        let Devices { devices, nets } = devices::open(spec)?;
        let allocate = match spec.shares_memory() {
            true => memory::allocate_shared,
            false => memory::allocate,
        };
        let memory = allocate(spec.memory_bytes(), spec.huge_pages)
            .map_err(|error| MachineError::Memory(spec.memory_mib, error))?;
        std::thread::scope(|scope| {
            let load = || {
                let entry = boot::load(&memory, spec, files);
                timeline.record(Stage::KernelLoaded);
                entry
            };
            let loader = std::thread::Builder::new()
                .name("loader".into())
                .stack_size(thread::STACK)
                .spawn_scoped(scope, load)
                .map_err(MachineError::Threads)?;
            let kvm = kvm::open()?;
            let vm = Vm::create(&kvm, memory.clone(), layout::ioapic_pins(spec.slots()))?;
            timeline.record(Stage::VmCreated);
            let model = CpuModel::of_this_host(&kvm, spec.cpus)?;
            let vcpus = create_vcpus(&vm, &model)?;
            let mut machine = Self::assemble(spec, vm, vcpus, timeline)?;
            machine.attach(devices, nets)?;
            if count_exits {
                machine.platform.stats.watch(&machine.vcpus);
            }
            let entry = match loader.join() {
                Ok(entry) => entry?,
                Err(panic) => std::panic::resume_unwind(panic),
            };
            machine.enter(entry)?;
            Ok(machine)
        })
    }

    fn assemble(
        spec: &ValidSpec,
        vm: Vm,
        vcpus: Vec<VcpuFd>,
        timeline: &Arc<Timeline>,
    ) -> Result<Self, MachineError> {
        seccomp::install_handler().map_err(MachineError::Threads)?;
        let worker = match spec.slots() {
            0 => None,
            _ => Some(Worker::spawn("worker", || thread::begin(Role::Worker))?),
        };
        let slots = Slots::new(&vm, worker.as_ref(), spec.slots())?;
        let mut mmio = BusBuilder::default();
        slots.add_to(&mut mmio);
        let routes = Box::new(KvmRoutes(vm.fd().clone()));
        let ioapic = IoApic::new(layout::ioapic_pins(spec.slots()), routes);
        mmio.add(layout::IOAPIC, layout::IOAPIC_SIZE, Arc::new(ioapic));
        let platform = Platform {
            mmio: mmio.freeze()?,
            ports: Ports::new(console(spec, &vm)?, vm.memory().clone()),
            stats: Stats::default(),
            timeline: timeline.clone(),
            ending: Arc::new(Ending::new().map_err(MachineError::Threads)?),
        };
        Ok(Self {
            vcpus,
            platform,
            slots,
            nets: Vec::new(),
            worker,
            vm,
        })
    }

    fn attach(
        &mut self,
        devices: Vec<Box<dyn VirtioDevice>>,
        nets: Vec<NetDevice>,
    ) -> Result<(), DeviceError> {
        let mut slots = Vec::with_capacity(devices.len());
        for device in devices {
            slots.push(self.slots.attach(device)?.slot);
        }
        let port = |net: NetDevice| NetPort {
            name: net.name,
            mac: net.mac,
            slot: slots[net.index],
            control: net.control,
        };
        self.nets = nets.into_iter().map(port).collect();
        Ok(())
    }

    fn enter(&self, entry: EntryPoint) -> Result<(), KvmError> {
        match self.vcpus.first() {
            Some(first) => cpu::enter(first, entry),
            None => Ok(()),
        }
    }

    /// Starts the vCPUs.
    ///
    /// # Errors
    /// No threads can be had; those that were started are stopped again.
    pub fn start(self) -> Result<Running, MachineError> {
        vcpu::install_kick_handler().map_err(MachineError::Threads)?;
        let platform = Arc::new(self.platform);
        let mut running = Running {
            vcpus: Vec::with_capacity(self.vcpus.len()),
            platform,
            slots: self.slots,
            nets: self.nets,
            worker: self.worker,
            vm: self.vm,
        };
        for (id, fd) in (0..).zip(self.vcpus) {
            let thread = VcpuThread::start(id, fd, running.platform.clone());
            running.vcpus.push(thread.map_err(MachineError::Threads)?);
        }
        Ok(running)
    }
}

fn create_vcpus(vm: &Vm, model: &CpuModel) -> Result<Vec<VcpuFd>, KvmError> {
    (0..model.cpus())
        .map(|id| {
            let vcpu = vm
                .fd()
                .create_vcpu(id.into())
                .map_err(KvmError::call("create a vCPU"))?;
            model.apply(&vcpu, id)?;
            Ok(vcpu)
        })
        .collect()
}

fn console(spec: &ValidSpec, vm: &Vm) -> Result<Option<Serial>, MachineError> {
    let Some(path) = &spec.console else {
        return Ok(None);
    };
    let file = serial::create_console(path).map_err(|source| MachineError::Console {
        path: path.clone(),
        source,
    })?;
    Ok(Some(Serial::new(
        file,
        irq::irqfd(vm.fd(), layout::SERIAL_IRQ)?,
    )))
}

/// A machine whose vCPUs run.
pub struct Running {
    // In the order in which they must go: threads first, the VM with its memory last.
    vcpus: Vec<VcpuThread>,
    platform: Arc<Platform>,
    slots: Slots,
    nets: Vec<NetPort>,
    worker: Option<Worker>,
    vm: Vm,
}

impl Running {
    /// Readable once the machine ended by itself: then call [`Running::stop`].
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.platform.ending.event()
    }

    /// How the machine ended by itself, if it did.
    pub fn end(&self) -> Option<End> {
        self.platform.ending.first()
    }

    /// Readable when a device may have lost its backing: then call [`Running::check_devices`]. Absent
    /// from a machine without devices.
    pub fn device_failure(&self) -> Option<BorrowedFd<'_>> {
        self.worker.as_ref().map(Worker::failure_fd)
    }

    /// Reports the failure of a device as the machine's end.
    pub fn check_devices(&self) {
        while let Some(failure) = self.worker.as_ref().and_then(Worker::failure) {
            self.platform
                .ending
                .report(End::Device(failure.error.to_string()));
        }
    }

    /// Puts a disk into an empty slot while the machine runs; returns the slot's number.
    ///
    /// # Errors
    /// A file cannot be opened, or no slot is empty.
    pub fn attach_disk(&self, disk: &DiskSpec) -> Result<usize, DeviceError> {
        let device = Box::new(Blk::new(devices::open_disk(disk)?));
        Ok(self.slots.attach(device)?.slot)
    }

    /// The virtio-mmio slots, to attach devices to and detach them from while the machine runs.
    pub fn slots(&self) -> &Slots {
        &self.slots
    }

    /// Number of vCPUs.
    pub fn cpus(&self) -> usize {
        self.vcpus.len()
    }

    /// The networks that the machine began with.
    pub fn nets(&self) -> &[NetPort] {
        &self.nets
    }

    /// Puts a network into an empty slot while the machine runs: on these `queues` of a tap, or on the switch
    /// that `net` names. `net` was found good ([`NetSpec::check`]).
    ///
    /// # Errors
    /// The tap or the switch cannot be used, or no slot is empty.
    pub fn attach_net(&self, net: &NetSpec, queues: Vec<OwnedFd>) -> Result<NetPort, DeviceError> {
        let name = net.name.clone();
        if net.socket.is_some() && !vhost_user::is_shared(self.vm.memory()) {
            return Err(DeviceError::PrivateMemory { name });
        }
        // At most 32, as in the spec.
        let cpus = u8::try_from(self.cpus()).unwrap_or(u8::MAX);
        let (device, control) = devices::make_net(net, queues, cpus)?;
        let slot = self.slots.attach(device)?.slot;
        Ok(NetPort {
            name,
            mac: net.mac,
            slot,
            control,
        })
    }

    /// Stops all threads, if they have not ended, and says why the machine ended: `cause` if nothing
    /// else was reported before.
    pub fn stop(mut self, cause: End) -> End {
        self.platform.ending.report(cause);
        for vcpu in &self.vcpus {
            vcpu.kick();
        }
        self.vcpus.clear();
        if let Some(worker) = self.worker.take() {
            drop(worker.stop());
        }
        let timeline = &self.platform.timeline;
        let stats = &self.platform.stats;
        timeline.record_at(Stage::Ended, crate::vmm::timeline::now(), || {
            stats.snapshot()
        });
        self.platform.ending.first().unwrap_or(End::PowerOff)
    }
}
