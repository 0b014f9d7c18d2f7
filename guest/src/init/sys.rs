#![allow(unsafe_code)]
//! The system calls that rustix does not offer, or offers as unsafe: the only unsafe code of the guest.
//!
//! Everything here is called from the one thread of `cube-init` or of a child that it just forked.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

use rustix::io::{Errno, Result};
use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::{Pid, Signal};

/// The C entry point. Rust's own would abort before `main`: it wants the three standard descriptors, and
/// the kernel opens none for init when there is no console.
#[cfg(not(test))]
#[unsafe(no_mangle)]
extern "C" fn main(_argc: libc::c_int, _argv: *const *const libc::c_char) -> libc::c_int {
    crate::run()
}

fn check(returned: libc::c_long) -> Result<libc::c_long> {
    if returned == -1 {
        let errno = std::io::Error::last_os_error().raw_os_error();
        return Err(Errno::from_raw_os_error(errno.unwrap_or(libc::EIO)));
    }
    Ok(returned)
}

/// Namespaces that a forked process starts with.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct NewNamespaces {
    pub(crate) mount: bool,
    pub(crate) pid: bool,
}

/// Forks into new namespaces and, if one is given, into the cgroup whose directory is `cgroup`. Returns
/// `None` in the child.
pub(crate) fn fork(
    namespaces: NewNamespaces,
    cgroup: Option<BorrowedFd<'_>>,
) -> Result<Option<Pid>> {
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    let flag = |wanted: bool, flag: u64| if wanted { flag } else { 0 };
    let flags = flag(namespaces.mount, libc::CLONE_NEWNS as u64)
        | flag(namespaces.pid, libc::CLONE_NEWPID as u64)
        | flag(cgroup.is_some(), CLONE_INTO_CGROUP);
    let arguments = libc::clone_args {
        flags,
        pidfd: 0,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: libc::SIGCHLD as u64,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: cgroup.map_or(0, |cgroup| cgroup.as_raw_fd() as u64),
    };
    // SAFETY: without CLONE_VM and a stack this is fork(2). This process has one thread, so the child's
    // copy of every lock is free and it may run any code.
    let pid = check(unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw const arguments,
            size_of_val(&arguments),
        )
    })?;
    Ok(Pid::from_raw(pid as i32))
}

/// In a child that was just forked: closes every descriptor from 3 on but those in `kept`. What it would
/// keep of the agent's would keep pipes open that the agent closes.
pub(crate) fn close_all_but(kept: &[BorrowedFd<'_>]) -> Result<()> {
    let mut kept: Vec<libc::c_uint> = kept.iter().map(|fd| fd.as_raw_fd() as _).collect();
    kept.sort_unstable();
    let mut from = 3;
    for end in kept.into_iter().chain([libc::c_uint::MAX]) {
        if from < end {
            // SAFETY: the owners of what is closed are the agent's, in this process's copy of its memory;
            // the child ends by execve or exit and never touches or drops them.
            check(unsafe { libc::syscall(libc::SYS_close_range, from, end - 1, 0) })?;
        }
        from = end.saturating_add(1).max(from);
    }
    Ok(())
}

/// Has the kernel reap this process's children, and never asks about one.
pub(crate) fn ignore_children() {
    // SAFETY: SIG_IGN is no handler, so no code runs on a signal.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}

/// Makes the mount that `mount` is the root of read-only, attached or not.
pub(crate) fn make_mount_read_only(mount: BorrowedFd<'_>) -> Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: the path is a NUL-terminated string and `attributes` one whole mount_attr; both outlive the
    // call.
    let returned = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of_val(&attributes),
        )
    };
    check(returned).map(drop)
}

/// Gives the calling process a cgroup namespace rooted at its cgroup. (Asked of clone3, the namespace
/// would be rooted at the parent's.)
pub(crate) fn unshare_cgroup() -> Result<()> {
    // SAFETY: only CLONE_FILES has memory-safety consequences, and it is not asked for.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWCGROUP) }
}

/// Executes `path`; returns only the error.
pub(crate) fn execute(path: &CString, argv: &[CString], env: &[CString]) -> Errno {
    let pointers = |strings: &[CString]| -> Vec<*const libc::c_char> {
        let ends = [ptr::null()];
        strings.iter().map(|s| s.as_ptr()).chain(ends).collect()
    };
    let (argv, env) = (pointers(argv), pointers(env));
    // SAFETY: both arrays end in a null pointer and outlive the call, as do the strings they point to.
    let returned = unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), env.as_ptr()) };
    check(returned.into()).err().unwrap_or(Errno::IO)
}

