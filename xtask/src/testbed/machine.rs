//! Runs QEMU for one job: its arguments, the watchdog, and how its end is told.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Write, stderr};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::follow::Follower;
use super::initramfs::Outer;
use super::job::{Job, read_status};
use super::{DIED, TIMED_OUT};
use crate::error::{Doing, Error, Result};
use crate::run::last_lines;

/// How large the outer machine is and how long it may run.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    /// The watchdog ends it then.
    pub(crate) timeout: Duration,
    /// Memory in MiB.
    pub(crate) memory_mib: u32,
    /// Processors.
    pub(crate) cpus: u8,
}

/// Files of one run.
struct Files<'a> {
    /// The directory of the run, where the streams and the console lie.
    run: &'a Path,
    /// Shared with the outer machine: script and exit status.
    share: &'a Path,
    /// Shared with the outer machine: `$CUBE_TESTBED_OUT`.
    out: &'a Path,
}

/// Runs the job and gives its exit status, or [`TIMED_OUT`], or [`DIED`].
pub(super) fn run(
    outer: &Outer,
    limits: &Limits,
    job: &Job,
    sink: impl Write + Send + 'static,
) -> Result<u8> {
    let directory = tempfile::Builder::new()
        .prefix("cube-testbed-")
        .tempdir()
        .doing("create a directory in", &std::env::temp_dir())?;
    let path = directory.path();
    let (share, own_out) = (path.join("share"), path.join("out"));
    for made in [&share, &own_out] {
        fs::create_dir(made).doing("create", made)?;
    }
    fs::write(share.join("job"), job.script()).doing("write", &share)?;
    let files = Files {
        run: path,
        share: &share,
        out: job.out_directory().unwrap_or(&own_out),
    };
    let streams = [
        Follower::start(&path.join("stdout"), sink)?,
        Follower::start(&path.join("stderr"), stderr())?,
    ];
    let in_time = start_and_wait(&arguments(outer, limits, &files), path, limits.timeout);
    // QEMU is gone: what it wrote is all there is.
    for stream in streams {
        stream.finish()?;
    }
    let in_time = in_time?;
    if let Some(status) = read_status(&share.join("status"))? {
        return Ok(status);
    }
    if in_time {
        eprintln!("testbed: the outer machine ended before the command did");
        eprintln!("{}", complaints(path));
        return Ok(DIED);
    }
    eprintln!(
        "testbed: ended after {} s (see --timeout)",
        limits.timeout.as_secs()
    );
    eprintln!("{}", complaints(path));
    Ok(TIMED_OUT)
}

/// Starts QEMU, waits for its end; false if the watchdog had to end it.
fn start_and_wait(arguments: &[OsString], path: &Path, timeout: Duration) -> Result<bool> {
    let log_path = path.join("qemu");
    let log = File::create(&log_path).doing("create", &log_path)?;
    let also = log.try_clone().doing("duplicate", &log_path)?;
    let program = "qemu-system-x86_64";
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(also)
        .spawn()
        .map_err(|source| Error::Start {
            program: program.into(),
            source,
        })?;
    let waited = wait(&child, timeout);
    if !matches!(waited, Ok(true)) {
        let _ = child.kill();
    }
    child.wait().doing("wait for", Path::new(program))?;
    waited
}

/// Whether the child ends within the time.
fn wait(child: &Child, timeout: Duration) -> Result<bool> {
    let what = Path::new("the outer machine");
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty()).doing("watch", what)?;
    let time = Timespec::try_from(timeout)
        .map_err(|_| Error::Said("the timeout is too long: use fewer seconds".into()))?;
    loop {
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&time)) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).doing("watch", what),
        }
    }
}

