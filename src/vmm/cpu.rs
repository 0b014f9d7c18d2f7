//! What a vCPU is made of: its CPUID, its model-specific registers, its first state.
#![forbid(unsafe_code)]

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, Msrs, kvm_cpuid_entry2, kvm_msr_entry, kvm_regs,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

use crate::vmm::boot::{EntryPoint, start_sregs};
use crate::vmm::kvm::KvmError;
use crate::vmm::layout::ZERO_PAGE;
use crate::vmm::supported_cpuid::SupportedCpuid;

/// CPUID leaf 1 (Intel SDM volume 2, CPUID): ECX VMX, TSC deadline timer, hypervisor; EDX HTT.
const ECX_VMX: u32 = 1 << 5;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;
/// CPUID leaf 0x8000_0001 ECX: SVM (AMD APM volume 3, appendix E).
const ECX_SVM: u32 = 1 << 2;
/// MSRs: fast string operations on; MTRRs on with write-back as the default (Intel SDM volume 4 and
/// volume 3, section 12.11.2.1).
const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;
/// RFLAGS: the bit that is always set; interrupts are off.
const RFLAGS_RESERVED: u64 = 2;

/// The CPUID of a machine's vCPUs, but for what tells them apart.
#[derive(Debug, Clone)]
pub struct CpuModel {
    entries: Vec<kvm_cpuid_entry2>,
}

impl CpuModel {
    /// What KVM supports here, less what a pod has no use for.
    pub fn of_this_host(kvm: &Kvm, supported: &SupportedCpuid, cpus: u8) -> Self {
        let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        Self::new(supported.entries(), cpus, deadline)
    }

    fn new(supported: &[kvm_cpuid_entry2], cpus: u8, tsc_deadline: bool) -> Self {
        let mut entries: Vec<_> = supported.iter().copied().filter(is_kept).collect();
        let last = u32::from(cpus) - 1;
        for entry in &mut entries {
            filter(entry, last, tsc_deadline);
        }
        if entries
            .iter()
            .any(|entry| entry.function == 0 && entry.eax >= 0xb)
        {
            entries.extend(topology(cpus));
        }
        Self { entries }
    }

    /// The CPUID of vCPU `id`.
    fn of_vcpu(&self, id: u8) -> Vec<kvm_cpuid_entry2> {
        let mut entries = self.entries.clone();
        let id = u32::from(id);
        for entry in &mut entries {
            match entry.function {
                0x1 => entry.ebx = (entry.ebx & 0x00ff_ffff) | id << 24,
                0xb => entry.edx = id,
                0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
                _ => (),
            }
        }
        entries
    }

    /// Gives a new vCPU its CPUID and MSRs.
    ///
    /// # Errors
    /// The call that failed.
    pub fn apply(&self, vcpu: &VcpuFd, id: u8) -> Result<(), KvmError> {
        let too_many = |_| KvmError::Call {
            action: "take the CPUID",
            source: std::io::ErrorKind::InvalidInput.into(),
        };
        let cpuid = CpuId::from_entries(&self.of_vcpu(id)).map_err(too_many)?;
        vcpu.set_cpuid2(&cpuid)
            .map_err(KvmError::call("set a vCPU's CPUID"))?;
        let msr = |index, data| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        let entries = [
            msr(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
            msr(MSR_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
        ];
        let msrs = Msrs::from_entries(&entries).map_err(too_many)?;
        let action = "set a vCPU's MSRs";
        match vcpu.set_msrs(&msrs).map_err(KvmError::call(action))? {
            set if set == entries.len() => Ok(()),
            _ => Err(KvmError::Call {
                action,
                source: std::io::ErrorKind::Unsupported.into(),
            }),
        }
    }
}

/// Not kept: extended topology of the host (0xb is made anew; 0x1f and 0x8000_0026 would contradict it)
/// and the performance counters (0xa, 0x8000_0022), whose MSRs cost exits and which nothing in a pod reads.
fn is_kept(entry: &kvm_cpuid_entry2) -> bool {
    !matches!(entry.function, 0xa | 0xb | 0x1f | 0x8000_0022 | 0x8000_0026)
}

/// Nested virtualization is off: it is by far the largest surface that KVM shows to a guest.
fn filter(entry: &mut kvm_cpuid_entry2, last: u32, tsc_deadline: bool) {
    let cpus = last + 1;
    match entry.function {
        0x1 => {
            entry.ecx = (entry.ecx & !ECX_VMX) | ECX_HYPERVISOR;
            entry.ecx |= if tsc_deadline { ECX_TSC_DEADLINE } else { 0 };
            entry.ebx = (entry.ebx & 0x0000_ffff) | cpus << 16;
            entry.edx = (entry.edx & !EDX_HTT) | if cpus > 1 { EDX_HTT } else { 0 };
        }
        // Cache parameters: the last level is shared by all, the others belong to one CPU.
        0x4 if entry.eax & 0x1f != 0 => {
            let sharing = if cache_level(entry.eax) >= 3 { last } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | sharing << 14 | core_mask(cpus).min(63) << 26;
        }
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let sharing = if cache_level(entry.eax) >= 3 { last } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | sharing << 14;
        }
        0x8000_0001 => entry.ecx &= !ECX_SVM,
        0x8000_0008 => entry.ecx = core_bits(cpus) << 12 | last,
        _ => (),
    }
}

fn cache_level(eax: u32) -> u32 {
    eax >> 5 & 7
}

/// Bits of an APIC id that number the cores.
fn core_bits(cpus: u32) -> u32 {
    cpus.next_power_of_two().trailing_zeros()
}

fn core_mask(cpus: u32) -> u32 {
    cpus.next_power_of_two() - 1
}

/// Leaf 0xb: one thread per core, all cores in one package.
fn topology(cpus: u8) -> [kvm_cpuid_entry2; 3] {
    let level = |index, shift, count, kind: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: kind << 8 | index,
        ..Default::default()
    };
    let cpus = u32::from(cpus);
    [
        level(0, 0, 1, 1),
        level(1, core_bits(cpus), cpus, 2),
        level(2, 0, 0, 0),
    ]
}

