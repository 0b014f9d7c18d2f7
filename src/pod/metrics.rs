//! What the pod uses, in Prometheus' text format (version 0.0.4): `GET /metrics`.
#![forbid(unsafe_code)]

use std::fmt::{Display, Write};

use cube_guest::stats::Usage;

use super::api::body::Stats;

/// The type of the text.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Metrics of what a cgroup uses: name behind `cube_pod_` and `cube_container_`, kind, help, value.
type OfUsage = (&'static str, &'static str, &'static str, fn(&Usage) -> f64);

const USAGE: &[OfUsage] = &[
    ("cpu_seconds_total", "counter", "CPU time.", |u| {
        u.cpu_us as f64 / 1e6
    }),
    (
        "memory_bytes",
        "gauge",
        "Memory, page cache included.",
        |u| u.memory as f64,
    ),
    (
        "memory_working_set_bytes",
        "gauge",
        "Memory less the page cache not used lately.",
        |u| u.working_set as f64,
    ),
    ("memory_rss_bytes", "gauge", "Anonymous memory.", |u| {
        u.rss as f64
    }),
    ("page_faults_total", "counter", "Page faults.", |u| {
        u.page_faults as f64
    }),
    (
        "major_page_faults_total",
        "counter",
        "Page faults that read from a disk.",
        |u| u.major_page_faults as f64,
    ),
    ("pids", "gauge", "Processes and threads.", |u| u.pids as f64),
    (
        "block_read_bytes_total",
        "counter",
        "Bytes read from disks.",
        |u| u.read_bytes as f64,
    ),
    (
        "block_written_bytes_total",
        "counter",
        "Bytes written to disks.",
        |u| u.written_bytes as f64,
    ),
    (
        "oom_kills_total",
        "counter",
        "Processes killed for want of memory.",
        |u| u.oom_kills as f64,
    ),
];

/// Families of samples.
#[derive(Default)]
struct Text(String);

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // A String takes everything.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        let labels: Vec<String> = labels
            .iter()
            .map(|(label, value)| format!("{label}=\"{}\"", escaped(value)))
            .collect();
        let _ = writeln!(self.0, "{name}{{{}}} {value}", labels.join(","));
    }
}

