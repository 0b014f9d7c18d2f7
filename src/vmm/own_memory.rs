//! What this process costs in memory, apart from the guest's: read from `/proc/self/smaps` when it is asked.
//!
//! The VMM knows where guest memory is mapped, so nothing has to be guessed from sizes.
#![forbid(unsafe_code)]

use std::io::{self, BufRead, BufReader};
use std::ops::Range;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::vmm::memory::GuestMemory;

/// Memory of a VMM's process, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OwnMemory {
    /// Proportional set size of everything but guest memory.
    pub pss: u64,
    /// Resident set size of everything but guest memory.
    pub rss: u64,
    /// Guest memory that is resident: what the guest has touched and not given back.
    pub guest: u64,
}

/// Measures this process, whose guest has `memory`.
///
/// # Errors
/// The process's memory map cannot be read.
pub fn measure(memory: &GuestMemory) -> io::Result<OwnMemory> {
    let smaps = BufReader::new(std::fs::File::open("/proc/self/smaps")?);
    let guest: Vec<Range<u64>> = memory
        .iter()
        .map(|region| {
            let start = region.as_ptr() as u64;
            start..start.saturating_add(region.len())
        })
        .collect();
    sum(smaps, &guest)
}

/// Adds up the mappings of `smaps` (proc(5)). A mapping belongs to the guest if it begins in one of its ranges:
/// advice splits guest memory into several mappings, each of which does.
fn sum(smaps: impl BufRead, guest: &[Range<u64>]) -> io::Result<OwnMemory> {
    let mut total = OwnMemory::default();
    let mut is_guests = false;
    for line in smaps.lines() {
        let line = line?;
        if let Some(start) = mapping_start(&line) {
            is_guests = guest.iter().any(|range| range.contains(&start));
            continue;
        }
        let Some((name, value)) = line.split_once(':') else {
            continue;
        };
        let kib: u64 = match value.split_whitespace().next().map(str::parse) {
            Some(Ok(kib)) => kib,
            _ => continue,
        };
        match (name, is_guests) {
            ("Rss", true) => total.guest += kib << 10,
            ("Rss", false) => total.rss += kib << 10,
            ("Pss", false) => total.pss += kib << 10,
            _ => {}
        }
    }
    Ok(total)
}

/// The address in a mapping's first line: `7f0000000000-7f0008000000 rw-p …`. The other lines have a name and
/// a colon before their first space.
fn mapping_start(line: &str) -> Option<u64> {
    let (start, end) = line.split(' ').next()?.split_once('-')?;
    u64::from_str_radix(end, 16).ok()?;
    u64::from_str_radix(start, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_the_guests_or_the_processes_own() {
        let smaps = "\
55d000000000-55d000001000 r-xp 00000000 fe:00 12 /usr/bin/cube-vmm
Size:                  4 kB
Rss:                   4 kB
Pss:                   1 kB
VmFlags: rd ex
7f0000000000-7f0000200000 rw-p 00000000 00:00 0
Rss:                 100 kB
Pss:                 100 kB
7f0000200000-7f0008000000 rw-p 00000000 00:00 0
Rss:                  50 kB
Pss:                  50 kB
7f0008000000-7f0008001000 rw-p 00000000 00:00 0
Rss:                   8 kB
Pss:                   8 kB
";
        let guest = 0x7f00_0000_0000..0x7f00_0800_0000;
        let expected = OwnMemory {
            pss: 9 << 10,
            rss: 12 << 10,
            guest: 150 << 10,
        };
        assert_eq!(sum(smaps.as_bytes(), &[guest]).unwrap(), expected);
    }

    #[test]
    fn touched_guest_memory_is_not_the_processes_own() {
        use vm_memory::{Bytes, GuestAddress};
        let memory = crate::vmm::memory::allocate(64 << 20, false).unwrap();
        let before = measure(&memory).unwrap();
        assert_eq!(before.guest, 0);
        memory
            .write_slice(&vec![1; 8 << 20], GuestAddress(0))
            .unwrap();
        let after = measure(&memory).unwrap();
        assert_eq!(after.guest, 8 << 20);
        assert!(after.pss > 0 && after.rss >= after.pss);
    }
}
