//! Answers that are awaited without waiting: for a program that polls.
#![forbid(unsafe_code)]

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use serde::de::DeserializeOwned;

use super::{ApiError, Head, MAX_HEAD, refused};

/// Bytes read at a time.
const PIECE: usize = 4096;

/// An answer on its way.
#[derive(Debug)]
pub struct Incoming {
    stream: UnixStream,
    bytes: Vec<u8>,
    head: Option<Head>,
    over: bool,
}

impl Incoming {
    pub(super) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            bytes: Vec::new(),
            head: None,
            over: false,
        })
    }

    /// The descriptor to poll for reading; `None`: nothing more comes.
    pub fn interest(&self) -> Option<BorrowedFd<'_>> {
        (!self.over).then(|| self.stream.as_fd())
    }

    /// Whether nothing more comes.
    pub fn is_over(&self) -> bool {
        self.over
    }

    /// Takes what has come. A pod that has gone is the end.
    ///
    /// # Errors
    /// What came is not HTTP.
    pub fn turn(&mut self) -> Result<(), ApiError> {
        let mut piece = [0; PIECE];
        while !self.over {
            match self.stream.read(&mut piece) {
                Ok(length @ 1..) => self.bytes.extend_from_slice(&piece[..length]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Ok(_) | Err(_) => self.over = true,
            }
        }
        if self.head.is_none() {
            self.take_head()?;
        }
        Ok(())
    }

    fn take_head(&mut self) -> Result<(), ApiError> {
        if let Some((head, length)) = Head::parse(&self.bytes)? {
            self.bytes.drain(..length);
            self.head = Some(head);
        } else if self.bytes.len() > MAX_HEAD {
            return Err(httparse::Error::Token.into());
        }
        Ok(())
    }

    /// The next line of a body that goes on.
    pub fn line(&mut self) -> Option<Vec<u8>> {
        self.head.as_ref()?;
        let end = self.bytes.iter().position(|byte| *byte == b'\n')?;
        Some(self.bytes.drain(..=end).collect())
    }

    /// Whether all of it is here.
    pub fn is_complete(&self) -> bool {
        match &self.head {
            Some(head) => self.over || head.length.is_some_and(|n| n <= self.bytes.len() as u64),
            None => false,
        }
    }

    /// The answer, once all of it is here.
    ///
    /// # Errors
    /// [`ApiError`].
    pub fn answer<T: DeserializeOwned>(&self) -> Option<Result<T, ApiError>> {
        let head = self.head.as_ref().filter(|_| self.is_complete())?;
        Some(match head.status < 400 {
            true => serde_json::from_slice(&self.bytes).map_err(ApiError::from),
            false => Err(refused(head.status, &self.bytes)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn pair() -> (UnixStream, Incoming) {
        let (pod, stream) = UnixStream::pair().unwrap();
        (pod, Incoming::new(stream).unwrap())
    }

    #[test]
    fn an_answer_is_there_when_its_last_byte_is() {
        let (mut pod, mut incoming) = pair();
        for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n[1,2]" {
            assert!(incoming.answer::<Vec<u8>>().is_none());
            pod.write_all(&[*byte]).unwrap();
            incoming.turn().unwrap();
        }
        assert_eq!(incoming.answer::<Vec<u8>>().unwrap().unwrap(), [1, 2]);
        assert!(!incoming.is_over());
    }

    #[test]
    fn a_refusal_has_the_pods_sentence() {
        let (mut pod, mut incoming) = pair();
        pod.write_all(b"HTTP/1.1 409 Conflict\r\nContent-Length: 14\r\n\r\n{\"error\":\"no\"}")
            .unwrap();
        incoming.turn().unwrap();
        let refused = incoming.answer::<()>().unwrap().unwrap_err();
        assert_eq!(refused.to_string(), "no");
    }

    #[test]
    fn lines_come_whole_and_a_pod_that_goes_is_the_end() {
        let (mut pod, mut incoming) = pair();
        pod.write_all(b"HTTP/1.1 200 OK\r\n\r\none\ntw").unwrap();
        incoming.turn().unwrap();
        assert_eq!(incoming.line().unwrap(), b"one\n");
        assert_eq!(incoming.line(), None);
        pod.write_all(b"o\n").unwrap();
        drop(pod);
        incoming.turn().unwrap();
        assert_eq!(incoming.line().unwrap(), b"two\n");
        assert!(incoming.is_over() && incoming.interest().is_none());
        assert!(
            incoming.answer::<()>().is_some(),
            "it ends with its connection"
        );
    }

    #[test]
    fn no_answer_at_all_is_none() {
        let (pod, mut incoming) = pair();
        drop(pod);
        incoming.turn().unwrap();
        assert!(incoming.is_over() && incoming.answer::<()>().is_none());
    }
}
