//! Bodies that go on: events, and logs that are followed. Read piece by piece, when the client has taken
//! the piece before.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::event_log::EventLog;

/// Bytes sent at a time.
const PIECE: usize = 64 << 10;

/// A body that goes on.
#[derive(Debug)]
pub(crate) enum Feed {
    /// Events after a number.
    Events { since: u64, follow: bool },
    /// A container's log.
    Log(LogFeed),
}

/// A piece of a body.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) bytes: Vec<u8>,
    /// There may be another piece now.
    pub(crate) more: bool,
    /// Nothing follows.
    pub(crate) last: bool,
}

impl Feed {
    /// The container whose log it is.
    pub(crate) fn container(&self) -> Option<&str> {
        match self {
            Self::Events { .. } => None,
            Self::Log(log) => Some(&log.container),
        }
    }

    /// Whether there may be something new. `grew`: the container's log did; `ended`: it writes no more.
    pub(crate) fn is_awake(&mut self, events: &EventLog, grew: bool, ended: bool) -> bool {
        match self {
            Self::Events { since, follow } => !*follow || *since < events.last(),
            Self::Log(log) => {
                // Kept: the client may not have taken the piece before.
                log.at_end &= !grew;
                !log.at_end || ended
            }
        }
    }

    /// What there is now. `ended`: the container writes no more.
    pub(crate) fn next(&mut self, events: &EventLog, ended: bool) -> Piece {
        match self {
            Self::Events { since, follow } => {
                let (text, last) = events.lines_after(*since);
                *since = last;
                Piece {
                    bytes: text.into_bytes(),
                    more: false,
                    last: !*follow,
                }
            }
            // A log that cannot be read any more has no more to say.
            Self::Log(log) => log.next(ended).unwrap_or(Piece {
                last: true,
                ..Piece::default()
            }),
        }
    }
}

/// Reads a log from a place on.
#[derive(Debug)]
pub(crate) struct LogFeed {
    container: String,
    path: PathBuf,
    file: File,
    follow: bool,
    /// Lines before this time are left out, RFC 3339 in UTC: such times sort as text.
    since: Option<String>,
    /// The unfinished line read last.
    rest: Vec<u8>,
    /// The last read found nothing.
    at_end: bool,
}

impl LogFeed {
    /// The log at `path`: all of it, or its last `tail` lines.
    pub(crate) fn open(
        container: &str,
        path: &Path,
        tail: Option<u64>,
        since: Option<String>,
        follow: bool,
    ) -> io::Result<Self> {
        let mut file = File::open(path)?;
        if let Some(lines) = tail {
            seek_to_tail(&mut file, lines)?;
        }
        Ok(Self {
            container: container.to_owned(),
            path: path.to_owned(),
            file,
            follow,
            since,
            rest: Vec::new(),
            at_end: false,
        })
    }

    fn next(&mut self, ended: bool) -> io::Result<Piece> {
        let mut bytes = vec![0; PIECE];
        let length = self.file.read(&mut bytes)?;
        bytes.truncate(length);
        if length == 0 && self.is_rotated() {
            self.file = File::open(&self.path)?;
            return self.next(ended);
        }
        self.at_end = length == 0;
        Ok(Piece {
            more: length > 0,
            last: length == 0 && (ended || !self.follow),
            bytes: self.filter(bytes),
        })
    }

    fn filter(&mut self, bytes: Vec<u8>) -> Vec<u8> {
        let Some(since) = &self.since else {
            return bytes;
        };
        self.rest.extend_from_slice(&bytes);
        let whole = self.rest.iter().rposition(|b| *b == b'\n');
        let rest = self.rest.split_off(whole.map_or(0, |at| at + 1));
        let lines = std::mem::replace(&mut self.rest, rest);
        lines
            .split_inclusive(|b| *b == b'\n')
            .filter(|line| line.get(..since.len()).unwrap_or_default() >= since.as_bytes())
            .flatten()
            .copied()
            .collect()
    }

