//! How a machine ends, and the exit status that `cube-vmm` reports it with.
//!
//! | status | meaning |
//! |-------:|---------|
//! | 0      | the guest powered off |
//! | 1      | the host failed: no `/dev/kvm`, a file that cannot be read, a device's backing failed |
//! | 2      | the arguments or the spec are wrong |
//! | 64     | the guest asked for a reset |
//! | 65     | the guest's kernel panicked |
//! | 66     | triple fault: the guest has no handler left |
//! | 67     | KVM gave up on a vCPU, or stopped it for a reason that this VMM does not know |
//! | 129    | the other end of `--lifetime-fd` was closed, or SIGHUP |
//! | 130    | SIGINT |
//! | 143    | SIGTERM |
//!
//! Each but 0 comes with a sentence on standard error.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Mutex;

use rustix::event::{EventfdFlags, eventfd};

/// Why the machine ended. The first reason counts.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum End {
    /// Init asked for it.
    #[error("the guest powered off")]
    PowerOff,
    /// `reboot(2)` in the guest, or a write to the i8042's reset.
    #[error("the guest asked for a reset")]
    Reset,
    /// The kernel's panic handler reset the machine.
    #[error("the guest's kernel panicked")]
    Panic,
    /// KVM_EXIT_SHUTDOWN.
    #[error("the guest's vCPU {vcpu} triple-faulted: it has no exception handler left")]
    TripleFault {
        /// Which vCPU.
        vcpu: u8,
    },
    /// KVM cannot go on, or says something that this VMM does not understand.
    #[error("KVM stopped vCPU {vcpu}: {reason}")]
    Unhandled {
        /// Which vCPU.
        vcpu: u8,
        /// What KVM said, with the instruction pointer.
        reason: String,
    },
    /// A device of ours lost its backing.
    #[error("a device failed: {0}")]
    Device(String),
    /// What attends to the machine cannot go on with it.
    #[error("the pod cannot go on: {0}")]
    Pod(String),
    /// Somebody on the host ended it.
    #[error("the machine was stopped by {0}")]
    Stopped(StopCause),
}

/// Who stopped the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopCause {
    /// A signal, by number.
    Signal(i32),
    /// The peer of the lifetime descriptor is gone.
    LifetimeEnded,
}

impl std::fmt::Display for StopCause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Signal(libc::SIGTERM) => f.write_str("SIGTERM"),
            Self::Signal(libc::SIGINT) => f.write_str("SIGINT"),
            Self::Signal(libc::SIGHUP) => f.write_str("SIGHUP"),
            Self::Signal(number) => write!(f, "signal {number}"),
            Self::LifetimeEnded => f.write_str("the end of its parent (--lifetime-fd was closed)"),
        }
    }
}

impl End {
    /// The exit status, as the table above has it.
    pub fn status(&self) -> u8 {
        match self {
            Self::PowerOff => 0,
            Self::Device(_) | Self::Pod(_) => 1,
            Self::Reset => 64,
            Self::Panic => 65,
            Self::TripleFault { .. } => 66,
            Self::Unhandled { .. } => 67,
            Self::Stopped(StopCause::Signal(number)) => 128 + (number & 0x7f) as u8,
            Self::Stopped(StopCause::LifetimeEnded) => 129,
        }
    }

    /// Whether the guest ended by a fault of its own, of which its console may tell more.
    pub fn is_guest_failure(&self) -> bool {
        matches!(
            self,
            Self::Reset | Self::Panic | Self::TripleFault { .. } | Self::Unhandled { .. }
        )
    }
}

/// Where threads report the machine's end; `main` polls it.
pub struct Ending {
    first: Mutex<Option<End>>,
    event: OwnedFd,
}

impl Ending {
    /// Nothing has ended yet.
    ///
    /// # Errors
    /// No eventfd can be had.
    pub fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            first: Mutex::default(),
            event,
        })
    }

    /// Reports an end. Only the first is kept: the others follow from it.
    pub fn report(&self, end: End) {
        let mut first = self
            .first
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        first.get_or_insert(end);
        // The counter cannot overflow: each thread reports once.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    /// The first end reported.
    pub fn first(&self) -> Option<End> {
        self.first
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .clone()
    }

    /// Readable once an end was reported.
    pub fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// How much of the console is shown when a boot fails.
const TAIL_LINES: usize = 20;
const TAIL_BYTES: u64 = 8192;

/// The last lines of a console file, each indented, without control characters; empty if there are none.
pub fn console_tail(path: &Path) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let text = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<String> = text
        .lines()
        .map(|line| line.chars().filter(|c| !c.is_control()).collect::<String>())
        .filter(|line| !line.is_empty())
        .collect();
    let tail = &lines[lines.len().saturating_sub(TAIL_LINES)..];
    tail.iter().map(|line| format!("  {line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn every_end_has_a_status_of_its_own() {
        let ends = [
            End::PowerOff,
            End::Device(String::new()),
            End::Reset,
            End::Panic,
            End::TripleFault { vcpu: 0 },
            End::Unhandled {
                vcpu: 0,
                reason: String::new(),
            },
            End::Stopped(StopCause::LifetimeEnded),
            End::Stopped(StopCause::Signal(libc::SIGINT)),
            End::Stopped(StopCause::Signal(libc::SIGTERM)),
        ];
        let statuses: Vec<u8> = ends.iter().map(End::status).collect();
        assert_eq!(statuses, [0, 1, 64, 65, 66, 67, 129, 130, 143]);
    }

    #[test]
    fn the_first_end_counts() {
        let ending = Ending::new().unwrap();
        assert_eq!(ending.first(), None);
        ending.report(End::Panic);
        ending.report(End::Reset);
        assert_eq!(ending.first(), Some(End::Panic));
        let mut count = [0; 8];
        rustix::io::read(ending.event(), &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 2);
    }

    #[test]
    fn the_tail_is_short_and_printable() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        for n in 0..1000 {
            write!(file, "line {n}\x1b[31m\r\n").unwrap();
        }
        let tail = console_tail(file.path());
        assert_eq!(tail.lines().count(), 20);
        assert!(tail.ends_with("  line 999[31m\n"), "{tail}");
        assert_eq!(console_tail(Path::new("/nonexistent")), "");
    }
}
