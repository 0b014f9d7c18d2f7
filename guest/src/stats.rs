//! What the guest measures of itself. Counters count from the start of what they belong to.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

/// The pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PodStats {
    /// The guest's memory, in bytes, as its kernel sees it (`MemTotal`).
    pub memory_total: u64,
    /// What of it could be given to a new program (`MemAvailable`).
    pub memory_available: u64,
    /// `cube-init` itself.
    pub agent: AgentStats,
    /// All containers together, and `cube-init`: the root cgroup.
    pub usage: Usage,
    /// Network interfaces, the loopback left out.
    pub interfaces: Vec<InterfaceStats>,
    /// Containers that have not been removed.
    pub containers: Vec<ContainerStats>,
}

/// The process `cube-init`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentStats {
    /// Resident memory, in bytes.
    pub rss: u64,
    /// Open file descriptors.
    pub descriptors: u64,
}

/// One container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContainerStats {
    /// Its id.
    pub id: String,
    /// What it uses; zeroes once it has ended.
    pub usage: Usage,
    /// Its writable disk; absent: it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub writable: Option<FileSystemStats>,
}

/// What a cgroup uses.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Usage {
    /// CPU time in microseconds.
    pub cpu_us: u64,
    /// `memory.current`, in bytes.
    pub memory: u64,
    /// `memory.current` less `inactive_file`: what the kubelet calls the working set.
    pub working_set: u64,
    /// Anonymous memory, in bytes.
    pub rss: u64,
    /// Page faults, and those of them that read from a disk.
    pub page_faults: u64,
    /// Page faults that read from a disk.
    pub major_page_faults: u64,
    /// Processes and threads.
    pub pids: u64,
    /// Bytes read from disks.
    pub read_bytes: u64,
    /// Bytes written to disks.
    pub written_bytes: u64,
    /// Processes that the OOM killer ended.
    pub oom_kills: u64,
}

/// A file system (statvfs(3)).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileSystemStats {
    /// Size in bytes.
    pub total_bytes: u64,
    /// Bytes in use.
    pub used_bytes: u64,
    /// Inodes in use.
    pub used_inodes: u64,
}

/// A network interface.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InterfaceStats {
    /// Its name.
    pub name: String,
    /// Bytes received.
    pub received_bytes: u64,
    /// Packets received.
    pub received_packets: u64,
    /// Packets lost on the way in.
    pub received_errors: u64,
    /// Bytes sent.
    pub sent_bytes: u64,
    /// Packets sent.
    pub sent_packets: u64,
    /// Packets lost on the way out.
    pub sent_errors: u64,
}
