//! The kernel's command line, as the VMM makes it.
#![forbid(unsafe_code)]

use std::fmt::Write;

use crate::vmm::layout;
use crate::vmm::spec::MachineSpec;

/// For every guest:
/// - `panic=-1 reboot=k,panic_warm`: a panic resets at once, through the i8042, and says so in memory
///   (see `cube_guest::RESET_MODE_ADDRESS`);
/// - `tsc=reliable no_timer_check`: no watchdog over the clock that KVM vouches for, no search for a
///   timer interrupt that this machine does not have;
/// - `rcupdate.rcu_expedited=1 cryptomgr.notests random.trust_cpu=on`: nothing that boots waits for a
///   grace period, a self-test or entropy;
/// - `percpu_alloc=page`: chunks of per-CPU memory as large as their content. Otherwise they are 2 MiB, and
///   the cgroup accounting of the second one alone is 4 MiB that every guest touches;
/// - `slub_min_objects=4`: half the objects in a slab that Linux would have. An idle pod has a few of most kinds, and
///   a new slab is touched as a whole;
/// - `noreplace-smp`: with one CPU Linux overwrites each of its `lock` prefixes, thousands of them, and changes page
///   tables twice for each;
/// - `swiotlb=noforce`: no bounce buffers (64 MiB of them as soon as there is memory beyond 4 GiB): virtio
///   devices reach all of memory.
pub const ALWAYS: &str = "panic=-1 reboot=k,panic_warm tsc=reliable no_timer_check \
                      rcupdate.rcu_expedited=1 cryptomgr.notests random.trust_cpu=on \
                      percpu_alloc=page slub_min_objects=4 noreplace-smp swiotlb=noforce";
/// Without a serial port: no probing for one, no formatting of messages for nobody.
pub const SILENT: &str = "quiet 8250.nr_uarts=0";
/// With a serial port every message goes there.
const CONSOLE: &str = "console=ttyS0 8250.nr_uarts=1";

/// The command line of a machine with that many virtio-mmio slots, without the final NUL.
pub fn command_line(spec: &MachineSpec, slots: usize) -> String {
    let console = if spec.console.is_some() {
        CONSOLE
    } else {
        SILENT
    };
    let mut line = format!("{ALWAYS} {console}");
    for slot in 0..slots {
        let (address, irq) = (layout::slot_address(slot), layout::slot_irq(slot));
        // A String takes everything.
        let size = layout::SLOT_SIZE;
        let _ = write!(line, " virtio_mmio.device={size}@{address:#x}:{irq}");
    }
    if !spec.command_line.is_empty() {
        line.push(' ');
        line.push_str(&spec.command_line);
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(more: &str, console: bool) -> MachineSpec {
        let mut spec =
            MachineSpec::from_json(br#"{"kernel":{"path":"/k"},"cpus":1,"memory_mib":64}"#)
                .unwrap();
        spec.command_line = more.into();
        spec.console = console.then(|| "/console".into());
        spec
    }

    #[test]
    fn slots_are_declared_with_address_and_line() {
        let line = command_line(&spec("", false), 2);
        assert!(line.starts_with("panic=-1 reboot=k,panic_warm "), "{line}");
        let end = "virtio_mmio.device=512@0xd0000000:5 virtio_mmio.device=512@0xd0000200:6";
        assert!(line.ends_with(end), "{line}");
    }

    #[test]
    fn the_users_words_come_last() {
        assert!(command_line(&spec("a=b c", true), 1).ends_with(":5 a=b c"));
    }

    #[test]
    fn all_slots_fit_with_room_for_the_user() {
        let line = command_line(&spec("", true), layout::MAX_SLOTS);
        assert!(
            line.len() + 500 < layout::COMMAND_LINE_MAX,
            "{}",
            line.len()
        );
    }
}
