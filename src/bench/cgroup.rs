//! A control group for the processes of one run: what they cost with everything that the kernel holds for
//! them (page tables, KVM's tables, sockets), which no figure of `/proc` shows.
#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};

/// A cgroup of version 2 with the memory controller. Removed when dropped: its processes must have ended.
#[derive(Debug)]
pub struct Group {
    path: PathBuf,
    /// Where this process belongs.
    home: PathBuf,
}

impl Group {
    /// A new group; none where there is no cgroup v2 hierarchy, it has no memory controller, or this user
    /// may not make groups.
    pub fn create() -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
        let own = fs::read_to_string("/proc/self/cgroup").ok()?;
        Self::below(&root(&mounts)?, &own)
    }

    fn below(root: &Path, own: &str) -> Option<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let controllers = fs::read_to_string(root.join("cgroup.controllers")).ok()?;
        if !controllers.split_whitespace().any(|name| name == "memory") {
            return None;
        }
        fs::write(root.join("cgroup.subtree_control"), "+memory").ok()?;
        let own = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = root.join(format!("cube-bench-{}-{number}", std::process::id()));
        fs::create_dir(&path).ok()?;
        Some(Self {
            path,
            home: root.join(own),
        })
    }

    /// Starts `command` in the group. A child is born into its parent's group, so this process enters it for
    /// the time of the call: no shell stands between, and what the start costs is counted from its beginning.
    ///
    /// # Errors
    /// The command cannot be started, or this process cannot move.
    pub fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        fs::write(self.path.join("cgroup.procs"), "0")?;
        let child = command.spawn();
        fs::write(self.home.join("cgroup.procs"), "0")?;
        child
    }

    /// `memory.current`, in bytes.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn memory(&self) -> io::Result<u64> {
        let text = fs::read_to_string(self.path.join("memory.current"))?;
        text.trim().parse().map_err(io::Error::other)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // It fails while a process lives in it; an empty group left behind costs nothing.
        let _ = fs::remove_dir(&self.path);
    }
}

fn root(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (path, kind) = (words.next()?, words.next()?);
        (kind == "cgroup2").then(|| path.into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hierarchy_of_version_2_is_found_among_the_mounts() {
        let mounts = "proc /proc proc rw 0 0\ncgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n\
                      cgroup /sys/fs/cgroup cgroup2 rw 0 0\n";
        assert_eq!(root(mounts), Some("/sys/fs/cgroup".into()));
        assert_eq!(root("proc /proc proc rw 0 0\n"), None);
    }

    #[test]
    fn a_child_is_started_from_within_the_group_and_this_process_goes_home() {
        let tree = tempfile::tempdir().expect("a directory");
        let home = tree.path().join("user");
        fs::create_dir(&home).expect("a directory");
        fs::write(tree.path().join("cgroup.controllers"), "cpu memory\n").expect("a file");
        let group = Group::below(tree.path(), "1:name=x:/y\n0::/user\n").expect("a group");
        let mut child = group.spawn(&mut Command::new("true")).expect("it starts");
        child.wait().expect("it ends");
        for group in [&group.path, &home] {
            assert_eq!(
                fs::read(group.join("cgroup.procs")).expect("it moved"),
                b"0"
            );
        }
        fs::write(group.path.join("memory.current"), "4096\n").expect("a file");
        assert_eq!(group.memory().expect("a number"), 4096);
    }

    #[test]
    fn without_the_memory_controller_there_is_no_group() {
        let tree = tempfile::tempdir().expect("a directory");
        fs::write(tree.path().join("cgroup.controllers"), "cpu\n").expect("a file");
        assert!(Group::below(tree.path(), "0::/\n").is_none());
    }
}
