//! What stands in for a VMM: this test program, started again by a script with [`MODE`] set.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// The guest's memory, and what of it is touched. A huge page at the end adds at most 2 MiB.
pub(crate) const MEMORY_MIB: u32 = 128;
pub(crate) const TOUCHED_MIB: u32 = 96;
/// What `large` holds beside it.
pub(crate) const BALLAST_MIB: u32 = 96;
/// What `slow` waits at least.
pub(crate) const DELAY_MS: u64 = 1500;

const MODE: &str = "CUBE_TEST_FAKE_VMM";
const STARTED: &str = "CUBE_TEST_FAKE_STARTED";

/// A program that is the fake in that mode. It notes when it was started.
pub(crate) fn script(directory: &Path, mode: &str) -> PathBuf {
    let program = std::env::current_exe().expect("this program");
    let script = format!(
        "#!/bin/sh\n[ \"$1\" != --version ] || {{ echo fake 1; exit; }}\n\
         {STARTED}=$(date +%s%N) {MODE}={mode} FAKE_DIRECTORY={} exec {} --exact fake::vmm --nocapture\n",
        directory.display(),
        program.display()
    );
    executable(&directory.join(format!("vmm-{mode}")), &script)
}

fn executable(path: &Path, script: &str) -> PathBuf {
    fs::write(path, script).expect("a script");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("a mode");
    path.to_owned()
}

/// A crosvm that knows these options of `run`, and ends like the real one when it is given another that leaves a device
/// out. Its guest runs at once.
pub(crate) fn crosvm(directory: &Path, options: &[&str]) -> PathBuf {
    let known = options.join("|");
    let help = options.join("  leaves it out\n  ");
    let script = format!(
        "#!/bin/sh\n[ \"$1\" != version ] || {{ echo crosvm 1; exit; }}\n\
         [ \"$2\" != --help ] || {{ echo '  {help}  leaves it out'; exit; }}\n\
         for word; do case $word in {known}) ;; --no-*) echo \"Unrecognized argument: $word\" >&2; exit 35;; esac; done\n\
         printf '\\007'; exec sleep 1000\n"
    );
    executable(&directory.join("crosvm"), &script)
}

#[test]
fn vmm() {
    if let Ok(mode) = std::env::var(MODE) {
        act(&mode);
    }
    // Otherwise this checks what the other tests rely on: that it does act when told to.
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    let output = command
        .args(["--exact", "fake::vmm"])
        .env(MODE, "crashes")
        .output()
        .expect("it runs");
    assert_eq!(output.status.code(), Some(3));
}

fn act(mode: &str) -> ! {
    match mode {
        "crashes" => {
            eprintln!("no such kernel");
            exit(3);
        }
        "hangs" => idle(),
        "slow" => {
            thread::sleep(Duration::from_millis(DELAY_MS));
            note();
        }
        _ => {}
    }
    let memory =
        GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), (MEMORY_MIB as usize) << 20)]);
    let memory = memory.expect("memory");
    for page in 0..u64::from(TOUCHED_MIB) << 8 {
        // Slow ones have no time to touch memory between their note and their marker.
        if mode != "slow" {
            memory
                .write_obj(1u8, GuestAddress(page << 12))
                .expect("a page");
        }
    }
    let ballast = if mode == "large" {
        BALLAST_MIB as usize
    } else {
        0
    };
    let ballast = vec![1u8; ballast << 20];
    say(b"\x07");
    std::hint::black_box((&memory, &ballast));
    match mode {
        "reads" => read_slowly(),
        "lacks" => say(b"\x15"),
        _ => {}
    }
    idle()
}

fn say(word: &[u8]) {
    let mut out = std::io::stdout().lock();
    out.write_all(word)
        .and_then(|()| out.flush())
        .expect("standard output");
}

/// As a guest that reads its disk, and notes how long that took.
fn read_slowly() {
    let began = Instant::now();
    thread::sleep(Duration::from_millis(DELAY_MS));
    note_ms(began.elapsed().as_secs_f64() * 1e3);
    say(b"\x07");
}

/// Milliseconds since the script began, which is the harness's start but for the exec of a shell.
fn note() {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("a clock")
        .as_nanos();
    let started: u128 = std::env::var(STARTED)
        .expect("a time")
        .parse()
        .expect("a number");
    note_ms((now - started) as f64 / 1e6);
}

fn note_ms(took: f64) {
    let path = Path::new(&std::env::var("FAKE_DIRECTORY").expect("a directory")).join("delays");
    let mut file = fs::File::options()
        .create(true)
        .append(true)
        .open(path)
        .expect("notes");
    let _ = writeln!(file, "{took}");
}

fn idle() -> ! {
    loop {
        thread::park();
    }
}
