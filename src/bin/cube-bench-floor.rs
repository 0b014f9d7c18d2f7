//! What a start cannot cost less than: a program that makes the same VM as the VMMs (memory, interrupt chip, one
//! vCPU), runs a guest that writes the benchmarks' marker, and ends. No file, no device, no thread.
//!
//! `cube-bench-floor MEMORY_MIB ORDER`: the order of the calls after KVM_CREATE_VM, in which hosts differ by
//! milliseconds: three letters of `m` (memory), `i` (interrupt chip), `v` (vCPU). `cube bench` tries them all and
//! takes the fastest. A `c` after the `v` gives the vCPU a CPUID, which no guest of six instructions needs and every
//! other does: by hand, to see what KVM's answer costs on a host.
//!
//! Unsafe for the one call that tells KVM where the memory is.
#![allow(unsafe_code)]

use std::io::{self, Write};
use std::process::ExitCode;

use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, kvm_enable_cap, kvm_regs,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Where the guest's code is: anywhere below 1 MiB, where real mode reaches it.
const ADDRESS: u64 = 0x1000;
/// I/O APIC pins of the interrupt chip.
const PINS: u64 = 24;

fn main() -> ExitCode {
    if std::env::args().any(|argument| argument == "--version") {
        println!("cube-bench-floor {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cube-bench-floor: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> io::Result<()> {
    let usage = || io::Error::other("usage: cube-bench-floor MEMORY_MIB ORDER (such as 128 imv)");
    let mut arguments = std::env::args().skip(1);
    let memory_mib: usize = arguments
        .next()
        .and_then(|mib| mib.parse().ok())
        .ok_or_else(usage)?;
    let order = arguments.next().ok_or_else(usage)?;
    let bytes = memory_mib
        .checked_shl(20)
        .filter(|bytes| *bytes > ADDRESS as usize);
    let ranges = [(GuestAddress(0), bytes.ok_or_else(usage)?)];

    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).map_err(io::Error::other)?;
    memory
        .write_slice(&cube::bench::payload::REAL_MODE, GuestAddress(ADDRESS))
        .map_err(io::Error::other)?;
    let mut vcpu = None;
    for step in order.chars() {
        match step {
            'm' => set_memory(&vm, &memory)?,
            'i' => split_chip(&vm)?,
            'v' => vcpu = Some(vm.create_vcpu(0)?),
            'c' => {
                let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
                vcpu.as_ref().ok_or_else(usage)?.set_cpuid2(&cpuid)?;
            }
            _ => return Err(usage()),
        }
    }
    until_reset(&mut vcpu.ok_or_else(usage)?)
}

fn split_chip(vm: &VmFd) -> io::Result<()> {
    let mut split = kvm_enable_cap {
        cap: KVM_CAP_SPLIT_IRQCHIP,
        ..Default::default()
    };
    split.args[0] = PINS;
    Ok(vm.enable_cap(&split)?)
}

fn set_memory(vm: &VmFd, memory: &GuestMemoryMmap<()>) -> io::Result<()> {
    let region = memory.iter().next().ok_or(io::ErrorKind::OutOfMemory)?;
    let slot = kvm_userspace_memory_region {
        memory_size: vm_memory::GuestMemoryRegion::len(region),
        userspace_addr: region.as_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: `run` owns the mapping until the process is about to end, and its vCPU runs before that only.
    Ok(unsafe { vm.set_user_memory_region(slot) }?)
}

fn until_reset(vcpu: &mut VcpuFd) -> io::Result<()> {
    let mut sregs = vcpu.get_sregs()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs {
        rip: ADDRESS,
        rflags: 2,
        ..Default::default()
    })?;
    loop {
        match vcpu.run()? {
            VcpuExit::IoOut(0x3f8, byte) => io::stdout()
                .write_all(byte)
                .and_then(|()| io::stdout().flush())?,
            VcpuExit::IoOut(0x64, _) => return Ok(()),
            other => {
                return Err(io::Error::other(format!(
                    "the guest did something else: {other:?}"
                )));
            }
        }
    }
}
