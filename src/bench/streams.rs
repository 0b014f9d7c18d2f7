//! What goes through a stream and comes back: through an exec's `cat` in a pod, and, as what that is to be held
//! against, through the vsock socket of a bare VMM whose guest sends back what it gets.
#![forbid(unsafe_code)]

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use cube_guest::ProcessSpec;

use super::background::{self, Background};
use super::exits;
use super::footprint;
use super::measure;
use super::peers::{Kind, Machine, Peer};
use super::plan::{Contender, Figures, Row, record, take_turns};
use super::pod::PodCommand;
use crate::pod::api::body::{CreateExec, ExecCreated, Exit};

/// The port that the benchmarks' init listens on (`guest/src/bench_init.rs`).
const PORT: u32 = 1024;
/// Bytes written and read at a time.
const PIECE: usize = 64 << 10;
/// What goes through before it counts: then every buffer has its size.
const WARM_UP_MIB: u32 = 8;

/// What is sent, and through which machine where there is no pod.
#[derive(Debug)]
pub struct StreamBench {
    /// With a vsock device, and an init that sends back what it gets.
    pub machine: Machine,
    /// How much is sent, and comes back.
    pub mib: u32,
    /// After how long a guest that is not ready, or does not read or write, is given up.
    pub deadline: Duration,
}

/// What is looked at before and after.
struct Look {
    /// Resident memory of the VMM's own.
    own_rss_kib: u64,
    /// By KVM's count; 0 where that cannot be read.
    exits: u64,
}

impl Look {
    fn at(pid: u32, memory_mib: u32) -> io::Result<Self> {
        Ok(Self {
            own_rss_kib: footprint::of_process(pid, memory_mib)?.overhead_rss_kib,
            exits: exits::of_process(pid).get("total").copied().unwrap_or(0),
        })
    }
}

impl StreamBench {
    /// Lets every VMM of `rows` with such a socket, and pods in the background, take turns.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn run(
        &self,
        rows: &mut [Row],
        rounds: u32,
        directory: &Path,
        progress: &mut dyn FnMut(),
    ) -> io::Result<()> {
        take_turns(rows, rounds, progress, |row| self.turn(row, directory))
    }

    fn turn(&self, row: &Row, directory: &Path) -> io::Result<Result<Figures, String>> {
        // A row of a second kernel is not measured twice.
        let is_measured = |peer: &Peer| {
            row.name == peer.name && matches!(peer.kind, Kind::CubeVmm | Kind::Firecracker)
        };
        match &row.contender {
            Contender::Vmm { peer, .. } if is_measured(peer) => self.through_vsock(peer, directory),
            Contender::Background(pod) => Ok(self.through_exec(pod, directory)),
            _ => Ok(Ok(Figures::new())),
        }
    }

    fn through_vsock(&self, peer: &Peer, directory: &Path) -> io::Result<Result<Figures, String>> {
        let socket = peer.vsock(directory);
        if let Err(error) = fs::remove_file(&socket)
            && error.kind() != ErrorKind::NotFound
        {
            return Err(error);
        }
        let command = peer.command(&self.machine, directory)?;
        let running = match measure::start(command, directory, self.deadline, None) {
            Ok(running) => running,
            Err(error) => return Ok(Err(error.to_string())),
        };
        let look = || Look::at(running.pid(), self.machine.memory_mib);
        let connect = || {
            let stream = connect(&socket, self.deadline)?;
            Ok([stream.try_clone()?, stream])
        };
        let measured = self.measure(&look, &connect, &|| Ok(()));
        let words = running.stop();
        Ok(measured.map_err(|error| format!("{error} ({})", words.trim())))
    }

    fn through_exec(&self, pod: &PodCommand, directory: &Path) -> Result<Figures, String> {
        let background = Background::start(pod, 1, self.deadline, directory, None);
        let background = background.map_err(|error| error.to_string())?;
        let api = background.api();
        let exec = std::cell::RefCell::new(String::new());
        let begin = || {
            let body = CreateExec {
                process: ProcessSpec {
                    argv: vec!["cat".to_owned()],
                    ..ProcessSpec::default()
                },
                stdin: true,
                terminal: None,
            };
            let path = format!("/v1/containers/{}/execs", background::container(0));
            let ExecCreated { exec: id } =
                api.call("POST", &path, &body).map_err(io::Error::other)?;
            let attach = |stream: &str| {
                let path = format!("/v1/execs/{id}/attach/{stream}");
                api.upgrade(&path).map_err(io::Error::other)
            };
            let ends = [attach("stdin")?, attach("stdout")?];
            exec.replace(id);
            Ok(ends)
        };
        let end = || {
            let path = format!("/v1/execs/{}/wait", exec.borrow());
            let exit: Exit = api.get(&path).map_err(io::Error::other)?;
            match exit.exit_code {
                0 => Ok(()),
                code => Err(io::Error::other(format!("`cat` ended with status {code}"))),
            }
        };
        let measured = self.measure(&|| Look::at(background.pid(), pod.memory_mib), &begin, &end);
        measured.map_err(|error| error.to_string())
    }

    /// `begin` gives what to write to and what to read from; `end` is for after the last byte.
    fn measure(
        &self,
        look: &dyn Fn() -> io::Result<Look>,
        begin: &dyn Fn() -> io::Result<[UnixStream; 2]>,
        end: &dyn Fn() -> io::Result<()>,
    ) -> io::Result<Figures> {
        let through = |mib: u32| {
            let [to, from] = begin()?;
            to.set_write_timeout(Some(self.deadline))?;
            from.set_read_timeout(Some(self.deadline))?;
            let took = there_and_back(to, from, u64::from(mib) << 20);
            // Who is stuck has no end; who has ended may have had a reason.
            if !matches!(&took, Err(error) if error.kind() == ErrorKind::WouldBlock) {
                end()?;
            }
            took
        };
        through(WARM_UP_MIB)?;
        let before = look()?;
        let took = through(self.mib)?;
        let after = look()?;
        let grown = after.own_rss_kib.saturating_sub(before.own_rss_kib);
        let exits = after.exits.saturating_sub(before.exits);
        let mut taken = Figures::new();
        let per_gib = took.as_secs_f64() * 1e3 * 1024.0 / f64::from(self.mib);
        record(&mut taken, "echo_ms_per_gib", per_gib);
        record(&mut taken, "echo_growth_kib", grown as f64);
        if exits > 0 {
            let per_mib = exits as f64 / f64::from(self.mib);
            record(&mut taken, "echo_exits_per_mib", per_mib);
        }
        Ok(taken)
    }
}

