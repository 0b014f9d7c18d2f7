//! A vCPU's thread: runs the guest, and answers what KVM hands to user space.
//!
//! ```text
//!       run                         exit that ends the machine
//! idle ─────▶ running ─────────────────────────────────────────▶ ended ──join──▶
//!  │            │  ▲ exit answered                                ▲
//!  │            └──┘                            kick ─────────────┤
//!  └────────────────────── the machine is not started ────────────┘
//! ```
//!
//! To stop a vCPU from outside (*kick*), `immediate_exit` is set in its `kvm_run` page and then a signal
//! sent: wherever the thread is, `KVM_RUN` returns at once or does not start (Documentation/virt/kvm/api.rst,
//! `immediate_exit`).
//!
//! Unsafe because the kicker writes that one byte of a page that the vCPU's descriptor owns.
#![allow(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};

use kvm_bindings::kvm_run;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::vmm::bus::Bus;
use crate::vmm::exit::{End, Ending};
use crate::vmm::ports::{PortAction, Ports};
use crate::vmm::stats::{ExitKind, Stats};
use crate::vmm::thread::{self, Role};
use crate::vmm::timeline::{self, Stage, Timeline};

/// All that a vCPU's exits reach. Frozen when the vCPUs start.
pub struct Platform {
    /// Devices in the physical address space.
    pub mmio: Bus,
    /// The I/O ports.
    pub ports: Ports,
    /// The counters.
    pub stats: Stats,
    /// Where marks go.
    pub timeline: Arc<Timeline>,
    /// Where the end of the machine is reported.
    pub ending: Arc<Ending>,
}

/// The kicker's half: the `immediate_exit` byte, while the vCPU's thread keeps it mapped.
struct Kick {
    stop: AtomicBool,
    immediate_exit: Mutex<Option<ImmediateExit>>,
}

struct ImmediateExit(*mut u8);

// SAFETY: the pointer is only used under the `Kick`'s lock, for atomic stores.
unsafe impl Send for ImmediateExit {}

impl ImmediateExit {
    fn of(run: &mut kvm_run) -> Self {
        Self(&raw mut run.immediate_exit)
    }

    fn set(&self) {
        // SAFETY: the byte is mapped: the thread that owns the mapping takes this value away, under the
        // lock that the caller holds, before it lets go of it (`Withdraw`). The thread itself never
        // accesses the byte but through the kernel.
        unsafe { AtomicU8::from_ptr(self.0) }.store(1, Ordering::SeqCst);
    }
}

/// Takes the pointer away from the kicker when the thread ends, however it ends.
struct Withdraw<'a>(&'a Kick);

impl Drop for Withdraw<'_> {
    fn drop(&mut self) {
        *self
            .0
            .immediate_exit
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// A vCPU's thread that has no vCPU yet: it makes itself ready, its system call filter included, while the
/// machine is built. Dropping it ends and joins the thread.
pub struct IdleVcpu {
    work: Option<SyncSender<Work>>,
    thread: Option<JoinHandle<()>>,
}

/// What it waits for.
struct Work {
    fd: VcpuFd,
    platform: Arc<Platform>,
    kick: Arc<Kick>,
}

/// A vCPU's running thread. Dropping it stops and joins the thread.
pub struct VcpuThread {
    kick: Arc<Kick>,
    thread: Option<JoinHandle<()>>,
}

extern "C" fn ignore(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Installs the handler of the kick signal; once per process, before the first vCPU runs.
///
/// # Errors
/// The operating system's answer.
pub fn install_kick_handler() -> io::Result<()> {
    Ok(register_signal_handler(SIGRTMIN(), ignore)?)
}

impl IdleVcpu {
    /// Starts the thread `vcpu-<id>`, which does `errand` before anything else.
    ///
    /// # Errors
    /// No thread can be had.
    pub fn spawn(id: u8, errand: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let (sender, receiver) = sync_channel::<Work>(1);
        let body = move || {
            errand();
            let limited = thread::begin(Role::Vcpu);
            // The sender goes without a word if the machine is not started.
            if let Ok(work) = receiver.recv() {
                work.perform(id, limited);
            }
        };
        let thread = Builder::new()
            .name(format!("vcpu-{id}"))
            .stack_size(thread::STACK)
            .spawn(body)?;
        Ok(Self {
            work: Some(sender),
            thread: Some(thread),
        })
    }

    /// Gives the thread its vCPU, which starts to run.
    pub fn run(mut self, mut fd: VcpuFd, platform: Arc<Platform>) -> VcpuThread {
        let kick = Arc::new(Kick {
            stop: AtomicBool::new(false),
            immediate_exit: Mutex::new(Some(ImmediateExit::of(fd.get_kvm_run()))),
        });
        let work = Work {
            fd,
            platform,
            kick: kick.clone(),
        };
        // It waits for nothing else, and has room for one; a thread that panicked has said so.
        let _ = self.work.take().map(|sender| sender.send(work));
        VcpuThread {
            kick,
            thread: self.thread.take(),
        }
    }
}

impl Drop for IdleVcpu {
    fn drop(&mut self) {
        self.work = None;
        if let Some(thread) = self.thread.take() {
            // A panic was reported on standard error where it happened.
            let _ = thread.join();
        }
    }
}

impl Work {
    /// Runs vCPU `id` until it stops; `limited`: how the thread's filter was taken.
    fn perform(self, id: u8, limited: io::Result<()>) {
        let Self { fd, platform, kick } = self;
        let mut vcpu = Vcpu {
            id,
            fd,
            platform,
            kick: &kick,
        };
        let withdraw = Withdraw(&kick);
        let end = match limited {
            Ok(()) => vcpu.run(),
            Err(error) => Some(End::Device(format!("the thread of vCPU {id}: {error}"))),
        };
        drop(withdraw);
        if let Some(end) = end {
            vcpu.platform.ending.report(end);
        }
    }
}

impl VcpuThread {
    /// Asks the vCPU to stop; returns at once.
    pub fn kick(&self) {
        self.kick.stop.store(true, Ordering::SeqCst);
        let byte = self
            .kick
            .immediate_exit
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let (Some(byte), Some(thread)) = (&*byte, &self.thread) {
            byte.set();
            // It fails only for a thread that ended, and that is what is asked for.
            let _ = thread.kill(SIGRTMIN());
        }
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.kick();
        if let Some(thread) = self.thread.take() {
            // A panic was reported on standard error where it happened.
            let _ = thread.join();
        }
    }
}

/// The thread's half.
struct Vcpu<'a> {
    id: u8,
    fd: VcpuFd,
    platform: Arc<Platform>,
    kick: &'a Kick,
}

impl Vcpu<'_> {
    /// Runs until the machine ends (and says how) or the vCPU is kicked.
    fn run(&mut self) -> Option<End> {
        if self.id == 0 {
            self.platform.timeline.record(Stage::KernelStarted);
        }
        while !self.kick.stop.load(Ordering::SeqCst) {
            let step = match self.fd.run() {
                Ok(exit) => answer(&self.platform, exit),
                Err(error) => match error.errno() {
                    libc::EINTR => {
                        self.platform.stats.user.count(ExitKind::Interrupted);
                        Step::Continue
                    }
                    libc::EAGAIN => Step::Continue,
                    _ => Step::Unhandled(format!("KVM_RUN failed: {error}")),
                },
            };
            match step {
                Step::Continue => (),
                Step::End(end) => return Some(end),
                Step::TripleFault => return Some(End::TripleFault { vcpu: self.id }),
                Step::Unhandled(reason) => return Some(self.unhandled(&reason)),
            }
        }
        None
    }

    fn unhandled(&mut self, reason: &str) -> End {
        let detail = internal_error(self.fd.get_kvm_run()).unwrap_or_default();
        let at = match self.fd.get_regs() {
            Ok(regs) => format!(" at instruction pointer {:#x}", regs.rip),
            Err(_) => String::new(),
        };
        End::Unhandled {
            vcpu: self.id,
            reason: format!("{reason}{detail}{at}"),
        }
    }
}

