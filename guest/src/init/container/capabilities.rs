//! What a process may do: five sets of capabilities (capabilities(7)), from the specification or the default
//! of Docker and containerd.
#![forbid(unsafe_code)]

use cube_guest::Capabilities;
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

/// The names without `CAP_`; a capability's number is its place (linux/capability.h).
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// Everything the kernel has.
const ALL: CapabilitySet = CapabilitySet::from_bits_retain((1 << NAMES.len()) - 1);

/// The sets of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sets {
    bounding: CapabilitySet,
    held: CapabilitySets,
    ambient: CapabilitySet,
}

impl Sets {
    /// The sets asked for; without any, the default: for root Docker's, or all if privileged, and for
    /// others none.
    ///
    /// # Errors
    /// A name that is no capability's.
    pub(crate) fn resolve(
        asked: Option<&Capabilities>,
        privileged: bool,
        is_root: bool,
    ) -> Result<Self, Error> {
        if let Some(asked) = asked {
            return Ok(Self {
                bounding: parse(&asked.bounding)?,
                held: CapabilitySets {
                    effective: parse(&asked.effective)?,
                    permitted: parse(&asked.permitted)?,
                    inheritable: parse(&asked.inheritable)?,
                },
                ambient: parse(&asked.ambient)?,
            });
        }
        let bounding = if privileged { ALL } else { DEFAULT };
        let held = match is_root {
            true => bounding,
            false => CapabilitySet::empty(),
        };
        Ok(Self {
            bounding,
            held: CapabilitySets {
                effective: held,
                permitted: held,
                inheritable: CapabilitySet::empty(),
            },
            ambient: CapabilitySet::empty(),
        })
    }

    /// Takes every other capability out of the bounding set: no program gets it back, set-user-ID or not.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub(crate) fn bound(&self) -> Result<(), Error> {
        for (number, name) in NAMES.iter().enumerate() {
            let capability = CapabilitySet::from_bits_retain(1 << number);
            if self.bounding.contains(capability) {
                continue;
            }
            match rustix::thread::remove_capability_from_bounding_set(capability) {
                Ok(()) => {}
                // Beyond the kernel's last capability.
                Err(Errno::INVAL) => break,
                Err(error) => return Err(error).context(|| format!("drop CAP_{name}")),
            }
        }
        Ok(())
    }

    /// Gives the process its own sets, after it became its user with all capabilities kept.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub(crate) fn limit(&self) -> Result<(), Error> {
        rustix::thread::set_capabilities(None, self.held)
            .context(|| "set the capabilities".into())?;
        for (number, name) in NAMES.iter().enumerate() {
            let capability = CapabilitySet::from_bits_retain(1 << number);
            if self.ambient.contains(capability) {
                rustix::thread::configure_capability_in_ambient_set(capability, true).context(
                    || {
                        format!(
                            "make CAP_{name} ambient (it must be permitted and inheritable too)"
                        )
                    },
                )?;
            }
        }
        Ok(())
    }
}

/// Puts all that is permitted in force again, which becoming another user took out of force.
///
/// # Errors
/// The kernel's refusal.
pub(crate) fn keep_in_force() -> Result<(), Error> {
    let keep = || {
        let mut sets = rustix::thread::capabilities(None)?;
        sets.effective = sets.permitted;
        rustix::thread::set_capabilities(None, sets)
    };
    keep().context(|| "keep the capabilities until the program starts".into())
}

fn parse(names: &[String]) -> Result<CapabilitySet, Error> {
    let mut set = CapabilitySet::empty();
    for name in names {
        let known = name.strip_prefix("CAP_").unwrap_or(name);
        let number = NAMES.iter().position(|other| *other == known);
        let number = number.ok_or_else(|| {
            Error::Refused(format!("no capability is called `{}`", name.escape_debug()))
        })?;
        set |= CapabilitySet::from_bits_retain(1 << number);
    }
    Ok(set)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_dockers_mask() {
        // CapEff of a root process in a default Docker container.
        assert_eq!(DEFAULT.bits(), 0xa804_25fb);
        let root = Sets::resolve(None, false, true).unwrap();
        assert_eq!(root.held.effective, DEFAULT);
        let other = Sets::resolve(None, false, false).unwrap();
        assert_eq!((other.bounding, other.held.permitted.bits()), (DEFAULT, 0));
    }

    #[test]
    fn privileged_is_everything() {
        let sets = Sets::resolve(None, true, true).unwrap();
        assert_eq!(sets.held.permitted.bits(), (1 << 41) - 1);
    }

    #[test]
    fn names_are_the_kernels() {
        let parsed = |name: &str| parse(&[name.to_owned()]).unwrap();
        assert_eq!(parsed("CAP_NET_ADMIN"), CapabilitySet::NET_ADMIN);
        assert_eq!(parsed("SETFCAP"), CapabilitySet::SETFCAP);
        assert_eq!(
            parsed("CAP_CHECKPOINT_RESTORE"),
            CapabilitySet::CHECKPOINT_RESTORE
        );
        assert_eq!(parsed("CAP_SYS_ADMIN"), CapabilitySet::SYS_ADMIN);
        let refused = parse(&["CAP_FLY".to_owned()]).unwrap_err().to_string();
        assert!(refused.contains("`CAP_FLY`"), "{refused}");
    }
}
