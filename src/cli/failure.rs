//! Exit statuses and the sentences that go with them.
#![forbid(unsafe_code)]

use std::fmt::Display;

/// A failure of Cube's own, before the container ran.
pub(crate) const FAILURE: u8 = 1;
/// Wrong usage or values.
pub(crate) const USAGE: u8 = 2;
/// The machine ended, or broke, while the container ran: its status is not known.
pub(crate) const LOST: u8 = 125;

/// Why a command ends without success.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    /// The exit status of `cube`.
    pub(crate) status: u8,
    /// A sentence for standard error; empty: everything was said.
    pub(crate) sentence: String,
}

impl Failure {
    /// Cube could not do it.
    pub(crate) fn new(error: impl Display) -> Self {
        Self::with_status(FAILURE, error)
    }

    /// The user asked for what cannot be.
    pub(crate) fn usage(error: impl Display) -> Self {
        Self::with_status(USAGE, error)
    }

    /// The container was lost.
    pub(crate) fn lost(error: impl Display) -> Self {
        Self::with_status(LOST, error)
    }

    /// Any status.
    pub(crate) fn with_status(status: u8, error: impl Display) -> Self {
        Self {
            status,
            sentence: error.to_string(),
        }
    }
}

/// The statuses, for `--help`.
pub(crate) const STATUS_HELP: &str = "\
Exit status:
  of `cube run`: that of the container; 128 + N if signal N killed it;
    126 or 127 if its command cannot be executed or found;
    125 if the machine ended before the container's status was known.
  1  Cube failed before the container ran, or the command failed.
  2  The arguments or values are wrong.";
