//! What the pod uses, read from the kernel's files at the moment it is asked for.
#![forbid(unsafe_code)]

use std::fs;

use cube_guest::stats::{
    AgentStats, ContainerStats, FileSystemStats, InterfaceStats, PodStats, Usage,
};

use crate::container::Container;

/// Bytes of a page on x86_64.
const PAGE_SIZE: u64 = 4096;

/// The pod, without its containers.
pub(crate) fn pod(containers: Vec<ContainerStats>) -> PodStats {
    let meminfo = read("/proc/meminfo");
    let kib = |name: &str| value(&meminfo, &format!("{name}:")).saturating_mul(1024);
    let (total, available) = (kib("MemTotal"), kib("MemAvailable"));
    let root = |file: &str| read(&format!("/sys/fs/cgroup/{file}"));
    // The root cgroup has no memory.current and no pids.current.
    let used = total.saturating_sub(kib("MemFree"));
    let mut usage = usage(
        &root("cpu.stat"),
        &root("memory.stat"),
        &root("io.stat"),
        used,
    );
    usage.pids = threads(&read("/proc/loadavg"));
    usage.oom_kills = value(&read("/proc/vmstat"), "oom_kill");
    PodStats {
        memory_total: total,
        memory_available: available,
        agent: agent(),
        usage,
        interfaces: interfaces(&read("/proc/net/dev")),
        containers,
    }
}

/// This process.
fn agent() -> AgentStats {
    // The second number of proc(5)'s `statm` is resident pages.
    let pages = read("/proc/self/statm");
    let pages = pages.split_whitespace().nth(1).and_then(|n| n.parse().ok());
    let descriptors = fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    AgentStats {
        rss: pages.unwrap_or(0_u64).saturating_mul(PAGE_SIZE),
        // Less the one that lists them.
        descriptors: descriptors.saturating_sub(1) as u64,
    }
}

/// One container; zeroes once it has ended.
pub(crate) fn container(container: &Container) -> ContainerStats {
    let id = container.id.clone();
    let Ok(made) = container.made() else {
        return ContainerStats {
            id,
            ..ContainerStats::default()
        };
    };
    let file = |name: &str| made.cgroup.read(name).unwrap_or_default();
    let number = |name: &str| file(name).trim().parse().unwrap_or(0);
    let measure = || Usage {
        pids: number("pids.current"),
        oom_kills: value(&file("memory.events"), "oom_kill"),
        ..usage(
            &file("cpu.stat"),
            &file("memory.stat"),
            &file("io.stat"),
            number("memory.current"),
        )
    };
    ContainerStats {
        id,
        usage: match container.is_live() {
            true => measure(),
            false => Usage::default(),
        },
        writable: made.writable.as_deref().and_then(file_system),
    }
}

fn file_system(directory: &str) -> Option<FileSystemStats> {
    let what = rustix::fs::statvfs(directory).ok()?;
    let used = what.f_blocks.saturating_sub(what.f_bfree);
    Some(FileSystemStats {
        total_bytes: what.f_blocks.saturating_mul(what.f_frsize),
        used_bytes: used.saturating_mul(what.f_frsize),
        used_inodes: what.f_files.saturating_sub(what.f_ffree),
    })
}

fn usage(cpu: &str, memory: &str, io: &str, used: u64) -> Usage {
    Usage {
        cpu_us: value(cpu, "usage_usec"),
        memory: used,
        working_set: used.saturating_sub(value(memory, "inactive_file")),
        rss: value(memory, "anon"),
        page_faults: value(memory, "pgfault"),
        major_page_faults: value(memory, "pgmajfault"),
        pids: 0,
        read_bytes: sum(io, "rbytes="),
        written_bytes: sum(io, "wbytes="),
        oom_kills: 0,
    }
}

/// The number in the line that begins with the word `name`; 0 if there is none.
fn value(text: &str, name: &str) -> u64 {
    let mut words = text.lines().map(str::split_whitespace);
    let mut line = words.find_map(|mut line| (line.next() == Some(name)).then_some(line));
    let number = line.as_mut().and_then(Iterator::next);
    number.and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// The sum of all words that begin with `key`: a line of io.stat is a device.
fn sum(text: &str, key: &str) -> u64 {
    let words = text
        .split_whitespace()
        .filter_map(|word| word.strip_prefix(key));
    words.filter_map(|number| number.parse::<u64>().ok()).sum()
}

/// The fourth field of /proc/loadavg is `running/all`, in threads.
fn threads(loadavg: &str) -> u64 {
    let field = loadavg.split_whitespace().nth(3);
    let all = field.and_then(|field| field.split_once('/'));
    all.and_then(|(_, all)| all.parse().ok()).unwrap_or(0)
}

/// /proc/net/dev: two lines of titles, then `name: ` and 8 numbers of each direction.
fn interfaces(table: &str) -> Vec<InterfaceStats> {
    let lines = table
        .lines()
        .skip(2)
        .filter_map(|line| line.split_once(':'));
    lines
        .filter(|(name, _)| name.trim() != "lo")
        .map(|(name, numbers)| {
            let numbers: Vec<u64> = numbers
                .split_whitespace()
                .map(|n| n.parse().unwrap_or(0))
                .collect();
            let number = |place: usize| numbers.get(place).copied().unwrap_or(0);
            InterfaceStats {
                name: name.trim().to_owned(),
                received_bytes: number(0),
                received_packets: number(1),
                received_errors: number(2) + number(3),
                sent_bytes: number(8),
                sent_packets: number(9),
                sent_errors: number(10) + number(11),
            }
        })
        .collect()
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_by_whole_words() {
        let text = "anon 5\ninactive_anon 6\npgfault 7\nfile_mapped\n";
        assert_eq!(value(text, "anon"), 5);
        assert_eq!(value(text, "pgfault"), 7);
        assert_eq!(value(text, "file"), 0);
        assert_eq!(value(text, "file_mapped"), 0);
        assert_eq!(value("MemTotal:      117000 kB\n", "MemTotal:"), 117_000);
    }

    #[test]
    fn devices_are_summed() {
        let io = "254:0 rbytes=10 wbytes=1 rios=2 wios=1 dbytes=0 dios=0\n254:16 rbytes=5 wbytes=2 rios=1\n";
        assert_eq!((sum(io, "rbytes="), sum(io, "wbytes=")), (15, 3));
        assert_eq!(threads("0.00 0.01 0.05 1/57 123\n"), 57);
    }

    #[test]
    fn interfaces_are_a_table() {
        let table = "Inter-|   Receive |  Transmit\n face |bytes    packets errs drop\n    \
            lo:     100       2    0    0    0     0          0         0      100       2    0    0    0     0       0          0\n  \
            eth0: 1000 10 1 2 0 0 0 0 2000 20 3 4 0 0 0 0\n";
        let found = interfaces(table);
        assert_eq!(found.len(), 1);
        assert_eq!(
            (
                &*found[0].name,
                found[0].received_bytes,
                found[0].received_errors
            ),
            ("eth0", 1000, 3)
        );
        assert_eq!((found[0].sent_packets, found[0].sent_errors), (20, 7));
    }

    #[test]
    fn this_machine_has_memory() {
        let stats = pod(Vec::new());
        assert!(stats.memory_total > stats.memory_available && stats.memory_available > 0);
        assert!(stats.usage.pids > 0);
        assert!(stats.agent.rss > 0 && stats.agent.descriptors > 0);
    }
}
