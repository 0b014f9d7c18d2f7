//! A job for the testbed: the script that runs the command there, and how its exit status comes back.
#![forbid(unsafe_code)]

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::{env, fs};

use crate::error::{Doing, Error, Result};

/// Where the outer machine mounts the directory of the run.
pub(crate) const SHARE: &str = "/run/cube-testbed";

/// Variables that go along, by name or by the start of it.
const NAMES: &[&str] = &["PATH", "HOME", "USER", "LANG", "CI"];
const PREFIXES: &[&str] = &["CUBE_", "CARGO_", "RUST", "XDG_", "NEXTEST_"];

/// A command, its environment and working directory.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    command: Vec<OsString>,
    directory: PathBuf,
    environment: Vec<(OsString, OsString)>,
    out: Option<PathBuf>,
}

impl Job {
    /// `command` as it would run here.
    pub(crate) fn new(command: &[OsString]) -> Result<Self> {
        let directory = env::current_dir().doing("read", Path::new("the working directory"))?;
        let environment = env::vars_os()
            .filter(|(name, _)| goes_along(name))
            .collect();
        Ok(Self {
            command: command.to_vec(),
            directory,
            environment,
            out: None,
        })
    }

    /// Runs it in `directory`.
    pub(crate) fn directory(mut self, directory: &Path) -> Self {
        self.directory = directory.into();
        self
    }

    /// Adds a variable.
    pub(crate) fn variable(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// Sends what the command leaves in `$CUBE_TESTBED_OUT` to `directory`.
    pub(crate) fn out(mut self, directory: &Path) -> Result<Self> {
        fs::create_dir_all(directory).doing("create", directory)?;
        self.out = Some(directory.canonicalize().doing("find", directory)?);
        Ok(self)
    }

    /// The directory for `$CUBE_TESTBED_OUT`, if anybody wants it.
    pub(super) fn out_directory(&self) -> Option<&Path> {
        self.out.as_deref()
    }

    /// The bash script that the outer machine runs.
    pub(super) fn script(&self) -> Vec<u8> {
        let mut script = Vec::new();
        let own = [
            (OsString::from("CUBE_TESTBED"), OsString::from("1")),
            (
                OsString::from("CUBE_TESTBED_OUT"),
                OsString::from(format!("{SHARE}/out")),
            ),
        ];
        for (name, value) in self.environment.iter().chain(&own) {
            script.extend_from_slice(b"export ");
            script.extend_from_slice(name.as_bytes());
            script.push(b'=');
            script.extend_from_slice(&quoted(value));
            script.push(b'\n');
        }
        script.extend_from_slice(b"cd ");
        script.extend_from_slice(&quoted(self.directory.as_os_str()));
        script.extend_from_slice(b" || exit 125\nexec --");
        for word in &self.command {
            script.push(b' ');
            script.extend_from_slice(&quoted(word));
        }
        script.push(b'\n');
        script
    }
}

/// Whether a variable matters to builds, tests or Cube, and is one that a shell can export.
fn goes_along(name: &OsStr) -> bool {
    let Some(name) = name.to_str() else {
        return false;
    };
    let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    plain && (NAMES.contains(&name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix)))
}

/// A word in single quotes; bytes of any kind stay as they are.
fn quoted(word: &OsStr) -> Vec<u8> {
    let mut text = vec![b'\''];
    for &byte in word.as_bytes() {
        match byte {
            b'\'' => text.extend_from_slice(b"'\\''"),
            byte => text.push(byte),
        }
    }
    text.push(b'\'');
    text
}

/// The exit status in the file that the outer machine wrote. Absent or odd: it did not end in good order.
pub(super) fn parse_status(text: &str) -> Option<u8> {
    text.strip_suffix('\n')?.parse().ok()
}

/// Reads the status file; `None` as in [`parse_status`].
pub(super) fn read_status(path: &Path) -> Result<Option<u8>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(parse_status(&text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Io {
            doing: format!("read {}", path.display()),
            source,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn job(words: &[&str]) -> Job {
        Job {
            command: words.iter().map(Into::into).collect(),
            directory: "/tmp".into(),
            environment: Vec::new(),
            out: None,
        }
    }

    #[test]
    fn the_script_runs_the_very_words_there() {
        let words = [
            "printf",
            "%s|",
            "a b",
            "it's",
            "$HOME",
            "",
            "-x",
            "new\nline",
            "\"q\"",
            "*",
        ];
        let script = job(&words).variable("CUBE_X", "it's $a").script();
        let mut all = String::from_utf8(script).unwrap();
        all = all.replace(
            "exec -- 'printf'",
            "echo \"$CUBE_X|$PWD|$CUBE_TESTBED\"; exec -- 'printf'",
        );
        let output = Command::new("bash").arg("-c").arg(all).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(
            text,
            "it's $a|/tmp|1\na b|it's|$HOME||-x|new\nline|\"q\"|*|"
        );
    }

    #[test]
    fn the_exit_status_of_the_script_is_the_commands() {
        let script = String::from_utf8(job(&["sh", "-c", "exit 7"]).script()).unwrap();
        let status = Command::new("bash").arg("-c").arg(script).status().unwrap();
        assert_eq!(status.code(), Some(7));
    }

    #[test]
    fn a_status_is_a_number_and_a_line_end_or_nothing() {
        assert_eq!(parse_status("0\n"), Some(0));
        assert_eq!(parse_status("255\n"), Some(255));
        for odd in ["", "\n", "7", "256\n", "-1\n", "x\n", "1\n2\n"] {
            assert_eq!(parse_status(odd), None, "{odd:?}");
        }
    }

    #[test]
    fn only_variables_that_matter_go_along() {
        for name in [
            "PATH",
            "CUBE_KERNEL",
            "RUST_BACKTRACE",
            "CARGO_HOME",
            "XDG_CACHE_HOME",
        ] {
            assert!(goes_along(OsStr::new(name)), "{name}");
        }
        for name in [
            "SSH_AUTH_SOCK",
            "TERM",
            "CUBE_A-B",
            "PATHS",
            "BASH_FUNC_x%%",
        ] {
            assert!(!goes_along(OsStr::new(name)), "{name}");
        }
    }
}
