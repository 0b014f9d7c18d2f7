//! The `/init` of the benchmarks: says on the first serial port that it runs, then idles for good. With `bench_io=`
//! on the kernel's command line it reads the first virtio disk in between, and says when it has.
//!
//! It writes the port itself, through `/dev/port`, so that the marker costs the same under every VMM and
//! whether or not the kernel has a serial driver.
//!
//! Unsafe for the C entry point. Rust's own would abort before `main`: it wants the three standard descriptors, or
//! `/dev/null` in their place, and a kernel without a console gives its init none of them.
#![cfg_attr(not(test), no_main)]
#![allow(unsafe_code)]

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use rustix::fs::OFlags;
use rustix::mount::{MountFlags, mount};

/// The data register of the first serial port.
const SERIAL: u64 = 0x3f8;
/// BEL: what the harness waits for.
const MARKER: u8 = 0x07;
/// NAK: there is no disk that could be read.
const ABSENT: u8 = 0x15;
/// Bytes of a read, and what direct reads are aligned to.
const BLOCK: usize = 1 << 20;
const PAGE: usize = 4096;

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
    port.write_all_at(&[MARKER], SERIAL)?;
    // The kernel hands what it does not know, and has a `=` in it, to its first program.
    if std::env::var_os("bench_io").is_some() {
        let said = if read_disk().is_ok() { MARKER } else { ABSENT };
        port.write_all_at(&[said], SERIAL)?;
    }
    loop {
        std::thread::park();
    }
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
