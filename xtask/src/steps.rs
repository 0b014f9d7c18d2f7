//! `[3/9] slim kernel … cached`: what a task is doing, how far it is, how long each step took.
#![forbid(unsafe_code)]

use std::io::{IsTerminal, Write, stderr};
use std::time::{Duration, Instant};

use crate::error::Result;

/// How a step ended well.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Something was done.
    Done,
    /// It was there already.
    Cached,
    /// It was done; this is worth knowing about it.
    Note(String),
}

impl From<bool> for Outcome {
    /// Whether it was cached.
    fn from(cached: bool) -> Self {
        if cached { Self::Cached } else { Self::Done }
    }
}

/// The steps of one task, in order, on standard error.
#[derive(Debug)]
pub(crate) struct Steps {
    total: usize,
    number: usize,
    started: Instant,
}

impl Steps {
    /// A task of `total` steps begins.
    pub(crate) fn new(total: usize) -> Self {
        Self {
            total,
            number: 0,
            started: Instant::now(),
        }
    }

    /// Runs the next step and says how it went.
    pub(crate) fn step<T>(
        &mut self,
        name: &str,
        work: impl FnOnce() -> Result<(T, Outcome)>,
    ) -> Result<T> {
        self.number += 1;
        let head = format!("[{}/{}] {name}", self.number, self.total);
        // On a terminal the line is completed, or drawn over by what the step prints.
        let terminal = stderr().is_terminal();
        if terminal {
            eprint!("{head} …\r");
            let _ = stderr().flush();
        } else {
            eprintln!("{head} …");
        }
        let began = Instant::now();
        let result = work();
        let took = began.elapsed();
        match &result {
            Ok((_, outcome)) => eprintln!("{}", line(&head, outcome, took)),
            Err(_) => eprintln!("{head} … FAILED after {}", human(took)),
        }
        result.map(|(value, _)| value)
    }

    /// Time since the task began.
    pub(crate) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }
}

fn line(head: &str, outcome: &Outcome, took: Duration) -> String {
    match outcome {
        Outcome::Done => format!("{head} … done in {}", human(took)),
        Outcome::Cached => format!("{head} … cached"),
        Outcome::Note(note) => format!("{head} … {note} ({})", human(took)),
    }
}

/// `0.4 s`, `59.9 s`, `4 min 10 s`.
pub(crate) fn human(time: Duration) -> String {
    let seconds = time.as_secs();
    if seconds < 60 {
        format!("{:.1} s", time.as_secs_f64())
    } else {
        format!("{} min {} s", seconds / 60, seconds % 60)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_how_the_step_went() {
        let took = Duration::from_millis(4_240);
        assert_eq!(
            line("[3/9] slim kernel", &Outcome::Cached, took),
            "[3/9] slim kernel … cached"
        );
        assert_eq!(
            line("[1/2] a", &Outcome::Done, took),
            "[1/2] a … done in 4.2 s"
        );
        assert_eq!(
            line("[1/2] a", &Outcome::Note("x".into()), took),
            "[1/2] a … x (4.2 s)"
        );
        assert_eq!(human(Duration::from_secs(250)), "4 min 10 s");
    }

    #[test]
    fn steps_are_numbered_and_a_failure_goes_through() {
        let mut steps = Steps::new(2);
        assert_eq!(steps.step("a", || Ok((7, Outcome::Done))).unwrap(), 7);
        let failed: Result<()> = steps.step("b", || Err(crate::error::Error::Said("no".into())));
        assert_eq!(failed.unwrap_err().to_string(), "no");
        assert_eq!(steps.number, 2);
    }
}
