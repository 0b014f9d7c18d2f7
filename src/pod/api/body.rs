//! What the API's bodies say: plain data, shared by the server and its clients.
#![forbid(unsafe_code)]

use std::net::IpAddr;
use std::path::PathBuf;

use cube_guest::stats::PodStats;
use cube_guest::{
    DeviceSpec, ExitStatus, MountSpec, PidNamespace, ProcessSpec, Resources, SecuritySpec,
    TerminalSize,
};
use serde::{Deserialize, Serialize};

use crate::vmm::own_memory::OwnMemory;
use crate::vmm::timeline::{Entry, Stage};

/// A container to create. The process's `stdio` is the API's to set and must be absent.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateContainer {
    /// Unique in the pod: 1 to 63 letters, digits, `-`, `_`, `.`, the first a letter or digit.
    pub id: String,
    /// Files of the read-only EROFS image disk, laid end to end.
    pub image: Vec<DiskFile>,
    /// The ext4 disk for what the container writes; absent: a tmpfs.
    #[serde(default)]
    pub writable: Option<DiskFile>,
    /// Mount the root read-only.
    #[serde(default)]
    pub read_only_root: bool,
    /// Its first process.
    pub process: ProcessSpec,
    /// Whether it has a standard input.
    #[serde(default)]
    pub stdin: bool,
    /// Whether its standard input ends with the first client's; otherwise clients come and go.
    #[serde(default)]
    pub stdin_once: bool,
    /// A terminal of this size instead of three streams.
    #[serde(default)]
    pub terminal: Option<TerminalSize>,
    /// File for its output in CRI format; absent: `<pod directory>/<id>.log`.
    #[serde(default)]
    pub log_path: Option<PathBuf>,
    /// Keep no log: its output waits in the guest for a client, and ends with the last one, as a pipe does.
    #[serde(default)]
    pub no_log: bool,
    /// cgroup limits.
    #[serde(default)]
    pub resources: Resources,
    /// Mounted over the root, in order.
    #[serde(default)]
    pub mounts: Vec<MountSpec>,
    /// Device files besides the usual ones.
    #[serde(default)]
    pub devices: Vec<DeviceSpec>,
    /// What it may do.
    #[serde(default)]
    pub security: SecuritySpec,
    /// A seccomp profile as the OCI runtime specification has it, instead of `security.seccomp`.
    #[serde(default)]
    pub seccomp_profile: Option<serde_json::Value>,
    /// Whose PID namespace it has.
    #[serde(default)]
    pub pid_namespace: PidNamespace,
}

/// A file of a disk, opened by the pod process.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskFile {
    /// A raw file or block device.
    pub path: PathBuf,
    /// Its size in bytes; absent: as large as it is.
    #[serde(default)]
    pub size: Option<u64>,
}

/// A further process in a running container. Its outputs are read when a client attaches to them.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateExec {
    /// What to run; its `stdio` must be absent.
    pub process: ProcessSpec,
    /// Whether it has a standard input, which ends with the first client's.
    #[serde(default)]
    pub stdin: bool,
    /// A terminal of this size instead of three streams.
    #[serde(default)]
    pub terminal: Option<TerminalSize>,
}

/// An exec that was created.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExecCreated {
    /// Its id.
    pub exec: String,
}

/// A signal to send.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kill {
    /// Its number, 1 to 64.
    pub signal: u8,
    /// To every process of the container.
    #[serde(default)]
    pub all: bool,
}

/// A graceful end.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stop {
    /// Milliseconds between SIGTERM and SIGKILL.
    #[serde(default = "default_grace")]
    pub grace_ms: u32,
}

fn default_grace() -> u32 {
    10_000
}

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// As a shell shows it: 128 + N for signal N.
    pub exit_code: u8,
    /// The signal that ended it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<u8>,
    /// The guest's kernel ended it for want of memory.
    #[serde(default)]
    pub oom_killed: bool,
    /// Why it never ran.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl From<&ExitStatus> for Exit {
    fn from(status: &ExitStatus) -> Self {
        let (exit_code, signal, oom_killed, reason) = match status {
            ExitStatus::Code(code) => (*code, None, false, None),
            ExitStatus::Signal { signal, oom_killed } => {
                (128 | signal, Some(*signal), *oom_killed, None)
            }
            ExitStatus::NotStarted { code, reason } => (*code, None, false, Some(reason.clone())),
        };
        Self {
            exit_code,
            signal,
            oom_killed,
            reason,
        }
    }
}

/// Where a container is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ContainerState {
    /// Its disks are being attached.
    Creating,
    /// It can be started.
    Created,
    /// It was asked to start.
    Starting,
    /// Its process runs.
    Running,
    /// Its processes are frozen.
    Paused,
    /// Its process ended.
    Exited,
    /// Its disks are being detached.
    Removing,
}

/// A container as the API shows it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ContainerStatus {
    /// Its id.
    pub id: String,
    /// Where it is.
    pub state: ContainerState,
    /// When it was created, RFC 3339.
    pub created_at: String,
    /// When its process began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<String>,
    /// When its process ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<String>,
    /// How it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<Exit>,
    /// The log; absent: it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_path: Option<PathBuf>,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// How often it was started again after it had ended.
    pub restarts: u32,
    /// Why its log has holes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_error: Option<String>,
}

/// The pod as the API shows it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PodStatus {
    /// Its id.
    pub id: String,
    /// `starting`, `ready` or `stopping`.
    pub state: String,
    /// When its process began, RFC 3339.
    pub created_at: String,
    /// Version of the pod process.
    pub version: String,
    /// Version of the agent; absent until it is ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_version: Option<String>,
    /// The pod process.
    pub pid: u32,
    /// Its IP addresses; the first one is the one to call it by.
    pub addresses: Vec<IpAddr>,
    /// The stages of its machine's start.
    pub timeline: Vec<BootStage>,
    /// Its containers.
    pub containers: Vec<ContainerStatus>,
}

/// A stage of a machine's start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootStage {
    /// What happened.
    pub stage: Stage,
    /// Microseconds after the first stage.
    pub after_us: u64,
}

impl BootStage {
    /// The timeline as the API shows it.
    pub fn of(entries: &[Entry]) -> Vec<Self> {
        let first = entries.iter().map(|entry| entry.monotonic_ns).min();
        let stage = |entry: &Entry| Self {
            stage: entry.stage,
            after_us: entry.monotonic_ns.saturating_sub(first.unwrap_or(0)) / 1000,
        };
        let mut stages: Vec<Self> = entries.iter().map(stage).collect();
        stages.sort_by_key(|stage| stage.after_us);
        stages
    }
}

/// What the pod uses.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Stats {
    /// What the guest measures of itself and its containers.
    pub guest: PodStats,
    /// The pod process; absent: it cannot read its own memory map.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm: Option<VmmMemory>,
}

/// Memory of the pod process, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmmMemory {
    /// Proportional set size of everything but guest memory: what the pod costs beyond its guest.
    pub pss: u64,
    /// Resident set size of the same.
    pub rss: u64,
    /// Guest memory that is resident.
    pub guest: u64,
}

impl From<OwnMemory> for VmmMemory {
    fn from(memory: OwnMemory) -> Self {
        let OwnMemory { pss, rss, guest } = memory;
        Self { pss, rss, guest }
    }
}
