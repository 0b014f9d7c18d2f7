//! Counts tests by the summaries that nextest and libtest print.
#![forbid(unsafe_code)]

use std::fmt;
use std::ops::AddAssign;

/// How many tests did what.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Counts {
    passed: u64,
    failed: u64,
}

impl Counts {
    pub(super) fn new(passed: usize, failed: usize) -> Self {
        let count = |tests| u64::try_from(tests).unwrap_or(u64::MAX);
        Self {
            passed: count(passed),
            failed: count(failed),
        }
    }

    /// What a line of output says: a summary, or nothing.
    ///
    /// nextest: `Summary [ 1.2s] 12 tests run: 11 passed (1 slow), 1 failed, 3 skipped`;
    /// libtest: `test result: ok. 5 passed; 0 failed; 0 ignored; …`.
    pub(super) fn of_line(line: &str) -> Self {
        let line = without_colour(line);
        let text = line.trim_start();
        // nextest indents what a failed test printed, libtest's own summary in it.
        if !line.starts_with("test result: ") && !text.starts_with("Summary [") {
            return Self::default();
        }
        // nextest: a test that timed out or did not start is a failed one.
        let failed = ["failed", "timed out", "exec failed"]
            .iter()
            .map(|word| before(text, word));
        Self {
            passed: before(text, "passed"),
            failed: failed.sum(),
        }
    }

    /// Nothing failed.
    pub(super) fn good(&self) -> bool {
        self.failed == 0
    }
}

/// The number directly before `word`, or 0.
fn before(text: &str, word: &str) -> u64 {
    let find = |(at, _): (usize, &str)| text[..at].trim_end().rsplit(' ').next()?.parse().ok();
    text.match_indices(word).find_map(find).unwrap_or(0)
}

/// Removes escape sequences that set colours.
fn without_colour(line: &str) -> String {
    let mut plain = String::new();
    let mut rest = line;
    while let Some((text, after)) = rest.split_once("\x1b[") {
        plain += text;
        rest = after.split_once('m').map_or("", |(_, rest)| rest);
    }
    plain + rest
}

impl AddAssign for Counts {
    fn add_assign(&mut self, more: Self) {
        self.passed += more.passed;
        self.failed += more.failed;
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summaries_are_understood() {
        let cases = [
            (
                "     Summary [   1.230s] 12 tests run: 12 passed (1 slow), 3 skipped",
                Counts::new(12, 0),
            ),
            (
                "     Summary [   1.2s] 5 tests run: 2 passed, 2 failed, 1 timed out, 0 skipped",
                Counts::new(2, 3),
            ),
            (
                "\x1b[32;1m     Summary\x1b[0m [ 0.1s] \x1b[1m7\x1b[0m tests run: \x1b[1m7\x1b[0m passed",
                Counts::new(7, 0),
            ),
            (
                "test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured",
                Counts::new(5, 0),
            ),
            (
                "test result: FAILED. 5 passed; 4 failed; 0 ignored",
                Counts::new(5, 4),
            ),
            (
                "    test result: FAILED. 0 passed; 1 failed; 0 ignored",
                Counts::new(0, 0),
            ),
            ("test ends::seven_passed ... ok", Counts::new(0, 0)),
            ("3 passed", Counts::new(0, 0)),
        ];
        for (line, expected) in cases {
            assert_eq!(Counts::of_line(line), expected, "{line}");
        }
    }
}
