//! Throughput and latency of a guest's interface, VMM against VMM: the same kernel, the same root file system, a tap
//! in a network namespace of the harness's own, `iperf3` and `ping` of the host on its other side.
//!
//! Every figure is one of which less is better, as all others of the harness: time and processor time a GiB takes,
//! exits per MiB, time of a round trip.
#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::io::{FdFlags, fcntl_setfd};
use serde::Serialize;
use serde_json::{Value, json};

use super::exits;
use super::measure::{self, Running};
use super::peers::{Kind, Peer, start_as_a_pods};
use super::plan::{Contender, Figures, Row, take_turns};
use crate::net::{namespace, tap};

/// The tap, and the guest's address on it.
const TAP: &str = "bench0";
const MAC: &str = "02:00:00:00:00:02";
/// The host's end, and the guest's (`guest/bench-net-init`).
const HOST: &str = "10.77.0.1/30";
const GUEST: &str = "10.77.0.2";
/// Seconds of load in each direction that do not count: the guest touches its buffers for the first time, and TCP
/// finds its pace.
const WARM_UP: &str = "1";
/// Round trips that are measured in one turn.
const PINGS: &str = "200";

/// What is booted, and for how long it is loaded.
#[derive(Debug, Clone, Serialize)]
pub struct NetBench {
    /// Uncompressed ELF kernel.
    pub kernel: PathBuf,
    /// Image of the root file system, whose `/init` sets the interface up and starts iperf3.
    pub root: PathBuf,
    /// vCPUs.
    pub cpus: u8,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Seconds of load in each direction.
    pub seconds: u32,
    /// After how long a guest that is not ready is given up.
    #[serde(skip)]
    pub deadline: Duration,
}

impl NetBench {
    /// Lets every VMM of `rows` that is known to have such an interface take turns.
    ///
    /// # Errors
    /// The host's side cannot be made, or a file not written.
    pub fn run(
        &self,
        rows: &mut [Row],
        rounds: u32,
        directory: &Path,
        progress: &mut dyn FnMut(),
    ) -> io::Result<()> {
        take_turns(rows, rounds, progress, |row| match &row.contender {
            Contender::Vmm { peer, .. } if measures(peer.kind) => self.turn(peer, directory),
            _ => Ok(Ok(Figures::new())),
        })
    }

    fn turn(&self, peer: &Peer, directory: &Path) -> io::Result<Result<Figures, String>> {
        let name = format!("cube-bench-{}", std::process::id());
        namespace::create(&name).map_err(io::Error::other)?;
        let mut outcome = Ok(Err(String::new()));
        let entered = namespace::run(&name, || {
            outcome = self.in_namespace(peer, directory);
            Ok(())
        });
        let removed = namespace::remove(&name);
        entered.and(removed).map_err(io::Error::other)?;
        outcome
    }

    fn in_namespace(&self, peer: &Peer, directory: &Path) -> io::Result<Result<Figures, String>> {
        for words in [
            format!("tuntap add {TAP} mode tap vnet_hdr"),
            format!("addr add {HOST} dev {TAP}"),
            format!("link set {TAP} up"),
        ] {
            said(Command::new("ip").args(words.split(' ')))?;
        }
        let (command, queues) = self.command(peer, directory)?;
        let started = measure::start(command, directory, self.deadline, None);
        drop(queues);
        match started {
            Ok(running) => {
                let measured = self.load(&running);
                let words = running.stop();
                Ok(measured.map_err(|error| format!("{error} ({})", words.trim())))
            }
            Err(error) => Ok(Err(error.to_string())),
        }
    }

    /// The command that boots the guest, and what it inherits.
    fn command(&self, peer: &Peer, directory: &Path) -> io::Result<(Command, Vec<OwnedFd>)> {
        let mut command = Command::new(&peer.path);
        let path = directory.join(format!("{}-net.json", peer.name));
        let boot = format!(
            "{} {} root=/dev/vda ro rootfstype=erofs init=/init",
            crate::vmm::boot::cmdline::ALWAYS,
            crate::vmm::boot::cmdline::SILENT
        );
        let (config, queues) = match peer.kind {
            Kind::Firecracker => {
                command.args(["--no-api", "--config-file"]).arg(&path);
                (self.firecracker(&boot), Vec::new())
            }
            _ => {
                command.arg("--spec").arg(&path);
                let (queues, _) = tap::open_existing(TAP, 1).map_err(io::Error::other)?;
                for queue in &queues {
                    // The harness starts one program at a time: nobody else inherits it.
                    fcntl_setfd(queue, FdFlags::empty())?;
                }
                let mut spec = self.cube(&boot, &queues);
                start_as_a_pods(&mut command, &mut spec, directory);
                (spec, queues)
            }
        };
        fs::write(&path, config.to_string())?;
        Ok((command, queues))
    }

    fn cube(&self, boot: &str, queues: &[OwnedFd]) -> Value {
        let queues: Vec<_> = queues.iter().map(AsRawFd::as_raw_fd).collect();
        json!({
            "kernel": {"path": self.kernel},
            "command_line": boot,
            "cpus": self.cpus,
            "memory_mib": self.memory_mib,
            // Not every `/dev` has a `stdout`.
            "console": "/proc/self/fd/1",
            "disks": [{"serial": "root", "read_only": true, "parts": [{"file": {"path": self.root}}]}],
            "nets": [{"name": "eth0", "tap_fds": queues, "mac": MAC}],
        })
    }

