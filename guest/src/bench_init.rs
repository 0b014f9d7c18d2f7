//! The `/init` of the benchmarks: says on the first serial port that it runs, then idles for good.
//!
//! It writes the port itself, through `/dev/port`, so that the marker costs the same under every VMM and
//! whether or not the kernel has a serial driver.
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

use rustix::mount::{MountFlags, mount};

/// The data register of the first serial port.
const SERIAL: u64 = 0x3f8;
/// BEL: what the harness waits for.
const MARKER: u8 = 0x07;

fn main() -> io::Result<()> {
    fs::create_dir_all("/dev")?;
    mount("dev", "/dev", "devtmpfs", MountFlags::empty(), None)?;
    let port = File::options().write(true).open("/dev/port")?;
    port.write_all_at(&[MARKER], SERIAL)?;
    loop {
        std::thread::park();
    }
}
