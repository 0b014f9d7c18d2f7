//! Runs QEMU for one job: its arguments, the watchdog, and how its end is told.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Write, stderr};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::follow::Follower;
use super::initramfs::Outer;
use super::job::{Job, read_status};
use super::qemu::Qemu;
use super::{DIED, TIMED_OUT};
use crate::error::{Doing, Error, Result};
use crate::run::last_lines;

/// How often the watchdog looks at what was said.
const LOOK: Duration = Duration::from_secs(5);

/// How large the outer machine is and how long it may run.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    /// The watchdog ends it then.
    pub(crate) timeout: Duration,
    /// The watchdog ends it when standard output has been silent for so long: an emulated machine can lose its timer
    /// and sleep for ever.
    pub(crate) silence: Option<Duration>,
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
    let end = start_and_wait(&outer.qemu, &arguments(outer, limits, &files), path, limits);
    // QEMU is gone: what it wrote is all there is.
    for stream in streams {
        stream.finish()?;
    }
    let end = end?;
    if let Some(status) = read_status(&share.join("status"))? {
        return Ok(status);
    }
    match end {
        End::OfItself => eprintln!("testbed: the outer machine ended before the command did"),
        End::Silent => eprintln!("testbed: ended, because the outer machine says nothing any more"),
        End::Late => eprintln!(
            "testbed: ended after {} s (see --timeout)",
            limits.timeout.as_secs()
        ),
    }
    eprintln!("{}", complaints(path));
    Ok(match end {
        End::OfItself | End::Silent => DIED,
        End::Late => TIMED_OUT,
    })
}

/// Why QEMU ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    OfItself,
    /// The watchdog ended it: it took too long.
    Late,
    /// The watchdog ended it: it said nothing for too long.
    Silent,
}

/// Starts QEMU and waits for its end, or brings it about.
fn start_and_wait(
    qemu: &Qemu,
    arguments: &[OsString],
    path: &Path,
    limits: &Limits,
) -> Result<End> {
    let log_path = path.join("qemu");
    let log = File::create(&log_path).doing("create", &log_path)?;
    let also = log.try_clone().doing("duplicate", &log_path)?;
    let mut child = qemu
        .command()
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(also)
        .spawn()
        .map_err(|source| Error::Start {
            program: qemu.program().display().to_string(),
            source,
        })?;
    let waited = wait(&child, limits, &path.join("stdout"));
    if !matches!(waited, Ok(End::OfItself)) {
        let _ = child.kill();
    }
    child.wait().doing("wait for", qemu.program())?;
    waited
}

/// Waits for the child's end, or until one of the limits is reached.
fn wait(child: &Child, limits: &Limits, stdout: &Path) -> Result<End> {
    let what = Path::new("the outer machine");
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty()).doing("watch", what)?;
    let length = || fs::metadata(stdout).map_or(0, |file| file.len());
    let began = Instant::now();
    let (mut heard, mut last) = (began, length());
    loop {
        let silence = limits
            .silence
            .map(|most| most.saturating_sub(heard.elapsed()));
        let left = limits.timeout.saturating_sub(began.elapsed());
        let time = left.min(silence.unwrap_or(left)).min(LOOK);
        let time = Timespec::try_from(time)
            .map_err(|_| Error::Said("the timeout is too long: use fewer seconds".into()))?;
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&time)) {
            Ok(1..) => return Ok(End::OfItself),
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).doing("watch", what),
        }
        if length() != last {
            (heard, last) = (Instant::now(), length());
        }
        if began.elapsed() >= limits.timeout {
            return Ok(End::Late);
        }
        if limits.silence.is_some_and(|most| heard.elapsed() >= most) {
            return Ok(End::Silent);
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
    // A processor that is stuck for a minute ends the machine: it does not come back.
    add(&[
        "-append",
        &format!(
            "console=ttyS0 quiet panic=-1 softlockup_panic=1 watchdog_thresh=30 mitigations=off testbed.timeout={timeout}"
        ),
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
    use std::process::Command;

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
            qemu: Qemu::installed(),
            kernel: "/k".into(),
            initramfs: "/i".into(),
        };
        let limits = Limits {
            timeout: Duration::from_secs(10),
            silence: None,
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
    fn the_watchdog_tells_an_end_from_a_hang_and_from_silence() {
        let limits = |timeout, silence| Limits {
            timeout: Duration::from_secs(timeout),
            silence,
            memory_mib: 512,
            cpus: 1,
        };
        let nowhere = Path::new("/nonexistent");
        let mut quick = Command::new("true").spawn().unwrap();
        let ended = wait(&quick, &limits(60, None), nowhere).unwrap();
        assert_eq!(ended, End::OfItself);
        quick.wait().unwrap();
        let mut slow = Command::new("sleep").arg("600").spawn().unwrap();
        let late = wait(&slow, &limits(0, None), nowhere).unwrap();
        let silent = wait(&slow, &limits(60, Some(Duration::ZERO)), nowhere).unwrap();
        assert_eq!((late, silent), (End::Late, End::Silent));
        slow.kill().unwrap();
        slow.wait().unwrap();
    }
}
