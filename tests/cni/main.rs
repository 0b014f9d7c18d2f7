//! Pod networks by CNI: the real plug-ins, in a network namespace that stands for the host, and plug-ins that
//! misbehave. Needs root, `containernetworking-plugins`, `iproute2`, `iptables`.

mod fixture;
mod killed;
mod plugins;
mod real;
