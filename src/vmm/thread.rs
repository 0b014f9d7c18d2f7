//! The kinds of thread: `main` (events, signals, later the API and the agent), `worker` (all virtio queues
//! of in-process devices) and `vcpu-N`.
#![forbid(unsafe_code)]

use std::io;

/// Stack of the threads that this VMM starts, in bytes; untouched pages cost nothing.
pub const STACK: usize = 256 << 10;

/// What a thread does, and so what it may ask of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Events, signals, API.
    Main,
    /// Virtio queues.
    Worker,
    /// Runs the guest.
    Vcpu,
}

/// Every thread calls this once, before it touches anything of the guest's. It is where the system calls of
/// its role are to be limited; nothing is limited yet.
///
/// # Errors
/// The kernel refused a limit.
pub fn begin(_role: Role) -> io::Result<()> {
    Ok(())
}
