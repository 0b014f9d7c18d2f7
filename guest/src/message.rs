//! The control frames.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use crate::network::InterfaceSpec;
use crate::spec::{ContainerSpec, ProcessSpec, Resources, TerminalSize, VolumeSpec};
use crate::stats::PodStats;

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
    /// Bind the virtio-mmio slot of this number, which the host has just filled, to its driver. Answered
    /// when the device is there.
    BindSlot {
        /// Number of the slot, from 0 in the order of the kernel's command line.
        slot: u16,
    },
    /// Let go of the device in a slot. Refused while a container or a volume uses its disk.
    UnbindSlot {
        /// Number of the slot.
        slot: u16,
    },
    /// Set up a network interface whose device was bound before. When it is to go, unbind its slot.
    SetUpInterface(Box<InterfaceSpec>),
    /// Make a volume, for containers that are started later. Answered when it is mounted.
    AddVolume(VolumeSpec),
    /// Unmount a volume that no container uses.
    RemoveVolume {
        /// Its name.
        volume: String,
    },
    /// Replace the content of a volume of [`VolumeSource::Files`], atomically. The guest dials the stream
    /// `token`, which carries one [`FileSet`](crate::files::FileSet), and answers when the new content is
    /// there. One write of a volume at a time.
    WriteFiles {
        /// The volume's name.
        volume: String,
        /// The stream.
        token: u64,
    },
    /// Send a file of a container's file system through the stream `token`; the answer comes first. The
    /// container may have ended, but not been removed: a file that shrinks meanwhile ends early.
    ReadFile {
        /// The container's id.
        container: String,
        /// Absolute path in the container.
        path: String,
        /// A longer file is sent from its end: the last so many bytes.
        max_bytes: u64,
        /// The stream.
        token: u64,
    },
    /// Start a container. Refused if the specification makes no sense; whatever else is in the way is reported
    /// as [`GuestEvent::Exited`].
    Start(Box<ContainerSpec>),
    /// Run a further process in a running container, one that is not paused. Whatever else is in the way is
    /// reported as [`GuestEvent::ExecExited`].
    Exec {
        /// The container's id.
        container: String,
        /// Id of the new process, unique in the pod.
        exec: String,
        /// What to run.
        process: Box<ProcessSpec>,
    },
    /// Send a signal to a process.
    Signal {
        /// Which.
        process: ProcessId,
        /// Signal number, 1 to 64.
        signal: u8,
        /// Send it to every process of the container's cgroup. Not for an exec, which has none of its own.
        #[serde(default)]
        all: bool,
    },
    /// Change the size of a process's terminal.
    Resize {
        /// Which.
        process: ProcessId,
        /// The new size.
        size: TerminalSize,
    },
    /// Change a container's limits; what is absent stays.
    Update {
        /// The container's id.
        container: String,
        /// The limits.
        resources: Resources,
    },
    /// Freeze a container's processes. Answered when all are frozen.
    Pause {
        /// The container's id.
        container: String,
    },
    /// Thaw them. Answered when that is done; a pause that was not done yet is answered by an error.
    Resume {
        /// The container's id.
        container: String,
    },
    /// Forget a container that has ended: its cgroup goes and its disks are unmounted. Answered when they can
    /// be taken away.
    Remove {
        /// The container's id.
        container: String,
    },
    /// Connect the stream `token` to a TCP port of the pod's loopback; answered when it is connected, and
    /// dialled then.
    Forward {
        /// The port.
        port: u16,
        /// The stream.
        token: u64,
    },
    /// Measure the pod and its containers.
    Stats,
    /// End every container (SIGTERM, then SIGKILL after the grace period) and power off.
    Shutdown {
        /// Milliseconds between SIGTERM and SIGKILL.
        grace_ms: u32,
    },
}

/// A process that the host started.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ProcessId {
    /// The first process of a container.
    Container(String),
    /// The process of an exec.
    Exec(String),
}

/// What a successful request is answered with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Answer {
    /// It was done.
    Done,
    /// To [`HostRequest::Stats`].
    Stats(Box<PodStats>),
    /// To [`HostRequest::ReadFile`].
    File {
        /// The file's size in bytes.
        size: u64,
        /// How many of them, its last, come through the stream.
        sent: u64,
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
        result: Result<Answer, String>,
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
    /// An exec's process ended, or could not be started.
    ExecExited {
        /// The exec's id.
        exec: String,
        /// How it ended.
        status: ExitStatus,
    },
    /// The kernel's OOM killer ended a process of the container, not necessarily its first. Never comes after
    /// the container's end was reported.
    OomKilled {
        /// The container's id.
        container: String,
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
