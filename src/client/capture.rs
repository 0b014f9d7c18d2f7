//! The last bytes of what a child process says, without ever waiting for it.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::io::{self, PipeReader, Read};
use std::os::fd::{AsFd, BorrowedFd};

/// Reads per turn; the rest waits for the next.
const MAX_READS: usize = 16;

/// Reads a pipe and keeps its last bytes.
#[derive(Debug)]
pub(crate) struct Capture {
    pipe: Option<PipeReader>,
    bytes: VecDeque<u8>,
    limit: usize,
}

impl Capture {
    /// Keeps the last `limit` bytes of `pipe`.
    pub(crate) fn new(pipe: PipeReader, limit: usize) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&pipe, true)?;
        Ok(Self {
            pipe: Some(pipe),
            bytes: VecDeque::new(),
            limit,
        })
    }

    /// The descriptor to poll for reading; `None` after its end.
    pub(crate) fn interest(&self) -> Option<BorrowedFd<'_>> {
        self.pipe.as_ref().map(AsFd::as_fd)
    }

    /// Takes what has arrived.
    pub(crate) fn turn(&mut self) {
        let mut piece = [0; 4096];
        for _ in 0..MAX_READS {
            let Some(pipe) = &mut self.pipe else { return };
            match pipe.read(&mut piece) {
                Ok(length @ 1..) => {
                    self.bytes.extend(&piece[..length]);
                    let excess = self.bytes.len().saturating_sub(self.limit);
                    self.bytes.drain(..excess);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Ok(_) | Err(_) => self.pipe = None,
            }
        }
    }

    /// What was kept, as text.
    pub(crate) fn text(&self) -> String {
        let bytes: Vec<u8> = self.bytes.iter().copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn the_end_of_what_was_said_is_kept_and_no_more() {
        let (reader, mut writer) = io::pipe().unwrap();
        let mut capture = Capture::new(reader, 10).unwrap();
        capture.turn();
        assert_eq!(capture.text(), "");
        for _ in 0..100 {
            writer.write_all(b"noise, noise, ").unwrap();
            capture.turn();
        }
        writer.write_all(b"the reason").unwrap();
        drop(writer);
        capture.turn();
        assert_eq!(capture.text(), "the reason");
        assert!(capture.interest().is_none(), "at its end");
    }
}
