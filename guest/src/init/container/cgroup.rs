//! cgroup v2: one cgroup per container below the root, where the agent itself stays.
#![forbid(unsafe_code)]

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use cube_guest::Resources;
use rustix::event::epoll::EventFlags;
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal};

use crate::error::{Context, Error, log_error};
use crate::events::{Poller, Source, Watched};

const ROOT: &str = "/sys/fs/cgroup";
/// Controllers that containers get, if the kernel has them.
const CONTROLLERS: [&str; 6] = ["cpu", "cpuset", "hugetlb", "io", "memory", "pids"];
/// The kernel's default period of `cpu.max`, in microseconds.
const DEFAULT_PERIOD: u64 = 100_000;

/// A container's cgroup.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: String,
    directory: OwnedFd,
    /// `memory.events`, which has an event when a count in it changes.
    memory: Watched,
    /// Its count of OOM kills as last reported.
    oom_kills: u64,
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
    /// Makes the cgroup of the container `id` and sets its limits; `index` is what its events are called.
    ///
    /// # Errors
    /// A limit that the kernel does not take; the cgroup is removed again.
    pub(crate) fn create(
        id: &str,
        limits: &Resources,
        index: u32,
        poller: &Poller,
    ) -> Result<Self, Error> {
        // The prefix keeps the name apart from the kernel's own files.
        let path = format!("{ROOT}/container-{id}");
        rustix::fs::mkdir(&path, Mode::from_raw_mode(0o755))
            .context(|| format!("make the cgroup {path}"))?;
        let open = || -> Result<Self, Error> {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let directory = rustix::fs::open(&path, flags, Mode::empty());
            Ok(Self {
                directory: directory.context(|| format!("open the cgroup {path}"))?,
                memory: watch(&path, "memory.events", Source::Memory(index), poller)?,
                oom_kills: 0,
                path: path.clone(),
            })
        };
        let cgroup = open().inspect_err(|_| _ = rustix::fs::rmdir(&path))?;
        match cgroup.update(limits) {
            Ok(()) => Ok(cgroup),
            Err(error) => {
                cgroup.remove(poller);
                Err(error)
            }
        }
    }

    /// For clone3.
    pub(crate) fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Sets the limits that are given.
    ///
    /// # Errors
    /// One that the kernel does not take; those before it are set.
    pub(crate) fn update(&self, limits: &Resources) -> Result<(), Error> {
        let current = match (limits.cpu_quota_us, limits.cpu_period_us) {
            (None, None) => String::new(),
            _ => self.read("cpu.max").unwrap_or_default(),
        };
        for (file, value) in settings(limits, &current)? {
            write(&format!("{}/{file}", self.path), &value)?;
        }
        Ok(())
    }

    /// Whether the OOM killer has ended a process since this was last asked, and whether ever.
    pub(crate) fn oom_killed(&mut self) -> (bool, bool) {
        let kills = oom_kills(&content(&self.memory));
        let before = std::mem::replace(&mut self.oom_kills, kills);
        (before < kills, kills > 0)
    }

    /// Kills every process in it, frozen or not.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub(crate) fn kill(&self) -> Result<(), Error> {
        write(&format!("{}/cgroup.kill", self.path), "1")
    }

    /// Sends `signal` to every process in it and below.
    ///
    /// # Errors
    /// The list cannot be read.
    pub(crate) fn signal(&self, signal: Signal) -> Result<(), Error> {
        let mut signalled = Vec::new();
        each_directory(&self.path, &mut |path| {
            let list = format!("{path}/cgroup.procs");
            let pids = fs::read_to_string(&list).context(|| format!("read {list}"))?;
            signalled.extend(pids.lines().filter_map(|pid| pid.parse::<i32>().ok()));
            Ok(())
        })?;
        for pid in signalled.into_iter().filter_map(Pid::from_raw) {
            // One that ended meanwhile needs no signal.
            let _ = rustix::process::kill_process(pid, signal);
        }
        Ok(())
    }

    /// Asks the kernel to freeze or thaw its processes; [`Condition::Frozen`] tells when that is done.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub(crate) fn freeze(&self, frozen: bool) -> Result<(), Error> {
        let value = if frozen { "1" } else { "0" };
        write(&format!("{}/cgroup.freeze", self.path), value)
    }

    /// A watch that sees the cgroup reach `condition`; `None` if it is there.
    ///
    /// # Errors
    /// The file cannot be watched.
    pub(crate) fn reach(
        &self,
        condition: Condition,
        index: u32,
        poller: &Poller,
    ) -> Result<Option<Awaited>, Error> {
        let events = watch(&self.path, "cgroup.events", Source::Cgroup(index), poller)?;
        let awaited = Awaited { events, condition };
        if awaited.is_reached() {
            awaited.close(poller);
            return Ok(None);
        }
        Ok(Some(awaited))
    }

    /// One of its files.
    ///
    /// # Errors
    /// It does not exist, such as a file of a controller that the kernel lacks.
    pub(crate) fn read(&self, file: &str) -> std::io::Result<String> {
        fs::read_to_string(format!("{}/{file}", self.path))
    }

    /// Removes it and what is below; its processes have ended.
    pub(crate) fn remove(self, poller: &Poller) {
        self.memory.close(poller);
        let removed = each_directory(&self.path, &mut |path| {
            rustix::fs::rmdir(path).context(|| format!("remove the cgroup {path}"))
        });
        if let Err(error) = removed {
            log_error(&error.to_string());
        }
    }
}

