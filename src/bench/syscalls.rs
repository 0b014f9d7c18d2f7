//! System calls that a VMM makes before its guest runs, counted by `strace`: a figure of the program, not of
//! the machine.
#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::measure;
use super::peers::find;

/// Counts the system calls of `command` and its children until the first KVM_RUN; none where there is no
/// `strace` in PATH, or the guest did not run under it.
///
/// # Errors
/// The trace cannot be read.
pub fn until_first_run(
    command: &Command,
    directory: &Path,
    deadline: Duration,
) -> io::Result<Option<u64>> {
    let Some(strace) = find("strace") else {
        return Ok(None);
    };
    let trace = directory.join("strace");
    let mut traced = Command::new(strace);
    traced.args(["-f", "-qq", "-o"]).arg(&trace);
    traced.arg(command.get_program()).args(command.get_args());
    // Dropping what was started ends it: the trace is whole as far as it matters.
    if measure::start(traced, directory, deadline, None).is_err() {
        return Ok(None);
    }
    Ok(count(&String::from_utf8_lossy(&fs::read(&trace)?)))
}

/// Lines are `PID call(arguments) = result`; the second half of an interrupted one, signals and ends of
/// processes are no calls.
fn count(trace: &str) -> Option<u64> {
    let calls = trace.lines().filter_map(|line| {
        let call = line
            .trim_start_matches(|c: char| c.is_ascii_digit())
            .trim_start();
        call.starts_with(|c: char| c.is_ascii_lowercase() || c == '_')
            .then_some(call)
    });
    let (mut counted, mut ran) = (0, false);
    for call in calls {
        if call.starts_with("ioctl(") && call.contains(", KVM_RUN") {
            ran = true;
            break;
        }
        counted += 1;
    }
    ran.then_some(counted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted_until_the_guest_runs() {
        let trace = "71 execve(\"/vmm\", [\"/vmm\"], 0x7ff /* 9 vars */) = 0\n\
                     71 clone3({flags=0}, 88 <unfinished ...>\n\
                     72 ioctl(9, KVM_CREATE_VM, 0) = 10\n\
                     71 <... clone3 resumed>) = 72\n\
                     71 --- SIGCHLD {si_signo=SIGCHLD} ---\n\
                     72 ioctl(12, KVM_RUN <unfinished ...>\n\
                     71 write(1, \"x\", 1) = 1\n";
        assert_eq!(count(trace), Some(3));
        assert_eq!(count("72 ioctl(12, KVM_RUN, 0) = 0\n"), Some(0));
        assert_eq!(count("71 execve(\"/vmm\", [], 0x0) = -1 ENOENT\n"), None);
    }
}
