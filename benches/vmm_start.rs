//! How long a VMM takes from its exec to a guest's first instruction, which writes 0xfe to port 0x64.
//!
//! `cargo bench --bench vmm_start [-- --runs N] [-- --against NAME=COMMAND …]`
//!
//! Measured is the wall time from before `fork` to the process's end, in turns, so that a slow minute is
//! everybody's. Beside Cube runs the *floor*: a program (this one, executed anew) that makes only the KVM calls
//! without which no guest runs. `firecracker` is measured when it is in PATH; any other VMM with `--against`, in
//! whose command `{kernel}` is the kernel's path.
//!
//! Unsafe for the floor's one call that tells KVM where the memory is.
#![allow(unsafe_code)]

#[path = "../tests/payload/mod.rs"]
mod payload;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use cube::vmm::timeline::{self, Entry, Stage};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const MEMORY_MIB: usize = 64;

/// The floor: VM, memory, one vCPU in real mode. No interrupt chip, no CPUID, no kernel to read.
fn floor() {
    let kvm = Kvm::new().expect("/dev/kvm");
    let vm = kvm.create_vm().expect("a VM");
    let ranges = [(GuestAddress(0), MEMORY_MIB << 20)];
    let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).expect("memory");
    memory
        .write_slice(payload::RESET, GuestAddress(0x1000))
        .expect("the code");
    let region = kvm_userspace_memory_region {
        memory_size: (MEMORY_MIB << 20) as u64,
        userspace_addr: memory
            .get_host_address(GuestAddress(0))
            .expect("an address") as u64,
        ..Default::default()
    };
    // SAFETY: `memory` lives until the end of this function, longer than the VM.
    unsafe { vm.set_user_memory_region(region) }.expect("a memory slot");
    let mut vcpu = vm.create_vcpu(0).expect("a vCPU");
    let mut sregs = vcpu.get_sregs().expect("registers");
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).expect("registers");
    let regs = kvm_bindings::kvm_regs {
        rip: 0x1000,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs).expect("registers");
    assert!(matches!(vcpu.run(), Ok(VcpuExit::IoOut(0x64, [0xfe]))));
    drop(vcpu);
    drop(vm);
}

/// A program to measure.
struct Contender {
    name: String,
    program: String,
    arguments: Vec<String>,
    times: Vec<Duration>,
}

impl Contender {
    fn new(name: &str, command: &[&str]) -> Self {
        let (program, arguments) = command.split_first().expect("a command");
        Self {
            name: name.into(),
            program: (*program).into(),
            arguments: arguments.iter().map(|word| (*word).into()).collect(),
            times: Vec::new(),
        }
    }

    fn run(&mut self) {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let start = Instant::now();
        let status = command.status();
        self.times.push(start.elapsed());
        status.unwrap_or_else(|error| panic!("{}: {error}", self.program));
    }

    /// The `part`-th hundredth of the times, in milliseconds.
    fn percentile(&mut self, part: usize) -> f64 {
        self.times.sort_unstable();
        self.times[(self.times.len() - 1) * part / 100].as_secs_f64() * 1e3
    }
}

struct Options {
    runs: usize,
    against: Vec<(String, String)>,
}

fn options() -> Options {
    let mut options = Options {
        runs: 100,
        against: Vec::new(),
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--runs" => {
                let runs = arguments.next().and_then(|runs| runs.parse().ok());
                options.runs = runs
                    .filter(|runs| *runs > 0)
                    .expect("--runs takes a number");
            }
            "--against" => {
                let text = arguments.next().expect("--against takes NAME=COMMAND");
                let (name, command) = text.split_once('=').expect("NAME=COMMAND");
                options.against.push((name.into(), command.into()));
            }
            // Cargo's own.
            "--bench" => (),
            other => panic!("unknown argument {other}"),
        }
    }
    options
}

fn write(directory: &Path, name: &str, content: &[u8]) -> String {
    let path = directory.join(name);
    std::fs::write(&path, content).expect("a temporary file");
    path.to_str().expect("a path in UTF-8").to_owned()
}

