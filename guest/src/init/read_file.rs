//! Reads a file of a container, whether it runs or not: a job that enters the container's mount namespace.
//!
//! The path is the host's and the files are the container's: whatever it resolves to is the container's
//! own. It may be anything: only a regular file is read, and nothing here waits for one.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;

use cube_guest::Answer;
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::thread::LinkNameSpaceType;

use crate::error::{Context, Error};
use crate::job::Reporter;

/// Answers with the file's size, then writes its last `max_bytes` to `to`.
pub(crate) fn read(namespace: &str, path: &str, max_bytes: u64, reporter: Reporter, to: &File) {
    match open(namespace, path, max_bytes) {
        Ok((mut file, size, sent)) => {
            reporter.answer(Ok(Answer::File { size, sent }));
            copy(&mut file, sent, to);
        }
        Err(error) => reporter.answer(Err(error)),
    }
}

fn open(namespace: &str, path: &str, max_bytes: u64) -> Result<(File, u64, u64), Error> {
    let enter = || {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let namespace = rustix::fs::open(namespace, flags, Mode::empty())?;
        let kind = Some(LinkNameSpaceType::Mount);
        rustix::thread::move_into_link_name_space(namespace.as_fd(), kind)
    };
    enter().context(|| "enter the container's mount namespace".into())?;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_MAGICLINKS;
    let action = || format!("open {} in the container", path.escape_debug());
    let file = rustix::fs::openat2(CWD, path, flags, Mode::empty(), resolve).context(action)?;
    let what = rustix::fs::fstat(&file).context(action)?;
    if FileType::from_raw_mode(what.st_mode) != FileType::RegularFile {
        return Err(Error::Refused(format!(
            "{} in the container is not a regular file",
            path.escape_debug()
        )));
    }
    let size = u64::try_from(what.st_size).unwrap_or(0);
    let sent = size.min(max_bytes);
    let mut file = File::from(file);
    file.seek(SeekFrom::Start(size - sent)).context(action)?;
    Ok((file, size, sent))
}

/// Copies until the end of the file or of the reader's interest.
fn copy(from: &mut File, bytes: u64, mut to: &File) {
    let mut buffer = vec![0; 32 << 10];
    let mut from = from.take(bytes);
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..read]).is_err() {
            return;
        }
    }
}
