//! The control frames.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use crate::spec::{ContainerSpec, TerminalSize};

/// Host to guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostMessage {
    /// Repeated in the reply.
    pub id: u64,
    /// What to do.
    pub request: HostRequest,
}

/// What the host can ask for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum HostRequest {
    /// Start a further container.
    Start(Box<ContainerSpec>),
    /// Send a signal to a container's first process.
    Signal {
        /// The container's id.
        container: String,
        /// Signal number, 1 to 64.
        signal: u8,
    },
    /// Change the size of a container's terminal.
    Resize {
        /// The container's id.
        container: String,
        /// The new size.
        size: TerminalSize,
    },
    /// End every container (SIGTERM, then SIGKILL after the grace period) and power off.
    Shutdown {
        /// Milliseconds between SIGTERM and SIGKILL.
        grace_ms: u32,
    },
}

/// Guest to host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum GuestMessage {
    /// The first frame of the control connection.
    Hello {
        /// [`crate::PROTOCOL_VERSION`] of the guest.
        protocol: u32,
        /// Version of `cube-init`.
        version: String,
    },
    /// The answer to the request of the same id.
    Reply {
        /// Id of the request.
        id: u64,
        /// An error is a sentence for a person.
        result: Result<(), String>,
    },
    /// Something happened.
    Event(GuestEvent),
}

/// What the guest reports unasked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum GuestEvent {
    /// The container's process was executed.
    Started {
        /// The container's id.
        container: String,
    },
    /// The container's first process ended, or could not be started.
    Exited {
        /// The container's id.
        container: String,
        /// How it ended.
        status: ExitStatus,
    },
    /// The guest could not set the pod up; it powers off next. No container ran.
    Failed {
        /// A sentence: what, which file or disk, why.
        reason: String,
    },
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ExitStatus {
    /// It exited with this code.
    Code(u8),
    /// A signal killed it.
    Signal {
        /// The signal's number.
        signal: u8,
        /// The kernel's OOM killer sent it.
        oom_killed: bool,
    },
    /// It never ran.
    NotStarted {
        /// The exit status that a shell would give: 127 not found, 126 not executable, 125 otherwise.
        code: u8,
        /// A sentence: what, which file, why.
        reason: String,
    },
}
