//! Whether `/dev/kvm` can run a Linux guest, by running the instructions that decide it.
//!
//! Some KVMs interpret guest code and lack what every kernel needs in its first milliseconds: exceptions and the return
//! from them in 64-bit mode. The payload executes `int3` in ring 0, its handler reports through an I/O port and returns
//! with `iretq`, and the code behind the `int3` reports again.
//!
//! `unsafe` is needed for one call, which gives the guest its memory.
#![allow(unsafe_code)]

use kvm_bindings::{kvm_segment, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// What trying `/dev/kvm` showed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Linux guests run on it.
    RunsLinux,
    /// It works, but not for a whole kernel; why.
    TooWeak(String),
    /// It cannot be opened or used at all; why.
    Unusable(String),
}

const MEMORY_BYTES: usize = 2 << 20;
const GDT: u64 = 0x1000;
const IDT: u64 = 0x2000;
const PML4: u64 = 0x3000;
const PDPT: u64 = 0x4000;
const PD: u64 = 0x5000;
const CODE: u64 = 0x8000;
const HANDLER: u64 = 0x9000;
const STACK_TOP: u64 = 0xb000;
const CODE_SELECTOR: u16 = 0x08;
const DATA_SELECTOR: u16 = 0x10;
const REPORT_PORT: u16 = 0xf4;

/// `int3; mov al, 'R'; out 0xf4, al; hlt`
const CODE_BYTES: &[u8] = &[0xcc, 0xb0, b'R', 0xe6, 0xf4, 0xf4];
/// `push rax; mov al, 'H'; out 0xf4, al; pop rax; iretq`
const HANDLER_BYTES: &[u8] = &[0x50, 0xb0, b'H', 0xe6, 0xf4, 0x58, 0x48, 0xcf];
/// The handler ran, and the code behind the exception.
const EXPECTED: &[u8] = b"HR";

/// Tries.
pub(crate) fn try_kvm() -> Verdict {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => return Verdict::Unusable(unusable(error.errno())),
    };
    match run(&kvm) {
        Ok(verdict) => verdict,
        Err(error) => Verdict::Unusable(format!("/dev/kvm refuses to make a machine: {error}")),
    }
}

/// Why `/dev/kvm` does not open, and what to do.
fn unusable(errno: i32) -> String {
    match errno {
        libc::ENOENT => "there is no /dev/kvm: enable virtualization in the firmware or, inside a virtual machine, \
                         nested virtualization, and load kvm_intel or kvm_amd"
            .into(),
        libc::EACCES | libc::EPERM => "no permission for /dev/kvm: add yourself to the group that owns it \
                                       (`usermod -aG kvm USER`, then log in again), or run as root"
            .into(),
        errno => format!("/dev/kvm does not open: {}", std::io::Error::from_raw_os_error(errno)),
    }
}

fn run(kvm: &Kvm) -> Result<Verdict, kvm_ioctls::Error> {
    let invalid = |_| kvm_ioctls::Error::new(libc::ENOMEM);
    // Declared before the machine, so that it is unmapped after the machine is gone.
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)])
        .map_err(|_| kvm_ioctls::Error::new(libc::ENOMEM))?;
    fill(&memory).map_err(invalid)?;
    let vm = kvm.create_vm()?;
    give_memory(&vm, &memory)?;
    let mut vcpu = vm.create_vcpu(0)?;
    let mut sregs = vcpu.get_sregs()?;
    long_mode(&mut sregs);
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    regs.rip = CODE;
    regs.rsp = STACK_TOP;
    regs.rflags = 2;
    vcpu.set_regs(&regs)?;
    Ok(judge(&mut vcpu))
}

fn give_memory(vm: &VmFd, memory: &GuestMemoryMmap<()>) -> Result<(), kvm_ioctls::Error> {
    let address = memory
        .get_host_address(GuestAddress(0))
        .map_err(|_| kvm_ioctls::Error::new(libc::EFAULT))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY_BYTES as u64,
        userspace_addr: address as u64,
    };
    // SAFETY: the region is the whole mapping owned by `memory`, which `run` keeps until the machine is gone.
    unsafe { vm.set_user_memory_region(region) }
}

/// Tables and code.
fn fill(memory: &GuestMemoryMmap<()>) -> Result<(), vm_memory::GuestMemoryError> {
    let word = |at: u64, value: u64| memory.write_obj(value, GuestAddress(at));
    // Flat 64-bit code and data (Intel SDM volume 3, 3.4.5): present, ring 0.
    word(GDT + u64::from(CODE_SELECTOR), 0x00af_9b00_0000_ffff)?;
    word(GDT + u64::from(DATA_SELECTOR), 0x00cf_9300_0000_ffff)?;
    // Gate 3, a 64-bit interrupt gate (SDM volume 3, 6.14.1).
    let gate = (HANDLER & 0xffff)
        | (u64::from(CODE_SELECTOR) << 16)
        | (0x8e << 40)
        | ((HANDLER >> 16) << 48);
    word(IDT + 3 * 16, gate)?;
    // The first 2 MiB, identity-mapped by one large page: present, writable, 0x80 = large.
    word(PML4, PDPT | 3)?;
    word(PDPT, PD | 3)?;
    word(PD, 0x83)?;
    memory.write_slice(CODE_BYTES, GuestAddress(CODE))?;
    memory.write_slice(HANDLER_BYTES, GuestAddress(HANDLER))
}

/// 64-bit mode with paging, as an operating system sets it up.
fn long_mode(sregs: &mut kvm_sregs) {
    let code = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: CODE_SELECTOR,
        type_: 0xb,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment {
        selector: DATA_SELECTOR,
        type_: 3,
        l: 0,
        db: 1,
        ..code
    };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 0x17);
    (sregs.idt.base, sregs.idt.limit) = (IDT, 4 * 16 - 1);
    sregs.cr3 = PML4;
    sregs.cr4 |= 1 << 5; // PAE
    sregs.cr0 |= (1 << 31) | 1; // PG, PE
    sregs.efer |= (1 << 8) | (1 << 10); // LME, LMA
}

/// Runs the payload: at most two reports and a halt, so that it ends whatever happens.
fn judge(vcpu: &mut VcpuFd) -> Verdict {
    let mut reports = Vec::new();
    for _ in 0..=EXPECTED.len() {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(REPORT_PORT, data)) => reports.extend_from_slice(data),
            Ok(VcpuExit::Hlt) => break,
            Ok(VcpuExit::InternalError) => {
                return Verdict::TooWeak(
                    "KVM cannot execute `int3` or `iretq` in 64-bit mode (it interprets guest code)".into(),
                );
            }
            Ok(other) => {
                return Verdict::TooWeak(format!("an exception in 64-bit mode ends in {other:?}"));
            }
            Err(error) => return Verdict::TooWeak(format!("KVM_RUN fails: {error}")),
        }
    }
    if reports == EXPECTED {
        Verdict::RunsLinux
    } else {
        Verdict::TooWeak(format!(
            "the payload reported {reports:?} where {EXPECTED:?} was expected"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trying_ends_with_a_verdict_and_a_reason() {
        match try_kvm() {
            Verdict::RunsLinux => {}
            Verdict::TooWeak(why) | Verdict::Unusable(why) => assert!(!why.is_empty()),
        }
    }

    #[test]
    fn reasons_say_what_to_do() {
        assert!(unusable(libc::ENOENT).contains("load kvm_intel or kvm_amd"));
        assert!(unusable(libc::EACCES).contains("usermod"));
        assert!(unusable(libc::EIO).contains("does not open"));
    }
}
