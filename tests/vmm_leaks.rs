//! A machine gives back all that it took. A program of its own with one test, because it counts the whole
//! process's descriptors and address space.
#![forbid(unsafe_code)]

mod payload;

use std::sync::Arc;

use cube::vmm::exit::{End, StopCause};
use cube::vmm::machine::Machine;
use cube::vmm::spec::{HostLimits, MachineSpec, ValidSpec};
use cube::vmm::timeline::Timeline;

const MEMORY_MIB: usize = 2048;

fn count(directory: &str) -> usize {
    std::fs::read_dir(directory).unwrap().count()
}

/// The process's descriptors. (Threads are joined, but a joined thread may still be listed for a moment.)
fn descriptors() -> usize {
    count("/proc/self/fd")
}

/// The process's address space, in units of the guest's memory. Thread-local heaps are far smaller.
fn guests_mapped() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: usize = statm.split(' ').next().unwrap().parse().unwrap();
    (pages >> 8) / MEMORY_MIB
}

fn spec(kernel: &std::path::Path, vsock: &std::path::Path) -> Arc<ValidSpec> {
    let json = serde_json::json!({
        "kernel": {"path": kernel},
        "cpus": 3,
        "memory_mib": MEMORY_MIB,
        "rng": true,
        "vsock": {"cid": 3, "path": vsock},
        "spare_slots": 2,
    });
    let spec = MachineSpec::from_json(json.to_string().as_bytes()).unwrap();
    Arc::new(spec.validate(HostLimits::of_this_host()).unwrap())
}

fn run(spec: &Arc<ValidSpec>) -> End {
    let timeline = Arc::new(Timeline::new(None));
    let machine = Machine::build(spec, &timeline, true).unwrap();
    let running = machine.start().unwrap();
    assert_eq!(
        guests_mapped(),
        1,
        "the guest's memory is there while it runs"
    );
    running.stop(End::Stopped(StopCause::LifetimeEnded))
}

#[test]
fn nothing_is_left_of_a_machine() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = directory.path().join("kernel");
    std::fs::write(&kernel, payload::elf(payload::SPIN)).unwrap();
    let spec = spec(&kernel, &directory.path().join("vsock"));
    run(&spec);
    let before = descriptors();
    assert_eq!(guests_mapped(), 0);
    for _ in 0..5 {
        assert_eq!(run(&spec), End::Stopped(StopCause::LifetimeEnded));
    }
    assert_eq!((descriptors(), guests_mapped()), (before, 0));
    assert_eq!(
        count(directory.path().to_str().unwrap()),
        1,
        "the socket is gone"
    );
    // What fails half-way leaves nothing either.
    std::fs::write(&kernel, b"not a kernel").unwrap();
    for _ in 0..5 {
        assert!(Machine::build(&spec, &Arc::new(Timeline::new(None)), true).is_err());
    }
    assert_eq!((descriptors(), guests_mapped()), (before, 0));
}
