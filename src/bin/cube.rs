//! The command line of Cube.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    cube::cli::main()
}