/// Blocks every signal and returns a descriptor that is readable when SIGCHLD is pending.
pub(crate) fn child_signals() -> Result<OwnedFd> {
    set_signal_mask(true)?;
    // SAFETY: an all-zero sigset_t is a valid object for sigemptyset to initialise.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is a valid, exclusively borrowed sigset_t for both calls.
    unsafe {
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
    }
    // SAFETY: `set` is initialised; -1 asks for a new descriptor.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    check(fd.into())?;
    // SAFETY: the kernel just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Blocks or unblocks every signal. No signal ever has a handler here, so a child that unblocks them has
/// the state of a fresh process.
pub(crate) fn set_signal_mask(blocked: bool) -> Result<()> {
    // SAFETY: an all-zero sigset_t is a valid object for sigfillset to initialise.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    let how = if blocked {
        libc::SIG_BLOCK
    } else {
        libc::SIG_UNBLOCK
    };
    // SAFETY: `set` is a valid sigset_t, initialised by the first call before the second reads it.
    let returned = unsafe {
        libc::sigfillset(&raw mut set);
        libc::sigprocmask(how, &raw const set, ptr::null_mut())
    };
    check(returned.into()).map(drop)
}

/// A signal by number, real-time ones included; `None` unless 1 to 64.
pub(crate) fn signal(number: u8) -> Option<Signal> {
    // SAFETY: the number is one of the kernel's 64 signals. It is only sent, never used for a handler, so
    // the C library's reserved real-time signals are no concern.
    (1..=64)
        .contains(&number)
        .then(|| unsafe { Signal::from_raw_unchecked(number.into()) })
}

/// Marks every descriptor from 3 on close-on-exec.
pub(crate) fn close_on_exec() -> Result<()> {
    // SAFETY: no descriptor is closed, so none that is owned becomes invalid.
    let returned = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    check(returned).map(drop)
}

/// Installs a seccomp filter without setting no_new_privs; needs CAP_SYS_ADMIN.
pub(crate) fn install_filter(program: &[seccompiler::sock_filter]) -> Result<()> {
    let program = libc::sock_fprog {
        len: program.len().try_into().map_err(|_| Errno::INVAL)?,
        // seccompiler's sock_filter is the kernel's, like libc's.
        filter: program.as_ptr().cast_mut().cast(),
    };
    // SAFETY: `program` points to `len` filters that outlive the call; the kernel copies them.
    let returned = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            0,
            &raw const program,
        )
    };
    check(returned).map(drop)
}

/// Brings the interface `lo` up.
pub(crate) fn loopback_up() -> Result<()> {
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, flags, None)?;
    // SAFETY: ifreq is plain data for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads one ifreq, which `request` is.
    let returned =
        unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    check(returned.into()).map(drop)
}

/// An address of the host's vsock.
struct HostAddress(libc::sockaddr_vm);

// SAFETY: the closure gets a pointer to a whole sockaddr_vm, borrowed for the call, and its size.
unsafe impl SocketAddrArg for HostAddress {
    unsafe fn with_sockaddr<R>(
        &self,
        f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R,
    ) -> R {
        f(
            (&raw const self.0).cast(),
            size_of::<libc::sockaddr_vm>() as SocketAddrLen,
        )
    }
}

/// A non-blocking stream socket on its way to a vsock port of the host; it is writable once connected, or
/// has an error.
pub(crate) fn dial_host(port: u32) -> Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None)?;
    extend_connect_timeout(socket.as_fd())?;
    // SAFETY: sockaddr_vm is plain data for which all zeroes is a valid value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = libc::VMADDR_CID_HOST;
    address.svm_port = port;
    match rustix::net::connect(&socket, &HostAddress(address)) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(error) => Err(error),
    }
}

/// The kernel's 2 s for a vsock connect are too few for a guest whose host is overloaded; a host that is
/// not there at all answers at once.
fn extend_connect_timeout(socket: BorrowedFd<'_>) -> Result<()> {
    /// `SO_VM_SOCKETS_CONNECT_TIMEOUT_OLD` of linux/vm_sockets.h: takes a timeval.
    const CONNECT_TIMEOUT: libc::c_int = 6;
    let timeout = libc::timeval {
        tv_sec: 60,
        tv_usec: 0,
    };
    // SAFETY: the option reads one timeval, which `timeout` is.
    let returned = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::AF_VSOCK,
            CONNECT_TIMEOUT,
            (&raw const timeout).cast(),
            size_of_val(&timeout) as libc::socklen_t,
        )
    };
    check(returned.into()).map(drop)
}
