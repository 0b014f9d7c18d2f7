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
    start: u64,
    end: u64,
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

/// Guest memory is the run of neighbouring mappings whose sizes add up to the guest's size (advice splits a
/// mapping). A VMM whose memory is in several places gets the largest mappings until its size is reached.
fn of_smaps(smaps: &str, memory_mib: u32) -> Footprint {
    let mut mappings = parse(smaps);
    let guest_kib = u64::from(memory_mib) * 1024;
    let guest = run_of(&mappings, guest_kib);
    let mut footprint = Footprint::default();
    let mut count = |mapping: &Mapping, is_guest: bool| {
        if is_guest {
            footprint.guest_touched_kib += mapping.rss_kib;
        } else {
            footprint.overhead_pss_kib += mapping.pss_kib;
            footprint.overhead_rss_kib += mapping.rss_kib;
        }
    };
    if let Some(guest) = guest {
        for (index, mapping) in mappings.iter().enumerate() {
            count(mapping, guest.contains(&index));
        }
        return footprint;
    }
    mappings.sort_by_key(|mapping| std::cmp::Reverse(mapping.size_kib));
    let mut found_kib = 0;
    for mapping in &mappings {
        let missing = guest_kib.saturating_sub(found_kib);
        let is_guest = missing > 0 && mapping.size_kib >= missing.min(guest_kib / 8);
        found_kib += if is_guest { mapping.size_kib } else { 0 };
        count(mapping, is_guest);
    }
    footprint
}

/// The neighbours that are exactly `guest_kib` large together; of several such runs the one with most in it.
fn run_of(mappings: &[Mapping], guest_kib: u64) -> Option<std::ops::Range<usize>> {
    let ends_at = |first: usize| {
        let mut size = 0;
        for (index, mapping) in mappings.iter().enumerate().skip(first) {
            if index > first && mapping.start != mappings[index - 1].end {
                return None;
            }
            size += mapping.size_kib;
            if size >= guest_kib {
                return (size == guest_kib).then_some(first..index + 1);
            }
        }
        None
    };
    let resident =
        |run: &std::ops::Range<usize>| mappings[run.clone()].iter().map(|m| m.rss_kib).sum::<u64>();
    (0..mappings.len()).filter_map(ends_at).max_by_key(resident)
}

fn parse(smaps: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        if let Some((start, end)) = range(line) {
            mappings.push(Mapping {
                start,
                end,
                ..Mapping::default()
            });
            continue;
        }
        let (Some((key, value)), Some(mapping)) = (line.split_once(':'), mappings.last_mut())
        else {
            continue;
        };
        let kib = || value.split_whitespace().next()?.parse().ok();
        match key {
            "Size" => mapping.size_kib = kib().unwrap_or(0),
            "Pss" => mapping.pss_kib = kib().unwrap_or(0),
            "Rss" => mapping.rss_kib = kib().unwrap_or(0),
            _ => {}
        }
    }
    mappings
}

/// The addresses in a mapping's first line: `7f0000000000-7f0008000000 rw-p …`.
fn range(line: &str) -> Option<(u64, u64)> {
    let (start, end) = line.split(' ').next()?.split_once('-')?;
    Some((
        u64::from_str_radix(start, 16).ok()?,
        u64::from_str_radix(end, 16).ok()?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A map of (gap before it, size, resident, proportional) in KiB.
    fn smaps(mappings: &[(u64, u64, u64, u64)]) -> String {
        let mut address: u64 = 0x7f00_0000_0000;
        let line = |&(gap, size, rss, pss): &(u64, u64, u64, u64)| {
            let start = address + (gap << 10);
            address = start + (size << 10);
            format!(
                "{start:x}-{address:x} rw-p 00000000 00:00 0\nSize: {size} kB\nRss: {rss} kB\nPss: {pss} kB\n"
            )
        };
        mappings.iter().map(line).collect()
    }

    #[test]
    fn guest_memory_is_told_from_the_rest() {
        let smaps = smaps(&[
            (4, 2048, 900, 700),
            (4, 131_072, 15_000, 15_000),
            (0, 132, 64, 64),
        ]);
        let footprint = of_smaps(&smaps, 128);
        assert_eq!(footprint.guest_touched_kib, 15_000);
        assert_eq!(
            (footprint.overhead_pss_kib, footprint.overhead_rss_kib),
            (764, 964)
        );
    }

    #[test]
    fn advice_splits_guest_memory_and_a_large_reservation_is_not_part_of_it() {
        let pieces = [
            (4, 65_404, 100, 100),
            (8, 16_384, 5, 5),
            (0, 8_192, 8_192, 8_192),
            (0, 106_496, 3, 3),
        ];
        let footprint = of_smaps(&smaps(&pieces), 128);
        assert_eq!(
            (footprint.guest_touched_kib, footprint.overhead_pss_kib),
            (8_200, 100)
        );
    }

    #[test]
    fn guest_memory_may_be_in_two_places() {
        let footprint = of_smaps(
            &smaps(&[
                (4, 3 << 20, 10, 10),
                (4, 1 << 20, 20, 20),
                (4, 65_536, 1, 1),
            ]),
            4096,
        );
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
