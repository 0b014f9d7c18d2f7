//! The QEMU that the outer machine runs in: the installed one, or, where that is too old, the one of the release's
//! backports, unpacked in the cache and not installed.
//!
//! QEMU 7.2, Debian 12's, hangs far more often, and Linux in its guests finds XSAVE wrong and goes on without it
//! (docs/decisions.md, 45).
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cache::{Cache, Key};
use crate::error::{Error, Result};
use crate::{apt, run};

const PROGRAM: &str = "qemu-system-x86_64";

/// The major version that emulates what the guests' KVM needs.
const ENOUGH: u32 = 10;

/// What the emulator and its firmware are in. Its libraries are those of the installed one, which depends on the same.
const PACKAGES: &[&str] = &["qemu-system-x86", "qemu-system-data", "seabios"];

/// Where the firmware is in them.
const DATA: &[&str] = &["usr/share/qemu", "usr/share/seabios"];

/// An emulator.
#[derive(Debug, Clone)]
pub(crate) struct Qemu {
    program: PathBuf,
    data: Vec<PathBuf>,
}

impl Qemu {
    /// The emulator, and whether it was there already. An old one is better than none: that the backports cannot be
    /// had is said, and no error.
    pub(crate) fn find_or_make(cache: &Cache) -> Result<(Self, bool)> {
        let installed = Self::installed();
        if installed.version()? >= ENOUGH {
            return Ok((installed, true));
        }
        Self::of_backports(cache).or_else(|error| {
            eprintln!(
                "  the installed QEMU is older than {ENOUGH}.0, and there is no newer one ({error}): what runs in \
                 the testbed may go wrong without a fault of its own"
            );
            Ok((installed, true))
        })
    }

    /// The one in PATH.
    pub(super) fn installed() -> Self {
        Self {
            program: PROGRAM.into(),
            data: Vec::new(),
        }
    }

    fn of_backports(cache: &Cache) -> Result<(Self, bool)> {
        let suite = apt::Backports::of_this_release()?;
        let key = Key::of(&[
            ("packages", PACKAGES.join(" ").as_bytes()),
            ("suite", suite.name().as_bytes()),
            ("enough", &ENOUGH.to_le_bytes()),
        ]);
        let found = cache.entry("qemu", &key, |directory| {
            suite.unpack(PACKAGES, directory)?;
            let version = Self::unpacked(directory).version()?;
            match version >= ENOUGH {
                true => Ok(()),
                false => Err(Error::Said(format!("{} has QEMU {version}", suite.name()))),
            }
        })?;
        Ok((Self::unpacked(&found.directory), found.cached))
    }

    fn unpacked(tree: &Path) -> Self {
        Self {
            program: tree.join("usr/bin").join(PROGRAM),
            data: DATA.iter().map(|path| tree.join(path)).collect(),
        }
    }

    /// The major version.
    fn version(&self) -> Result<u32> {
        let text = run::captured(Command::new(&self.program).arg("--version"))?;
        major(&text).ok_or_else(|| {
            Error::Said(format!(
                "{} does not say its version: {}",
                self.program.display(),
                text.lines().next().unwrap_or_default()
            ))
        })
    }

    /// The command that runs it.
    pub(super) fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        for path in &self.data {
            command.args([OsString::from("-L"), path.into()]);
        }
        command
    }

    /// Its program, for messages.
    pub(super) fn program(&self) -> &Path {
        &self.program
    }
}

/// The number in `QEMU emulator version 7.2.18 (Debian …)`.
fn major(text: &str) -> Option<u32> {
    let (_, number) = text.split_once("version ")?;
    number.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_major_version_is_read_from_what_it_says() {
        let text = "QEMU emulator version 7.2.18 (Debian 1:7.2+dfsg-7)\nCopyright (c) 2003-2022\n";
        assert_eq!(major(text), Some(7));
        assert_eq!(major("QEMU emulator version 10.0.2"), Some(10));
        assert_eq!(major("something else"), None);
    }
}