/// What an exit leads to.
enum Step {
    Continue,
    End(End),
    TripleFault,
    Unhandled(String),
}

fn answer(platform: &Platform, exit: VcpuExit<'_>) -> Step {
    let kind = match exit {
        VcpuExit::MmioRead(address, data) => {
            data.fill(0);
            match platform.mmio.find(address) {
                Some((device, offset)) => {
                    device.read(offset, data);
                    mmio_kind(address)
                }
                None => ExitKind::MmioUnknown,
            }
        }
        VcpuExit::MmioWrite(address, data) => match platform.mmio.find(address) {
            Some((device, offset)) => {
                device.write(offset, data);
                mmio_kind(address)
            }
            None => ExitKind::MmioUnknown,
        },
        VcpuExit::IoIn(port, data) => platform.ports.read(port, data),
        VcpuExit::IoOut(port, data) => return port_write(platform, port, data),
        // No line is level-triggered, whatever the guest made of its redirection entry.
        VcpuExit::IoapicEoi(_) => ExitKind::Eoi,
        VcpuExit::Intr => ExitKind::Interrupted,
        VcpuExit::Shutdown => return Step::TripleFault,
        VcpuExit::FailEntry(reason, _) => {
            return Step::Unhandled(format!("entering the guest failed with reason {reason:#x}"));
        }
        VcpuExit::InternalError => return Step::Unhandled("KVM_EXIT_INTERNAL_ERROR".into()),
        VcpuExit::MemoryFault { gpa, .. } => {
            return Step::Unhandled(format!("KVM_EXIT_MEMORY_FAULT at guest address {gpa:#x}"));
        }
        other => return Step::Unhandled(format!("unknown exit {other:?}")),
    };
    platform.stats.user.count(kind);
    Step::Continue
}

fn port_write(platform: &Platform, port: u16, data: &[u8]) -> Step {
    let (kind, action) = platform.ports.write(port, data);
    platform.stats.user.count(kind);
    match action {
        PortAction::None => Step::Continue,
        PortAction::Reached(stage) => {
            platform
                .timeline
                .record_at(stage, timeline::now(), || platform.stats.snapshot());
            Step::Continue
        }
        PortAction::End(end) => Step::End(end),
    }
}

fn mmio_kind(address: u64) -> ExitKind {
    match address {
        crate::vmm::layout::IOAPIC.. => ExitKind::IoApic,
        _ => ExitKind::Virtio,
    }
}

/// KVM's words for `KVM_EXIT_INTERNAL_ERROR`.
fn internal_error(run: &mut kvm_run) -> Option<String> {
    if run.exit_reason != kvm_bindings::KVM_EXIT_INTERNAL_ERROR {
        return None;
    }
    // SAFETY: for this exit reason KVM has filled in this member; any bytes are valid for its type.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    let what = match internal.suberror {
        1 => "it cannot emulate an instruction",
        2 => "an event came while another was being delivered",
        3 => "an event could not be delivered",
        4 => "an exit reason that it does not know",
        _ => "no reason that this VMM knows",
    };
    Some(format!(", suberror {} ({what})", internal.suberror))
}
