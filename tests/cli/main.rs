//! The command `cube` without a guest: a fake machine runs the container's command as a local process
//! and speaks the agent's side of the protocol.

mod fake_machine;
mod fixture;
mod help;
mod run;
mod terminal;
mod usage;
