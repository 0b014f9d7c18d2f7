//! The streams: the ends that a process gets of its standard streams, and all streams that are not done.
//!
//! A container gets pipes or a terminal, never a socket: `/dev/stdout` must be openable.
#![forbid(unsafe_code)]

use std::os::fd::{BorrowedFd, OwnedFd};

use cube_guest::{STREAM_PORT, Stdio, TerminalSize};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};
use rustix::pipe::PipeFlags;
use rustix::pty::OpenptFlags;

use crate::error::{Context, Error, log_error};
use crate::events::{Poller, Source};
use crate::stream::{BUFFER, End, Stream, winsize};
use crate::sys;
use crate::table::Table;

/// Mount options of a container's `/dev/pts`, as containerd's: group 5 is `tty`.
const DEVPTS_OPTIONS: [(&str, &str); 3] = [("ptmxmode", "0666"), ("mode", "0620"), ("gid", "5")];

/// Bytes that a standard stream's pipe holds, as many as its vsock connection may have on the way: with the kernel's
/// 64 KiB a writer and a reader of long pieces take turns at each of them.
const PIPE: usize = 256 << 10;

/// What a process gets as its standard streams.
#[derive(Debug)]
pub(crate) enum ChildStdio {
    /// Standard input, output and error; an absent one is `/dev/null`.
    Pipes([Option<OwnedFd>; 3]),
    /// A terminal on the container's own devpts.
    Terminal(
        /// The slave, open.
        OwnedFd,
    ),
}

/// The streams that are not done, by index.
#[derive(Debug)]
pub(crate) struct Streams {
    streams: Table<Stream>,
    buffer: Box<[u8]>,
}

impl Streams {
    pub(crate) fn new() -> Self {
        Self {
            streams: Table::default(),
            buffer: vec![0; BUFFER].into_boxed_slice(),
        }
    }

    /// Whether every stream is done.
    pub(crate) fn are_done(&self) -> bool {
        self.streams.is_empty()
    }

    /// Makes a process's standard streams and dials their tokens; a terminal is one of `devpts`. Returns
    /// the process's ends, and the index of the terminal's stream.
    ///
    /// # Errors
    /// A pipe, terminal or socket that could not be made. The streams made before it end by themselves.
    pub(crate) fn open(
        &mut self,
        stdio: &Stdio,
        devpts: BorrowedFd<'_>,
        poller: &Poller,
    ) -> Result<(ChildStdio, Option<u32>), Error> {
        match *stdio {
            Stdio::Null => Ok((ChildStdio::Pipes([None, None, None]), None)),
            Stdio::Pipes {
                stdin,
                stdout,
                stderr,
            } => {
                let mut ends = [None, None, None];
                for (number, token) in [stdin, stdout, stderr].into_iter().enumerate() {
                    let Some(token) = token else { continue };
                    let (reader, writer) = pipe(number == 0)?;
                    // A pipe that stays as it was made is slower, and no more.
                    let _ = rustix::pipe::fcntl_setpipe_size(&reader, PIPE);
                    let (theirs, ours) = match number {
                        0 => (reader, End::Input(writer)),
                        _ => (writer, End::Output(reader)),
                    };
                    self.dial(token, ours, poller)?;
                    ends[number] = Some(theirs);
                }
                Ok((ChildStdio::Pipes(ends), None))
            }
            Stdio::Terminal { token, size } => {
                let (child, ours) =
                    open_terminal(devpts, size).context(|| "make a terminal".into())?;
                Ok((child, Some(self.dial(token, ours, poller)?)))
            }
        }
    }

    /// Lets the stream `index` do what it can.
    pub(crate) fn turn(&mut self, index: u32, poller: &Poller) {
        let Some(stream) = self.streams.get_mut(index) else {
            return;
        };
        let done = stream
            .turn(poller, &mut self.buffer)
            .unwrap_or_else(|error| {
                log_error(&format!("a stream failed: {error}"));
                true
            });
        if done && let Some(stream) = self.streams.take(index) {
            stream.close(poller);
        }
    }

    /// Changes the size of the terminal whose stream is `index`.
    pub(crate) fn resize(&self, index: u32, size: TerminalSize) -> Result<(), Error> {
        // The terminal may be gone by now, and then its size does not matter.
        let stream = self.streams.get(index);
        stream.map_or(Ok(()), |stream| match stream.resize(size) {
            Ok(()) | Err(Errno::NOTTY) => Ok(()),
            Err(error) => Err(error).context(|| "change the terminal's size".into()),
        })
    }

    /// Dials the host for the stream `token`, whose other end is `end`. Returns its index.
    ///
    /// # Errors
    /// No socket can be had.
    pub(crate) fn dial(&mut self, token: u64, end: End, poller: &Poller) -> Result<u32, Error> {
        let socket = sys::dial_host(STREAM_PORT)
            .context(|| format!("dial the host's vsock port {STREAM_PORT} for a stream"))?;
        let name = Source::Stream(self.streams.vacant());
        let index = self.streams.insert(Stream::new(socket, token, end, name));
        self.turn(index, poller);
        Ok(index)
    }
}

/// Both ends of a pipe whose end that the agent keeps does not block: the writing end if `writes`.
pub(crate) fn pipe(writes: bool) -> Result<(OwnedFd, OwnedFd), Error> {
    let make = || -> rustix::io::Result<(OwnedFd, OwnedFd)> {
        let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        rustix::io::ioctl_fionbio(if writes { &writer } else { &reader }, true)?;
        Ok((reader, writer))
    };
    make().context(|| "make a pipe".into())
}

/// A devpts that is not mounted anywhere yet: `/dev/pts` of one container, whose terminals are all on it.
/// The agent keeps the descriptor and opens them by it, so that no path of the container's is involved.
pub(crate) fn make_devpts() -> Result<OwnedFd, Error> {
    let make = || {
        let config = rustix::mount::fsopen("devpts", FsOpenFlags::FSOPEN_CLOEXEC)?;
        for (key, value) in DEVPTS_OPTIONS {
            rustix::mount::fsconfig_set_string(&config, key, value)?;
        }
        rustix::mount::fsconfig_create(&config)?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        rustix::mount::fsmount(&config, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
    };
    make().context(|| "make a container's devpts".into())
}

fn open_terminal(
    devpts: BorrowedFd<'_>,
    size: TerminalSize,
) -> rustix::io::Result<(ChildStdio, End)> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let master = rustix::fs::openat(devpts, "ptmx", flags, Mode::empty())?;
    rustix::pty::unlockpt(&master)?;
    // Open here and until the child has it: a terminal without a user reads as ended.
    let slave_flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, slave_flags)?;
    rustix::termios::tcsetwinsize(&master, winsize(size))?;
    let again = rustix::io::fcntl_dupfd_cloexec(&master, 3)?;
    Ok((ChildStdio::Terminal(slave), End::Terminal(master, again)))
}