    fn firecracker(&self, boot: &str) -> Value {
        json!({
            "boot-source": {"kernel_image_path": self.kernel, "boot_args": boot},
            "drives": [{
                "drive_id": "root",
                "path_on_host": self.root,
                "is_root_device": false,
                "is_read_only": true,
            }],
            "network-interfaces": [{"iface_id": "eth0", "guest_mac": MAC, "host_dev_name": TAP}],
            "machine-config": {"vcpu_count": self.cpus, "mem_size_mib": self.memory_mib},
        })
    }

    fn load(&self, running: &Running) -> io::Result<Figures> {
        let mut figures = Figures::new();
        let mut note = |figure: String, value| figures.entry(figure).or_default().push(value);
        for (direction, more) in [("to", &[][..]), ("from", &["--reverse"])] {
            iperf(WARM_UP, more)?;
            let before = Spent::of(running.pid());
            let said = iperf(&self.seconds.to_string(), more)?;
            let spent = Spent::of(running.pid()).since(&before);
            let (bytes, took) = received(&said)?;
            let gib = bytes / f64::from(1 << 30);
            note(format!("net_{direction}_ms_per_gib"), took * 1e3 / gib);
            note(
                format!("net_{direction}_cpu_ms_per_gib"),
                spent.cpu_ns as f64 / 1e6 / gib,
            );
            if spent.exits > 0 {
                note(
                    format!("net_{direction}_exits_per_mib"),
                    spent.exits as f64 / (gib * 1024.0),
                );
            }
        }
        let said = said(Command::new("ping").args(["-n", "-i", "0.005", "-c", PINGS, GUEST]))?;
        note("net_ping_ms".to_owned(), median_ping(&said)?);
        Ok(figures)
    }
}

/// Whether the harness can give a VMM of this kind an interface.
pub fn measures(kind: Kind) -> bool {
    matches!(kind, Kind::CubeVmm | Kind::Firecracker)
}

/// What a process has used up.
#[derive(Debug, Clone, Copy)]
struct Spent {
    /// Time of all its threads on processors, that of the guest included.
    cpu_ns: u64,
    /// KVM exits; 0 where debugfs is not readable.
    exits: u64,
}

impl Spent {
    fn of(pid: u32) -> Self {
        let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter();
        let times = tasks.flatten().flatten().filter_map(|task| {
            let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
            text.split_whitespace().next()?.parse::<u64>().ok()
        });
        Self {
            cpu_ns: times.sum(),
            exits: exits::of_process(pid).get("total").copied().unwrap_or(0),
        }
    }

    fn since(self, before: &Self) -> Self {
        Self {
            cpu_ns: self.cpu_ns.saturating_sub(before.cpu_ns),
            exits: self.exits.saturating_sub(before.exits),
        }
    }
}

/// Loads the guest's interface for some seconds; gives iperf3's report.
fn iperf(seconds: &str, more: &[&str]) -> io::Result<String> {
    let mut command = Command::new("iperf3");
    command.args(["--json", "--client", GUEST, "--time", seconds]);
    said(command.args(more))
}

/// Runs a program to its end; gives what it said.
fn said(command: &mut Command) -> io::Result<String> {
    let output = command.output().map_err(|error| {
        let program = command.get_program().to_string_lossy();
        io::Error::new(error.kind(), format!("cannot execute {program}: {error}"))
    })?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(text);
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!("{command:?}: {errors}{text}")))
}

/// Bytes that iperf3's receiver got, and the seconds that it took.
fn received(report: &str) -> io::Result<(f64, f64)> {
    let report: Value = serde_json::from_str(report)?;
    let field = |name: &str| report["end"]["sum_received"][name].as_f64();
    let both = field("bytes").zip(field("seconds"));
    both.filter(|(bytes, _)| *bytes > 0.0)
        .ok_or_else(|| io::Error::other("iperf3 says nothing of bytes received"))
}

/// The median round trip in milliseconds, of ping's lines (`… time=0.123 ms`).
fn median_ping(said: &str) -> io::Result<f64> {
    let times = said.lines().filter_map(|line| {
        let (_, rest) = line.split_once("time=")?;
        rest.split_whitespace().next()?.parse::<f64>().ok()
    });
    let mut times: Vec<f64> = times.collect();
    times.sort_by(f64::total_cmp);
    let median = times.get(times.len() / 2).copied();
    median.ok_or_else(|| io::Error::other("ping got no answer"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn iperf3s_report_is_read() {
        let report = r#"{"end":{"sum_sent":{"bytes":9,"seconds":1.0},
            "sum_received":{"bytes":2147483648,"seconds":2.5}}}"#;
        assert_eq!(received(report).unwrap(), (2_147_483_648.0, 2.5));
        for wrong in [
            "",
            "{}",
            r#"{"end":{"sum_received":{"bytes":0,"seconds":1}}}"#,
        ] {
            assert!(received(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_median_of_pings_is_taken() {
        let said = "PING 10.77.0.2\n64 bytes from 10.77.0.2: icmp_seq=1 ttl=64 time=9.5 ms\n\
                    64 bytes: time=0.5 ms\n64 bytes: time=0.7 ms\n\nrtt min/avg/max\n";
        assert_eq!(median_ping(said).unwrap(), 0.7);
        assert!(median_ping("nothing").is_err());
    }
}
