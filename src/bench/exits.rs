//! KVM exits of a VMM by reason, as KVM itself counts them in debugfs: the same for every VMM.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// Where KVM keeps a directory per VM, named `<pid>-<fd>` (Linux, virt/kvm/kvm_main.c).
const DIRECTORY: &str = "/sys/kernel/debug/kvm";

/// The counters that tell where the time goes. KVM sums them over the vCPUs.
const REASONS: &[&str] = &[
    "exits",
    "io_exits",
    "mmio_exits",
    "halt_exits",
    "irq_exits",
    "irq_window_exits",
    "signal_exits",
];

/// The counters of the VM that process `pid` runs; empty where debugfs is not mounted or not readable.
pub fn of_process(pid: u32) -> BTreeMap<String, u64> {
    read_counters(Path::new(DIRECTORY), pid)
}

fn read_counters(debugfs: &Path, pid: u32) -> BTreeMap<String, u64> {
    let prefix = format!("{pid}-");
    let vm = fs::read_dir(debugfs).ok().and_then(|entries| {
        entries
            .flatten()
            .find(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
            .map(|entry| entry.path())
    });
    let Some(vm) = vm else { return BTreeMap::new() };
    let counter = |reason: &&str| {
        let count = fs::read_to_string(vm.join(reason))
            .ok()?
            .trim()
            .parse()
            .ok()?;
        Some((
            reason.trim_end_matches("_exits").replace("exits", "total"),
            count,
        ))
    };
    REASONS.iter().filter_map(counter).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_from_the_directory_of_the_process() {
        let debugfs = tempfile::tempdir().expect("a directory");
        for (pid, count) in ["71-9", "7-12"].iter().zip(["1", "4321\n"]) {
            fs::create_dir(debugfs.path().join(pid)).expect("a VM's directory");
            fs::write(debugfs.path().join(pid).join("exits"), count).expect("a counter");
            fs::write(debugfs.path().join(pid).join("io_exits"), "17\n").expect("a counter");
        }
        let counters = read_counters(debugfs.path(), 7);
        assert_eq!(counters.get("total"), Some(&4321));
        assert_eq!(counters.get("io"), Some(&17));
        assert!(read_counters(debugfs.path(), 9).is_empty());
    }
}
