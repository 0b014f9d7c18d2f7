//! A long step's progress: a bar on a terminal, a plain line now and then elsewhere.
#![forbid(unsafe_code)]

use std::io::{IsTerminal, stderr};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// Counts towards an expected total.
#[derive(Debug)]
pub(crate) struct Progress {
    name: String,
    expected: u64,
    done: u64,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// `expected` may be an estimate: the bar waits at its end, and the plain lines stop at 95 %.
    pub(crate) fn new(name: &str, expected: u64) -> Self {
        let bar = stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{prefix} [{bar:40}] {pos}/{len} {elapsed}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            let bar = ProgressBar::new(expected)
                .with_style(style)
                .with_prefix(name.to_owned());
            bar.enable_steady_tick(Duration::from_millis(250));
            bar
        });
        Self {
            name: name.to_owned(),
            expected,
            done: 0,
            bar,
        }
    }

    /// One more is done.
    pub(crate) fn advance(&mut self) {
        let before = self.done;
        self.done += 1;
        match &self.bar {
            Some(bar) => bar.set_position(self.done.min(self.expected)),
            None => {
                if let Some(percent) = crossed(before, self.done, self.expected) {
                    eprintln!("  {} {percent} %", self.name);
                }
            }
        }
    }

    /// How many were done.
    pub(crate) fn finish(self) -> u64 {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        self.done
    }
}

/// The multiple of ten per cent that lies between two counts, the hundredth excepted.
fn crossed(before: u64, after: u64, expected: u64) -> Option<u64> {
    let tenth = |count: u64| (count * 10).checked_div(expected).unwrap_or(0).min(9);
    (tenth(after) > tenth(before)).then(|| tenth(after) * 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_lines_come_at_tenths_and_never_claim_the_end() {
        let lines: Vec<u64> = (0..300).filter_map(|n| crossed(n, n + 1, 200)).collect();
        assert_eq!(lines, [10, 20, 30, 40, 50, 60, 70, 80, 90]);
        assert_eq!(crossed(0, 1, 0), None);
    }
}
