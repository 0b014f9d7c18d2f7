//! The benchmark harness: start-up time, memory footprint and network, VMM against VMM.
//!
//! It looks at every VMM from outside, in the same way, so that nobody has to trust a VMM's own figures:
//! processes are spawned with their serial port on a pipe, the guest writes one byte there when it runs,
//! and memory and exits are read from `/proc` and debugfs.
#![forbid(unsafe_code)]

mod background;
pub mod cgroup;
pub mod chart;
pub mod density;
pub mod exits;
pub mod footprint;
pub mod measure;
pub mod network;
mod page;
pub mod payload;
pub mod peers;
pub mod plan;
pub mod pod;
pub mod report;
pub mod stats;
pub mod streams;
pub mod syscalls;
