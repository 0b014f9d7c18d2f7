//! The filter that keeps a container from speaking vsock to the host as the agent does.
//!
//! `socket(AF_VSOCK)` is refused as Docker's default profile refuses it (EPERM), and so is
//! `io_uring_setup`, the other way to make a socket. A system call of another architecture kills the
//! process: the slim kernel has none.
#![forbid(unsafe_code)]

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use crate::error::{Context, Error};
use crate::sys;

/// Installs the filter for this process and all that it becomes. Needs CAP_SYS_ADMIN, so that
/// no_new_privs can stay off.
///
/// # Errors
/// A kernel without seccomp filters: the container must not run then.
pub(crate) fn install() -> Result<(), Error> {
    let program = program().map_err(|error| {
        Error::Refused(format!(
            "the container's seccomp filter cannot be compiled: {error}"
        ))
    })?;
    sys::install_filter(&program).context(|| "install the container's seccomp filter".into())
}

fn program() -> Result<BpfProgram, seccompiler::BackendError> {
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

    #[test]
    fn vsock_is_refused_and_other_sockets_are_not() {
        if !rustix::process::geteuid().is_root() {
            return; // Without no_new_privs, only root may install a filter.
        }
        // The filter is this thread's alone.
        std::thread::spawn(|| {
            super::install().unwrap();
            let socket = |family| rustix::net::socket(family, SocketType::STREAM, None);
            assert_eq!(socket(AddressFamily::VSOCK).unwrap_err(), Errno::PERM);
            assert!(socket(AddressFamily::UNIX).is_ok());
            assert!(socket(AddressFamily::INET).is_ok());
        })
        .join()
        .unwrap();
    }
}
