//! The pod's side of the agent connection: handshake, requests, events and stdio streams.
//!
//! Synchronous and transport-agnostic: it is given connected Unix sockets and says which descriptors
//! to poll. It knows nothing of command lines, images or processes. The thread that owns the pod's
//! poll loop owns everything here.
//!
//! - [`session`]: the state machine that turns control frames into [`session::SessionEvent`]s.
//! - [`listen`]: the two sockets at which a vsock device delivers what the guest dials.
//! - [`supervisor`]: the pod process's own loop: machine, session and API in one.
//! - [`api`]: the HTTP server; `serve`: what each route does; `pending`: what waits for the agent.
//! - `container`: containers and execs; `channel`: the bytes of one stream; `log_file`: logs in CRI format.
//! - [`event_log`]: what happened; `feed`: bodies that go on.
//! - [`metrics`]: what the pod uses as Prometheus text; `volume`, `upload`: volumes and the files for them.
//! - [`stand_in`]: a pod whose machine is played.
//! - `machinery`: the machine as the supervisor sees it; `ready`: what a poll found.
//! - `frames`: control frames out of a non-blocking connection.
//! - `pairing`: streams matched to their owners by token.
//! - [`seccomp_profile`]: OCI seccomp profiles compiled for the guest.

pub mod api;
pub(crate) mod channel;
pub(crate) mod container;
pub mod event_log;
pub(crate) mod feed;
pub(crate) mod frames;
pub(crate) mod interfaces;
pub mod listen;
pub(crate) mod log_file;
pub(crate) mod machinery;
pub mod metrics;
pub(crate) mod pairing;
pub(crate) mod pending;
pub(crate) mod ready;
pub mod seccomp_profile;
pub(crate) mod serve;
pub mod session;
pub mod stand_in;
pub mod supervisor;
pub(crate) mod upload;
pub(crate) mod volume;

pub use pairing::new_token;
