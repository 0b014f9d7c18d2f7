//! The vsock device on a real worker, with real Unix sockets on the host's side and a fake driver on the
//! guest's.
#![allow(
    unreachable_pub,
    reason = "modules of a test binary, shared with other binaries"
)]

#[path = "../driver/mod.rs"]
mod driver;

mod guest;
mod hostile;
mod lifecycle;
mod limits;
mod passing;
mod streams;
