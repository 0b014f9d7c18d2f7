//! Starts a pod process and talks to it. Used by the command line; knows nothing of images.
//!
//! One thread owns a [`Pod`] and polls it:
//!
//! ```text
//!  PodRequest ──▶ Pod::start ──▶ pod directory, sockets, `cube-vmm` with inherited descriptors
//!                    │
//!                    ▼ interests / turn
//!                 PodEvent: the session's events, and the end of the machine
//! ```
//!
//! - [`run_dir`]: the directory of a pod that lives, removed at its end, also after a crash.
//! - [`vmm_process`]: `cube-vmm` as a child process.
//! - [`pod`]: both, with the agent's session.
//! - [`detached`]: a pod that outlives its command, and finding it again.
//! - [`api`]: the pod API of such a pod.
//! - [`install`]: where kernel, init and VMM are.

pub mod api;
pub(crate) mod capture;
pub mod detached;
pub mod install;
pub mod pod;
pub mod run_dir;
pub mod vmm_process;

pub use api::{ApiError, PodApi};
pub use install::{Install, InstallError, NamedFile};
pub use pod::{Pod, PodDisk, PodError, PodEvent, PodLink, PodNet, PodRequest};
pub use run_dir::{RunDirError, base_directory};
pub use vmm_process::{MachineEnd, VmmError};