/// What a cgroup can be waited for to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Condition {
    /// All its processes are frozen, or not all.
    Frozen(bool),
    /// It has no process.
    Empty,
}

/// `cgroup.events`, watched until a condition holds.
#[derive(Debug)]
pub(crate) struct Awaited {
    events: Watched,
    condition: Condition,
}

impl Awaited {
    /// Whether the condition holds.
    pub(crate) fn is_reached(&self) -> bool {
        holds(&content(&self.events), self.condition)
    }

    pub(crate) fn close(self, poller: &Poller) {
        self.events.close(poller);
    }
}

fn holds(events: &str, condition: Condition) -> bool {
    let line = match condition {
        Condition::Frozen(true) => "frozen 1",
        Condition::Frozen(false) => "frozen 0",
        Condition::Empty => "populated 0",
    };
    events.lines().any(|other| other == line)
}

/// The kernel signals a change of such a file as an exceptional condition.
fn watch(path: &str, file: &str, source: Source, poller: &Poller) -> Result<Watched, Error> {
    let watch = || -> rustix::io::Result<Watched> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = rustix::fs::open(format!("{path}/{file}"), flags, Mode::empty())?;
        let mut watched = Watched::new(file, source);
        watched.watch(poller, Some(EventFlags::PRI))?;
        Ok(watched)
    };
    watch().context(|| format!("watch {path}/{file}"))
}

/// Reads a watched file, which also takes note of its last change.
fn content(file: &Watched) -> String {
    let mut buffer = [0; 512];
    let read = rustix::io::pread(file, &mut buffer, 0).unwrap_or(0);
    String::from_utf8_lossy(&buffer[..read]).into_owned()
}

/// Visits a cgroup and those below it, innermost first: a privileged container may have made some.
fn each_directory(
    path: &str,
    visit: &mut impl FnMut(&str) -> Result<(), Error>,
) -> Result<(), Error> {
    for entry in fs::read_dir(path)
        .context(|| format!("list {path}"))?
        .flatten()
    {
        if entry.file_type().is_ok_and(|kind| kind.is_dir())
            && let Some(below) = entry.path().to_str()
        {
            each_directory(below, visit)?;
        }
    }
    visit(path)
}

