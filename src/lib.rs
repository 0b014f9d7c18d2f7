//! Cube: Kubernetes pods, each in its own microVM, at the cost of a process.
//!
//! The library behind the binaries `cube` (the command line) and `cube-vmm` (one process per pod).
//! `ARCHITECTURE.md` has the code map; `tests/tidy.rs` enforces who may import whom.
#![deny(unsafe_code)]

pub mod bench;
pub mod cli;
pub mod client;
pub mod image;
pub mod net;
pub mod pod;
pub mod vmm;
