//! Why vCPUs left guest mode: counted here when an exit reaches user space, and by KVM for all exits.
//!
//! KVM's numbers come from its statistics descriptors (Documentation/virt/kvm/api.rst, section 4.133),
//! one per vCPU, opened only when somebody wants them. They can be read from any thread at any time.
//!
//! Unsafe for the one ioctl that kvm-ioctls does not have.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl;

mod request {
    //! The ioctl's number, as the macro makes it.
    #![allow(missing_docs, unreachable_pub)]

    use kvm_bindings::KVMIO;

    vmm_sys_util::ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);
}

/// An exit to user space, by what had to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitKind {
    /// The i8042.
    PortReset,
    /// The mark port.
    PortMark,
    /// The 16550.
    PortSerial,
    /// A port that is not there.
    PortUnknown,
    /// The I/O APIC.
    IoApic,
    /// A virtio-mmio slot.
    Virtio,
    /// An address at which nothing is.
    MmioUnknown,
    /// End of a level-triggered interrupt.
    Eoi,
    /// A signal for the thread.
    Interrupted,
}

const KINDS: [(ExitKind, &str); 9] = [
    (ExitKind::PortReset, "user_port_reset"),
    (ExitKind::PortMark, "user_port_mark"),
    (ExitKind::PortSerial, "user_port_serial"),
    (ExitKind::PortUnknown, "user_port_unknown"),
    (ExitKind::IoApic, "user_ioapic"),
    (ExitKind::Virtio, "user_virtio"),
    (ExitKind::MmioUnknown, "user_mmio_unknown"),
    (ExitKind::Eoi, "user_eoi"),
    (ExitKind::Interrupted, "user_interrupted"),
];

/// Exits to user space of all vCPUs.
#[derive(Debug, Default)]
pub struct ExitCounters([AtomicU64; KINDS.len()]);

impl ExitCounters {
    /// Counts one.
    pub fn count(&self, kind: ExitKind) {
        if let Some(counter) = self.0.get(kind as usize) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How many so far.
    pub fn get(&self, kind: ExitKind) -> u64 {
        self.0
            .get(kind as usize)
            .map_or(0, |counter| counter.load(Ordering::Relaxed))
    }
}

/// Statistics of a running machine.
#[derive(Default)]
pub struct Stats {
    /// Counted by the vCPU threads.
    pub user: ExitCounters,
    kvm: Vec<File>,
}

impl Stats {
    /// Also reads what KVM counts for `vcpus`.
    pub fn watch(&mut self, vcpus: &[VcpuFd]) {
        self.kvm = vcpus.iter().filter_map(stats_file).collect();
    }

