//! The wire protocol between the pod process on the host and `cube-init` in the guest: the only thing
//! that host and guest share.
//!
//! - At boot the guest finds a [`PodSpec`] as JSON in the initramfs at [`POD_SPEC_PATH`] and starts its
//!   containers at once, without a round trip to the host.
//! - The guest dials [`CONTROL_PORT`] on the host over vsock and sends [`GuestMessage::Hello`] first.
//!   Both directions then carry frames: a little-endian `u32` length, then that many bytes of JSON.
//! - Every stdio is a vsock connection of its own: the guest dials [`STREAM_PORT`], sends the stream's
//!   token as eight little-endian bytes, and from there on the bytes are the stream's. Flow control is
//!   vsock credit; end of file is a shutdown of the sending side.
//!
//! # Streams
//! Streams and the control connection are dialled at the same time: a stream may be there before `Hello`.
//! The guest dials every token of a [`ContainerSpec`], also when the container could not be started: each
//! output ends with end of file, and the host then closes its end. A host that closes an output early
//! breaks the container's pipe (`SIGPIPE`), and a container that closes its input has the guest close that
//! stream. A [`GuestEvent::Exited`] may arrive before its container's last output: the container is done
//! when both the event and every output's end of file are there.
//!
//! Further streams carry an exec's standard streams, a file set, a file, a forwarded port: always dialled by
//! the guest, always named by a token that came with the host's request. A request that is answered by an
//! error dials nothing, [`HostRequest::WriteFiles`] excepted, whose stream the guest closes when it refuses
//! the set. Replies come in the order in which things are done, not asked: what may wait for a disk, a
//! server or a process is answered when it is done, and the agent serves others meanwhile.
//!
//! # The end
//! When the pod is done the guest waits for the host to close every stream, shuts down its sending side of
//! the control connection and waits for the host to close that: so the host has read everything. Then it
//! unmounts the disks and writes [`Mark::PowerOff`]. It never waits for a host whose control connection is
//! gone.
#![forbid(unsafe_code)]

pub mod files;
pub mod frame;
pub mod message;
pub mod network;
pub mod spec;
pub mod stats;

pub use message::{
    Answer, ExitStatus, GuestEvent, GuestMessage, HostMessage, HostRequest, ProcessId,
};
pub use network::NetworkSpec;
pub use spec::{
    Capabilities, ContainerSpec, DeviceSpec, MountSource, MountSpec, PidNamespace, PodSpec,
    ProcessSpec, Resources, Rlimit, RootFs, Seccomp, SecuritySpec, Stdio, TerminalSize,
    VolumeSource, VolumeSpec,
};

/// Version of this protocol; host and guest must agree exactly.
pub const PROTOCOL_VERSION: u32 = 3;
/// Host vsock port for the control connection.
pub const CONTROL_PORT: u32 = 1024;
/// Host vsock port for stdio streams.
pub const STREAM_PORT: u32 = 1025;
/// Where the guest finds its [`PodSpec`].
pub const POD_SPEC_PATH: &str = "/cube/pod.json";
/// The kernel command line always has `panic=-1 reboot=k,panic_warm`: the kernel then resets through
/// the i8042, with 0x1234 at [`RESET_MODE_ADDRESS`] if it panicked and 0 if it was asked to restart.
pub const RESET_MODE_ADDRESS: u64 = 0x472;
/// Value at [`RESET_MODE_ADDRESS`] after a kernel panic.
pub const RESET_MODE_PANIC: u16 = 0x1234;
/// I/O port that the guest's init writes one byte to (through `/dev/port`) to mark a stage of the boot
/// or to power off; the VMM timestamps it. See [`Mark`].
pub const MARK_PORT: u16 = 0x3f0;

/// What a byte written to [`MARK_PORT`] means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Mark {
    /// The first thing that init does.
    InitStarted = 1,
    /// The control connection is up and `Hello` is on its way.
    AgentReady = 2,
    /// The first container's process is about to be executed.
    ContainerStarted = 3,
    /// The pod is done: end the VM in good order.
    PowerOff = 0xff,
}
