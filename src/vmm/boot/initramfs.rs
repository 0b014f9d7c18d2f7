//! The initramfs, built straight into guest memory: a cpio archive in the "newc" format
//! (Documentation/driver-api/early-userspace/buffer-format.rst).
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::io::Seek;
use std::ops::Range;

use vm_memory::{Bytes, GuestAddress};

use crate::vmm::boot::{BootError, length};
use crate::vmm::files::Opened;
use crate::vmm::layout;
use crate::vmm::memory::{self, GuestMemory, HUGE_PAGE};
use crate::vmm::spec::{InitramfsSpec, ValidSpec};

/// `st_mode` of what the archive holds.
const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;
const PRIVATE_FILE: u32 = 0o100_600;
/// The name that ends an archive.
const TRAILER: &str = "TRAILER!!!";
const PAGE: u64 = 4096;
/// Linux's unit of its memory map on x86_64 (SECTION_SIZE_BITS in arch/x86/include/asm/sparsemem.h): the
/// `struct page` of 64 bytes of each of its pages, together, fill one huge page.
const SECTION: u64 = 128 << 20;

/// Where the initramfs lies in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ramdisk {
    pub(super) address: u64,
    pub(super) length: u64,
}

/// One member of the archive.
struct Member<'a> {
    name: &'a str,
    mode: u32,
    content: Content<'a>,
}

enum Content<'a> {
    Text(&'a str),
    Init { length: u64 },
}

impl Member<'_> {
    fn content_length(&self) -> u64 {
        match &self.content {
            Content::Text(text) => text.len() as u64,
            Content::Init { length } => *length,
        }
    }

    /// Header and name, padded to four bytes.
    fn head(&self, inode: usize) -> Vec<u8> {
        let (mode, size, name) = (self.mode, self.content_length(), self.name);
        let links = 1 + u32::from(mode == DIRECTORY);
        // magic, inode, mode, uid, gid, links, mtime, size, 4 device numbers, name size, check
        let mut head = format!(
            "070701{inode:08x}{mode:08x}{0:08x}{0:08x}{links:08x}{0:08x}{size:08x}{0:08x}{0:08x}{0:08x}{0:08x}{1:08x}{0:08x}{name}\0",
            0, name.len() + 1
        )
        .into_bytes();
        head.resize(head.len().next_multiple_of(4), 0);
        head
    }

    fn length(&self) -> u64 {
        self.head(0).len() as u64 + self.content_length().next_multiple_of(4)
    }
}

/// All members in order: directories before what they hold.
fn members(spec: &InitramfsSpec, init_length: u64) -> Vec<Member<'_>> {
    let directories: BTreeSet<&str> = spec
        .files
        .iter()
        .flat_map(|file| file.path.match_indices('/').map(|(at, _)| &file.path[..at]))
        .collect();
    let init = Content::Init {
        length: init_length,
    };
    let mut members = vec![Member {
        name: "init",
        mode: EXECUTABLE,
        content: init,
    }];
    let empty = |name, mode| Member {
        name,
        mode,
        content: Content::Text(""),
    };
    members.extend(directories.into_iter().map(|name| empty(name, DIRECTORY)));
    members.extend(spec.files.iter().map(|file| Member {
        name: &file.path,
        mode: PRIVATE_FILE,
        content: Content::Text(&file.content),
    }));
    members.push(empty(TRAILER, 0));
    members
}

/// Builds the archive at the end of low memory. Whether the kernel leaves it that much is for the caller to see,
/// who may be loading it meanwhile.
pub(super) fn load(
    memory: &GuestMemory,
    initramfs: &InitramfsSpec,
    mut init: Opened,
    spec: &ValidSpec,
) -> Result<Ramdisk, BootError> {
    // Whoever opened an inherited file may have left its position anywhere.
    init.file
        .rewind()
        .map_err(|error| BootError::Read(init.path.clone(), error))?;
    let members = members(initramfs, length(&init.file, &init.path)?);
    let length = members
        .iter()
        .fold(0u64, |sum, member| sum.saturating_add(member.length()));
    let low_memory = spec.memory_bytes().min(layout::HOLE_START);
    let address = match low_memory.checked_sub(length) {
        Some(start) if start & !(PAGE - 1) >= layout::HIGH_MEMORY => start & !(PAGE - 1),
        _ => {
            return Err(BootError::InitramfsDoesNotFit {
                length,
                memory_mib: spec.memory_mib,
            });
        }
    };
    for range in wholly_used(address, spec.memory_bytes()) {
        memory::prefer_huge_pages(memory, range.start, range.end);
    }
    let mut at = address;
    for (inode, member) in members.iter().enumerate() {
        let head = member.head(inode + 1);
        memory.write_slice(&head, GuestAddress(at))?;
        write_content(memory, member, &mut init, at + head.len() as u64)?;
        at += member.length();
    }
    Ok(Ramdisk { address, length })
}

/// Where a kernel will have written every page soon after its start, with its initramfs at `address`. It takes
/// early memory from the top down, from directly below the initramfs or, where there is memory above 4 GiB,
/// from the end of that: a few page tables, and then its array of page descriptors (mm/sparse-vmemmap.c), which
/// has a huge page for each section of memory. A section that is not all there leaves its own in part untouched.
fn wholly_used(address: u64, memory_bytes: u64) -> [Range<u64>; 2] {
    let below_4_gib = memory_bytes.min(layout::HOLE_START);
    let above = memory_bytes - below_4_gib;
    let (archive, bottom, top) = if above == 0 {
        let first_taken = huge_page_of(address);
        (first_taken..below_4_gib, layout::HIGH_MEMORY, first_taken)
    } else {
        let end = layout::HOLE_END + above;
        (
            address..below_4_gib,
            layout::HOLE_END,
            huge_page_of(end - 1),
        )
    };
    let Some(descriptors) = top.checked_sub(memory_bytes.div_ceil(SECTION) * HUGE_PAGE) else {
        return [archive, 0..0];
    };
    let whole = descriptors + memory_bytes / SECTION * HUGE_PAGE;
    [archive, descriptors.max(bottom)..whole.max(bottom)]
}

fn huge_page_of(address: u64) -> u64 {
    address & !(HUGE_PAGE - 1)
}

/// The archive that holds nothing but `init` as `/init`, for a VMM that loads its initramfs from a file.
pub fn archive_of(init: &[u8]) -> Vec<u8> {
    let spec = InitramfsSpec {
        init: crate::vmm::spec::FileSource::Fd(-1),
        files: Vec::new(),
    };
    let mut archive = Vec::new();
    for (inode, member) in members(&spec, init.len() as u64).iter().enumerate() {
        archive.extend(member.head(inode + 1));
        match member.content {
            Content::Text(text) => archive.extend(text.as_bytes()),
            Content::Init { .. } => archive.extend(init),
        }
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}

fn write_content(
    memory: &GuestMemory,
    member: &Member<'_>,
    init: &mut Opened,
    at: u64,
) -> Result<(), BootError> {
    let at = GuestAddress(at);
    match member.content {
        Content::Text(text) => Ok(memory.write_slice(text.as_bytes(), at)?),
        Content::Init { length } => memory
            .read_exact_volatile_from(at, &mut init.file, length as usize)
            .map_err(|error| BootError::Read(init.path.clone(), std::io::Error::other(error))),
    }
}

#[cfg(test)]
mod tests;
