//! The arguments of `cube-vmm`.
#![forbid(unsafe_code)]

use std::ffi::{OsStr, OsString};
use std::os::fd::RawFd;
use std::path::PathBuf;

/// What `--help` prints.
const HELP: &str = "\
Runs one virtual machine in this process until it ends.

Usage: cube-vmm (--spec-fd N | --spec FILE) [OPTIONS]

  --spec-fd N       read the machine's spec (JSON) from inherited descriptor N
  --spec FILE       read it from FILE; `-` is standard input
  --check           say whether the spec is good, and run nothing
  --timeline-fd N   write the stages of the machine's life to descriptor N, a line of JSON each
  --started-at NS   CLOCK_MONOTONIC at which the caller started this program: the timeline's first stage
  --count-exits     add the vCPUs' exits, by reason, to the timeline's stages from init on
  --lifetime-fd N   stop the machine when the other end of this pipe or socket is closed
  --pod-fd N        serve the pod described (JSON) on inherited descriptor N
  --help, --version

Exit status: 0 the guest powered off, 1 the host failed, 2 wrong arguments or spec, 64 the guest reset,
65 its kernel panicked, 66 triple fault, 67 KVM stopped it; 129, 130, 143 stopped by --lifetime-fd or
SIGHUP, SIGINT, SIGTERM.

Examples:
  Boot a kernel with an init and see its console:
    echo '{\"kernel\": {\"path\": \"vmlinux\"}, \"initramfs\": {\"init\": {\"path\": \"cube-init\"}},
          \"cpus\": 2, \"memory_mib\": 128, \"console\": \"/dev/stdout\"}' | cube-vmm --spec -
  See where the start's time goes:
    cube-vmm --spec machine.json --timeline-fd 3 --count-exits 3>timeline.json
";

/// What to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Action {
    Print(String),
    Run(Box<Arguments>),
}

/// Where the spec comes from.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Source {
    Fd(RawFd),
    File(PathBuf),
    StandardInput,
}

/// A run of one machine.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Arguments {
    pub(super) spec: Source,
    pub(super) check: bool,
    pub(super) timeline_fd: Option<RawFd>,
    pub(super) started_at: Option<u64>,
    pub(super) count_exits: bool,
    pub(super) lifetime_fd: Option<RawFd>,
    pub(super) pod_fd: Option<RawFd>,
}

