//! What the host asks the guest to run.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The pod as `cube-init` sees it at boot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PodSpec {
    /// Host name of the pod's UTS namespace.
    #[serde(default)]
    pub hostname: String,
    /// Kernel parameters of the pod's namespaces, such as `net.core.somaxconn`: name and value.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub sysctls: BTreeMap<String, String>,
    /// Size of the pod's `/dev/shm` in bytes; absent: 64 MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shm_bytes: Option<u64>,
    /// Made at boot, in order, before the containers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<VolumeSpec>,
    /// Started at boot, in order.
    #[serde(default)]
    pub containers: Vec<ContainerSpec>,
    /// Power off when the last of `containers` has exited and its exit was reported.
    #[serde(default)]
    pub exit_with_containers: bool,
}

/// One container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContainerSpec {
    /// Unique in the pod; a valid file name.
    pub id: String,
    /// Its root file system.
    pub rootfs: RootFs,
    /// Its first process.
    pub process: ProcessSpec,
    /// cgroup v2 limits.
    #[serde(default)]
    pub resources: Resources,
    /// Mounted over the root, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<MountSpec>,
    /// Device files besides the usual ones.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<DeviceSpec>,
    /// What the container may do.
    #[serde(default)]
    pub security: SecuritySpec,
    /// Whose PID namespace it has.
    #[serde(default)]
    pub pid_namespace: PidNamespace,
}

/// A PID namespace.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PidNamespace {
    /// The container's own: its first process is PID 1.
    #[default]
    Container,
    /// One that all such containers of the pod share.
    Pod,
}

/// Something mounted in a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountSpec {
    /// Absolute path in the container; made if absent.
    pub path: String,
    /// What is mounted there.
    pub source: MountSource,
    /// Refuse writes.
    #[serde(default)]
    pub read_only: bool,
}

/// What is mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum MountSource {
    /// A volume of the pod, or a file or directory in it.
    Volume {
        /// The volume's name.
        volume: String,
        /// Relative path in the volume, without `..`; a directory is made if absent, with the mode of the
        /// volume's root. Symbolic links in it must stay in the volume. Empty: all of it.
        #[serde(default)]
        sub_path: String,
    },
    /// A tmpfs of the container's own.
    Tmpfs {
        /// Its size in bytes; absent: half of the memory.
        #[serde(default)]
        size_bytes: Option<u64>,
        /// Mode of its root.
        #[serde(default = "world_writable")]
        mode: u32,
    },
}

fn world_writable() -> u32 {
    0o1777
}

/// A device file in a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceSpec {
    /// Absolute path in the container.
    pub path: String,
    /// The disk with this virtio-blk serial.
    pub serial: String,
    /// Permission bits.
    #[serde(default = "owner_and_group")]
    pub mode: u32,
    /// Owner.
    #[serde(default)]
    pub uid: u32,
    /// Group.
    #[serde(default)]
    pub gid: u32,
}

fn owner_and_group() -> u32 {
    0o660
}

/// What a container may do, beside its processes' own capabilities.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SecuritySpec {
    /// Every capability, every device, nothing masked, no filter, `/sys` writable.
    #[serde(default)]
    pub privileged: bool,
    /// Paths hidden; absent: the usual ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub masked_paths: Option<Vec<String>>,
    /// Paths made read-only; absent: the usual ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_only_paths: Option<Vec<String>>,
    /// The system call filter.
    #[serde(default)]
    pub seccomp: Seccomp,
}

/// A system call filter. Besides it, every container that is not privileged has the guard that keeps vsock,
/// and so the agent's voice, from it: EPERM for `socket(AF_VSOCK)` and `io_uring_setup`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Seccomp {
    /// `cube-init`'s own default: the guard alone.
    #[default]
    Default,
    /// None but the guard.
    Unconfined,
    /// Classic BPF programs, installed in order after the guard. They must allow `capset` and `prctl`, or
    /// the process `no_new_privileges`. Each instruction is a `struct sock_filter` (linux/filter.h)
    /// as a little-endian `u64`.
    Programs(Vec<Vec<u64>>),
}

/// A volume of the pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeSpec {
    /// Unique in the pod; a valid file name.
    pub name: String,
    /// What it is.
    pub source: VolumeSource,
}

/// Where a volume's content is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum VolumeSource {
    /// A tmpfs.
    Memory {
        /// Its size in bytes; absent: half of the memory.
        #[serde(default)]
        size_bytes: Option<u64>,
    },
    /// The file system on a disk.
    Disk {
        /// The disk's virtio-blk serial.
        serial: String,
        /// `ext4` or `erofs`.
        file_system: String,
        /// Permission bits that its root directory gets; absent: those it has. For an emptyDir, which everybody
        /// may write.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        root_mode: Option<u32>,
        /// Mount it read-only.
        #[serde(default)]
        read_only: bool,
    },
    /// Files that the host writes ([`HostRequest::WriteFiles`](crate::HostRequest::WriteFiles)).
    Files,
    /// A directory of an NFS server, reached through the pod's network.
    Nfs {
        /// IPv4 or IPv6 address: the guest resolves no names.
        server: String,
        /// Absolute path on it.
        path: String,
        /// Mount options as of nfs(5), comma-separated.
        #[serde(default)]
        options: String,
        /// Mount it read-only.
        #[serde(default)]
        read_only: bool,
    },
}

