//! The edge at which a [`MachineSpec`] becomes trusted.
#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::ffi::OsStr;

use crate::vmm::boot::cmdline;
use crate::vmm::layout;
use crate::vmm::spec::net::check_nets;
use crate::vmm::spec::{DiskSpec, FileSource, InitramfsSpec, MachineSpec, VsockSpec};

/// The most vCPUs of a machine.
const MAX_CPUS: u8 = 32;
/// The longest virtio-blk serial (virtio 1.2, section 5.2.6.1).
const MAX_SERIAL: usize = 20;
/// A Unix socket's path holds 107 bytes; `_` and a port number are appended to ours.
const MAX_SOCKET_PATH: usize = 107 - "_4294967295".len();
/// The first context id that a guest may have; 0 to 2 name the hypervisor, the loopback and the host.
const FIRST_GUEST_CID: u32 = 3;

/// What is wrong with a [`MachineSpec`]: a sentence that names the field.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The text is not the JSON of a spec.
    #[error("the machine spec is not valid: {0}")]
    Json(#[from] serde_json::Error),
    /// A field's value cannot be used.
    #[error("the machine spec's field `{field}` {fault}")]
    Field {
        /// Path of the field, such as `disks[1].serial`.
        field: String,
        /// What is wrong with it, as the rest of a sentence.
        fault: String,
    },
}

pub(super) fn fault<T>(field: impl Into<String>, fault: impl Into<String>) -> Result<T, SpecError> {
    Err(SpecError::Field {
        field: field.into(),
        fault: fault.into(),
    })
}

/// What the host has, as far as a spec is checked against it.
#[derive(Debug, Clone, Copy)]
pub struct HostLimits {
    /// The host's memory in bytes.
    pub memory: u64,
}

impl HostLimits {
    /// Asks the running host.
    pub fn of_this_host() -> Self {
        let info = rustix::system::sysinfo();
        let total: u64 = info.totalram;
        Self {
            memory: total.saturating_mul(u64::from(info.mem_unit)),
        }
    }
}

/// A [`MachineSpec`] that was found good. Its files may still be missing.
#[derive(Debug, Clone)]
pub struct ValidSpec(MachineSpec);

impl std::ops::Deref for ValidSpec {
    type Target = MachineSpec;

    fn deref(&self) -> &MachineSpec {
        &self.0
    }
}

impl ValidSpec {
    /// Guest memory in bytes.
    pub fn memory_bytes(&self) -> u64 {
        u64::from(self.memory_mib) << 20
    }

    /// Whether another process works on guest memory.
    pub fn shares_memory(&self) -> bool {
        self.nets.iter().any(|net| net.socket.is_some())
    }
}

impl MachineSpec {
    /// Number of virtio-mmio slots: one for each device, and the spare ones.
    pub fn slots(&self) -> usize {
        self.disks.len()
            + self.nets.len()
            + usize::from(self.vsock.is_some())
            + usize::from(self.rng)
            + usize::from(self.spare_slots)
    }

    /// Reads a spec from its JSON text. Unknown fields are errors.
    ///
    /// # Errors
    /// [`SpecError::Json`], naming the field, line and column.
    pub fn from_json(text: &[u8]) -> Result<Self, SpecError> {
        Ok(serde_json::from_slice(text)?)
    }

    /// Checks every value.
    ///
    /// # Errors
    /// [`SpecError::Field`] for the first field that cannot be used.
    pub fn validate(self, host: HostLimits) -> Result<ValidSpec, SpecError> {
        if self.cpus == 0 || self.cpus > MAX_CPUS {
            let given = self.cpus;
            return fault("cpus", format!("is {given}; it must be 1 to {MAX_CPUS}"));
        }
        check_memory(self.memory_mib, host)?;
        check_descriptors(&self)?;
        if let Some(initramfs) = &self.initramfs {
            check_initramfs(initramfs)?;
        }
        check_disks(&self.disks)?;
        check_nets(&self.nets)?;
        if let Some(vsock) = &self.vsock {
            check_vsock(vsock)?;
        }
        let slots = self.slots();
        if slots > layout::MAX_SLOTS {
            let most = layout::MAX_SLOTS;
            let fault_text = format!(
                "brings the machine to {slots} virtio slots with its disks and devices; it has {most}"
            );
            return fault("spare_slots", fault_text);
        }
        check_command_line(&self)?;
        Ok(ValidSpec(self))
    }
}

fn check_memory(mib: u32, host: HostLimits) -> Result<(), SpecError> {
    let host_mib = host.memory >> 20;
    match mib {
        0 => fault("memory_mib", "is 0; a machine needs memory"),
        _ if u64::from(mib) > host_mib => fault(
            "memory_mib",
            format!("is {mib}; this host has only {host_mib} MiB"),
        ),
        _ => Ok(()),
    }
}

