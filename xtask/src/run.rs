//! Child processes: shown, captured, or counted line by line.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read};
use std::process::{Command, ExitStatus, Stdio};

use crate::error::{Error, Result};

/// How many last lines of a quiet child's output an error shows.
const TAIL_LINES: usize = 30;

fn command_line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let line: Vec<_> = words.map(|word| word.to_string_lossy()).collect();
    line.join(" ")
}

fn start_error(command: &Command, source: std::io::Error) -> Error {
    Error::Start {
        program: command.get_program().to_string_lossy().into_owned(),
        source,
    }
}

fn check(command: &Command, status: ExitStatus, tail: &str) -> Result<()> {
    if status.success() {
        return Ok(());
    }
    let tail = if tail.is_empty() {
        String::new()
    } else {
        format!("\n{tail}")
    };
    Err(Error::Child {
        command: command_line(command),
        status: status.to_string(),
        tail,
    })
}

/// Runs it with this process's standard output and error, without input. A bad end is an error.
pub(crate) fn shown(command: &mut Command) -> Result<()> {
    let status = command
        .stdin(Stdio::null())
        .status()
        .map_err(|source| start_error(command, source))?;
    check(command, status, "")
}

/// Runs it quietly and gives back its standard output. A bad end is an error that has its last lines.
pub(crate) fn captured(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|source| start_error(command, source))?;
    check(command, output.status, &last_lines(&output.stderr))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Like [`captured`], but its standard error is this process's.
pub(crate) fn captured_loudly(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(|source| start_error(command, source))?;
    check(command, output.status, "")?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs it and hands each line of its standard output and error to `line`.
pub(crate) fn each_line(command: &mut Command, mut line: impl FnMut(&str)) -> Result<()> {
    let (reader, writer) = std::io::pipe().map_err(|source| Error::Io {
        doing: "create a pipe".into(),
        source,
    })?;
    let both = writer
        .try_clone()
        .map_err(|source| start_error(command, source))?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(both)
        .spawn()
        .map_err(|source| start_error(command, source))?;
    // The command holds writing ends of the pipe: without them the reader sees the end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut tail = VecDeque::new();
    for text in lossy_lines(reader) {
        line(&text);
        if tail.len() == TAIL_LINES {
            tail.pop_front();
        }
        tail.push_back(text);
    }
    let status = child
        .wait()
        .map_err(|source| start_error(command, source))?;
    check(command, status, &Vec::from(tail).join("\n"))
}

fn lossy_lines(reader: impl Read) -> impl Iterator<Item = String> {
    BufReader::new(reader)
        .split(b'\n')
        .map_while(std::result::Result::ok)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

/// The last lines of a text.
pub(crate) fn last_lines(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_both_streams_arrive_and_the_tail_is_in_the_error() {
        let mut lines = Vec::new();
        let mut command = Command::new("sh");
        command.args(["-c", "echo a; echo b >&2; echo c; exit 3"]);
        let error = each_line(&mut command, |line| lines.push(line.to_owned())).unwrap_err();
        assert_eq!(lines, ["a", "b", "c"]);
        let text = error.to_string();
        assert!(
            text.contains("exit status: 3") && text.ends_with("a\nb\nc"),
            "{text}"
        );
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = captured(&mut Command::new("/nonexistent/tool"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("/nonexistent/tool"), "{error}");
    }
}
