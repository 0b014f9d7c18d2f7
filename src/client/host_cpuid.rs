//! What KVM supports on this host, kept in the directory of the pods, so that not every machine has to ask
//! ([`crate::vmm::supported_cpuid`] says what that costs).
//!
//! The file's name has what the answer depends on: the boot, and with it the kernel and the processors, and the
//! loads of KVM's modules. The kernel numbers the directories of sysfs as they come, so a module that was loaded again,
//! perhaps with other parameters, has another inode there.
//!
//! Whatever goes wrong here, the machine asks KVM itself and only starts a little later.
#![forbid(unsafe_code)]

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::install::NamedFile;
use crate::vmm::kvm;
use crate::vmm::supported_cpuid::SupportedCpuid;

/// What the files' names begin with. Names of pods never begin with a dot.
const PREFIX: &str = ".cpuid-";
/// KVM's modules: the one that all hosts have, and those for one kind of processor or hypervisor.
const COMMON: &str = "kvm";
const SPECIFIC: [&str; 3] = ["kvm_intel", "kvm_amd", "kvm_pvm"];

/// The kept answer, for a machine's spec; asked for and written to `base` if it is not there yet.
pub fn kept(base: &Path) -> Option<NamedFile> {
    let path = base.join(name()?);
    let open = || NamedFile::open("CPUID", &path).ok();
    open().or_else(|| {
        keep(base, &path)?;
        open()
    })
}

/// None where what the answer depends on cannot be told.
fn name() -> Option<String> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let module = |name: &str| Some(fs::metadata(format!("/sys/module/{name}")).ok()?.ino());
    let common = module(COMMON)?;
    let specific = SPECIFIC.iter().filter_map(|name| module(name));
    let specific: Vec<_> = specific.map(|inode| inode.to_string()).collect();
    let known = !specific.is_empty();
    known.then(|| format!("{PREFIX}{}-{common}-{}", boot.trim(), specific.join("-")))
}

/// Writes KVM's answer to `path`, whole or not at all, in place of what other boots have left in `base`.
fn keep(base: &Path, path: &Path) -> Option<()> {
    let supported = SupportedCpuid::ask(&kvm::open().ok()?).ok()?;
    let unfinished = PathBuf::from(format!("{}.{}", path.display(), std::process::id()));
    for entry in fs::read_dir(base).ok()?.flatten() {
        if entry
            .file_name()
            .as_encoded_bytes()
            .starts_with(PREFIX.as_bytes())
        {
            let _ = fs::remove_file(entry.path());
        }
    }
    let mut options = fs::OpenOptions::new();
    let options = options.write(true).create_new(true).mode(0o600);
    let mut file = options.open(&unfinished).ok()?;
    file.write_all(&supported.to_bytes()).ok()?;
    fs::rename(&unfinished, path).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(base: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(base).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    #[test]
    fn an_answer_is_kept_once_and_those_of_other_boots_go() {
        let base = tempfile::tempdir().unwrap();
        fs::write(base.path().join(".cpuid-another-boot-1-2"), "").unwrap();
        fs::write(base.path().join(".lock"), "").unwrap();
        let first = kept(base.path()).unwrap();
        let asked = SupportedCpuid::ask(&kvm::open().unwrap()).unwrap();
        assert_eq!(fs::read(&first.path).unwrap(), asked.to_bytes());
        assert_eq!(files(base.path()).len(), 2);
        let inode = first.file.metadata().unwrap().ino();
        let second = kept(base.path()).unwrap();
        assert_eq!(second.file.metadata().unwrap().ino(), inode);
    }

    #[test]
    fn without_a_place_there_is_none() {
        assert!(kept(Path::new("/nonexistent")).is_none());
    }
}