fn check_command_line(spec: &MachineSpec) -> Result<(), SpecError> {
    let given = &spec.command_line;
    if let Some(odd) = given.chars().find(|c| !matches!(c, ' '..='~')) {
        return fault(
            "command_line",
            format!("contains {odd:?}; only printable ASCII is allowed"),
        );
    }
    let whole = cmdline::command_line(spec, spec.slots()).len();
    if whole > layout::COMMAND_LINE_MAX {
        let most = layout::COMMAND_LINE_MAX;
        let text =
            format!("makes the kernel's command line {whole} bytes long; Linux takes {most}");
        return fault("command_line", text);
    }
    Ok(())
}

/// Every inherited descriptor becomes one owned file: none may be named twice.
fn check_descriptors(spec: &MachineSpec) -> Result<(), SpecError> {
    let mut seen = HashSet::new();
    let mut check = |field: String, source: &FileSource| match source {
        FileSource::Path(path) if path.as_os_str().is_empty() => fault(field, "is an empty path"),
        FileSource::Fd(fd) if *fd < 3 => fault(
            field,
            format!("is descriptor {fd}; an inherited one is 3 or more"),
        ),
        FileSource::Fd(fd) if !seen.insert(*fd) => fault(
            field,
            format!("is descriptor {fd}, which another field has already"),
        ),
        _ => Ok(()),
    };
    check("kernel".into(), &spec.kernel)?;
    if let Some(cpuid) = &spec.cpuid {
        check("cpuid".into(), cpuid)?;
    }
    if let Some(initramfs) = &spec.initramfs {
        check("initramfs.init".into(), &initramfs.init)?;
    }
    for (i, disk) in spec.disks.iter().enumerate() {
        for (j, part) in disk.parts.iter().enumerate() {
            check(format!("disks[{i}].parts[{j}].file"), &part.file)?;
        }
    }
    for (i, net) in spec.nets.iter().enumerate() {
        for (j, fd) in net.tap_fds.iter().enumerate() {
            check(format!("nets[{i}].tap_fds[{j}]"), &FileSource::Fd(*fd))?;
        }
    }
    Ok(())
}

fn check_initramfs(spec: &InitramfsSpec) -> Result<(), SpecError> {
    let mut seen = HashSet::from(["init"]);
    for (i, file) in spec.files.iter().enumerate() {
        let field = || format!("initramfs.files[{i}].path");
        let path = file.path.as_str();
        let well_formed = path.split('/').all(|part| !matches!(part, "" | "." | ".."));
        if !well_formed || path.contains('\0') || path.len() > 1024 {
            let text = format!("is {path:?}; it must be a plain path without a leading slash");
            return fault(field(), text);
        }
        if !seen.insert(path) {
            return fault(
                field(),
                format!("is {path:?}, which the initramfs has already"),
            );
        }
    }
    Ok(())
}

fn check_disks(disks: &[DiskSpec]) -> Result<(), SpecError> {
    let mut serials = HashSet::new();
    for (i, disk) in disks.iter().enumerate() {
        let serial = &disk.serial;
        let well_formed = serial.bytes().all(|b| b.is_ascii_graphic() && b != b'/');
        if serial.is_empty() || serial.len() > MAX_SERIAL || !well_formed {
            let text = format!(
                "is {serial:?}; it must be 1 to {MAX_SERIAL} printable ASCII bytes without `/`"
            );
            return fault(format!("disks[{i}].serial"), text);
        }
        if !serials.insert(serial) {
            let text = format!("is {serial:?}, which another disk has already");
            return fault(format!("disks[{i}].serial"), text);
        }
        match disk.parts.len() {
            0 => return fault(format!("disks[{i}].parts"), "is empty; a disk needs a file"),
            1 => (),
            _ if disk.read_only => (),
            _ => {
                let text = "has more than one file; such a disk must be `read_only`";
                return fault(format!("disks[{i}].parts"), text);
            }
        }
    }
    Ok(())
}

fn check_vsock(vsock: &VsockSpec) -> Result<(), SpecError> {
    let cid = vsock.cid;
    if !(FIRST_GUEST_CID..u32::MAX).contains(&cid) {
        let text = format!("is {cid}; a guest's context id is {FIRST_GUEST_CID} or more");
        return fault("vsock.cid", text);
    }
    let path: &OsStr = vsock.path.as_os_str();
    if path.is_empty() || path.len() > MAX_SOCKET_PATH {
        let text = format!(
            "is {} bytes long; a socket's path is 1 to {MAX_SOCKET_PATH}",
            path.len()
        );
        return fault("vsock.path", text);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
