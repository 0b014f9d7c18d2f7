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
use std::sync::mpsc::{Receiver, sync_channel};

use cube_guest::network::MacAddress;
use kvm_ioctls::{Kvm, VcpuFd};

use crate::vmm::boot::{self, BootError, BootFiles, EntryPoint, LoadedKernel};
use crate::vmm::bus::{BusBuilder, Overlap};
use crate::vmm::cpu::{self, CpuModel};
use crate::vmm::devices::{self, DeviceError, Devices, NetDevice};
use crate::vmm::exit::{End, Ending};
use crate::vmm::files::{FileError, Opened};
use crate::vmm::ioapic::IoApic;
use crate::vmm::irq::{self, KvmRoutes};
use crate::vmm::kvm::{self, KvmError, Vm};
use crate::vmm::layout;
use crate::vmm::memory::{self, GuestMemory};
use crate::vmm::own_memory::{self, OwnMemory};
use crate::vmm::ports::Ports;
use crate::vmm::seccomp;
use crate::vmm::serial::{self, Serial};
use crate::vmm::slots::Slots;
use crate::vmm::spec::{DiskSpec, NetSpec, ValidSpec};
use crate::vmm::stats::Stats;
use crate::vmm::supported_cpuid::{KeptError, SupportedCpuid};
use crate::vmm::thread::{self, Role};
use crate::vmm::timeline::{Entry, Stage, Timeline};
use crate::vmm::vcpu::{self, IdleVcpu, Platform, VcpuThread};
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
    /// The CPUID that was kept cannot be used.
    #[error(transparent)]
    Cpuid(#[from] KeptError),
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
    /// The first vCPU's thread has said on standard error what happened to it.
    #[error("the thread that prepares the first vCPU has panicked")]
    Panicked,
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
    threads: Vec<IdleVcpu>,
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
    /// The vCPUs' threads are started first: they make themselves ready, and that of the first asks for the
    /// CPUID, unless it was kept, and loads the kernel, while this thread makes the VM, with calls that sleep.
    ///
    /// # Errors
    /// [`MachineError`]; nothing is left behind.
    pub fn build(
        spec: &Arc<ValidSpec>,
        timeline: &Arc<Timeline>,
        count_exits: bool,
    ) -> Result<Self, MachineError> {
        let BootFiles { kernel, init } = BootFiles::open(spec)?;
        let kept = match &spec.cpuid {
            Some(file) => Some(SupportedCpuid::read(Opened::for_reading(file, "CPUID")?)?),
            None => None,
        };
        let Devices { devices, nets } = devices::open(spec)?;
        let allocate = match spec.shares_memory() {
            true => memory::allocate_shared,
            false => memory::allocate,
        };
        let memory = allocate(spec.memory_bytes(), spec.huge_pages)
            .map_err(|error| MachineError::Memory(spec.memory_mib, error))?;
        let kvm = Arc::new(kvm::open()?);
        let crew = Crew::start(spec, &kvm, &memory, kernel, kept)?;
        let vm = Vm::create(&kvm, memory, spec.slots())?;
        timeline.record(Stage::VmCreated);
        let vcpus = create_vcpus(&vm, spec.cpus)?;
        let mut machine = Self::assemble(spec, vm, vcpus, timeline)?;
        machine.threads = crew.threads;
        machine.attach(devices, nets)?;
        if count_exits {
            machine.platform.stats.watch(&machine.vcpus);
        }
        let rest = boot::load_rest(machine.vm.memory(), spec, init)?;
        // What does not need the other thread's answers is done by now: it is long at the CPUID.
        let supported = first_of(&crew.cpuid)??;
        let model = CpuModel::of_this_host(&kvm, &supported, spec.cpus);
        for (id, vcpu) in (0..).zip(&machine.vcpus) {
            model.apply(vcpu, id)?;
        }
        let kernel = first_of(&crew.kernel)??;
        timeline.record(Stage::KernelLoaded);
        machine.enter(rest.entry(kernel, spec)?)?;
        machine.vm.set_memory()?;
        Ok(machine)
    }

    fn assemble(
        spec: &ValidSpec,
        vm: Vm,
        vcpus: Vec<VcpuFd>,
        timeline: &Arc<Timeline>,
    ) -> Result<Self, MachineError> {
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
            threads: Vec::new(),
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
    /// The kick signal's handler cannot be installed.
    pub fn start(self) -> Result<Running, MachineError> {
        vcpu::install_kick_handler().map_err(MachineError::Threads)?;
        let platform = Arc::new(self.platform);
        let threads = self.threads.into_iter().zip(self.vcpus);
        let vcpus = threads.map(|(thread, fd)| thread.run(fd, platform.clone()));
        Ok(Running {
            vcpus: vcpus.collect(),
            platform,
            slots: self.slots,
            nets: self.nets,
            worker: self.worker,
            vm: self.vm,
        })
    }
}

/// The vCPUs' threads, and what the first of them is about to find out.
struct Crew {
    threads: Vec<IdleVcpu>,
    cpuid: Receiver<Result<SupportedCpuid, KvmError>>,
    kernel: Receiver<Result<LoadedKernel, BootError>>,
}

/// What comes first out of a channel that the first vCPU's thread holds.
fn first_of<T>(results: &Receiver<T>) -> Result<T, MachineError> {
    results.recv().map_err(|_| MachineError::Panicked)
}

impl Crew {
    fn start(
        spec: &Arc<ValidSpec>,
        kvm: &Arc<Kvm>,
        memory: &GuestMemory,
        kernel: Opened,
        kept: Option<SupportedCpuid>,
    ) -> Result<Self, MachineError> {
        seccomp::install_handler().map_err(MachineError::Threads)?;
        let (cpuid_sender, cpuid) = sync_channel(1);
        let (kernel_sender, loaded) = sync_channel(1);
        let asks = kept.is_none();
        if let Some(kept) = kept {
            // There is room for one.
            let _ = cpuid_sender.send(Ok(kept));
        }
        let (kvm, memory, its_spec) = (kvm.clone(), memory.clone(), spec.clone());
        let prepare = move || {
            // Nobody is there to hear it if the machine cannot be built.
            if asks {
                let _ = cpuid_sender.send(SupportedCpuid::ask(&kvm));
            }
            let _ = kernel_sender.send(boot::load_kernel(&memory, &its_spec, kernel));
        };
        let first = IdleVcpu::spawn(0, prepare).map_err(MachineError::Threads)?;
        let others = (1..spec.cpus).map(|id| IdleVcpu::spawn(id, || ()));
        let threads = std::iter::once(Ok(first)).chain(others);
        Ok(Self {
            threads: threads
                .collect::<io::Result<_>>()
                .map_err(MachineError::Threads)?,
            cpuid,
            kernel: loaded,
        })
    }
}

fn create_vcpus(vm: &Vm, count: u8) -> Result<Vec<VcpuFd>, KvmError> {
    let create = |id: u8| vm.fd().create_vcpu(id.into());
    (0..count)
        .map(|id| create(id).map_err(KvmError::call("create a vCPU")))
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

    /// The stages of the machine's life so far.
    pub fn timeline(&self) -> Vec<Entry> {
        self.platform.timeline.entries()
    }

    /// What this process costs in memory, apart from the guest's.
    ///
    /// # Errors
    /// The process's memory map cannot be read.
    pub fn own_memory(&self) -> io::Result<OwnMemory> {
        own_memory::measure(self.vm.memory())
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