/// What is wrong with the arguments.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ArgumentError {
    #[error("unknown argument {0:?}")]
    Unknown(OsString),
    #[error("{0} needs a value")]
    NoValue(&'static str),
    #[error("{0} takes a number, not {1:?}")]
    NotANumber(&'static str, OsString),
    #[error("{0} was given twice")]
    Twice(&'static str),
    #[error("descriptor {0} was given for two things")]
    SharedDescriptor(RawFd),
    #[error("no spec was given: --spec-fd or --spec is needed")]
    NoSpec,
}

/// Sets what must be given once.
fn once<T>(slot: &mut Option<T>, name: &'static str, value: T) -> Result<(), ArgumentError> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(ArgumentError::Twice(name)),
    }
}

fn number<T: std::str::FromStr>(
    name: &'static str,
    value: Option<OsString>,
) -> Result<T, ArgumentError> {
    let value = value.ok_or(ArgumentError::NoValue(name))?;
    let parsed = value.to_str().and_then(|text| text.parse().ok());
    parsed.ok_or(ArgumentError::NotANumber(name, value))
}

/// Reads the arguments, the program's name left out.
pub(super) fn parse(
    mut arguments: impl Iterator<Item = OsString>,
) -> Result<Action, ArgumentError> {
    let (mut spec, mut timeline_fd, mut started_at, mut lifetime_fd) = (None, None, None, None);
    let mut pod_fd = None;
    let (mut check, mut count_exits) = (false, false);
    while let Some(argument) = arguments.next() {
        match argument.to_str() {
            Some("--help" | "-h") => return Ok(Action::Print(HELP.to_owned())),
            Some("--version" | "-V") => {
                return Ok(Action::Print(format!(
                    "cube-vmm {}\n",
                    env!("CARGO_PKG_VERSION")
                )));
            }
            Some("--spec-fd") => {
                let fd = number("--spec-fd", arguments.next())?;
                once(&mut spec, "the spec", Source::Fd(fd))?;
            }
            Some("--spec") => {
                let value = arguments.next().ok_or(ArgumentError::NoValue("--spec"))?;
                let source = if value == OsStr::new("-") {
                    Source::StandardInput
                } else {
                    Source::File(value.into())
                };
                once(&mut spec, "the spec", source)?;
            }
            Some("--timeline-fd") => {
                once(
                    &mut timeline_fd,
                    "--timeline-fd",
                    number("--timeline-fd", arguments.next())?,
                )?;
            }
            Some("--started-at") => {
                once(
                    &mut started_at,
                    "--started-at",
                    number("--started-at", arguments.next())?,
                )?;
            }
            Some("--lifetime-fd") => {
                once(
                    &mut lifetime_fd,
                    "--lifetime-fd",
                    number("--lifetime-fd", arguments.next())?,
                )?;
            }
            Some("--pod-fd") => {
                once(
                    &mut pod_fd,
                    "--pod-fd",
                    number("--pod-fd", arguments.next())?,
                )?;
            }
            Some("--check") => check = true,
            Some("--count-exits") => count_exits = true,
            _ => return Err(ArgumentError::Unknown(argument)),
        }
    }
    let spec = spec.ok_or(ArgumentError::NoSpec)?;
    let spec_fd = match spec {
        Source::Fd(fd) => Some(fd),
        _ => None,
    };
    check_distinct([spec_fd, timeline_fd, lifetime_fd, pod_fd])?;
    let run = Arguments {
        spec,
        check,
        timeline_fd,
        started_at,
        count_exits,
        lifetime_fd,
        pod_fd,
    };
    Ok(Action::Run(Box::new(run)))
}

/// Each inherited descriptor gets one owner.
fn check_distinct(fds: [Option<RawFd>; 4]) -> Result<(), ArgumentError> {
    let mut given: Vec<RawFd> = fds.into_iter().flatten().collect();
    given.sort_unstable();
    match given.windows(2).find(|pair| pair.first() == pair.last()) {
        Some(pair) => Err(ArgumentError::SharedDescriptor(pair[0])),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_line(line: &str) -> Result<Action, ArgumentError> {
        parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn a_full_line_is_understood() {
        let line =
            "--spec-fd 3 --timeline-fd 4 --started-at 12 --count-exits --lifetime-fd 5 --pod-fd 6";
        let expected = Arguments {
            spec: Source::Fd(3),
            check: false,
            timeline_fd: Some(4),
            started_at: Some(12),
            count_exits: true,
            lifetime_fd: Some(5),
            pod_fd: Some(6),
        };
        assert_eq!(parse_line(line), Ok(Action::Run(Box::new(expected))));
    }

    #[test]
    fn a_dash_is_standard_input() {
        let Ok(Action::Run(run)) = parse_line("--check --spec -") else {
            panic!()
        };
        assert_eq!((run.spec, run.check), (Source::StandardInput, true));
    }

    #[test]
    fn faults_are_named() {
        for (line, expected) in [
            ("", "no spec was given"),
            ("--spec a --spec-fd 3", "the spec was given twice"),
            (
                "--spec a --timeline-fd 3 --timeline-fd 4",
                "--timeline-fd was given twice",
            ),
            ("--spec-fd x", "--spec-fd takes a number, not \"x\""),
            ("--spec-fd", "--spec-fd needs a value"),
            (
                "--spec-fd 4 --lifetime-fd 4",
                "descriptor 4 was given for two things",
            ),
            (
                "--spec a --pod-fd 4 --lifetime-fd 4",
                "was given for two things",
            ),
            ("--spec-fd 4 --pod-fd 4", "was given for two things"),
            ("--spec a -v", "unknown argument \"-v\""),
        ] {
            let error = parse_line(line).unwrap_err().to_string();
            assert!(error.contains(expected), "{line}: {error}");
        }
    }
}
