//! A set of files on its way into a volume: held here until the guest has taken it through its stream.
#![forbid(unsafe_code)]

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use cube_guest::files::{FileEntry, FileSet};
use cube_guest::frame::{self, FrameError};
use rustix::event::PollFlags;

use super::api::volume_body::PutFile;
use super::ready::Ready;

/// The set. `Debug` does not show it: it may be a Secret.
pub(crate) struct Upload {
    token: u64,
    bytes: Vec<u8>,
    sent: usize,
    stream: Option<UnixStream>,
}

impl std::fmt::Debug for Upload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Upload")
            .field("sent", &self.sent)
            .field("bytes", &self.bytes.len())
            .finish_non_exhaustive()
    }
}

impl Upload {
    /// The files as the guest reads them ([`cube_guest::files`]), for the stream `token`.
    ///
    /// # Errors
    /// Their names together are longer than a frame.
    pub(crate) fn new(token: u64, files: Vec<PutFile>) -> Result<Self, FrameError> {
        let entries = files.iter().map(|file| FileEntry {
            path: file.path.clone(),
            mode: file.mode,
            uid: file.uid,
            gid: file.gid,
            size: file.content.bytes().len() as u64,
        });
        let set = FileSet {
            files: entries.collect(),
        };
        let mut bytes = frame::encode(&set)?;
        for file in files {
            bytes.extend_from_slice(file.content.bytes());
        }
        Ok(Self {
            token,
            bytes,
            sent: 0,
            stream: None,
        })
    }

    /// The token of its stream.
    pub(crate) fn token(&self) -> u64 {
        self.token
    }

    /// Takes the guest's end.
    pub(crate) fn connect(&mut self, stream: UnixStream) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        self.stream = Some(stream);
        Ok(())
    }

    /// What to poll.
    pub(crate) fn interest(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let stream = self.stream.as_ref()?;
        Some((stream.as_fd(), PollFlags::OUT))
    }

    /// Sends what the guest takes. A guest that refuses the set closes its stream, and says why in its answer.
    pub(crate) fn turn(&mut self, ready: &Ready) {
        let Some(stream) = self.stream.as_mut().filter(|stream| ready.has(*stream)) else {
            return;
        };
        while let Some(rest) = self.bytes.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match stream.write(rest) {
                Ok(length @ 1..) => self.sent += length,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Ok(_) | Err(_) => break,
            }
        }
        // Closed, which is the end of the set.
        self.stream = None;
        self.bytes = Vec::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::api::volume_body::Content;
    use std::io::Read;

    #[test]
    fn a_set_arrives_whole_and_is_not_kept() {
        let file = |path: &str, content: &[u8]| PutFile {
            path: path.to_owned(),
            mode: 0o400,
            uid: 1,
            gid: 2,
            content: Content::from(content.to_vec()),
        };
        let big = vec![7; 3 << 20];
        let mut upload = Upload::new(9, vec![file("a", b"x"), file("b/c", &big)]).unwrap();
        let (mut guest, host) = UnixStream::pair().unwrap();
        upload.connect(host).unwrap();
        let reader = std::thread::spawn(move || {
            let set: FileSet = frame::read(&mut guest).unwrap().unwrap();
            let mut content = Vec::new();
            guest.read_to_end(&mut content).unwrap();
            (set, content)
        });
        while let Some(interest) = upload.interest() {
            let ready = Ready::wait(vec![interest], None).unwrap();
            upload.turn(&ready);
        }
        let (set, content) = reader.join().unwrap();
        assert_eq!(
            (set.files[1].path.as_str(), set.files[1].size),
            ("b/c", 3 << 20)
        );
        assert!(content[0] == b'x' && content[1..] == big[..]);
        assert!(upload.bytes.is_empty() && upload.stream.is_none());
    }

    #[test]
    fn a_set_is_not_shown() {
        let files = vec![PutFile {
            path: "token".to_owned(),
            mode: 0o400,
            uid: 0,
            gid: 0,
            content: Content::from(b"hunter2".to_vec()),
        }];
        assert!(!format!("{files:?}").contains("hunter2"));
        let upload = Upload::new(1, files).unwrap();
        assert!(!format!("{upload:?}").contains("hunter2"));
    }
}
