//! System call filters: the guard that every container has, and what its specification adds.
//!
//! The guard keeps a container from speaking vsock to the host as the agent does: `socket(AF_VSOCK)` is
//! refused as Docker's default profile refuses it (EPERM), and so is `io_uring_setup`, the other way to
//! make a socket. A system call of another architecture kills the process: the slim kernel has none. Only a
//! privileged container, which could do worse, goes without.
#![forbid(unsafe_code)]

use cube_guest::{Seccomp, SecuritySpec};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, sock_filter,
};

use crate::error::{Context, Error};
use crate::sys;

/// Installs the filters for this process and all that it becomes. Needs CAP_SYS_ADMIN or no_new_privs.
///
/// # Errors
/// A kernel without seccomp filters, or a program that it does not take: the container must not run then.
pub(crate) fn install(security: &SecuritySpec) -> Result<(), Error> {
    if security.privileged {
        return Ok(());
    }
    let guard = guard().map_err(|error| {
        Error::Refused(format!(
            "the container's seccomp filter cannot be compiled: {error}"
        ))
    })?;
    sys::install_filter(&guard).context(|| "install the container's seccomp filter".into())?;
    if let Seccomp::Programs(programs) = &security.seccomp {
        for (number, program) in programs.iter().enumerate() {
            let program: BpfProgram = program.iter().copied().map(instruction).collect();
            sys::install_filter(&program)
                .context(|| format!("install the seccomp program {number} of the specification"))?;
        }
    }
    Ok(())
}

/// `struct sock_filter` of linux/filter.h as a little-endian word.
fn instruction(word: u64) -> sock_filter {
    let [c0, c1, jt, jf, k0, k1, k2, k3] = word.to_le_bytes();
    sock_filter {
        code: u16::from_le_bytes([c0, c1]),
        jt,
        jf,
        k: u32::from_le_bytes([k0, k1, k2, k3]),
    }
}

fn guard() -> Result<BpfProgram, seccompiler::BackendError> {
    // The kernel takes the family as an int: only its low half counts.
    let vsock = SeccompCondition::new(
        0,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::Eq,
        libc::AF_VSOCK as u64,
    )?;
    let rules = [
        (libc::SYS_socket, vec![SeccompRule::new(vec![vsock])?]),
        (libc::SYS_io_uring_setup, vec![]),
    ];
    let refuse = SeccompAction::Errno(libc::EPERM as u32);
    SeccompFilter::new(
        rules.into(),
        SeccompAction::Allow,
        refuse,
        TargetArch::x86_64,
    )?
    .try_into()
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;
    use rustix::net::{AddressFamily, SocketType};

    use super::*;

    /// Runs `check` on a thread with the filters, which are that thread's alone. Without no_new_privs, only
    /// root may install one.
    fn filtered(security: SecuritySpec, check: impl FnOnce() + Send + 'static) {
        if rustix::process::geteuid().is_root() {
            let thread = std::thread::spawn(move || {
                install(&security).unwrap();
                check();
            });
            thread.join().unwrap();
        }
    }

    fn socket(family: AddressFamily) -> rustix::io::Result<std::os::fd::OwnedFd> {
        rustix::net::socket(family, SocketType::STREAM, None)
    }

    #[test]
    fn vsock_is_refused_and_other_sockets_are_not() {
        for seccomp in [Seccomp::Default, Seccomp::Unconfined] {
            let security = SecuritySpec {
                seccomp,
                ..SecuritySpec::default()
            };
            filtered(security, || {
                assert_eq!(socket(AddressFamily::VSOCK).unwrap_err(), Errno::PERM);
                assert!(socket(AddressFamily::UNIX).is_ok());
                assert!(socket(AddressFamily::INET).is_ok());
            });
        }
    }

    #[test]
    fn programs_are_installed_besides_the_guard() {
        // socketpair(2), number 53, fails with EDOM (33): ld nr; jeq 53, 0, 1; ret ERRNO|33; ret ALLOW.
        let word = |code: u16, jt: u8, jf: u8, k: u32| {
            let [c0, c1] = code.to_le_bytes();
            let [k0, k1, k2, k3] = k.to_le_bytes();
            u64::from_le_bytes([c0, c1, jt, jf, k0, k1, k2, k3])
        };
        let program = vec![
            word(0x20, 0, 0, 0),
            word(0x15, 0, 1, 53),
            word(0x06, 0, 0, 0x0005_0021),
            word(0x06, 0, 0, 0x7fff_0000),
        ];
        let security = SecuritySpec {
            seccomp: Seccomp::Programs(vec![program]),
            ..SecuritySpec::default()
        };
        filtered(security, || {
            let pair = std::os::unix::net::UnixStream::pair();
            assert_eq!(pair.unwrap_err().raw_os_error(), Some(33));
            assert_eq!(socket(AddressFamily::VSOCK).unwrap_err(), Errno::PERM);
        });
    }
}
