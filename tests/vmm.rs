//! `cube-vmm` from the outside, on this host's KVM, with kernels of a few instructions.
#![forbid(unsafe_code)]

mod payload;
#[path = "vmm/process.rs"]
mod process;
#[path = "vmm/refused.rs"]
mod refused;

use cube::vmm::timeline::Stage;
use payload::{expect, map, mark, store, store_far};
use process::Process;

/// The first virtio-mmio slot.
const SLOT: u64 = 0xd000_0000;

fn power_off() -> Vec<u8> {
    [&mark(0xff), payload::HALT].concat()
}

#[test]
fn a_power_off_is_success() {
    let end = Process::start(&power_off(), "").end();
    assert_eq!((end.status, end.message.as_str()), (0, ""));
}

#[test]
fn a_reset_has_its_status() {
    let end = Process::start(payload::RESET, "").end();
    assert_eq!(
        (end.status, end.message.as_str()),
        (64, "cube-vmm: the guest asked for a reset\n")
    );
}

#[test]
fn a_panic_has_its_status() {
    let panic = [&store(0x472, 0x1234), payload::RESET].concat();
    let end = Process::start(&panic, "").end();
    assert_eq!(end.status, 65);
    assert_eq!(end.message, "cube-vmm: the guest's kernel panicked\n");
}

#[test]
fn a_triple_fault_has_its_status() {
    let end = Process::start(payload::TRIPLE_FAULT, "").end();
    assert_eq!(end.status, 66, "{}", end.message);
    assert!(
        end.message.contains("vCPU 0 triple-faulted"),
        "{}",
        end.message
    );
}

#[test]
fn what_kvm_cannot_run_has_its_status() {
    let end = Process::start(payload::RUN_NOWHERE, "").end();
    assert_eq!(end.status, 67, "{}", end.message);
    let expected = "KVM stopped vCPU 0: KVM_EXIT_INTERNAL_ERROR, suberror 1 (it cannot emulate an \
                    instruction) at instruction pointer 0x30000000";
    assert!(end.message.contains(expected), "{}", end.message);
}

#[test]
fn signals_end_a_machine_whatever_it_does() {
    for code in [payload::HALT, payload::SPIN] {
        for (signal, status, name) in [
            (libc::SIGTERM, 143, "SIGTERM"),
            (libc::SIGINT, 130, "SIGINT"),
        ] {
            let mut process = Process::start(code, r#""cpus": 3"#);
            process.wait_for(Stage::KernelStarted);
            process.signal(signal);
            let end = process.end();
            assert_eq!(end.status, status, "{}", end.message);
            assert!(
                end.message.contains(&format!("stopped by {name}")),
                "{}",
                end.message
            );
            assert_eq!(end.stages.last(), Some(&Stage::Ended));
        }
    }
}

#[test]
fn a_machine_ends_with_its_parent() {
    let mut process = Process::start(payload::HALT, "");
    process.wait_for(Stage::KernelStarted);
    process.close_lifetime();
    let end = process.end();
    assert_eq!(end.status, 129, "{}", end.message);
    assert!(
        end.message.contains("--lifetime-fd was closed"),
        "{}",
        end.message
    );
}

#[test]
fn marks_are_stages_of_the_timeline_each_once() {
    let code = [mark(1), mark(2), mark(1), mark(9), mark(3), power_off()].concat();
    let end = Process::start(&code, "").end();
    assert_eq!(end.status, 0, "{}", end.message);
    let from_kernel: Vec<_> = end
        .stages
        .into_iter()
        .skip_while(|stage| *stage != Stage::KernelStarted)
        .collect();
    let expected = [
        Stage::KernelStarted,
        Stage::InitStarted,
        Stage::AgentReady,
        Stage::ContainerStarted,
        Stage::Ended,
    ];
    assert_eq!(from_kernel, expected);
    assert_eq!(end.exits["user_port_mark"], 6);
}

#[test]
fn an_empty_slot_shows_no_device() {
    let code = [
        map(SLOT, 0xc000),
        expect(SLOT, 0x7472_6976),
        expect(SLOT + 4, 2),
        expect(SLOT + 8, 0),
        power_off(),
    ]
    .concat();
    let end = Process::start(&code, r#""spare_slots": 1"#).end();
    assert_eq!(end.status, 0, "{}", end.message);
    assert_eq!(end.exits.get("user_virtio"), None, "a read is no exit");
}

#[test]
fn the_guest_cannot_write_what_a_slot_reads_as() {
    let code = [
        map(SLOT, 0xc000),
        store_far(SLOT, 0x1234_5678),
        expect(SLOT, 0x7472_6976),
        power_off(),
    ]
    .concat();
    let end = Process::start(&code, r#""spare_slots": 1"#).end();
    assert_eq!(end.status, 0, "{}", end.message);
    assert_eq!(end.exits["user_virtio"], 1, "a write is one");
}

#[test]
fn a_device_in_a_slot_shows_itself() {
    let code = [map(SLOT, 0xc000), expect(SLOT + 8, 4), power_off()].concat();
    let end = Process::start(&code, r#""rng": true"#).end();
    assert_eq!(end.status, 0, "virtio-rng is device 4: {}", end.message);
}

#[test]
fn addresses_without_a_device_read_as_zeroes_and_are_counted() {
    let nowhere = 0x3000_0000;
    let code = [store(nowhere as u32, 7), expect(nowhere, 0), power_off()].concat();
    let end = Process::start(&code, "").end();
    assert_eq!(end.status, 0, "{}", end.message);
    assert_eq!(end.exits["user_mmio_unknown"], 2);
}

#[test]
fn memory_goes_on_behind_the_hole() {
    let (last_below, hole, above) = (0xbfff_f000, 0xc000_0000, 0x1_0ff0_0000);
    let code = [
        map(last_below, 0xc000),
        map(hole, 0xd000),
        map(above, 0xe000),
        store_far(last_below, 0x1111_1111),
        store_far(hole, 0x2222_2222),
        store_far(above, 0x3333_3333),
        expect(last_below, 0x1111_1111),
        expect(hole, 0),
        expect(above, 0x3333_3333),
        power_off(),
    ]
    .concat();
    let end = Process::start(&code, r#""memory_mib": 3328"#).end();
    assert_eq!(end.status, 0, "{}", end.message);
}

#[test]
fn all_vcpus_come_and_go() {
    let end = Process::start(payload::RESET, r#""cpus": 32"#).end();
    assert_eq!(end.status, 64, "{}", end.message);
}

#[test]
fn the_console_is_shown_when_a_boot_fails() {
    let directory = tempfile::tempdir().unwrap();
    let console = directory.path().join("console");
    let text = b"first\nKernel panic - not syncing\n";
    // mov dx, 0x3f8; then for each byte: mov al, byte; out dx, al
    let mut code = vec![0x66, 0xba, 0xf8, 0x03];
    code.extend(text.iter().flat_map(|byte| [0xb0, *byte, 0xee]));
    code.extend(payload::RESET);
    let end = Process::start(&code, &format!(r#""console": "{}""#, console.display())).end();
    assert_eq!(end.status, 64);
    let expected = "cube-vmm: the guest asked for a reset\nthe last lines of its console:\n  first\n  \
                    Kernel panic - not syncing\n";
    assert_eq!(end.message, expected);
    assert_eq!(std::fs::read(console).unwrap(), text);
}
