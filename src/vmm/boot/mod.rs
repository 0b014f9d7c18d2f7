//! What the guest finds in its memory when it starts: the kernel, its initramfs, its command line, the
//! boot parameters, the MP table and the tables that put the CPU into 64-bit mode (Linux's "64-bit boot
//! protocol", Documentation/x86/boot.rst).
//!
//! All of it needs guest memory alone, not the VM, and the kernel and the rest do not need each other: one
//! thread loads the kernel, while another talks to KVM and then writes the rest.
#![forbid(unsafe_code)]

pub mod cmdline;
pub mod initramfs;
mod kernel;
mod mptable;
mod params;
mod tables;

use std::fs::File;
use std::path::PathBuf;

use vm_memory::{Bytes, GuestAddress};

use crate::vmm::files::{FileError, Opened};
use crate::vmm::layout;
use crate::vmm::memory::GuestMemory;
use crate::vmm::spec::ValidSpec;

use initramfs::Ramdisk;

pub use kernel::LoadedKernel;
pub use tables::start_sregs;

/// Why the guest's memory could not be filled. The sentences name the file.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file could not be opened.
    #[error(transparent)]
    File(#[from] FileError),
    /// Not a kernel that can be booted directly.
    #[error(
        "the kernel {0} is not an x86_64 ELF executable ({1}); give it an uncompressed vmlinux"
    )]
    NotElf(PathBuf, &'static str),
    /// The file ends before what its headers promise.
    #[error("the kernel {path} is truncated: its headers describe {needed} bytes, it has {length}")]
    Truncated {
        /// The kernel.
        path: PathBuf,
        /// Bytes that the headers speak of.
        needed: u64,
        /// Bytes that there are.
        length: u64,
    },
    /// A segment lies where there is no memory.
    #[error(
        "the kernel {path} does not fit: it needs memory from {start:#x} to {end:#x}, and the guest's \
         {memory_mib} MiB give it {HIGH:#x} to {available:#x}; raise `memory_mib`",
        HIGH = layout::HIGH_MEMORY
    )]
    KernelDoesNotFit {
        /// The kernel.
        path: PathBuf,
        /// First byte of the segment.
        start: u64,
        /// Byte after the segment.
        end: u64,
        /// The guest's memory.
        memory_mib: u32,
        /// Where the memory that a kernel can use ends.
        available: u64,
    },
    /// Kernel and initramfs together are larger than the memory.
    #[error(
        "the initramfs of {length} bytes does not fit into {memory_mib} MiB of guest memory beside the \
         kernel; raise `memory_mib`"
    )]
    InitramfsDoesNotFit {
        /// Bytes of the initramfs.
        length: u64,
        /// The guest's memory.
        memory_mib: u32,
    },
    /// A file could not be read, or changed while it was read.
    #[error("cannot read {0}: {1}")]
    Read(PathBuf, std::io::Error),
    /// A table could not be written into guest memory.
    #[error("cannot write the guest's boot tables: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// What is loaded: opened before anything costly happens.
pub struct BootFiles {
    /// The kernel.
    pub kernel: Opened,
    /// The guest's first program, if it has an initramfs.
    pub init: Option<Opened>,
}

impl BootFiles {
    /// Opens the kernel and the init binary.
    ///
    /// # Errors
    /// The file that could not be opened.
    pub fn open(spec: &ValidSpec) -> Result<Self, FileError> {
        let kernel = Opened::for_reading(&spec.kernel, "kernel")?;
        let init = match &spec.initramfs {
            Some(initramfs) => Some(Opened::for_reading(&initramfs.init, "init")?),
            None => None,
        };
        Ok(Self { kernel, init })
    }
}

/// Where a vCPU starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EntryPoint(pub u64);

/// Loads the kernel.
///
/// # Errors
/// [`BootError`]; the memory's content is then undefined.
pub fn load_kernel(
    memory: &GuestMemory,
    spec: &ValidSpec,
    mut kernel: Opened,
) -> Result<LoadedKernel, BootError> {
    kernel::load(memory, &mut kernel, spec)
}

/// Writes everything else that the first vCPU needs.
///
/// # Errors
/// [`BootError`]; the memory's content is then undefined.
pub fn load_rest(
    memory: &GuestMemory,
    spec: &ValidSpec,
    init: Option<Opened>,
) -> Result<Rest, BootError> {
    let ramdisk = match (&spec.initramfs, init) {
        (Some(initramfs), Some(init)) => Some(initramfs::load(memory, initramfs, init, spec)?),
        _ => None,
    };
    write_command_line(memory, spec)?;
    params::write(memory, spec.memory_bytes(), ramdisk)?;
    mptable::write(memory, spec)?;
    tables::write(memory)?;
    Ok(Rest { ramdisk })
}

/// What is in guest memory beside the kernel.
#[derive(Debug, Clone, Copy)]
pub struct Rest {
    ramdisk: Option<Ramdisk>,
}

impl Rest {
    /// Where the first vCPU starts, with that kernel beside the rest.
    ///
    /// # Errors
    /// The two lie upon each other: the memory is too small.
    pub fn entry(&self, kernel: LoadedKernel, spec: &ValidSpec) -> Result<EntryPoint, BootError> {
        match self.ramdisk {
            Some(ramdisk) if ramdisk.address < kernel.end => Err(BootError::InitramfsDoesNotFit {
                length: ramdisk.length,
                memory_mib: spec.memory_mib,
            }),
            _ => Ok(EntryPoint(kernel.entry)),
        }
    }
}

fn write_command_line(memory: &GuestMemory, spec: &ValidSpec) -> Result<(), BootError> {
    let mut line = cmdline::command_line(spec, spec.slots()).into_bytes();
    line.push(0);
    memory.write_slice(&line, GuestAddress(layout::COMMAND_LINE))?;
    Ok(())
}

/// Length of an open file.
fn length(file: &File, path: &std::path::Path) -> Result<u64, BootError> {
    match file.metadata() {
        Ok(metadata) => Ok(metadata.len()),
        Err(error) => Err(BootError::Read(path.into(), error)),
    }
}