/// A label's value: backslash, quote and line feed are escaped.
fn escaped(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

/// The text for the pod `pod`.
pub fn render(pod: &str, stats: &Stats) -> String {
    let mut text = Text::default();
    of_pod(&mut text, pod, stats);
    for (name, kind, help, value) in USAGE {
        let name = format!("cube_container_{name}");
        text.family(&name, kind, help);
        for container in &stats.guest.containers {
            let labels = [("pod", pod), ("container", &container.id)];
            text.sample(&name, &labels, value(&container.usage));
        }
    }
    let file_systems = [
        (
            "cube_container_fs_size_bytes",
            "Size of the writable layer.",
        ),
        (
            "cube_container_fs_used_bytes",
            "Bytes in use of the writable layer.",
        ),
        (
            "cube_container_fs_used_inodes",
            "Inodes in use of the writable layer.",
        ),
    ];
    for (number, (name, help)) in file_systems.into_iter().enumerate() {
        text.family(name, "gauge", help);
        for container in &stats.guest.containers {
            let Some(fs) = &container.writable else {
                continue;
            };
            let values = [fs.total_bytes, fs.used_bytes, fs.used_inodes];
            let labels = [("pod", pod), ("container", &container.id)];
            text.sample(name, &labels, values[number]);
        }
    }
    text.0
}

fn of_pod(text: &mut Text, pod: &str, stats: &Stats) {
    let pod = [("pod", pod)];
    for (name, kind, help, value) in USAGE {
        let name = format!("cube_pod_{name}");
        text.family(&name, kind, help);
        text.sample(&name, &pod, value(&stats.guest.usage));
    }
    let guest = &stats.guest;
    let mut gauges = vec![
        (
            "cube_agent_memory_rss_bytes",
            "Of cube-init: RSS.",
            guest.agent.rss,
        ),
        (
            "cube_agent_descriptors",
            "Open files of cube-init.",
            guest.agent.descriptors,
        ),
        (
            "cube_pod_memory_total_bytes",
            "The guest's memory.",
            guest.memory_total,
        ),
        (
            "cube_pod_memory_available_bytes",
            "What of it could be had.",
            guest.memory_available,
        ),
    ];
    if let Some(vmm) = stats.vmm {
        gauges.extend([
            (
                "cube_vmm_memory_pss_bytes",
                "Of the pod process, guest memory left out: PSS.",
                vmm.pss,
            ),
            ("cube_vmm_memory_rss_bytes", "The same: RSS.", vmm.rss),
            (
                "cube_vmm_guest_memory_bytes",
                "Guest memory that is resident.",
                vmm.guest,
            ),
        ]);
    }
    for (name, help, value) in gauges {
        text.family(name, "gauge", help);
        text.sample(name, &pod, value);
    }
    let directions = [
        ("receive_bytes", "Bytes received."),
        ("receive_packets", "Packets received."),
        ("receive_errors", "Packets lost on the way in."),
        ("transmit_bytes", "Bytes sent."),
        ("transmit_packets", "Packets sent."),
        ("transmit_errors", "Packets lost on the way out."),
    ];
    for (number, (name, help)) in directions.into_iter().enumerate() {
        let name = format!("cube_pod_network_{name}_total");
        text.family(&name, "counter", help);
        for interface in &guest.interfaces {
            let values = [
                interface.received_bytes,
                interface.received_packets,
                interface.received_errors,
                interface.sent_bytes,
                interface.sent_packets,
                interface.sent_errors,
            ];
            let labels = [pod[0], ("interface", interface.name.as_str())];
            text.sample(&name, &labels, values[number]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::api::body::VmmMemory;
    use cube_guest::stats::{ContainerStats, FileSystemStats, InterfaceStats, PodStats};
    use std::collections::BTreeSet;

    fn stats() -> Stats {
        let usage = Usage {
            cpu_us: 1_500_000,
            working_set: 4096,
            ..Usage::default()
        };
        let container = |id: &str, writable| ContainerStats {
            id: id.to_owned(),
            usage: usage.clone(),
            writable,
        };
        let disk = FileSystemStats {
            used_bytes: 77,
            ..FileSystemStats::default()
        };
        Stats {
            guest: PodStats {
                usage: usage.clone(),
                interfaces: vec![InterfaceStats {
                    name: "eth0".to_owned(),
                    sent_bytes: 9,
                    ..InterfaceStats::default()
                }],
                containers: vec![container("a", Some(disk)), container("b", None)],
                ..PodStats::default()
            },
            vmm: Some(VmmMemory {
                pss: 1,
                rss: 2,
                guest: 3,
            }),
        }
    }

    #[test]
    fn every_sample_belongs_to_the_family_above_it() {
        let text = render("p", &stats());
        let (mut family, mut seen) = (String::new(), BTreeSet::new());
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert_eq!(kind == "counter", name.ends_with("_total"), "{name}");
                assert!(seen.insert(name.to_owned()), "{name} comes twice");
                family = name.to_owned();
            } else if !line.starts_with("# HELP ") {
                let (name, rest) = line.split_once('{').unwrap();
                assert_eq!(name, family);
                let (_, value) = rest.split_once("} ").unwrap();
                value.parse::<f64>().unwrap();
            }
        }
        for expected in [
            "cube_pod_cpu_seconds_total{pod=\"p\"} 1.5\n",
            "cube_container_memory_working_set_bytes{pod=\"p\",container=\"b\"} 4096\n",
            "cube_container_fs_used_bytes{pod=\"p\",container=\"a\"} 77\n",
            "cube_pod_network_transmit_bytes_total{pod=\"p\",interface=\"eth0\"} 9\n",
            "cube_vmm_memory_pss_bytes{pod=\"p\"} 1\n",
        ] {
            assert!(text.contains(expected), "{expected}");
        }
        assert!(!text.contains("fs_used_bytes{pod=\"p\",container=\"b\"}"));
    }

    #[test]
    fn labels_cannot_break_out() {
        let text = render("a\"b\\c\nd", &Stats::default());
        assert!(text.contains("{pod=\"a\\\"b\\\\c\\nd\"}"));
    }
}
