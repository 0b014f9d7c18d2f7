//! The vhost-user frontend against backends on real sockets: one by the `vhost-user-backend` crate, whose
//! device is a port of a switch, and others that break the protocol. The driver is the fake one.
#![allow(unreachable_pub, reason = "the modules share what they need")]

#[path = "../driver/mod.rs"]
mod driver;
mod hostile;
mod port;
mod rings;