/// The files to write, and what; `cpu_max` is what that file says now.
fn settings(limits: &Resources, cpu_max: &str) -> Result<Vec<(String, String)>, Error> {
    let mut files = Vec::new();
    let mut set = |file: &str, value: Option<String>| {
        files.extend(value.map(|value| (file.to_owned(), value)));
    };
    let number = |value: Option<u64>| value.map(|value| value.to_string());
    if limits.cpu_quota_us.is_some() || limits.cpu_period_us.is_some() {
        let mut current = cpu_max.split_whitespace();
        let quota_now = current.next().unwrap_or("max").to_owned();
        let period_now = current.next().map(str::to_owned);
        let quota = number(limits.cpu_quota_us).unwrap_or(quota_now);
        let period = number(limits.cpu_period_us).or(period_now);
        let period = period.unwrap_or(DEFAULT_PERIOD.to_string());
        set("cpu.max", Some(format!("{quota} {period}")));
    }
    set("cpu.weight", number(limits.cpu_weight));
    set("cpuset.cpus", limits.cpuset_cpus.clone());
    set("memory.low", number(limits.memory_low));
    set("memory.high", number(limits.memory_high));
    set("memory.max", number(limits.memory_max));
    set("pids.max", number(limits.pids_max));
    for (size, bytes) in &limits.hugepages {
        if size.is_empty() || !size.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return Err(Error::Refused(format!(
                "`{}` is not a size of huge pages: 2MB is one",
                size.escape_debug()
            )));
        }
        set(&format!("hugetlb.{size}.max"), Some(bytes.to_string()));
    }
    Ok(files)
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

    fn written(limits: &Resources, cpu_max: &str) -> Vec<String> {
        let files = settings(limits, cpu_max).unwrap().into_iter();
        files
            .map(|(file, value)| format!("{file}={value}"))
            .collect()
    }

    #[test]
    fn no_limits_write_nothing() {
        assert!(written(&Resources::default(), "").is_empty());
    }

    #[test]
    fn limits_become_files() {
        let limits = Resources {
            memory_max: Some(64 << 20),
            memory_low: Some(1),
            memory_high: Some(2),
            cpu_quota_us: Some(50_000),
            cpu_period_us: None,
            cpu_weight: Some(39),
            pids_max: Some(100),
            cpuset_cpus: Some("0-1".into()),
            hugepages: [("2MB".to_owned(), 4 << 20)].into(),
        };
        let expected = [
            "cpu.max=50000 100000",
            "cpu.weight=39",
            "cpuset.cpus=0-1",
            "memory.low=1",
            "memory.high=2",
            "memory.max=67108864",
            "pids.max=100",
            "hugetlb.2MB.max=4194304",
        ];
        assert_eq!(written(&limits, "max 100000\n"), expected);
    }

    #[test]
    fn half_of_cpu_max_leaves_the_other_half_as_it_is() {
        let period = Resources {
            cpu_period_us: Some(20_000),
            ..Resources::default()
        };
        assert_eq!(written(&period, "max 100000\n"), ["cpu.max=max 20000"]);
        assert_eq!(written(&period, "7000 100000\n"), ["cpu.max=7000 20000"]);
        let quota = Resources {
            cpu_quota_us: Some(7000),
            ..Resources::default()
        };
        assert_eq!(written(&quota, "max 30000\n"), ["cpu.max=7000 30000"]);
    }

    #[test]
    fn a_size_of_huge_pages_is_no_path() {
        let limits = Resources {
            hugepages: [("../2MB".to_owned(), 1)].into(),
            ..Resources::default()
        };
        let refused = settings(&limits, "").unwrap_err().to_string();
        assert!(refused.contains("`../2MB`"), "{refused}");
    }

    #[test]
    fn conditions_are_whole_lines() {
        assert!(holds("populated 0\nfrozen 1\n", Condition::Empty));
        assert!(holds("populated 0\nfrozen 1\n", Condition::Frozen(true)));
        assert!(!holds("populated 1\nfrozen 1\n", Condition::Frozen(false)));
        assert!(!holds("", Condition::Empty));
    }

    #[test]
    fn only_known_controllers_are_enabled() {
        assert_eq!(
            enable("cpuset cpu io memory hugetlb pids rdma\n"),
            "+cpuset +cpu +io +memory +hugetlb +pids "
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
