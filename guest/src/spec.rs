//! What the host asks the guest to run.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use crate::network::NetworkSpec;

/// The pod as `cube-init` sees it at boot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PodSpec {
    /// Host name of the pod's UTS namespace.
    #[serde(default)]
    pub hostname: String,
    /// Started at boot, in order.
    #[serde(default)]
    pub containers: Vec<ContainerSpec>,
    /// Power off when the last of `containers` has exited and its exit was reported.
    #[serde(default)]
    pub exit_with_containers: bool,
    /// Interfaces and names; absent: the loopback only, and the images' own `/etc/resolv.conf` and
    /// `/etc/hosts`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkSpec>,
}

/// One container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
}

/// The root: an image disk, and a writable disk over it by overlayfs. Disks are named by virtio-blk
/// serial.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Where its standard streams go.
    #[serde(default)]
    pub stdio: Stdio,
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
            .finish()
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
}
