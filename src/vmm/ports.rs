//! The I/O ports: the i8042's reset, the mark port, and the 16550 if the machine has one.
//!
//! A port that is not there reads as all ones, as on real hardware, and takes no writes; such accesses
//! are counted. Touched by vCPU threads.
#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::arithmetic_side_effects
    )
)]

use cube_guest::{MARK_PORT, Mark, RESET_MODE_ADDRESS, RESET_MODE_PANIC};
use vm_memory::{Bytes, GuestAddress};

use crate::vmm::exit::End;
use crate::vmm::memory::GuestMemory;
use crate::vmm::serial::Serial;
use crate::vmm::stats::ExitKind;
use crate::vmm::timeline::Stage;

/// The i8042: data, and status/command. It exists only to be reset through: its status always reads
/// "ready".
const I8042_DATA: u16 = 0x60;
const I8042_COMMAND: u16 = 0x64;
/// Pulses the CPU's reset line.
const COMMAND_RESET: u8 = 0xfe;
/// COM1: eight registers.
const SERIAL: u16 = 0x3f8;
const SERIAL_END: u16 = 0x400;

/// What a write to a port asks for beyond the device itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PortAction {
    /// Nothing.
    None,
    /// A stage of the boot was reached.
    Reached(Stage),
    /// The machine ends.
    End(End),
}

/// The ports of a machine.
pub struct Ports {
    serial: Option<Serial>,
    memory: GuestMemory,
}

impl Ports {
    /// `serial`: the 16550, if there is one. `memory`: where a panicking kernel leaves its note.
    pub fn new(serial: Option<Serial>, memory: GuestMemory) -> Self {
        Self { serial, memory }
    }

    /// The guest reads `data.len()` bytes from `port`.
    pub fn read(&self, port: u16, data: &mut [u8]) -> ExitKind {
        data.fill(0xff);
        match (port, &self.serial, data) {
            (I8042_DATA | I8042_COMMAND, _, data) => {
                data.fill(0);
                ExitKind::PortReset
            }
            (SERIAL..SERIAL_END, Some(serial), [byte]) => {
                *byte = serial.read(port.wrapping_sub(SERIAL) as u8);
                ExitKind::PortSerial
            }
            _ => ExitKind::PortUnknown,
        }
    }

    /// The guest writes `data` to `port`.
    pub fn write(&self, port: u16, data: &[u8]) -> (ExitKind, PortAction) {
        match (port, &self.serial, data) {
            (I8042_COMMAND, _, [COMMAND_RESET]) => {
                (ExitKind::PortReset, PortAction::End(self.reset_reason()))
            }
            (I8042_DATA | I8042_COMMAND, _, _) => (ExitKind::PortReset, PortAction::None),
            (MARK_PORT, _, [mark]) => (ExitKind::PortMark, marked(*mark)),
            (SERIAL..SERIAL_END, Some(serial), [byte]) => {
                serial.write(port.wrapping_sub(SERIAL) as u8, *byte);
                (ExitKind::PortSerial, PortAction::None)
            }
            _ => (ExitKind::PortUnknown, PortAction::None),
        }
    }

    /// A reset is a panic if the kernel left its note. Without memory there it cannot have.
    fn reset_reason(&self) -> End {
        match self
            .memory
            .read_obj::<u16>(GuestAddress(RESET_MODE_ADDRESS))
        {
            Ok(RESET_MODE_PANIC) => End::Panic,
            _ => End::Reset,
        }
    }
}

/// The meaning of a byte written to the mark port; a byte without one is ignored.
fn marked(mark: u8) -> PortAction {
    const INIT_STARTED: u8 = Mark::InitStarted as u8;
    const AGENT_READY: u8 = Mark::AgentReady as u8;
    const CONTAINER_STARTED: u8 = Mark::ContainerStarted as u8;
    const POWER_OFF: u8 = Mark::PowerOff as u8;
    match mark {
        INIT_STARTED => PortAction::Reached(Stage::InitStarted),
        AGENT_READY => PortAction::Reached(Stage::AgentReady),
        CONTAINER_STARTED => PortAction::Reached(Stage::ContainerStarted),
        POWER_OFF => PortAction::End(End::PowerOff),
        _ => PortAction::None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::memory;

    fn ports() -> Ports {
        Ports::new(None, memory::allocate(1 << 20, false).unwrap())
    }

    #[test]
    fn the_note_in_memory_tells_panic_from_reset() {
        let ports = ports();
        assert_eq!(ports.write(0x64, &[0xfe]).1, PortAction::End(End::Reset));
        ports
            .memory
            .write_obj(0x1234u16, GuestAddress(0x472))
            .unwrap();
        assert_eq!(ports.write(0x64, &[0xfe]).1, PortAction::End(End::Panic));
        assert_eq!(ports.write(0x64, &[0xfd]).1, PortAction::None);
        assert_eq!(ports.write(0x64, &[0xfe, 0]).1, PortAction::None);
    }

    #[test]
    fn marks_are_stages() {
        let ports = ports();
        assert_eq!(
            ports.write(0x3f0, &[1]).1,
            PortAction::Reached(Stage::InitStarted)
        );
        assert_eq!(
            ports.write(0x3f0, &[0xff]).1,
            PortAction::End(End::PowerOff)
        );
        assert_eq!(
            ports.write(0x3f0, &[77]),
            (ExitKind::PortMark, PortAction::None)
        );
    }

    #[test]
    fn what_is_not_there_reads_as_ones_and_is_counted() {
        let ports = ports();
        let mut data = [0; 4];
        assert_eq!(ports.read(0x80, &mut data), ExitKind::PortUnknown);
        assert_eq!(data, [0xff; 4]);
        assert_eq!(ports.read(0x3f8, &mut data[..1]), ExitKind::PortUnknown);
        assert_eq!(
            ports.write(0x3f8, b"x"),
            (ExitKind::PortUnknown, PortAction::None)
        );
        assert_eq!(ports.read(0x64, &mut data[..1]), ExitKind::PortReset);
        assert_eq!(data[0], 0, "the controller is always ready");
    }
}