    /// All counters by name, zeroes left out. KVM's own have the kernel's names (`exits`, `io_exits`,
    /// `halt_exits`, …), summed over the vCPUs; those counted here begin with `user_`.
    pub fn snapshot(&self) -> BTreeMap<String, u64> {
        let mut all = BTreeMap::new();
        for file in &self.kvm {
            // A kernel whose format we cannot read costs these numbers, nothing else.
            for (name, value) in read_cumulative(file).unwrap_or_default() {
                *all.entry(name).or_default() += value;
            }
        }
        for (kind, name) in KINDS {
            all.insert(name.to_owned(), self.user.get(kind));
        }
        all.retain(|_, value| *value > 0);
        all
    }
}

/// `None` where the kernel (before 5.14) has no such descriptors.
fn stats_file(vcpu: &VcpuFd) -> Option<File> {
    // SAFETY: the call takes no argument; `vcpu` is a vCPU's descriptor.
    let fd = unsafe { ioctl(vcpu, request::KVM_GET_STATS_FD()) };
    // SAFETY: a result that is not negative is a new descriptor that nobody else owns.
    (fd >= 0).then(|| unsafe { File::from_raw_fd(fd) })
}

/// `struct kvm_stats_header` is six words, `struct kvm_stats_desc` sixteen bytes and a name.
const HEADER: usize = 24;
const DESCRIPTOR: usize = 16;
/// Bits of a descriptor's flags: the type; zero is "cumulative".
const TYPE_MASK: u32 = 0xf;
/// More than any kernel says; the numbers come from the kernel, not from the guest.
const MAX_DESCRIPTORS: usize = 1024;

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

fn read_cumulative(file: &File) -> io::Result<Vec<(String, u64)>> {
    let odd = || io::Error::from(io::ErrorKind::InvalidData);
    let mut header = [0; HEADER];
    file.read_exact_at(&mut header, 0)?;
    let field = |n: usize| {
        word(&header, 4 * n)
            .map(|value| value as usize)
            .ok_or_else(odd)
    };
    let (name_size, count, descriptors, data) = (field(1)?, field(2)?, field(4)?, field(5)?);
    let size = DESCRIPTOR + name_size;
    if count > MAX_DESCRIPTORS || name_size > 256 {
        return Err(odd());
    }
    let mut table = vec![0; count * size];
    file.read_exact_at(&mut table, descriptors as u64)?;
    let mut values = Vec::new();
    for descriptor in table.chunks_exact(size) {
        if let Some((name, offset)) = cumulative(descriptor) {
            let mut value = [0; 8];
            file.read_exact_at(&mut value, data as u64 + u64::from(offset))?;
            values.push((name, u64::from_le_bytes(value)));
        }
    }
    Ok(values)
}

/// Name and offset of a counter of one value that only grows.
fn cumulative(descriptor: &[u8]) -> Option<(String, u32)> {
    let flags = word(descriptor, 0)?;
    let size = u16::from_le_bytes(descriptor.get(6..8)?.try_into().ok()?);
    let name = descriptor.get(DESCRIPTOR..)?;
    let name = name.split(|byte| *byte == 0).next()?;
    (flags & TYPE_MASK == 0 && size == 1).then(|| {
        Some((
            String::from_utf8_lossy(name).into_owned(),
            word(descriptor, 8)?,
        ))
    })?
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn kinds_are_in_the_order_of_their_counters() {
        for (index, (kind, _)) in KINDS.iter().enumerate() {
            assert_eq!(*kind as usize, index);
        }
        let counters = ExitCounters::default();
        counters.count(ExitKind::Virtio);
        assert_eq!(
            (
                counters.get(ExitKind::Virtio),
                counters.get(ExitKind::IoApic)
            ),
            (1, 0)
        );
    }

    /// A file as the kernel's documentation lays it out.
    fn statistics(descriptors: &[(&str, u32, u16, u32)], values: &[u64]) -> File {
        let name_size = 48;
        let start = HEADER + 8;
        let data = start + descriptors.len() * (DESCRIPTOR + name_size);
        let mut bytes = Vec::new();
        for field in [0, name_size, descriptors.len(), HEADER, start, data] {
            bytes.extend((field as u32).to_le_bytes());
        }
        bytes.extend(*b"kvm-1\0\0\0");
        for (name, flags, size, offset) in descriptors {
            bytes.extend(flags.to_le_bytes());
            bytes.extend(0u16.to_le_bytes());
            bytes.extend(size.to_le_bytes());
            bytes.extend(offset.to_le_bytes());
            bytes.extend(0u32.to_le_bytes());
            let mut name = name.as_bytes().to_vec();
            name.resize(name_size, 0);
            bytes.extend(name);
        }
        bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        file
    }

    #[test]
    fn growing_counters_are_read_and_others_left() {
        let file = statistics(
            &[
                ("exits", 0, 1, 0),
                ("histogram", 3, 2, 8),
                ("now", 1, 1, 24),
                ("halt", 0, 1, 32),
            ],
            &[11, 1, 2, 3, 44],
        );
        let expected = vec![("exits".to_owned(), 11), ("halt".to_owned(), 44)];
        assert_eq!(read_cumulative(&file).unwrap(), expected);
        let mut stats = Stats {
            kvm: vec![file],
            ..Stats::default()
        };
        stats.kvm.push(statistics(&[("exits", 0, 1, 0)], &[5]));
        stats.user.count(ExitKind::PortMark);
        let expected = [("exits", 16), ("halt", 44), ("user_port_mark", 1)];
        assert_eq!(
            stats.snapshot(),
            expected.map(|(name, n)| (name.to_owned(), n)).into()
        );
    }

    #[test]
    fn a_file_in_another_format_is_an_error() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[0xff; 64]).unwrap();
        assert!(read_cumulative(&file).is_err());
    }
}
