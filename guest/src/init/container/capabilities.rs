//! What a container's root may do: the default set of Docker and containerd.
#![forbid(unsafe_code)]

use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::error::{Context, Error};

/// The 14 capabilities of Docker's and containerd's default.
const DEFAULT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::NET_RAW)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::SYS_CHROOT)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::AUDIT_WRITE);

/// Takes every other capability out of the bounding set: no program gets it back, set-user-ID or not.
///
/// # Errors
/// The kernel's refusal.
pub(crate) fn bound() -> Result<(), Error> {
    for number in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if DEFAULT.contains(capability) {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // Beyond the kernel's last capability.
            Err(Errno::INVAL) => break,
            Err(error) => return Err(error).context(|| format!("drop the capability {number}")),
        }
    }
    Ok(())
}

/// Sets the process's own sets, after it became its user: the default for root, none for others.
///
/// # Errors
/// The kernel's refusal.
pub(crate) fn limit(is_root: bool) -> Result<(), Error> {
    let held = if is_root {
        DEFAULT
    } else {
        CapabilitySet::empty()
    };
    let sets = CapabilitySets {
        effective: held,
        permitted: held,
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, sets).context(|| "set the capabilities".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_dockers_mask() {
        // CapEff of a root process in a default Docker container.
        assert_eq!(DEFAULT.bits(), 0xa804_25fb);
    }
}