/// Puts the first vCPU at the kernel's entry, in 64-bit mode with the boot parameters in RSI. The others
/// wait in KVM for the kernel's start-up message.
///
/// # Errors
/// The call that failed.
pub fn enter(vcpu: &VcpuFd, entry: EntryPoint) -> Result<(), KvmError> {
    let reset = vcpu
        .get_sregs()
        .map_err(KvmError::call("read a vCPU's system registers"))?;
    vcpu.set_sregs(&start_sregs(reset))
        .map_err(KvmError::call("set a vCPU's system registers"))?;
    let regs = kvm_regs {
        rip: entry.0,
        rsi: ZERO_PAGE,
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    };
    vcpu.set_regs(&regs)
        .map_err(KvmError::call("set a vCPU's registers"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries
            .iter()
            .find(|e| e.function == function && e.index == index)
            .unwrap()
    }

    #[test]
    fn each_vcpu_knows_its_id_and_its_siblings() {
        let host = [
            leaf(0, [0x1f, 0, 0, 0]),
            leaf(1, [0, 0xff08_0800, ECX_VMX, 0]),
        ];
        let model = CpuModel::new(&host, 6, true);
        let entries = model.of_vcpu(5);
        let one = find(&entries, 1, 0);
        assert_eq!(one.ebx, 0x0506_0800);
        assert_eq!(one.ecx, ECX_TSC_DEADLINE | ECX_HYPERVISOR);
        assert_eq!(one.edx & EDX_HTT, EDX_HTT);
        let (threads, cores) = (find(&entries, 0xb, 0), find(&entries, 0xb, 1));
        assert_eq!(
            (threads.eax, threads.ebx, threads.ecx, threads.edx),
            (0, 1, 0x100, 5)
        );
        assert_eq!(
            (cores.eax, cores.ebx, cores.ecx, cores.edx),
            (3, 6, 0x201, 5)
        );
    }

    #[test]
    fn one_cpu_has_no_siblings() {
        let host = [
            leaf(1, [0, 0, 0, EDX_HTT]),
            leaf(0x8000_0008, [0, 0, 0x703f, 0]),
        ];
        let entries = CpuModel::new(&host, 1, false).of_vcpu(0);
        assert_eq!(find(&entries, 1, 0).edx, 0);
        assert_eq!(find(&entries, 1, 0).ecx, ECX_HYPERVISOR);
        assert_eq!(find(&entries, 0x8000_0008, 0).ecx, 0);
    }

    #[test]
    fn nested_virtualization_and_counters_are_gone() {
        let host = [
            leaf(0xa, [1; 4]),
            leaf(0x1f, [1; 4]),
            leaf(0x8000_0001, [0, 0, 0xff, 0]),
        ];
        let entries = CpuModel::new(&host, 2, true).of_vcpu(0);
        assert_eq!(entries.len(), 1);
        assert_eq!(entries[0].ecx, 0xff & !ECX_SVM);
    }

    #[test]
    fn caches_below_the_last_level_are_private() {
        let host = [
            leaf(4, [0x1c00_4121, 0, 0, 0]),
            leaf(4, [0x1c07_c163, 0, 0, 0]),
        ];
        let entries = CpuModel::new(&host, 4, true).of_vcpu(0);
        assert_eq!(entries[0].eax, 0x0c00_0121);
        assert_eq!(entries[1].eax, 0x0c00_c163);
    }
}
