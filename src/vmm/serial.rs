//! The optional 16550 at COM1, which writes to a file. Input is not wired. Touched by vCPU threads.
//!
//! What a guest says is bounded: after [`MAX_CONSOLE`] bytes nothing more is written.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use vm_superio::Trigger;
use vm_superio::serial::NoEvents;
use vmm_sys_util::eventfd::EventFd;

/// The most that a console's file receives, in bytes: a guest must not fill the host's disk.
pub const MAX_CONSOLE: u64 = 16 << 20;

/// A file that takes so many bytes more, and loses the rest.
struct Bounded {
    file: File,
    left: u64,
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let fits = bytes
            .len()
            .min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let (taken, lost) = bytes.split_at(fits);
        self.file.write_all(taken)?;
        self.left -= fits as u64;
        Ok(taken.len() + lost.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The port's interrupt line.
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The serial port.
pub struct Serial {
    uart: Mutex<vm_superio::Serial<Line, NoEvents, Bounded>>,
}

impl Serial {
    /// A port that writes to `console` and interrupts through `line`.
    pub fn new(console: File, line: EventFd) -> Self {
        let console = Bounded {
            file: console,
            left: MAX_CONSOLE,
        };
        Self {
            uart: Mutex::new(vm_superio::Serial::new(Line(line), console)),
        }
    }

    /// Reads register `offset`, 0 to 7.
    pub fn read(&self, offset: u8) -> u8 {
        self.uart
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .read(offset)
    }

    /// Writes register `offset`, 0 to 7.
    pub fn write(&self, offset: u8, value: u8) {
        let mut uart = self.uart.lock().unwrap_or_else(PoisonError::into_inner);
        // A full disk costs the console its output, not the guest its life; so does a lost interrupt.
        let _ = uart.write(offset, value);
    }
}

/// Creates or empties the console's file.
///
/// # Errors
/// The operating system's answer.
pub fn create_console(path: &Path) -> io::Result<File> {
    File::create(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_written_reach_the_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let serial = Serial::new(
            create_console(file.path()).unwrap(),
            EventFd::new(0).unwrap(),
        );
        for byte in b"hello" {
            serial.write(0, *byte);
        }
        assert_eq!(serial.read(5) & 0x60, 0x60, "the transmitter is empty");
        assert_eq!(std::fs::read(file.path()).unwrap(), b"hello");
    }

    #[test]
    fn a_talkative_guest_does_not_fill_the_disk() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut console = Bounded {
            file: create_console(file.path()).unwrap(),
            left: 5,
        };
        for _ in 0..3 {
            assert_eq!(console.write(b"abc").unwrap(), 3);
        }
        assert_eq!(std::fs::read(file.path()).unwrap(), b"abcab");
    }
}
