//! What a VMM costs in memory, read from its own `/proc` files.
#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::path::Path;

use serde::Serialize;

/// The memory of one VMM process, in KiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Footprint {
    /// PSS of everything that is not guest memory.
    pub overhead_pss_kib: u64,
    /// RSS of everything that is not guest memory.
    pub overhead_rss_kib: u64,
    /// Guest memory that is resident: what the guest has touched.
    pub guest_touched_kib: u64,
    /// Threads of the process.
    pub threads: u64,
}

/// One mapping of `/proc/PID/smaps`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Mapping {
    size_kib: u64,
    pss_kib: u64,
    rss_kib: u64,
}

/// Reads the footprint of a running process whose guest has `memory_mib` of memory.
///
/// # Errors
/// The process is gone, or its memory map cannot be read.
pub fn of_process(pid: u32, memory_mib: u32) -> io::Result<Footprint> {
    let proc = Path::new("/proc").join(pid.to_string());
    let mut footprint = of_smaps(&fs::read_to_string(proc.join("smaps"))?, memory_mib);
    footprint.threads = fs::read_dir(proc.join("task"))?.count() as u64;
    Ok(footprint)
}

/// Guest memory is the largest mapping, and every further one until the guest's size is reached: a VMM
/// maps it in one piece, or in two around the hole below 4 GiB.
fn of_smaps(smaps: &str, memory_mib: u32) -> Footprint {
    let mut mappings = parse(smaps);
    mappings.sort_by_key(|mapping| std::cmp::Reverse(mapping.size_kib));
    let guest_kib = u64::from(memory_mib) * 1024;
    let (mut found_kib, mut footprint) = (0, Footprint::default());
    for mapping in mappings {
        if found_kib < guest_kib && mapping.size_kib >= (guest_kib - found_kib).min(guest_kib / 8) {
            found_kib += mapping.size_kib;
            footprint.guest_touched_kib += mapping.rss_kib;
        } else {
            footprint.overhead_pss_kib += mapping.pss_kib;
            footprint.overhead_rss_kib += mapping.rss_kib;
        }
    }
    footprint
}

fn parse(smaps: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        let kib = || value.split_whitespace().next()?.parse().ok();
        match (key, mappings.last_mut()) {
            ("Size", _) => mappings.push(Mapping {
                size_kib: kib().unwrap_or(0),
                ..Mapping::default()
            }),
            ("Pss", Some(mapping)) => mapping.pss_kib = kib().unwrap_or(0),
            ("Rss", Some(mapping)) => mapping.rss_kib = kib().unwrap_or(0),
            _ => {}
        }
    }
    mappings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(size: u64, rss: u64, pss: u64) -> String {
        format!(
            "7f0000000000-7f0008000000 rw-p 00000000 00:00 0\nSize: {size} kB\nRss: {rss} kB\nPss: {pss} kB\n"
        )
    }

    #[test]
    fn guest_memory_is_told_from_the_rest() {
        let smaps = [
            mapping(2048, 900, 700),
            mapping(131_072, 15_000, 15_000),
            mapping(132, 64, 64),
        ];
        let footprint = of_smaps(&smaps.concat(), 128);
        assert_eq!(footprint.guest_touched_kib, 15_000);
        assert_eq!(
            (footprint.overhead_pss_kib, footprint.overhead_rss_kib),
            (764, 964)
        );
    }

    #[test]
    fn guest_memory_may_be_in_two_pieces() {
        let smaps = [
            mapping(3 << 20, 10, 10),
            mapping(1 << 20, 20, 20),
            mapping(65_536, 1, 1),
        ];
        let footprint = of_smaps(&smaps.concat(), 4096);
        assert_eq!(
            (footprint.guest_touched_kib, footprint.overhead_pss_kib),
            (30, 1)
        );
    }

    #[test]
    fn this_process_has_a_footprint() {
        let footprint = of_process(std::process::id(), 1 << 20).expect("our own smaps");
        assert!(footprint.overhead_pss_kib + footprint.guest_touched_kib > 0);
        assert!(footprint.threads >= 1);
    }
}
