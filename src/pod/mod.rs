//! The pod's side of the agent connection: handshake, requests, events and stdio streams.
//!
//! Synchronous and transport-agnostic: it is given connected Unix sockets and says which descriptors
//! to poll. It knows nothing of command lines, images or processes. The thread that owns the pod's
//! poll loop owns everything here.
//!
//! - [`session`]: the state machine that turns control frames into [`SessionEvent`]s.
//! - [`listen`]: the two sockets at which a vsock device delivers what the guest dials.
//! - `frames`: control frames out of a non-blocking connection.
//! - `pairing`: streams matched to their owners by token.
//! - [`seccomp_profile`]: OCI seccomp profiles compiled for the guest.

pub(crate) mod frames;
pub mod listen;
pub(crate) mod pairing;
pub mod seccomp_profile;
pub mod session;

pub use listen::{ListenError, Ports};
pub use pairing::new_token;
pub use session::{Session, SessionError, SessionEvent};
