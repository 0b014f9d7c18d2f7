//! The machine. It knows nothing of pods, images or networks: it takes a [`spec::MachineSpec`] and
//! file descriptors, and runs one virtual machine on KVM.
//!
//! [`machine::Machine`] is the way in; [`exit`] has the table of exit statuses.

pub mod boot;
pub mod bus;
pub mod command;
pub mod cpu;
pub mod devices;
pub mod exit;
pub mod files;
pub mod ioapic;
pub mod irq;
pub mod kvm;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod own_memory;
pub mod ports;
pub mod seccomp;
pub mod serial;
pub mod signals;
pub mod slots;
pub mod spec;
pub mod stats;
pub mod supported_cpuid;
pub mod thread;
pub mod timeline;
pub mod vcpu;
pub mod virtio;
pub mod worker;
