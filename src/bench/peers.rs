//! The VMMs that are measured: how each is found and told to boot the same machine.
#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Serialize;
use serde_json::json;

use crate::client::host_cpuid;
use crate::client::vmm_process::ALLOCATOR;

/// The guest's address on a vsock.
const GUEST_CID: u32 = 3;

/// One VMM that can be measured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Peer {
    /// The name of its program, as people call it.
    pub name: String,
    /// How it is driven.
    #[serde(skip)]
    pub kind: Kind,
    /// Its executable.
    pub path: PathBuf,
    /// The first line that it prints of its version.
    pub version: String,
    /// The floor's order of calls, once it is found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub order: Option<&'static str>,
    /// Options, known to this build, that leave out devices which no machine here uses.
    #[serde(skip)]
    pub leaves_out: Vec<&'static str>,
}

/// The VMMs known here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// What no VMM can beat: this project's `cube-bench-floor`, which boots no kernel.
    Floor,
    /// This project's `cube-vmm`.
    CubeVmm,
    /// Firecracker, configured by a file, without its API.
    Firecracker,
    /// Cloud Hypervisor.
    CloudHypervisor,
    /// QEMU with the microvm machine.
    Qemu,
    /// crosvm.
    Crosvm,
}

/// The machine that all of them boot.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// What it is called in reports.
    pub name: String,
    /// Uncompressed ELF kernel with a PVH note.
    pub kernel: PathBuf,
    /// The binary that is `/init`, and the initramfs made of it; absent for the tiny kernel.
    pub init: Option<Init>,
    /// Kernel command line, the same for all (a VMM may add its devices).
    pub command_line: String,
    /// A raw image that is the first, read-only disk.
    pub disk: Option<PathBuf>,
    /// Whether it has a vsock device, whose host socket is [`Peer::vsock`].
    pub vsock: bool,
    /// vCPUs.
    pub cpus: u8,
    /// Memory in MiB.
    pub memory_mib: u32,
}

/// The first program of the guest.
#[derive(Debug, Clone, Serialize)]
pub struct Init {
    /// The static binary.
    pub binary: PathBuf,
    /// A cpio archive with it as `/init`.
    pub initramfs: PathBuf,
}

impl Kind {
    /// Every kind, in the order of the tables.
    pub const ALL: [Self; 6] = [
        Self::Floor,
        Self::CubeVmm,
        Self::Firecracker,
        Self::CloudHypervisor,
        Self::Qemu,
        Self::Crosvm,
    ];

    /// The name of its executable.
    pub fn program(self) -> &'static str {
        match self {
            Self::Floor => "cube-bench-floor",
            Self::CubeVmm => "cube-vmm",
            Self::Firecracker => "firecracker",
            Self::CloudHypervisor => "cloud-hypervisor",
            Self::Qemu => "qemu-system-x86_64",
            Self::Crosvm => "crosvm",
        }
    }

    /// The peer at `path`.
    ///
    /// # Errors
    /// The program cannot be executed.
    pub fn at(self, path: PathBuf) -> io::Result<Peer> {
        let output = Command::new(&path).arg(self.version_flag()).output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let version = text.lines().next().unwrap_or("unknown").trim().to_owned();
        let leaves_out = match self {
            Self::Crosvm => known_options(&path, &CROSVM_LEAVES_OUT)?,
            _ => Vec::new(),
        };
        Ok(Peer {
            name: self.program().to_owned(),
            kind: self,
            path,
            version,
            order: None,
            leaves_out,
        })
    }

    fn version_flag(self) -> &'static str {
        match self {
            Self::Crosvm => "version",
            _ => "--version",
        }
    }
}

/// The orders of its calls that the floor is tried with: memory, interrupt chip, vCPU. A chip cannot be split once
/// there is a vCPU.
pub const FLOOR_ORDERS: [&str; 3] = ["imv", "ivm", "miv"];

/// With these crosvm leaves out devices that it has by default and no machine here uses. Built without a balloon, it does
/// not know the first, and ends.
const CROSVM_LEAVES_OUT: [&str; 3] = ["--no-balloon", "--no-rng", "--no-usb"];