/// The root: an image disk, and a writable disk over it by overlayfs. Disks are named by virtio-blk
/// serial.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RootFs {
    /// Serial of the read-only EROFS disk.
    pub image: String,
    /// Serial of the ext4 disk for the upper directory; absent: the upper directory is a tmpfs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub writable: Option<String>,
    /// Mount the root read-only.
    #[serde(default)]
    pub read_only: bool,
}

/// A process in a container. `env` may hold secrets: `Debug` shows names only.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProcessSpec {
    /// Program and arguments; not empty. Looked up in the container's `PATH`.
    pub argv: Vec<String>,
    /// `NAME=value`.
    #[serde(default)]
    pub env: Vec<String>,
    /// Working directory; made if absent. Empty: `/`.
    #[serde(default)]
    pub cwd: String,
    /// `user`, `uid`, `user:group`, `uid:gid` as in the OCI image configuration, resolved against the
    /// container's `/etc/passwd` and `/etc/group`. Empty: root.
    #[serde(default)]
    pub user: String,
    /// Supplementary groups, besides those of the user in the container's `/etc/group`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub additional_gids: Vec<u32>,
    /// Capability sets; absent: Docker's default for root, none for others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capabilities: Option<Capabilities>,
    /// `execve` grants no privileges (`PR_SET_NO_NEW_PRIVS`).
    #[serde(default)]
    pub no_new_privileges: bool,
    /// Resource limits; those absent are the pod's defaults.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rlimits: Vec<Rlimit>,
    /// `oom_score_adj`, -1,000 to 1,000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oom_score_adj: Option<i16>,
    /// Where its standard streams go.
    #[serde(default)]
    pub stdio: Stdio,
}

/// Capability sets by name, such as `CAP_NET_ADMIN` (capabilities(7)).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Capabilities {
    /// No program gets others.
    #[serde(default)]
    pub bounding: Vec<String>,
    /// Those in force.
    #[serde(default)]
    pub effective: Vec<String>,
    /// Kept across `execve` by file capabilities.
    #[serde(default)]
    pub inheritable: Vec<String>,
    /// Those that may be put in force.
    #[serde(default)]
    pub permitted: Vec<String>,
    /// Kept across `execve` without file capabilities.
    #[serde(default)]
    pub ambient: Vec<String>,
}

/// One resource limit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rlimit {
    /// Name, such as `RLIMIT_NOFILE` (setrlimit(2)).
    pub name: String,
    /// In force; `u64::MAX`: unlimited.
    pub soft: u64,
    /// Its ceiling.
    pub hard: u64,
}

impl std::fmt::Debug for ProcessSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<&str> = self
            .env
            .iter()
            .map(|e| e.split_once('=').map_or(e.as_str(), |(name, _)| name))
            .collect();
        f.debug_struct("ProcessSpec")
            .field("argv", &self.argv)
            .field("env", &names)
            .field("cwd", &self.cwd)
            .field("user", &self.user)
            .field("stdio", &self.stdio)
            .finish_non_exhaustive()
    }
}

/// Standard streams of a process. Numbers are stream tokens, unique in the pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Stdio {
    /// `/dev/null` for all three.
    #[default]
    Null,
    /// Three pipes; an absent one is `/dev/null`.
    Pipes {
        /// Token of standard input.
        stdin: Option<u64>,
        /// Token of standard output.
        stdout: Option<u64>,
        /// Token of standard error.
        stderr: Option<u64>,
    },
    /// A pseudo-terminal; one stream carries both directions.
    Terminal {
        /// Token of the stream.
        token: u64,
        /// Initial size.
        size: TerminalSize,
    },
}

/// Size of a terminal in character cells.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TerminalSize {
    /// Lines.
    pub rows: u16,
    /// Columns.
    pub columns: u16,
}

/// cgroup v2 limits; absent: no limit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resources {
    /// `memory.max` in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_max: Option<u64>,
    /// `cpu.max`: microseconds of CPU time per period.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_quota_us: Option<u64>,
    /// `cpu.max`: the period in microseconds; absent: 100,000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_period_us: Option<u64>,
    /// `cpu.weight`, 1 to 10,000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_weight: Option<u64>,
    /// `pids.max`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pids_max: Option<u64>,
    /// `cpuset.cpus`, such as `0-2,5`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpuset_cpus: Option<String>,
    /// `memory.low` in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_low: Option<u64>,
    /// `memory.high` in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_high: Option<u64>,
    /// `hugetlb.<size>.max` in bytes, by page size as the kernel writes it, such as `2MB`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub hugepages: BTreeMap<String, u64>,
}
