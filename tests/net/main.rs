//! The network device against a fake driver on a real worker: frames in both directions, the control queue,
//! limits, and a hostile guest. The link is a pair of sockets, or a tap in a network namespace of the test's
//! own (which needs root).
#![allow(unreachable_pub, reason = "the modules share what they need")]

#[path = "../driver/mod.rs"]
mod driver;
mod wire;

mod control;
mod hostile;
mod receive;
mod tap;
mod throttle;
mod transmit;
