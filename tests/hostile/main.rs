//! A hostile guest: a fake driver does to a device, on a real worker, what no driver should. Nothing may
//! panic or hang; the device says NEEDS_RESET or the request fails; and after a reset a well-behaved driver
//! works.
#![allow(unreachable_pub, reason = "the modules share what they need")]

#[path = "../driver/mod.rs"]
mod driver;

mod disk;
mod handshake;
mod holding;
mod pending;
mod random;
mod rings;
mod turns;
