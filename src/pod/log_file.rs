//! A container's log in the format of the Kubernetes CRI: `RFC3339Nano stdout|stderr P|F text`.
//!
//! A line is written when it is whole (`F`); one that grows longer than [`MAX_LINE`], or whose stream ends,
//! is written in parts (`P`), the last with `F`. Whoever rotates renames the file and asks for a reopen.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::time::{ClockId, Timespec, clock_gettime};

/// Longest text of a log line, as containerd's default (`max_container_log_line_size`).
const MAX_LINE: usize = 16 << 10;

/// The file.
#[derive(Debug)]
pub(crate) struct LogFile {
    path: PathBuf,
    file: File,
}

/// The unfinished line of one stream.
#[derive(Debug, Default)]
pub(crate) struct Line {
    text: Vec<u8>,
}

impl LogFile {
    /// Opens the log for appending; makes it, mode 0640, if it is not there.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            file: open(path)?,
        })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Goes on in a new file of the same name.
    pub(crate) fn reopen(&mut self) -> io::Result<()> {
        self.file = open(&self.path)?;
        Ok(())
    }

    /// Writes what `bytes` complete, in one write.
    pub(crate) fn write(&mut self, stream: &str, line: &mut Line, bytes: &[u8]) -> io::Result<()> {
        let mut entries = Vec::with_capacity(bytes.len() + 128);
        let stamp = timestamp(clock_gettime(ClockId::Realtime));
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (text, ended) = match piece.split_last() {
                Some((b'\n', text)) => (text, true),
                _ => (piece, false),
            };
            line.text.extend_from_slice(text);
            while line.text.len() > MAX_LINE {
                let rest = line.text.split_off(MAX_LINE);
                entry(&mut entries, &stamp, stream, "P", &line.text);
                line.text = rest;
            }
            if ended {
                entry(&mut entries, &stamp, stream, "F", &line.text);
                line.text.clear();
            }
        }
        self.file.write_all(&entries)
    }

    /// Writes what a stream left without a line end.
    pub(crate) fn end(&mut self, stream: &str, line: &mut Line) -> io::Result<()> {
        if line.text.is_empty() {
            return Ok(());
        }
        self.write(stream, line, b"\n")
    }
}

fn open(path: &Path) -> io::Result<File> {
    File::options()
        .append(true)
        .create(true)
        .mode(0o640)
        .open(path)
}

fn entry(into: &mut Vec<u8>, stamp: &str, stream: &str, tag: &str, text: &[u8]) {
    for part in [stamp, " ", stream, " ", tag, " "] {
        into.extend_from_slice(part.as_bytes());
    }
    into.extend_from_slice(text);
    into.push(b'\n');
}

/// A time as RFC 3339 with nanoseconds, in UTC.
pub(crate) fn timestamp(time: Timespec) -> String {
    let days = time.tv_sec.div_euclid(86_400);
    let second = time.tv_sec.rem_euclid(86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!(
        "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:09}Z",
        time.tv_nsec
    )
}

/// The date of a day counted from 1970-01-01, in the proleptic Gregorian calendar. Years are counted from
/// March, so that the leap day is a year's last.
fn civil(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(pieces: &[&[u8]]) -> Vec<String> {
        let directory = tempfile::tempdir().unwrap();
        let mut log = LogFile::open(&directory.path().join("log")).unwrap();
        let mut line = Line::default();
        for piece in pieces {
            log.write("stdout", &mut line, piece).unwrap();
        }
        log.end("stdout", &mut line).unwrap();
        let text = std::fs::read_to_string(log.path()).unwrap();
        text.lines()
            .map(|line| line.split_once(' ').unwrap().1.to_owned())
            .collect()
    }

    #[test]
    fn lines_are_whole_whatever_pieces_they_came_in() {
        let lines = written(&[b"on", b"e\n\ntwo\nthr", b"ee"]);
        let expected = [
            "stdout F one",
            "stdout F ",
            "stdout F two",
            "stdout F three",
        ];
        assert_eq!(lines, expected);
        assert!(written(&[b""]).is_empty());
    }

    #[test]
    fn long_lines_come_in_parts_that_join_to_the_whole() {
        let text = "x".repeat(MAX_LINE * 2 + 5);
        let lines = written(&[text.as_bytes(), b"\n"]);
        let tags: Vec<&str> = lines.iter().map(|l| &l[7..8]).collect();
        assert_eq!(tags, ["P", "P", "F"]);
        let joined: String = lines.iter().map(|l| &l[9..]).collect();
        assert_eq!(joined, text);
    }

    #[test]
    fn a_reopened_log_goes_on_under_its_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut log = LogFile::open(&path).unwrap();
        let mut line = Line::default();
        log.write("stderr", &mut line, b"old\n").unwrap();
        std::fs::rename(&path, path.with_extension("1")).unwrap();
        log.reopen().unwrap();
        log.write("stderr", &mut line, b"new\n").unwrap();
        let read = |path: &Path| std::fs::read_to_string(path).unwrap();
        assert!(read(&path).ends_with("stderr F new\n"));
        assert!(read(&path.with_extension("1")).ends_with("stderr F old\n"));
    }

    #[test]
    fn times_are_those_of_the_calendar() {
        // `date -u -d @N +%FT%T`
        let cases = [
            (0, "1970-01-01T00:00:00.000000007Z"),
            (951_782_400, "2000-02-29T00:00:00.000000007Z"),
            (1_709_251_199, "2024-02-29T23:59:59.000000007Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000000007Z"),
        ];
        for (tv_sec, expected) in cases {
            assert_eq!(timestamp(Timespec { tv_sec, tv_nsec: 7 }), expected);
        }
    }
}
