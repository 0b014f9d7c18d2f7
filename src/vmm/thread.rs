//! The kinds of thread: `main` (events, signals, later the API and the agent), `worker` (all virtio queues
//! of in-process devices), `vcpu-N`, and `vhost-user` for each device that another process serves.
#![forbid(unsafe_code)]

use std::io;

use crate::vmm::seccomp;

/// Stack of the threads that this VMM starts, in bytes. Untouched pages cost nothing, as long as it is smaller than a
/// huge page: of a stack of 2 MiB, Rust's default, the first touch can cost all.
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
    /// Speaks with a vhost-user backend.
    VhostUser,
}

/// Every thread calls this once, before it touches anything of the guest's: from here on it may make only
/// the system calls of its role.
///
/// # Errors
/// The kernel refused the filter.
pub fn begin(role: Role) -> io::Result<()> {
    seccomp::limit(role)
}
