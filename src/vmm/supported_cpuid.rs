//! What KVM says a vCPU may have (KVM_GET_SUPPORTED_CPUID), asked for or kept.
//!
//! The answer is the same until the host's KVM module or kernel changes, and costs KVM two instructions CPUID for each
//! entry. Where KVM itself runs in a virtual machine each of them is an exit: a third of a millisecond in all,
//! a fifth of a start. So whoever starts machines may keep the answer and name the file in each spec.
//!
//! The file: eight bytes that name the format, then entries of seven little-endian words: function, index, flags, EAX,
//! EBX, ECX, EDX.
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::arithmetic_side_effects
    )
)]
#![forbid(unsafe_code)]

use std::io::Read;
use std::path::PathBuf;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;

use crate::vmm::files::Opened;
use crate::vmm::kvm::KvmError;

/// What the file begins with; the digit is the format's version.
const FORMAT: &[u8; 8] = b"cubecpu1";
const ENTRY: usize = 7 * size_of::<u32>();
/// The longest file.
const MOST: usize = FORMAT.len() + KVM_MAX_CPUID_ENTRIES * ENTRY;
/// So many bytes tell a file that is too long.
const TOO_MANY: u64 = MOST as u64 + 1;
/// More than a file of most hosts has, so that it is read at once.
const USUAL: usize = 3 << 10;

/// The file that a spec names does not hold what it should.
#[derive(Debug, thiserror::Error)]
pub enum KeptError {
    /// It cannot be read.
    #[error("cannot read the CPUID {0}: {1}")]
    Read(PathBuf, std::io::Error),
    /// It is something else.
    #[error(
        "{0} does not hold what KVM supports on a host ({1}); leave `cpuid` out of the spec, and KVM is asked"
    )]
    Content(PathBuf, &'static str),
}

/// KVM's answer, as it gave it.
#[derive(Debug, Clone, PartialEq)]
pub struct SupportedCpuid(Vec<kvm_cpuid_entry2>);

impl SupportedCpuid {
    /// Asks KVM.
    ///
    /// # Errors
    /// KVM refused.
    pub fn ask(kvm: &Kvm) -> Result<Self, KvmError> {
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(KvmError::call("tell the CPUID it supports"))?;
        Ok(Self(supported.as_slice().to_vec()))
    }

    /// Reads an answer that was kept.
    ///
    /// # Errors
    /// [`KeptError`], which names the file.
    pub fn read(kept: Opened) -> Result<Self, KeptError> {
        let Opened { file, path } = kept;
        let mut bytes = Vec::with_capacity(USUAL);
        let read = file.take(TOO_MANY).read_to_end(&mut bytes);
        match read {
            Ok(_) => Self::from_bytes(&bytes).map_err(|fault| KeptError::Content(path, fault)),
            Err(error) => Err(KeptError::Read(path, error)),
        }
    }

    /// The file's content; the fault of one that is not good is part of a sentence.
    ///
    /// # Errors
    /// The format is another, an entry is cut short, or there are none or too many.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, &'static str> {
        let entries = bytes
            .strip_prefix(FORMAT)
            .ok_or("it does not begin with `cubecpu1`")?;
        let (entries, rest) = entries.as_chunks::<ENTRY>();
        match (entries.len(), rest) {
            (1..=KVM_MAX_CPUID_ENTRIES, []) => Ok(Self(entries.iter().map(entry).collect())),
            (0, []) => Err("it has no entry"),
            (_, []) => Err("it has more entries than KVM takes"),
            _ => Err("its last entry is cut short"),
        }
    }

    /// What [`Self::from_bytes`] takes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let words = self.0.iter().flat_map(|entry| {
            let place = [entry.function, entry.index, entry.flags];
            place
                .into_iter()
                .chain([entry.eax, entry.ebx, entry.ecx, entry.edx])
        });
        let words = words.flat_map(u32::to_le_bytes);
        FORMAT.iter().copied().chain(words).collect()
    }

    /// The entries.
    pub fn entries(&self) -> &[kvm_cpuid_entry2] {
        &self.0
    }
}

fn entry(bytes: &[u8; ENTRY]) -> kvm_cpuid_entry2 {
    let (words, _) = bytes.as_chunks::<4>();
    let mut words = words.iter().copied().map(u32::from_le_bytes);
    let mut next = || words.next().unwrap_or(0);
    kvm_cpuid_entry2 {
        function: next(),
        index: next(),
        flags: next(),
        eax: next(),
        ebx: next(),
        ecx: next(),
        edx: next(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entries(count: usize) -> Vec<u8> {
        [FORMAT.as_slice(), &vec![7; count * ENTRY]].concat()
    }

    #[test]
    fn what_is_kept_is_what_kvm_said() {
        let kvm = crate::vmm::kvm::open().unwrap();
        let asked = SupportedCpuid::ask(&kvm).unwrap();
        assert!(asked.entries().len() > 10, "{asked:?}");
        assert_eq!(SupportedCpuid::from_bytes(&asked.to_bytes()), Ok(asked));
    }

    #[test]
    fn another_file_is_refused() {
        let fault = |bytes: &[u8]| SupportedCpuid::from_bytes(bytes).unwrap_err();
        assert_eq!(fault(b""), "it does not begin with `cubecpu1`");
        assert_eq!(fault(b"cubecpu2"), "it does not begin with `cubecpu1`");
        assert_eq!(fault(FORMAT), "it has no entry");
        assert_eq!(fault(&entries(3)[..60]), "its last entry is cut short");
        let most = KVM_MAX_CPUID_ENTRIES;
        assert!(SupportedCpuid::from_bytes(&entries(most)).is_ok());
        assert_eq!(
            fault(&entries(most + 1)),
            "it has more entries than KVM takes"
        );
    }

    #[test]
    fn a_file_without_an_end_is_refused_before_its_end() {
        let (file, path) = (
            std::fs::File::open("/dev/zero").unwrap(),
            "/dev/zero".into(),
        );
        let error = SupportedCpuid::read(Opened { file, path }).unwrap_err();
        assert_eq!(
            error.to_string(),
            "/dev/zero does not hold what KVM supports on a host (it does not begin with `cubecpu1`); \
             leave `cpuid` out of the spec, and KVM is asked"
        );
    }

    proptest! {
        #[test]
        fn whatever_is_taken_is_written_again_as_it_was(bytes: Vec<u8>) {
            let bytes = [FORMAT.as_slice(), &bytes].concat();
            if let Ok(taken) = SupportedCpuid::from_bytes(&bytes) {
                prop_assert_eq!(taken.to_bytes(), bytes);
            }
        }
    }
}
