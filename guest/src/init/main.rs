//! `cube-init`: PID 1 of a Cube pod's microVM, its agent and the holder of what its containers share.
//!
//! One static binary, one thread, one epoll loop (so a fork is always safe):
//!
//! ```text
//! kernel ─▶ boot ─▶ Agent::new ─▶ dial control ─▶ start the pod's containers ─▶ loop ─▶ power off
//!                                  (never waits)   clone3 ─▶ child: root, user, exec
//! ```
//!
//! # What a container cannot do
//! The pod's host process takes the guest's word on the control port, and a container is hostile. It is
//! kept from speaking as the agent by four things, each enough for its own path:
//! - a seccomp filter refuses `socket(AF_VSOCK)` and `io_uring_setup` ([`container::seccomp`]), and only
//!   the agent holds the stream tokens;
//! - every file system that a container can write is mounted `nodev`; the few device files it gets are
//!   single-file bind mounts, so `mknod` for `/dev/port`, `/dev/mem` or a disk makes a file that cannot be
//!   opened;
//! - its mount namespace holds neither the agent's root nor the initramfs (emptied at boot) after
//!   `pivot_root`;
//! - it has its own PID namespace and no capability to trace, mount, load or reboot.
//!
//! PID 1 must not die: a panic writes its sentence to the kernel log and ends the VM as a kernel panic.
#![cfg_attr(not(test), no_main)]
#![deny(unsafe_code)]

mod agent;
mod boot;
mod container;
mod control;
mod disks;
mod error;
mod events;
mod forward;
mod job;
mod measure;
mod port;
mod read_file;
mod slots;
mod stdio;
mod stream;
mod sys;
mod table;
mod volumes;

use port::Port;

/// Everything; returns only if powering off failed, and the kernel then panics.
fn run() -> i32 {
    std::panic::set_hook(Box::new(|panic| error::log_emergency(&panic.to_string())));
    let port = Port::open();
    port.mark(cube_guest::Mark::InitStarted);
    let pod = boot::boot();
    if let Err(error) = &pod {
        error::log_error(&error.to_string());
    }
    match agent::Agent::new(port) {
        Ok(mut agent) => match agent.run(pod) {
            Ok(()) => agent.power_off(),
            Err(error) => error::log_emergency(&error.to_string()),
        },
        Err(error) => error::log_emergency(&error.to_string()),
    }
    1
}

#[cfg(test)]
fn main() {
    std::process::exit(run());
}
