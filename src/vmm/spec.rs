//! What the machine's user asks for: plain data, parsed once from JSON, validated once.
//!
//! Nothing here is live: [`MachineSpec::validate`] is the edge at which values become trusted; what comes
//! out is a [`ValidSpec`], and the machine takes nothing else.
#![forbid(unsafe_code)]

mod net;
mod validate;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use net::{NetSpec, Rate, RateLimit};
pub use validate::{HostLimits, SpecError, ValidSpec};

/// One virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineSpec {
    /// Uncompressed x86_64 ELF kernel (`vmlinux`).
    pub kernel: FileSource,
    /// Built in memory from the init binary and the files given; absent: no initramfs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<InitramfsSpec>,
    /// Appended to the kernel command line that the VMM makes.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub command_line: String,
    /// Number of vCPUs, 1 to 32.
    pub cpus: u8,
    /// What KVM supports on this host, as it said before ([`crate::vmm::supported_cpuid`]); absent: it is asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpuid: Option<FileSource>,
    /// Guest memory in MiB.
    pub memory_mib: u32,
    /// Whether the host may back guest memory with transparent huge pages. A workload that uses much memory
    /// runs faster; every 2 MiB of which the guest touches a byte are then touched whole.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub huge_pages: bool,
    /// Block devices, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskSpec>,
    /// Network devices, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nets: Vec<NetSpec>,
    /// The vsock device; absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockSpec>,
    /// Whether the guest gets a virtio-rng device.
    #[serde(default)]
    pub rng: bool,
    /// Empty virtio-mmio slots kept for devices attached while the machine runs.
    #[serde(default)]
    pub spare_slots: u8,
    /// File that receives the 16550's output; absent: the machine has no serial port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<PathBuf>,
}

/// Where a file comes from: a path that the VMM opens, or a descriptor that it inherited.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum FileSource {
    /// Opened by the VMM.
    Path(PathBuf),
    /// Inherited, already open.
    Fd(i32),
}

/// An initramfs built in memory (cpio "newc"): `/init` and small files beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InitramfsSpec {
    /// The static binary that becomes `/init`.
    pub init: FileSource,
    /// Further files: absolute path in the initramfs, content as text.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<InitramfsFile>,
}

/// One small file of the initramfs, mode 0600.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InitramfsFile {
    /// Path without a leading slash, such as `cube/pod.json`.
    pub path: String,
    /// The file's content. It may hold secrets (environment variables): never logged.
    pub content: String,
}

impl std::fmt::Debug for InitramfsFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InitramfsFile")
            .field("path", &self.path)
            .field("content", &format_args!("<{} bytes>", self.content.len()))
            .finish()
    }
}

/// One virtio-blk device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// The virtio-blk serial, 1 to 20 ASCII bytes: the only name the guest may know the disk by.
    pub serial: String,
    /// Files laid end to end; each but the last a multiple of 4,096 bytes long.
    pub parts: Vec<DiskPart>,
    /// Whether writes are refused. More than one part requires it.
    #[serde(default)]
    pub read_only: bool,
}

/// One file of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskPart {
    /// The raw file or block device.
    pub file: FileSource,
    /// The size it must have at least, in bytes; absent: as large as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
}

/// The vsock device and its host side.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockSpec {
    /// The guest's context id, at least 3.
    pub cid: u32,
    /// Unix socket that host programs connect to (`CONNECT <port>\n`); guest-initiated connections to
    /// port N go to `<path>_N`.
    pub path: PathBuf,
}
