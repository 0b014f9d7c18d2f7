//! Real guests: containers in microVMs on a KVM that can run Linux.
//!
//! `cargo xtask test` runs this where there is one, with `CUBE_E2E=1` and the paths that [`machine`] reads.
//! A test is a few lines on the fixture; the fixture checks after every run that nothing was left behind.

#[path = "../archive/mod.rs"]
mod archive;
mod fixture;
mod guest;
#[path = "../vhost_user/port.rs"]
mod port;

mod background;
mod commands;
mod cycles;
mod ends;
mod environment;
mod execs;
mod faults;
mod foreground;
mod images;
mod interfaces;
mod killed;
mod networks;
mod nfs;
mod pod_files;
mod pod_volumes;
mod pods;
mod runtime;
mod streams;
mod switches;
mod terminals;
mod volumes;
