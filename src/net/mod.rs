//! Pod networks: what CNI plug-ins make, joined to a tap for the machine.
//!
//! ```text
//!  host                     network namespace cube-<id>                     machine
//!  ────                     ───────────────────────────                     ───────
//!  bridge, routes ── veth ── eth0 ◀── tc: redirect ──▶ tap0 ── descriptors ── virtio-net
//!  (CNI plug-ins)            (its MAC and addresses are the guest's)
//! ```
//!
//! Nothing of it needs a daemon. Each network is recorded before anything of it is made, and its record is
//! locked for as long as its owner lives; whoever comes next undoes what an owner that was killed has left
//! ([`record`]). The plug-ins share the lock while they run, so nobody undoes what they are still doing.
//!
//! - [`attachment`]: makes a pod's network and undoes it: the recipe to read first.
//! - [`cni`]: configurations, plug-ins, results.
//! - [`namespace`], [`rtnetlink`], [`redirect`], [`tap`]: the kernel's parts.

pub mod attachment;
pub mod cni;
pub mod namespace;
pub mod record;
pub mod redirect;
pub mod rtnetlink;
pub mod tap;

pub use attachment::{Attachment, Networks};
pub use cni::config::{NetworkConfig, PortMapping};
pub use record::Record;

use std::io;
use std::path::PathBuf;

use cni::CniError;

/// A pod's network cannot be made, read or undone.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// A plug-in or its configuration.
    #[error(transparent)]
    Cni(#[from] CniError),
    /// A file or directory.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// A verb phrase.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The operating system's answer.
        #[source]
        source: io::Error,
    },
    /// The kernel refused something about an interface.
    #[error("cannot {action} `{interface}`: {source}")]
    Interface {
        /// A verb phrase.
        action: &'static str,
        /// The interface.
        interface: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A tap that the user named is not there.
    #[error("there is no tap interface `{0}`: make one with `ip tuntap add {0} mode tap vnet_hdr`")]
    NoTap(String),
    /// A record cannot be read.
    #[error("the record {} is malformed: {source}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// Where and how.
        #[source]
        source: serde_json::Error,
    },
}

/// Turns the system's answer into an error about a file.
pub(crate) trait AboutFile<T> {
    fn about(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T, NetError>;
}

impl<T, E: Into<io::Error>> AboutFile<T> for Result<T, E> {
    fn about(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T, NetError> {
        self.map_err(|source| NetError::File {
            action,
            path: path.into(),
            source: source.into(),
        })
    }
}

/// Turns the kernel's answer into an error about an interface.
pub(crate) trait AboutInterface<T> {
    fn about_interface(self, action: &'static str, interface: &str) -> Result<T, NetError>;
}

impl<T, E: Into<io::Error>> AboutInterface<T> for Result<T, E> {
    fn about_interface(self, action: &'static str, interface: &str) -> Result<T, NetError> {
        self.map_err(|source| NetError::Interface {
            action,
            interface: interface.to_owned(),
            source: source.into(),
        })
    }
}
