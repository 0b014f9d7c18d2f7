//! cgroup v2: one cgroup per container below the root, where the agent itself stays.
#![forbid(unsafe_code)]

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use cube_guest::Resources;
use rustix::fs::{Mode, OFlags};

use crate::error::{Context, Error, log_error};

const ROOT: &str = "/sys/fs/cgroup";
/// Controllers that containers get, if the kernel has them.
const CONTROLLERS: [&str; 5] = ["cpu", "cpuset", "io", "memory", "pids"];
/// The kernel's default period of `cpu.max`, in microseconds.
const DEFAULT_PERIOD: u64 = 100_000;

/// A container's cgroup.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: String,
    directory: OwnedFd,
}

/// Lets the containers' cgroups have controllers. (The rule that inner cgroups have no processes does
/// not hold for the root.)
///
/// # Errors
/// The kernel's refusal.
pub(crate) fn delegate() -> Result<(), Error> {
    let path = format!("{ROOT}/cgroup.controllers");
    let available = fs::read_to_string(&path).context(|| format!("read {path}"))?;
    write(
        &format!("{ROOT}/cgroup.subtree_control"),
        &enable(&available),
    )
}

/// The line for `cgroup.subtree_control`.
fn enable(available: &str) -> String {
    let wanted = available
        .split_whitespace()
        .filter(|name| CONTROLLERS.contains(name));
    wanted.map(|name| format!("+{name} ")).collect()
}

impl Cgroup {
    /// Makes the cgroup of the container `id` and sets its limits.
    ///
    /// # Errors
    /// A limit that the kernel does not take; the cgroup is removed again.
    pub(crate) fn create(id: &str, limits: &Resources) -> Result<Self, Error> {
        // The prefix keeps the name apart from the kernel's own files.
        let path = format!("{ROOT}/container-{id}");
        rustix::fs::mkdir(&path, Mode::from_raw_mode(0o755))
            .context(|| format!("make the cgroup {path}"))?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::open(&path, flags, Mode::empty());
        let cgroup = Self {
            directory: opened.context(|| format!("open the cgroup {path}"))?,
            path,
        };
        for (file, value) in settings(limits) {
            if let Err(error) = write(&format!("{}/{file}", cgroup.path), &value) {
                cgroup.remove();
                return Err(error);
            }
        }
        Ok(cgroup)
    }

    /// For clone3.
    pub(crate) fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Whether the OOM killer ended one of its processes.
    pub(crate) fn oom_killed(&self) -> bool {
        fs::read_to_string(format!("{}/memory.events", self.path))
            .is_ok_and(|text| oom_kills(&text) > 0)
    }

    /// Removes it; its processes have ended.
    pub(crate) fn remove(self) {
        if let Err(error) = rustix::fs::rmdir(&self.path) {
            log_error(&format!("cannot remove the cgroup {}: {error}", self.path));
        }
    }
}

/// The files to write, and what.
fn settings(limits: &Resources) -> Vec<(&'static str, String)> {
    let number = |file, value: Option<u64>| value.map(|value| (file, value.to_string()));
    let cpu = (limits.cpu_quota_us.is_some() || limits.cpu_period_us.is_some()).then(|| {
        let quota = limits
            .cpu_quota_us
            .map_or("max".to_owned(), |quota| quota.to_string());
        (
            "cpu.max",
            format!("{quota} {}", limits.cpu_period_us.unwrap_or(DEFAULT_PERIOD)),
        )
    });
    [
        number("memory.max", limits.memory_max),
        cpu,
        number("cpu.weight", limits.cpu_weight),
        number("pids.max", limits.pids_max),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The count in `memory.events`.
fn oom_kills(events: &str) -> u64 {
    events
        .lines()
        .find_map(|line| line.strip_prefix("oom_kill "))
        .and_then(|count| count.parse().ok())
        .unwrap_or(0)
}

fn write(path: &str, value: &str) -> Result<(), Error> {
    fs::write(path, value).context(|| format!("write `{}` to {path}", value.trim_end()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_limits_write_nothing() {
        assert!(settings(&Resources::default()).is_empty());
    }

    #[test]
    fn limits_become_files() {
        let limits = Resources {
            memory_max: Some(64 << 20),
            cpu_quota_us: Some(50_000),
            cpu_period_us: None,
            cpu_weight: Some(39),
            pids_max: Some(100),
            ..Resources::default()
        };
        let expected = [
            ("memory.max", "67108864"),
            ("cpu.max", "50000 100000"),
            ("cpu.weight", "39"),
            ("pids.max", "100"),
        ];
        assert_eq!(
            settings(&limits),
            expected.map(|(file, value)| (file, value.to_owned()))
        );
    }

    #[test]
    fn a_period_alone_leaves_the_quota_at_max() {
        let limits = Resources {
            cpu_period_us: Some(20_000),
            ..Resources::default()
        };
        assert_eq!(settings(&limits), [("cpu.max", "max 20000".to_owned())]);
    }

    #[test]
    fn only_known_controllers_are_enabled() {
        assert_eq!(
            enable("cpuset cpu io memory hugetlb pids rdma\n"),
            "+cpuset +cpu +io +memory +pids "
        );
        assert_eq!(enable("\n"), "");
    }

    #[test]
    fn oom_kills_are_counted_and_not_confused_with_group_kills() {
        let events = "low 0\nhigh 0\nmax 31\noom 2\noom_kill 1\noom_group_kill 7\n";
        assert_eq!(oom_kills(events), 1);
        assert_eq!(oom_kills("low 0\n"), 0);
    }
}