fn contenders(directory: &Path, options: &Options) -> Vec<Contender> {
    let kernel = write(directory, "kernel", &payload::elf(payload::RESET));
    let base = serde_json::json!({"kernel": {"path": kernel}, "cpus": 1, "memory_mib": MEMORY_MIB});
    let spec = write(directory, "spec.json", base.to_string().as_bytes());
    let mut pod = base;
    let disk = write(directory, "disk", &[0; 4096]);
    let part = serde_json::json!({"file": {"path": disk}});
    pod["disks"] = serde_json::json!([
        {"serial": "image", "parts": [part], "read_only": true},
        {"serial": "writable", "parts": [part]},
    ]);
    pod["vsock"] = serde_json::json!({"cid": 3, "path": directory.join("vsock")});
    (pod["rng"], pod["spare_slots"]) = (true.into(), 4.into());
    let pod = write(directory, "pod.json", pod.to_string().as_bytes());
    let itself = std::env::current_exe().expect("this program");
    let cube = env!("CARGO_BIN_EXE_cube-vmm");
    let mut contenders = vec![
        Contender::new(
            "floor",
            &[itself.to_str().expect("a path in UTF-8"), "--floor"],
        ),
        Contender::new("cube-vmm", &[cube, "--spec", &spec]),
        Contender::new("cube-vmm, pod", &[cube, "--spec", &pod]),
    ];
    let installed = |name: &str| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).any(|folder| folder.join(name).is_file())
    };
    if installed("firecracker") {
        let config = serde_json::json!({
            "boot-source": {"kernel_image_path": kernel, "boot_args": "reboot=k panic=1"},
            "drives": [],
            "machine-config": {"vcpu_count": 1, "mem_size_mib": MEMORY_MIB},
        });
        let config = write(directory, "firecracker.json", config.to_string().as_bytes());
        let command = ["firecracker", "--no-api", "--config-file", &config];
        contenders.push(Contender::new("firecracker", &command));
    }
    for (name, command) in &options.against {
        let command = command.replace("{kernel}", &kernel);
        contenders.push(Contender::new(
            name,
            &command.split_whitespace().collect::<Vec<_>>(),
        ));
    }
    contenders
}

/// Where the time goes in one run: each stage's distance from the exec, in milliseconds.
fn stages(spec: &str) -> Vec<(Stage, f64)> {
    let command = r#"exec "$0" --spec "$1" --timeline-fd 3 --started-at "$2" 3>&1"#;
    let started = timeline::now();
    let mut child = Command::new("sh")
        .args([
            "-c",
            command,
            env!("CARGO_BIN_EXE_cube-vmm"),
            spec,
            &started.to_string(),
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("sh");
    let lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
    let stages = lines
        .map(|line| serde_json::from_str::<Entry>(&line.expect("a line")).expect("JSON"))
        .map(|entry| (entry.stage, (entry.monotonic_ns - started) as f64 / 1e6))
        .collect();
    child.wait().expect("its end");
    stages
}

fn main() {
    if std::env::args().any(|argument| argument == "--floor") {
        return floor();
    }
    let options = options();
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut contenders = contenders(directory.path(), &options);
    for _ in 0..options.runs {
        contenders.iter_mut().for_each(Contender::run);
    }
    println!(
        "exec to exit of a guest of six bytes, {} runs in turns, ms",
        options.runs
    );
    println!(
        "{:<16} {:>8} {:>8} {:>8} {:>9}",
        "", "median", "p10", "p90", "x floor"
    );
    let floor = contenders[0].percentile(50);
    for contender in &mut contenders {
        let [median, p10, p90] = [50, 10, 90].map(|part| contender.percentile(part));
        let (name, ratio) = (&contender.name, median / floor);
        println!("{name:<16} {median:>8.2} {p10:>8.2} {p90:>8.2} {ratio:>9.2}");
    }
    for spec in ["spec.json", "pod.json"] {
        let path = directory.path().join(spec);
        let mut runs: Vec<_> = (0..options.runs.min(21))
            .map(|_| stages(path.to_str().expect("a path in UTF-8")))
            .collect();
        runs.sort_by(|a, b| {
            a.last()
                .map(|l| l.1)
                .partial_cmp(&b.last().map(|l| l.1))
                .expect("a time")
        });
        println!(
            "\n{spec}: the median run by stage (ms from before the shell that executes cube-vmm)"
        );
        for (stage, at) in &runs[runs.len() / 2] {
            println!("{:<16} {at:>8.2}", format!("{stage:?}"));
        }
    }
}
