//! The standard streams of the pod's containers: the ends that a container gets, and all the streams.
//!
//! A container gets pipes or a terminal, never a socket: `/dev/stdout` must be openable.
#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;

use cube_guest::{STREAM_PORT, Stdio, TerminalSize};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};
use rustix::pipe::PipeFlags;
use rustix::pty::OpenptFlags;

use crate::error::{Context, Error, log_error};
use crate::events::{Poller, Source};
use crate::stream::{BUFFER, End, Stream, winsize};
use crate::sys;

/// Mount options of a container's `/dev/pts`, as containerd's: group 5 is `tty`.
pub(crate) const DEVPTS_OPTIONS: [(&str, &str); 3] =
    [("ptmxmode", "0666"), ("mode", "0620"), ("gid", "5")];

/// What the container's process becomes its standard streams.
#[derive(Debug)]
pub(crate) enum ChildStdio {
    /// Standard input, output and error; an absent one is `/dev/null`.
    Pipes([Option<OwnedFd>; 3]),
    /// A terminal on the container's own devpts.
    Terminal {
        /// The slave, open.
        slave: OwnedFd,
        /// The devpts, not mounted yet: it becomes `/dev/pts`.
        devpts: OwnedFd,
    },
}

/// The streams that are not done, by index.
#[derive(Debug)]
pub(crate) struct Streams {
    slots: Vec<Option<Stream>>,
    buffer: Box<[u8]>,
}

impl Streams {
    pub(crate) fn new() -> Self {
        Self {
            slots: Vec::new(),
            buffer: vec![0; BUFFER].into_boxed_slice(),
        }
    }

    /// Whether every stream is done.
    pub(crate) fn are_done(&self) -> bool {
        self.slots.iter().all(Option::is_none)
    }

    /// Makes a container's standard streams and dials their tokens. Returns the container's ends, and the
    /// index of the terminal's stream.
    ///
    /// # Errors
    /// A pipe, terminal or socket that could not be made. The streams made before it end by themselves.
    pub(crate) fn open(
        &mut self,
        stdio: &Stdio,
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
                    let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
                        .context(|| "make a pipe for a standard stream".into())?;
                    let (theirs, ours) = match number {
                        0 => (reader, End::Input(non_blocking(writer)?)),
                        _ => (writer, End::Output(non_blocking(reader)?)),
                    };
                    self.dial(token, ours, poller)?;
                    ends[number] = Some(theirs);
                }
                Ok((ChildStdio::Pipes(ends), None))
            }
            Stdio::Terminal { token, size } => {
                let (child, ours) = open_terminal(size).context(|| "make a terminal".into())?;
                Ok((child, Some(self.dial(token, ours, poller)?)))
            }
        }
    }

    /// Lets the stream `index` do what it can.
    pub(crate) fn turn(&mut self, index: u32, poller: &Poller) {
        let Some(slot) = self.slots.get_mut(index as usize) else {
            return;
        };
        let Some(stream) = slot else { return };
        let done = stream
            .turn(poller, &mut self.buffer)
            .unwrap_or_else(|error| {
                log_error(&format!("a standard stream failed: {error}"));
                true
            });
        if done && let Some(stream) = slot.take() {
            stream.close(poller);
        }
    }

    /// Changes the size of the terminal whose stream is `index`.
    pub(crate) fn resize(&self, index: u32, size: TerminalSize) -> Result<(), Error> {
        let stream = self.slots.get(index as usize).and_then(Option::as_ref);
        // The terminal may be gone by now, and then its size does not matter.
        stream.map_or(Ok(()), |stream| match stream.resize(size) {
            Ok(()) | Err(Errno::NOTTY) => Ok(()),
            Err(error) => Err(error).context(|| "change the terminal's size".into()),
        })
    }

    fn dial(&mut self, token: u64, end: End, poller: &Poller) -> Result<u32, Error> {
        let socket = sys::dial_host(STREAM_PORT).context(|| {
            format!("dial the host's vsock port {STREAM_PORT} for a standard stream")
        })?;
        let free = self.slots.iter().position(Option::is_none);
        let index = free.unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        let name = index as u32;
        self.slots[index] = Some(Stream::new(socket, token, end, Source::Stream(name)));
        self.turn(name, poller);
        Ok(name)
    }
}

fn non_blocking(fd: OwnedFd) -> Result<OwnedFd, Error> {
    rustix::io::ioctl_fionbio(&fd, true).context(|| "make a pipe non-blocking".into())?;
    Ok(fd)
}

/// A terminal on a devpts of its own, which is not mounted anywhere yet.
fn open_terminal(size: TerminalSize) -> rustix::io::Result<(ChildStdio, End)> {
    use rustix::fs::{Mode, OFlags};
    let config = rustix::mount::fsopen("devpts", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in DEVPTS_OPTIONS {
        rustix::mount::fsconfig_set_string(&config, key, value)?;
    }
    rustix::mount::fsconfig_create(&config)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let devpts = rustix::mount::fsmount(&config, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let master = rustix::fs::openat(&devpts, "ptmx", flags, Mode::empty())?;
    rustix::pty::unlockpt(&master)?;
    // Open here and until the child has it: a terminal without a user reads as ended.
    let slave_flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, slave_flags)?;
    rustix::termios::tcsetwinsize(&master, winsize(size))?;
    let again = rustix::io::fcntl_dupfd_cloexec(&master, 3)?;
    Ok((
        ChildStdio::Terminal { slave, devpts },
        End::Terminal(master, again),
    ))
}
