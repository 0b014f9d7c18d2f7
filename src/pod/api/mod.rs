//! The pod API: HTTP/1.1 and JSON on a Unix socket, described in `resources/openapi.yaml`.
//!
//! - [`http`]: requests out of bytes, responses into bytes; no socket in sight.
//! - `server`: the socket and its connections.
//! - `routes`: the table of routes.
//! - [`body`], [`volume_body`]: what the bodies say.

pub mod body;
#[cfg(test)]
pub(crate) mod described;
pub mod http;
pub mod interface_body;
pub(crate) mod routes;
pub(crate) mod server;
pub mod volume_body;
