//! Starts a pod process and talks to it. Used by the command line; knows nothing of images.
//!
//! ```text
//!  PodRequest ──▶ prepare ──▶ pod directory, API's socket, `cube-vmm` with inherited descriptors
//!                                │
//!                    ┌───────────┴────────────┐
//!                    ▼                        ▼
//!                  Pod: ends with            Detached: outlives
//!                  its command               its command             both: PodApi
//! ```
//!
//! - [`run_dir`]: the directory of a pod that lives, removed at its end, also after a crash.
//! - `prepare`: what every pod process is started with; [`vmm_process`]: `cube-vmm` as a child process.
//! - [`pod`]: a pod that ends with its command.
//! - [`detached`]: a pod that outlives its command, and finding it again.
//! - [`api`]: the pod API of either.
//! - [`install`]: where kernel, init and VMM are; [`host_cpuid`]: what KVM supports, kept for the next machine.

pub mod api;
pub(crate) mod capture;
pub mod detached;
pub mod host_cpuid;
pub mod install;
pub mod pod;
mod prepare;
pub mod run_dir;
pub mod vmm_process;

pub use api::{ApiError, Incoming, PodApi, Upgrading};
pub use install::{Install, InstallError, NamedFile};
pub use pod::{Pod, PodDisk, PodError, PodLink, PodNet, PodRequest};
pub use run_dir::{RunDirError, base_directory};
pub use vmm_process::{MachineEnd, VmmError};