/// Those of `options` that `crosvm run` says it knows.
fn known_options(crosvm: &Path, options: &[&'static str]) -> io::Result<Vec<&'static str>> {
    let output = Command::new(crosvm).args(["run", "--help"]).output()?;
    let help = String::from_utf8_lossy(&output.stdout);
    let known = |option: &&&str| help.split_whitespace().any(|word| word == **option);
    Ok(options.iter().filter(known).copied().collect())
}

/// Looks for `program` beside this executable, then in `PATH`.
pub fn find(program: &str) -> Option<PathBuf> {
    let beside = std::env::current_exe()
        .ok()
        .and_then(|exe| exe.parent().map(Path::to_owned));
    let path = std::env::var_os("PATH").unwrap_or_default();
    beside
        .into_iter()
        .chain(std::env::split_paths(&path))
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file())
}

impl Peer {
    /// Where the host dials the guest of a machine with a vsock device: `CONNECT <port>` and a line's end first.
    pub fn vsock(&self, directory: &Path) -> PathBuf {
        directory.join(format!("{}.vsock", self.name))
    }

    /// The command that boots `machine` with its first serial port on standard output. Files it needs
    /// are written to `directory`.
    ///
    /// # Errors
    /// A file could not be written.
    pub fn command(&self, machine: &Machine, directory: &Path) -> io::Result<Command> {
        let mut command = Command::new(&self.path);
        match self.kind {
            Kind::Floor => {
                let order = self.order.unwrap_or(FLOOR_ORDERS[0]);
                command.args([&machine.memory_mib.to_string(), order]);
            }
            Kind::CubeVmm => {
                let vsock = self.vsock(directory);
                let mut spec = cube_spec(machine, &vsock);
                start_as_a_pods(&mut command, &mut spec, directory);
                let spec = write(directory, "cube-vmm.json", &spec)?;
                command.arg("--spec").arg(spec);
            }
            Kind::Firecracker => {
                let config = firecracker_config(machine, &self.vsock(directory));
                let config = write(directory, "firecracker.json", &config)?;
                command.args(["--no-api", "--config-file"]).arg(config);
            }
            Kind::CloudHypervisor => cloud_hypervisor(&mut command, machine),
            Kind::Qemu => qemu(&mut command, machine),
            Kind::Crosvm => crosvm(&mut command, machine, &self.leaves_out),
        }
        Ok(command)
    }
}

/// Adds what `cube` gives every machine that it starts; what it keeps is in `directory`.
pub(super) fn start_as_a_pods(
    command: &mut Command,
    spec: &mut serde_json::Value,
    directory: &Path,
) {
    command.envs(ALLOCATOR);
    if let Some(cpuid) = host_cpuid::kept(directory) {
        spec["cpuid"] = json!({"path": cpuid.path});
    }
}

fn write(directory: &Path, name: &str, content: &serde_json::Value) -> io::Result<PathBuf> {
    let path = directory.join(name);
    fs::write(&path, content.to_string())?;
    Ok(path)
}

fn cube_spec(machine: &Machine, vsock: &Path) -> serde_json::Value {
    let mut spec = json!({
        "kernel": {"path": machine.kernel},
        "command_line": machine.command_line,
        "cpus": machine.cpus,
        "memory_mib": machine.memory_mib,
        // Not every `/dev` has a `stdout`.
        "console": "/proc/self/fd/1",
    });
    if let Some(init) = &machine.init {
        spec["initramfs"] = json!({"init": {"path": init.binary}});
    }
    if let Some(disk) = &machine.disk {
        let parts = json!([{"file": {"path": disk}}]);
        spec["disks"] = json!([{"serial": "bench", "parts": parts, "read_only": true}]);
    }
    if machine.vsock {
        spec["vsock"] = json!({"cid": GUEST_CID, "path": vsock});
    }
    spec
}

fn firecracker_config(machine: &Machine, vsock: &Path) -> serde_json::Value {
    let mut boot = json!({"kernel_image_path": machine.kernel, "boot_args": machine.command_line});
    if let Some(init) = &machine.init {
        boot["initrd_path"] = json!(init.initramfs);
    }
    let drive = |disk: &PathBuf| {
        json!({
            "drive_id": "bench",
            "path_on_host": disk,
            "is_root_device": false,
            "is_read_only": true,
        })
    };
    let drives: Vec<_> = machine.disk.iter().map(drive).collect();
    let mut config = json!({
        "boot-source": boot,
        "drives": drives,
        "machine-config": {"vcpu_count": machine.cpus, "mem_size_mib": machine.memory_mib},
    });
    if machine.vsock {
        config["vsock"] = json!({"guest_cid": GUEST_CID, "uds_path": vsock});
    }
    config
}

fn cloud_hypervisor(command: &mut Command, machine: &Machine) {
    command.arg("--kernel").arg(&machine.kernel);
    command.args([
        "--cmdline",
        &machine.command_line,
        "--serial",
        "tty",
        "--console",
        "off",
    ]);
    command.args(["--cpus", &format!("boot={}", machine.cpus)]);
    command.args(["--memory", &format!("size={}M", machine.memory_mib)]);
    if let Some(init) = &machine.init {
        command.arg("--initramfs").arg(&init.initramfs);
    }
    if let Some(disk) = &machine.disk {
        let disk = format!("path={},readonly=on,image_type=raw", disk.display());
        command.args(["--disk", &disk]);
    }
}

fn qemu(command: &mut Command, machine: &Machine) {
    // Its own words on the command line name its virtio-mmio devices.
    let words = if machine.disk.is_some() { "on" } else { "off" };
    let board = format!(
        "microvm,accel=kvm,pic=off,pit=off,rtc=off,isa-serial=on,auto-kernel-cmdline={words}"
    );
    command.args([
        "-M",
        &board,
        "-cpu",
        "host",
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
    ]);
    command.args(["-display", "none", "-serial", "stdio"]);
    command.args([
        "-smp",
        &machine.cpus.to_string(),
        "-m",
        &format!("{}M", machine.memory_mib),
    ]);
    command
        .arg("-kernel")
        .arg(&machine.kernel)
        .args(["-append", &machine.command_line]);
    if let Some(init) = &machine.init {
        command.arg("-initrd").arg(&init.initramfs);
    }
    if let Some(disk) = &machine.disk {
        let drive = format!(
            "id=bench,file={},format=raw,if=none,readonly=on",
            disk.display()
        );
        let device = "virtio-blk-device,drive=bench";
        command.args(["-drive", &drive, "-device", device]);
    }
}

fn crosvm(command: &mut Command, machine: &Machine, leaves_out: &[&str]) {
    command.args(["run", "--disable-sandbox"]).args(leaves_out);
    command.args(["--serial", "type=stdout,hardware=serial,num=1"]);
    command.args([
        "--cpus",
        &machine.cpus.to_string(),
        "--mem",
        &machine.memory_mib.to_string(),
    ]);
    command.args(["--params", &machine.command_line]);
    if let Some(init) = &machine.init {
        command.arg("--initrd").arg(&init.initramfs);
    }
    if let Some(disk) = &machine.disk {
        let disk = format!("path={},ro=true", disk.display());
        command.args(["--block", &disk]);
    }
    command.arg(&machine.kernel);
}
