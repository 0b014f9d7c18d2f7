//! System call filters (seccomp(2)): each thread that meets the guest's data may ask the kernel only for
//! what its role needs. The lists are `resources/seccomp/*.json`, with a reason for each call; `build.rs`
//! compiles them.
//!
//! A call that is not on the list ends the process, with a sentence that names it: it is a bug of ours, or
//! the guest has taken the thread over.
//!
//! Unsafe for the signal handler that says the sentence.
#![allow(unsafe_code)]

pub(crate) mod search;

use std::io;

use seccompiler::{apply_filter, sock_filter};
use vmm_sys_util::signal::register_signal_handler;

use crate::vmm::thread::Role;

include!(concat!(env!("OUT_DIR"), "/seccomp.rs"));

/// Status of a process that is ended by a filter: a failure of the host's ([`crate::vmm::exit`]).
const FAILURE: libc::c_int = 1;
/// Index of the number of the refused call in a `siginfo_t` of SIGSYS, in `int`s: `si_signo`, `si_errno`,
/// `si_code`, padding, `si_call_addr` (two), `si_syscall` (sigaction(2)).
const SI_SYSCALL: usize = 6;

/// Installs the handler that explains a refused call; once per process, before the first filter.
///
/// # Errors
/// The operating system's answer.
pub fn install_handler() -> io::Result<()> {
    Ok(register_signal_handler(libc::SIGSYS, explain)?)
}

/// Limits the calling thread for the rest of its life, and threads that it starts.
///
/// # Errors
/// The kernel was built without seccomp filters.
pub fn limit(role: Role) -> io::Result<()> {
    let program = match role {
        // It starts the others, and speaks with the host alone.
        Role::Main => return Ok(()),
        Role::Worker => WORKER,
        Role::Vcpu => VCPU,
        Role::VhostUser => VHOST_USER,
    };
    apply_filter(program).map_err(io::Error::other)
}

extern "C" fn explain(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let info = info.cast::<libc::c_int>();
    // SAFETY: the kernel hands the handler a whole siginfo_t, which is larger than seven ints.
    let number = unsafe { info.add(SI_SYSCALL).read() };
    let mut digits = [0; 10];
    for part in [
        b"cube-vmm: a thread made the system call ".as_slice(),
        decimal(number.unsigned_abs(), &mut digits),
        b", which its filter (resources/seccomp) does not allow\n",
    ] {
        // SAFETY: write(2) is safe in a signal handler; the slice is valid for its length. Nobody is there
        // to hear that it failed.
        unsafe { libc::write(libc::STDERR_FILENO, part.as_ptr().cast(), part.len()) };
    }
    // SAFETY: _exit(2) is safe in a signal handler.
    unsafe { libc::_exit(FAILURE) };
}

/// `number` in decimal digits, without allocation: a signal handler may not allocate.
fn decimal(number: u32, digits: &mut [u8; 10]) -> &[u8] {
    let (mut rest, mut start) = (number, digits.len());
    for (at, digit) in digits.iter_mut().enumerate().rev() {
        *digit = b'0' + (rest % 10) as u8;
        (rest, start) = (rest / 10, at);
        if rest == 0 {
            break;
        }
    }
    digits.get(start..).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_without_allocation() {
        for number in [0, 7, 10, 435, u32::MAX] {
            assert_eq!(decimal(number, &mut [0; 10]), number.to_string().as_bytes());
        }
    }

    #[test]
    fn a_limited_thread_cannot_open_a_file() {
        // In a process of its own: the filter's answer is its end.
        for role in [Role::Worker, Role::Vcpu] {
            // SAFETY: the child calls nothing that another thread's lock could block.
            let child = unsafe { libc::fork() };
            if child == 0 {
                let limited = install_handler().and_then(|()| limit(role));
                let status = match limited {
                    Ok(()) => {
                        // SAFETY: the path is a C string. A filter that lets the call through shows as 3.
                        unsafe { libc::open(c"/".as_ptr(), libc::O_RDONLY) };
                        3
                    }
                    Err(_) => 4,
                };
                // SAFETY: ends the child without running the parent's destructors.
                unsafe { libc::_exit(status) };
            }
            let mut status = 0;
            // SAFETY: `status` is valid; the child is this process's.
            assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
            assert!(libc::WIFEXITED(status), "{role:?}: {status:#x}");
            assert_eq!(libc::WEXITSTATUS(status), FAILURE, "{role:?}");
        }
    }
}