fn arguments(outer: &Outer, limits: &Limits, files: &Files) -> Vec<OsString> {
    let mut list: Vec<OsString> = Vec::new();
    let mut add = |words: &[&str]| list.extend(words.iter().map(Into::into));
    add(&[
        "-M",
        "q35",
        "-accel",
        "tcg,thread=multi,tb-size=512",
        "-cpu",
        "EPYC-Rome,+svm,+npt",
    ]);
    add(&[
        "-smp",
        &limits.cpus.to_string(),
        "-m",
        &limits.memory_mib.to_string(),
    ]);
    add(&["-display", "none", "-no-reboot", "-nodefaults"]);
    add(&[
        "-kernel",
        &outer.kernel.to_string_lossy(),
        "-initrd",
        &outer.initramfs.to_string_lossy(),
    ]);
    // The second watchdog, inside, for when this process is gone.
    let timeout = limits.timeout.as_secs().saturating_add(30);
    add(&[
        "-append",
        &format!("console=ttyS0 quiet panic=-1 mitigations=off testbed.timeout={timeout}"),
    ]);
    add(&[
        "-serial",
        &format!("file:{}", escaped(&files.run.join("console"))),
    ]);
    let shares = [
        ("host", Path::new("/"), ",readonly=on,multidevs=remap"),
        ("job", files.share, ""),
        ("out", files.out, ""),
    ];
    for (tag, path, more) in shares {
        let path = escaped(path);
        add(&[
            "-fsdev",
            &format!("local,id={tag},path={path},security_model=none{more}"),
        ]);
        add(&[
            "-device",
            &format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}"),
        ]);
    }
    // Without ioeventfd the processor that kicks the queue carries the bytes to the file itself: no byte is under way
    // when the machine resets.
    add(&["-device", "virtio-serial-pci,ioeventfd=off"]);
    for name in ["stdout", "stderr"] {
        let path = escaped(&files.run.join(name));
        add(&["-chardev", &format!("file,id={name},path={path}")]);
        add(&[
            "-device",
            &format!("virtserialport,chardev={name},name={name}"),
        ]);
    }
    list
}

/// A path as a value in one of QEMU's comma-separated lists.
fn escaped(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

/// The last lines of QEMU's messages and of the console.
fn complaints(directory: &Path) -> String {
    let read = |name: &str| fs::read(directory.join(name)).unwrap_or_default();
    let qemu = without_feature_warnings(&String::from_utf8_lossy(&read("qemu")));
    format!("{qemu}{}", last_lines(&read("console")))
}

/// TCG warns once for each processor feature that it lacks: harmless, and dozens of lines.
fn without_feature_warnings(text: &str) -> String {
    let harmless = |line: &&str| line.contains("TCG doesn't support requested feature");
    text.lines()
        .filter(|line| !harmless(line))
        .fold(String::new(), |all, line| all + line + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn feature_warnings_are_dropped_and_others_are_not() {
        let text =
            "qemu: warning: TCG doesn't support requested feature: CPUID.01H\nqemu: no such file\n";
        assert_eq!(without_feature_warnings(text), "qemu: no such file\n");
    }

    #[test]
    fn the_host_is_read_only_and_odd_paths_survive() {
        let outer = Outer {
            kernel: "/k".into(),
            initramfs: "/i".into(),
        };
        let limits = Limits {
            timeout: Duration::from_secs(10),
            memory_mib: 512,
            cpus: 1,
        };
        let files = Files {
            run: Path::new("/r"),
            share: Path::new("/a,b"),
            out: Path::new("/o"),
        };
        let words = arguments(&outer, &limits, &files);
        let has = |text: &str| words.iter().any(|word| word.to_string_lossy() == text);
        assert!(has(
            "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap"
        ));
        assert!(has("local,id=job,path=/a,,b,security_model=none"));
        assert!(has("file,id=stdout,path=/r/stdout"));
    }

    #[test]
    fn the_watchdog_tells_an_end_from_a_hang() {
        let mut quick = Command::new("true").spawn().unwrap();
        assert!(wait(&quick, Duration::from_secs(60)).unwrap());
        quick.wait().unwrap();
        let mut slow = Command::new("sleep").arg("600").spawn().unwrap();
        assert!(!wait(&slow, Duration::ZERO).unwrap());
        slow.kill().unwrap();
        slow.wait().unwrap();
    }
}
