//! Copies a growing file to a stream until its writer closes it.
//!
//! Woken by inotify, so that nothing is polled: MODIFY means more, CLOSE_WRITE means that this was all.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};

use crate::error::{Doing, Error, Result};

/// A file being followed by a thread of its own.
#[derive(Debug)]
pub(super) struct Follower {
    path: PathBuf,
    thread: JoinHandle<io::Result<()>>,
}

impl Follower {
    /// Creates the file and copies to `sink` what others write to it.
    pub(super) fn start(path: &Path, sink: impl Write + Send + 'static) -> Result<Self> {
        File::create(path).doing("create", path)?;
        let file = File::open(path).doing("open", path)?;
        let watch = inotify::init(CreateFlags::CLOEXEC).doing("watch", path)?;
        inotify::add_watch(&watch, path, WatchFlags::MODIFY | WatchFlags::CLOSE_WRITE)
            .doing("watch", path)?;
        let thread = std::thread::spawn(move || copy(file, &watch, sink));
        Ok(Self {
            path: path.into(),
            thread,
        })
    }

    /// Waits until everything is copied. The writer must have ended, whether or not it ever opened the file.
    pub(super) fn finish(self) -> Result<()> {
        // Opening and closing it is the event that ends the thread if the writer never came.
        drop(
            File::options()
                .append(true)
                .open(&self.path)
                .doing("open", &self.path)?,
        );
        match self.thread.join() {
            Ok(copied) => copied.doing("copy the output from", &self.path),
            Err(_) => Err(Error::Said(format!(
                "the copier of {} panicked",
                self.path.display()
            ))),
        }
    }
}

fn copy(mut file: File, watch: &rustix::fd::OwnedFd, mut sink: impl Write) -> io::Result<()> {
    let mut events = [MaybeUninit::uninit(); 4096];
    let mut reader = inotify::Reader::new(watch, &mut events);
    let mut buffer = vec![0; 64 << 10];
    loop {
        let mut closed = reader.next()?.events().contains(ReadFlags::CLOSE_WRITE);
        while !reader.is_buffer_empty() {
            closed |= reader.next()?.events().contains(ReadFlags::CLOSE_WRITE);
        }
        loop {
            let n = file.read(&mut buffer)?;
            if n == 0 {
                break;
            }
            sink.write_all(buffer.get(..n).unwrap_or_default())?;
        }
        sink.flush()?;
        if closed {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn everything_written_before_the_close_arrives() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("stdout");
        let sink = Sink::default();
        let follower = Follower::start(&path, sink.clone()).unwrap();
        let mut writer = File::create(&path).unwrap();
        let mut expected = Vec::new();
        for n in 0..2_000_u32 {
            let line = format!("{n}\r\n\0").into_bytes();
            writer.write_all(&line).unwrap();
            expected.extend(line);
        }
        drop(writer);
        follower.finish().unwrap();
        assert_eq!(*sink.0.lock().unwrap(), expected);
    }

    #[test]
    fn a_writer_that_never_came_does_not_hang() {
        let directory = tempfile::tempdir().unwrap();
        let follower = Follower::start(&directory.path().join("f"), Sink::default()).unwrap();
        follower.finish().unwrap();
    }
}
