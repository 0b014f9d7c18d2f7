//! Named network namespaces, where `ip netns` looks for them.
//!
//! Unsafe for `unshare(2)`.
#![allow(unsafe_code)]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use super::{AboutFile, NetError};

/// Where named namespaces are.
const DIRECTORY: &str = "/run/netns";
/// `statfs(2)`: the file system of namespaces.
const NSFS_MAGIC: i64 = 0x6e73_6673;

/// Path of the namespace called `name`.
pub fn path(name: &str) -> PathBuf {
    Path::new(DIRECTORY).join(name)
}

/// Makes an empty network namespace called `name`.
///
/// # Errors
/// There is one already, or the kernel refuses.
pub fn create(name: &str) -> Result<(), NetError> {
    fs::create_dir_all(DIRECTORY).about("create", DIRECTORY)?;
    let path = path(name);
    let place = OpenOptions::new().write(true).create_new(true).open(&path);
    place.about("create the network namespace", &path)?;
    let made = on_a_thread(|| {
        // SAFETY: the thread shares nothing with others that the flag concerns but its network namespace.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
        rustix::mount::mount_bind("/proc/thread-self/ns/net", &path)?;
        Ok(())
    });
    made.about("create the network namespace", &path)
        .inspect_err(|_| _ = fs::remove_file(&path))
}

/// Whether there is a namespace called `name`: not only a file where it would be, as a creator that was killed
/// leaves it.
pub fn exists(name: &str) -> bool {
    rustix::fs::statfs(path(name)).is_ok_and(|found| found.f_type == NSFS_MAGIC)
}

/// Removes the namespace called `name` and everything in it. One that is not there is no error.
///
/// # Errors
/// The operating system's.
pub fn remove(name: &str) -> Result<(), NetError> {
    let path = path(name);
    match rustix::mount::unmount(&path, UnmountFlags::DETACH) {
        // Nothing is mounted there: it was not finished, or is gone.
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
        Err(error) => return Err(error).about("unmount the network namespace", &path),
    }
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).about("remove the network namespace", &path)
        }
        _ => Ok(()),
    }
}

/// Does `work` on a thread of its own inside the namespace called `name`.
///
/// # Errors
/// The namespace cannot be entered, or what `work` returned.
pub fn run<T: Send>(
    name: &str,
    work: impl FnOnce() -> Result<T, NetError> + Send,
) -> Result<T, NetError> {
    let path = path(name);
    let namespace = File::open(&path).about("open the network namespace", &path)?;
    let mut result = None;
    let entered = on_a_thread(|| {
        let kind = Some(LinkNameSpaceType::Network);
        rustix::thread::move_into_link_name_space(namespace.as_fd(), kind)?;
        result = Some(work());
        Ok(())
    });
    entered.about("enter the network namespace", &path)?;
    // The work was done if nothing failed before it.
    result.unwrap_or_else(|| Err(io::Error::other("nothing was done")).about("enter", &path))
}

/// A thread's namespaces end with it.
fn on_a_thread(work: impl FnOnce() -> io::Result<()> + Send) -> io::Result<()> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("netns".into());
        match thread.spawn_scoped(scope, work)?.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}
