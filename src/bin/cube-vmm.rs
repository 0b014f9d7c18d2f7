//! `cube-vmm`: runs one virtual machine, and the pod in it, in this process, until it ends.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    cube::vmm::command::main(std::env::args_os().skip(1), cube::pod::supervisor::open)
}