/// Dials the guest: the dialect that `cube-vmm` has from Firecracker.
fn connect(socket: &Path, deadline: Duration) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(deadline))?;
    writeln!(stream, "CONNECT {PORT}")?;
    let mut line = Vec::new();
    // Byte by byte: what follows is the stream.
    while line.last() != Some(&b'\n') && line.len() < 64 {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    match line.starts_with(b"OK ") {
        true => Ok(stream),
        false => Err(io::Error::other("the VMM's vsock socket says no")),
    }
}

/// Writes so many bytes to the one, reads as many from the other; how long that took.
fn there_and_back(mut to: UnixStream, mut from: UnixStream, bytes: u64) -> io::Result<Duration> {
    let began = Instant::now();
    // It is closed when all has come back: to some VMMs a half-closed connection is a closed one.
    let writer = thread::spawn(move || -> io::Result<UnixStream> {
        let piece: Vec<u8> = (0..PIECE).map(|n| (n % 251) as u8).collect();
        let mut left = bytes;
        while left > 0 {
            let length = left.min(PIECE as u64);
            to.write_all(&piece[..length as usize])?;
            left -= length;
        }
        Ok(to)
    });
    let (mut buffer, mut read) = (vec![0; PIECE], 0);
    let received = loop {
        match from.read(&mut buffer) {
            Ok(0) => break Ok(()),
            Ok(length) => read += length as u64,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => break Err(error),
        }
        if read >= bytes {
            break Ok(());
        }
    };
    let took = began.elapsed();
    // If it failed, the writer is not to wait for who does not read.
    let _ = from.shutdown(Shutdown::Both);
    let written = writer.join();
    received?;
    let to = written.map_err(|_| io::Error::other("the writer panicked"))??;
    // The end of one that is another than `from`; that of the other has come.
    let _ = to.shutdown(Shutdown::Write);
    match read {
        read if read == bytes => Ok(took),
        read => Err(io::Error::other(format!(
            "{read} of {bytes} bytes came back"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The guest's end of a connection that sends back the first `limit` bytes.
    fn echo(mut guest: UnixStream, limit: u64) -> thread::JoinHandle<()> {
        thread::spawn(move || {
            let mut read = guest.try_clone().expect("a descriptor").take(limit);
            let _ = io::copy(&mut read, &mut guest);
            let _ = guest.shutdown(Shutdown::Both);
        })
    }

    #[test]
    fn what_comes_back_is_counted() {
        let bytes = 3 * PIECE as u64 + 7;
        for (limit, whole) in [(bytes, true), (bytes - 1, false)] {
            let (host, guest) = UnixStream::pair().expect("sockets");
            let echo = echo(guest, limit);
            let from = host.try_clone().expect("a descriptor");
            let outcome = there_and_back(host, from, bytes);
            assert_eq!(outcome.is_ok(), whole, "{outcome:?}");
            echo.join().expect("it ends");
        }
    }

    #[test]
    fn a_socket_is_dialled_as_firecrackers() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("v");
        let listener = std::os::unix::net::UnixListener::bind(&path).expect("a socket");
        let guest = thread::spawn(move || {
            for answer in ["OK 5\n!", "no\n"] {
                let (mut stream, _) = listener.accept().expect("a client");
                let mut asked = [0; 13];
                stream.read_exact(&mut asked).expect("a line");
                assert_eq!(&asked, b"CONNECT 1024\n");
                stream.write_all(answer.as_bytes()).expect("it is read");
            }
        });
        let deadline = Duration::from_secs(60);
        let mut stream = connect(&path, deadline).expect("it is taken");
        let mut rest = String::new();
        stream.read_to_string(&mut rest).expect("the rest");
        assert_eq!(rest, "!", "nothing of the stream is lost");
        assert!(connect(&path, deadline).is_err());
        guest.join().expect("it ends");
    }
}
