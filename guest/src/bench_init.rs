//! The `/init` of the benchmarks: says on the first serial port that it runs, then idles for good. With `bench_io=`
//! on the kernel's command line it reads the first virtio disk in between, and says when it has; with `bench_vsock=` it
//! listens on a vsock port before it says anything, and sends back what it gets there, one connection after the other.
//!
//! It writes the port itself, through `/dev/port`, so that the marker costs the same under every VMM and
//! whether or not the kernel has a serial driver.
//!
//! Unsafe for the address of a family that no crate here knows, and for the C entry point. Rust's own would abort before `main`: it wants the three standard descriptors, or
//! `/dev/null` in their place, and a kernel without a console gives its init none of them.
#![cfg_attr(not(test), no_main)]
#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use rustix::fs::OFlags;
use rustix::mount::{MountFlags, mount};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

/// The data register of the first serial port.
const SERIAL: u64 = 0x3f8;
/// BEL: what the harness waits for.
const MARKER: u8 = 0x07;
/// NAK: there is no disk that could be read.
const ABSENT: u8 = 0x15;
/// Bytes of a read, and what direct reads are aligned to.
const BLOCK: usize = 1 << 20;
const PAGE: usize = 4096;
/// The vsock port that is listened on, and bytes of a read: what one packet carries at most.
const PORT: u32 = 1024;
const PACKET: usize = 64 << 10;

/// A kernel whose init ends panics, and the harness says that the guest did not run.
#[cfg(not(test))]
#[unsafe(no_mangle)]
extern "C" fn main(_argc: libc::c_int, _argv: *const *const libc::c_char) -> libc::c_int {
    i32::from(run().is_err())
}

#[cfg(test)]
fn main() -> io::Result<()> {
    run()
}

fn run() -> io::Result<()> {
    fs::create_dir_all("/dev")?;
    mount("dev", "/dev", "devtmpfs", MountFlags::empty(), None)?;
    let port = File::options().write(true).open("/dev/port")?;
    let listener = std::env::var_os("bench_vsock")
        .map(|_| listen())
        .transpose()?;
    port.write_all_at(&[MARKER], SERIAL)?;
    // The kernel hands what it does not know, and has a `=` in it, to its first program.
    if std::env::var_os("bench_io").is_some() {
        let said = if read_disk().is_ok() { MARKER } else { ABSENT };
        port.write_all_at(&[said], SERIAL)?;
    }
    if let Some(listener) = listener {
        loop {
            // One that its peer resets is one connection's end.
            let _ = accept(&listener).and_then(send_back);
        }
    }
    loop {
        std::thread::park();
    }
}

/// Listens on [`PORT`].
fn listen() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None)?;
    let address = libc::sockaddr_vm {
        svm_family: libc::AF_VSOCK as libc::sa_family_t,
        svm_reserved1: 0,
        svm_port: PORT,
        svm_cid: libc::VMADDR_CID_ANY,
        svm_zero: [0; 4],
    };
    let length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
    // SAFETY: the address is of that length and lives through the call.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    if bound == -1 {
        return Err(io::Error::last_os_error());
    }
    rustix::net::listen(&socket, 1)?;
    Ok(socket)
}

fn accept(listener: &OwnedFd) -> io::Result<File> {
    Ok(File::from(rustix::net::accept(listener)?))
}

/// Sends back what comes, to its end.
fn send_back(mut connection: File) -> io::Result<()> {
    let mut buffer = vec![0; PACKET];
    loop {
        match connection.read(&mut buffer)? {
            0 => return Ok(()),
            length => send_all(&mut connection, &buffer[..length])?,
        }
    }
}

/// Sends all of it, in shorter packets where the kernel finds no piece of memory for a long one.
fn send_all(connection: &mut File, mut bytes: &[u8]) -> io::Result<()> {
    let mut most = PACKET;
    while !bytes.is_empty() {
        match connection.write(&bytes[..bytes.len().min(most)]) {
            Ok(length) => {
                bytes = &bytes[length..];
                most = PACKET;
            }
            Err(error) if error.raw_os_error() == Some(libc::ENOMEM) && most > PAGE => most /= 4,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads all of it, past the guest's page cache.
fn read_disk() -> io::Result<()> {
    let direct = OFlags::DIRECT.bits().cast_signed();
    let mut disk = File::options()
        .read(true)
        .custom_flags(direct)
        .open("/dev/vda")?;
    let mut buffer = vec![0; BLOCK + PAGE];
    let start = buffer.as_ptr().align_offset(PAGE);
    let block = &mut buffer[start..start + BLOCK];
    while disk.read(block)? > 0 {}
    Ok(())
}
