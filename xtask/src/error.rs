//! What can go wrong in a task. Messages are sentences that say what to do.
#![forbid(unsafe_code)]

use std::io;
use std::path::Path;

/// The result of a task's step.
pub(crate) type Result<T> = std::result::Result<T, Error>;

/// A task failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A system call on a file or device failed.
    #[error("cannot {doing}: {source}")]
    Io {
        /// Verb and object: "read /a/b".
        doing: String,
        /// What the system said.
        source: io::Error,
    },
    /// A child process could not start.
    #[error("cannot start `{program}`: {source}; `cargo xtask setup` installs what is missing")]
    Start {
        /// Its name.
        program: String,
        /// What the system said.
        source: io::Error,
    },
    /// A child process ended badly; `tail` holds its last lines, if its output was not shown.
    #[error("`{command}` failed: {status}{tail}")]
    Child {
        /// The command line.
        command: String,
        /// How it ended.
        status: String,
        /// Empty, or a line break and its last lines.
        tail: String,
    },
    /// Packages are missing and nobody here may install them.
    #[error(
        "these Debian packages are missing: {names}\nRun as root: apt-get update && apt-get install --no-install-recommends {names}",
        names = .0.join(" ")
    )]
    Packages(Vec<String>),
    /// Everything else: a whole sentence.
    #[error("{0}")]
    Said(String),
}

/// Says what was being done when a system call failed.
pub(crate) trait Doing<T> {
    /// `verb` and `path` become "cannot VERB PATH".
    fn doing(self, verb: &str, path: &Path) -> Result<T>;
}

impl<T, E: Into<io::Error>> Doing<T> for std::result::Result<T, E> {
    fn doing(self, verb: &str, path: &Path) -> Result<T> {
        self.map_err(|source| Error::Io {
            doing: format!("{verb} {}", path.display()),
            source: source.into(),
        })
    }
}