    /// Whether the name is another file's by now.
    fn is_rotated(&self) -> bool {
        let identity = |m: std::fs::Metadata| (m.dev(), m.ino());
        match (self.file.metadata(), std::fs::metadata(&self.path)) {
            (Ok(old), Ok(new)) => identity(old) != identity(new),
            _ => false,
        }
    }
}

/// Goes to the beginning of the last `lines` lines, reading backwards.
fn seek_to_tail(file: &mut File, lines: u64) -> io::Result<()> {
    let mut at = file.seek(SeekFrom::End(0))?;
    let mut left = lines;
    let mut piece = vec![0; PIECE];
    let end = at;
    while at > 0 {
        let length = at.min(PIECE as u64);
        at -= length;
        file.seek(SeekFrom::Start(at))?;
        let piece = &mut piece[..usize::try_from(length).map_err(io::Error::other)?];
        file.read_exact(piece)?;
        for (index, _) in piece.iter().enumerate().rev().filter(|(_, b)| **b == b'\n') {
            let after = at + index as u64 + 1;
            if after == end && lines > 0 {
                continue;
            }
            if left <= 1 {
                let start = if lines == 0 { end } else { after };
                file.seek(SeekFrom::Start(start))?;
                return Ok(());
            }
            left -= 1;
        }
    }
    file.seek(SeekFrom::Start(if lines == 0 { end } else { 0 }))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn read(path: &Path, tail: Option<u64>, since: Option<&str>) -> String {
        let since = since.map(str::to_owned);
        let mut feed = LogFeed::open("c", path, tail, since, false).unwrap();
        let mut all = Vec::new();
        loop {
            let piece = feed.next(false).unwrap();
            all.extend(piece.bytes);
            if piece.last {
                return String::from_utf8(all).unwrap();
            }
        }
    }

    #[test]
    fn tail_and_since_give_the_end_of_the_log() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let lines: Vec<String> = (0..5000)
            .map(|n| format!("{n:05} stdout F {}\n", "x".repeat(40)))
            .collect();
        fs::write(&path, lines.concat()).unwrap();
        assert_eq!(read(&path, None, None), lines.concat());
        for tail in [0, 1, 2, 3000, 5000, 9000] {
            let from = lines.len().saturating_sub(tail);
            assert_eq!(
                read(&path, Some(tail as u64), None),
                lines[from..].concat(),
                "{tail}"
            );
        }
        assert_eq!(read(&path, None, Some("04998")), lines[4998..].concat());
        fs::write(&path, "").unwrap();
        assert_eq!(read(&path, Some(3), None), "");
    }

    #[test]
    fn a_log_is_read_again_only_when_it_grew_or_ends() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        fs::write(&path, "line\n").unwrap();
        let log = LogFeed::open("c", &path, None, None, true).unwrap();
        let (mut feed, events) = (Feed::Log(log), EventLog::default());
        while feed.is_awake(&events, false, false) {
            feed.next(&events, false);
        }
        assert!(feed.is_awake(&events, true, false));
        assert!(feed.is_awake(&events, false, false), "until it is read");
        assert!(!feed.next(&events, false).more);
        assert!(!feed.is_awake(&events, false, false));
        assert!(feed.is_awake(&events, false, true) && feed.next(&events, true).last);
    }

    #[test]
    fn a_followed_log_goes_on_after_rotation_and_ends_with_the_container() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        fs::write(&path, "old\n").unwrap();
        let mut feed = LogFeed::open("c", &path, None, None, true).unwrap();
        assert_eq!(feed.next(false).unwrap().bytes, b"old\n");
        assert_eq!(feed.next(false).unwrap(), Piece::default());
        fs::rename(&path, path.with_extension("1")).unwrap();
        fs::write(&path, "new\n").unwrap();
        assert_eq!(feed.next(true).unwrap().bytes, b"new\n");
        assert!(feed.next(true).unwrap().last);
    }
}
