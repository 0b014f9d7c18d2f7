//! The one error of `cube-init`, and the kernel log that it goes to when nobody else listens.
#![forbid(unsafe_code)]

use std::fs::OpenOptions;
use std::io::Write;

use rustix::io::Errno;

/// Why something was not done: always a sentence for a person.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The kernel refused.
    #[error("cannot {action}: {source}")]
    System {
        /// What was being done, as a verb phrase that names the file, disk or container.
        action: String,
        /// The kernel's answer.
        source: Errno,
    },
    /// What was asked for makes no sense or does not exist.
    #[error("{0}")]
    Refused(String),
}

/// Turns the kernel's answer into an [`Error`] that says what was being done.
pub(crate) trait Context<T> {
    /// `action` is a verb phrase such as `mount /proc`.
    fn context(self, action: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T> Context<T> for rustix::io::Result<T> {
    fn context(self, action: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|source| Error::System {
            action: action(),
            source,
        })
    }
}

impl<T> Context<T> for std::io::Result<T> {
    fn context(self, action: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|error| Error::System {
            action: action(),
            source: Errno::from_io_error(&error).unwrap_or(Errno::IO),
        })
    }
}

/// Writes a sentence to the kernel log as an error.
pub(crate) fn log_error(sentence: &str) {
    log(3, sentence);
}

/// Writes a sentence to the kernel log as the last thing this kernel will say.
pub(crate) fn log_emergency(sentence: &str) {
    log(0, sentence);
}

fn log(level: u8, sentence: &str) {
    // Nobody is left to tell if the kernel log cannot be written.
    let _ = OpenOptions::new()
        .write(true)
        .open("/dev/kmsg")
        .and_then(|mut kmsg| {
            kmsg.write_all(format!("<{level}>cube-init: {sentence}\n").as_bytes())
        });
}
