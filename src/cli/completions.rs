//! `cube completions`: a script that teaches a shell the command line.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::Cli;
use super::images::print;

/// Print a completion script for a shell.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  cube completions bash > /etc/bash_completion.d/cube")]
pub(crate) struct CompletionsArgs {
    /// The shell.
    shell: Shell,
}

/// Prints the script.
pub(crate) fn completions(arguments: &CompletionsArgs) -> ExitCode {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut Cli::command(), "cube", &mut script);
    // It is made of the texts of this program.
    print(&String::from_utf8_lossy(&script))
}
