//! `cube logs`: what a container said.
#![forbid(unsafe_code)]

use std::io::{self, BufRead, Write};
use std::process::ExitCode;

use clap::Args;

use super::failure::Failure;
use crate::client::{PodApi, base_directory};
use crate::pod::api::body::PodStatus;

/// Print what a container of a pod wrote to its standard output and error.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cube logs web
  cube logs -f --tail 10 web main
  cube logs --timestamps --since 2026-01-31T12:00:00Z web")]
pub(crate) struct LogsArgs {
    /// Go on until the container ends.
    #[arg(long, short)]
    follow: bool,

    /// Begin with the last so many lines.
    #[arg(long, short = 'n', value_name = "LINES")]
    tail: Option<u64>,

    /// Leave out what was written before this time, RFC 3339 in UTC.
    #[arg(long, value_name = "TIME")]
    since: Option<String>,

    /// Print the log as it is kept: time, stream, P (partial) or F (full), text.
    #[arg(long, short)]
    timestamps: bool,

    /// The pod.
    pod: String,

    /// The container; may be left out if the pod has one only.
    container: Option<String>,
}

/// The container named, or the only one.
pub(super) fn container(api: &PodApi, given: Option<&str>) -> Result<String, Failure> {
    if let Some(given) = given {
        return Ok(given.to_owned());
    }
    let pod: PodStatus = api.get("/v1/pod").map_err(Failure::new)?;
    match pod.containers.as_slice() {
        [only] => Ok(only.id.clone()),
        all => {
            let names: Vec<&str> = all.iter().map(|c| c.id.as_str()).collect();
            let names = names.join(", ");
            Err(Failure::usage(format!(
                "name a container of {}: {names}",
                pod.id
            )))
        }
    }
}

/// Runs `cube logs`.
pub(crate) fn run(arguments: &LogsArgs) -> Result<ExitCode, Failure> {
    let base = base_directory().map_err(Failure::new)?;
    let api = PodApi::of(&base, &arguments.pod);
    let container = container(&api, arguments.container.as_deref())?;
    let mut path = format!("/v1/containers/{container}/logs?");
    if arguments.follow {
        path.push_str("follow=1&");
    }
    if let Some(tail) = arguments.tail {
        path.push_str(&format!("tail={tail}&"));
    }
    if let Some(since) = &arguments.since {
        path.push_str(&format!("since={since}"));
    }
    let mut log = api.follow(&path).map_err(Failure::new)?;
    let (mut output, mut errors) = (io::stdout().lock(), io::stderr().lock());
    let mut line = Vec::new();
    loop {
        line.clear();
        if log.read_until(b'\n', &mut line).map_err(Failure::new)? == 0 {
            return Ok(ExitCode::SUCCESS);
        }
        let written = match (arguments.timestamps, text(&line)) {
            (false, Some(("stderr", text))) => errors.write_all(text),
            (false, Some((_, text))) => output.write_all(text),
            _ => output.write_all(&line),
        };
        if let Err(error) = written.and_then(|()| output.flush()) {
            return match error.kind() {
                io::ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
                _ => Err(Failure::new(error)),
            };
        }
    }
}

/// Stream and text of a log line; of a partial one the text has no line end.
fn text(line: &[u8]) -> Option<(&str, &[u8])> {
    let mut parts = line.splitn(4, |byte| *byte == b' ');
    let (_time, stream) = (parts.next()?, parts.next()?);
    let (tag, text) = (parts.next()?, parts.next()?);
    let text = match tag {
        b"P" => text.strip_suffix(b"\n").unwrap_or(text),
        _ => text,
    };
    Some((std::str::from_utf8(stream).ok()?, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_line_join() {
        assert_eq!(text(b"t stdout P some \n"), Some(("stdout", &b"some "[..])));
        assert_eq!(text(b"t stderr F text\n"), Some(("stderr", &b"text\n"[..])));
        assert_eq!(text(b"t stdout F \n"), Some(("stdout", &b"\n"[..])));
        assert_eq!(text(b"noise\n"), None);
    }
}
