//! Cargo builds: the host's binaries, the guest's static init, the end-to-end test.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;

use crate::error::{Error, Result};
use crate::run;
use crate::steps::{Outcome, Steps};

/// What everything is built for (.cargo/config.toml), named so that its flags reach nothing that runs at build time.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// How the host's binaries are built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    /// Cargo's `dev`.
    Dev,
    /// Cargo's `release`.
    Release,
}

/// The work tree.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or(Path::new("/"))
}

/// The cargo that runs this, in the work tree.
pub(crate) fn cargo() -> Command {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command.current_dir(root());
    command
}

/// What of `cargo metadata` matters here.
#[derive(Debug, Deserialize)]
pub(crate) struct Metadata {
    /// Where builds go.
    pub(crate) target_directory: PathBuf,
    packages: Vec<Package>,
}

#[derive(Debug, Deserialize)]
struct Package {
    targets: Vec<Target>,
}

#[derive(Debug, Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

impl Metadata {
    /// Asks cargo.
    pub(crate) fn read() -> Result<Self> {
        let arguments = ["metadata", "--no-deps", "--format-version", "1"];
        let text = run::captured(cargo().args(arguments))?;
        serde_json::from_str(&text)
            .map_err(|error| Error::Said(format!("`cargo metadata` printed odd JSON: {error}")))
    }

    /// Names of integration tests, in all packages.
    pub(crate) fn tests(&self) -> Vec<&str> {
        let targets = self.packages.iter().flat_map(|package| &package.targets);
        targets
            .filter(|target| target.kind.iter().any(|kind| kind == "test"))
            .map(|target| target.name.as_str())
            .collect()
    }
}

/// `cube-init` is the only program of its file system, and every pod's memory holds it: no dynamic linking, no
/// relocations, no tables to unwind what aborts anyway.
const INIT_FLAGS: &str =
    "-C target-feature=+crt-static -C relocation-model=static -C force-unwind-tables=no";

/// The step that builds `cube-init`, and the benchmarks' init beside it; gives its path.
pub(crate) fn init(steps: &mut Steps) -> Result<PathBuf> {
    steps.step("cube-init", || {
        let directory = Metadata::read()?.target_directory.join("init");
        let mut build = cargo();
        build
            .args([
                "build",
                "--quiet",
                "--profile",
                "init",
                "--package",
                "cube-guest",
                "--bins",
            ])
            .args(["--target", TARGET, "--target-dir"])
            .arg(&directory)
            // Flags from the environment would go before the target's.
            .env_remove("RUSTFLAGS")
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .env(
                "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS",
                INIT_FLAGS,
            );
        run::shown(&mut build)?;
        Ok((directory.join(TARGET).join("init/cube-init"), Outcome::Done))
    })
}

/// The step that builds the host's binaries; gives their directory.
pub(crate) fn host(steps: &mut Steps, profile: Profile) -> Result<PathBuf> {
    steps.step("binaries", || {
        let directory = Metadata::read()?.target_directory;
        let mut build = cargo();
        build.args(["build", "--package", "cube", "--bins"]);
        let name = match profile {
            Profile::Dev => "debug",
            Profile::Release => {
                build.arg("--release");
                "release"
            }
        };
        run::shown(&mut build)?;
        Ok((directory.join(TARGET).join(name), Outcome::Done))
    })
}

/// Compiles the end-to-end test without running it; gives its path.
pub(crate) fn end_to_end_test() -> Result<PathBuf> {
    let mut build = cargo();
    build
        .args(["test", "--no-run", "--package", "cube", "--test", "e2e"])
        .args(["--example", "tree-digest"])
        .arg("--message-format=json-render-diagnostics");
    let text = run::captured_loudly(&mut build)?;
    executable(&text)
        .ok_or_else(|| Error::Said("cargo built no executable for the test `e2e`".into()))
}

/// The test executable that cargo's messages name.
fn executable(messages: &str) -> Option<PathBuf> {
    #[derive(Deserialize)]
    struct Message {
        executable: Option<PathBuf>,
        target: Option<Target>,
    }
    let parsed = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Message>(line).ok());
    parsed
        .filter(|message| {
            message
                .target
                .as_ref()
                .is_some_and(|target| target.name == "e2e")
        })
        .find_map(|message| message.executable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_test_is_found_among_cargos_messages() {
        let messages = concat!(
            r#"{"reason":"compiler-artifact","target":{"name":"cube","kind":["bin"]},"executable":"/t/cube"}"#,
            "\nnot json\n",
            r#"{"reason":"compiler-artifact","target":{"name":"e2e","kind":["test"]},"executable":"/t/e2e-1"}"#,
            "\n",
            r#"{"reason":"build-finished","success":true}"#,
        );
        assert_eq!(executable(messages).unwrap(), Path::new("/t/e2e-1"));
        assert_eq!(executable(""), None);
    }

    #[test]
    fn the_work_tree_has_this_package() {
        assert!(root().join("xtask/Cargo.toml").is_file());
    }
}
