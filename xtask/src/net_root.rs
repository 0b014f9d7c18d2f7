//! The root file system of the network benchmark's guest: busybox, iperf3 and its libraries from Debian's packages,
//! `guest/bench-net-init` as `/init`, in one read-only EROFS image that every VMM takes as its disk.
#![forbid(unsafe_code)]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cache::{Cache, Key};
use crate::error::{Doing, Result};
use crate::steps::{Outcome, Steps};
use crate::{apt, binaries, run};

/// Counts up when the way that it is made changes.
const RECIPE: &str = "1";
const PACKAGES: &[&str] = &[
    "busybox-static",
    "iperf3",
    "libc6",
    "libiperf0",
    "libsctp1",
    "libssl3",
];
/// Where the guest mounts something, or keeps nothing.
const DIRECTORIES: &[&str] = &["dev", "proc", "sys", "tmp"];

/// The step that makes or finds it; gives the image.
pub(crate) fn step(steps: &mut Steps) -> Result<PathBuf> {
    steps.step("root of the network benchmark", || {
        apt::ensure(&[apt::IMAGES])?;
        let path = binaries::root().join("guest/bench-net-init");
        let init = fs::read(&path).doing("read", &path)?;
        let key = Key::of(&[
            ("recipe", RECIPE.as_bytes()),
            ("init", &init),
            ("packages", PACKAGES.join(" ").as_bytes()),
        ]);
        let found =
            Cache::of_user()?.entry("net-root", &key, |directory| make(&init, directory))?;
        Ok((
            found.directory.join("root.erofs"),
            Outcome::from(found.cached),
        ))
    })
}

fn make(init: &[u8], directory: &Path) -> Result<()> {
    let scratch = directory.join("scratch");
    let (archives, tree) = (scratch.join("deb"), scratch.join("tree"));
    for path in [&archives, &tree] {
        fs::create_dir_all(path).doing("create", path)?;
    }
    apt::unpack(PACKAGES, &archives, &tree)?;
    let bin = tree.join("bin");
    let applets = run::captured(Command::new(bin.join("busybox")).arg("--list"))?;
    for applet in applets.lines().filter(|applet| *applet != "busybox") {
        let link = bin.join(applet);
        symlink("busybox", &link).doing("link", &link)?;
    }
    for name in DIRECTORIES {
        let path = tree.join(name);
        fs::create_dir_all(&path).doing("create", &path)?;
    }
    let path = tree.join("init");
    fs::write(&path, init).doing("write", &path)?;
    fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).doing("make executable", &path)?;
    let image = directory.join("root.erofs");
    run::captured(
        Command::new("mkfs.erofs")
            .args(["-T0", "--all-root"])
            .arg(&image)
            .arg(&tree),
    )?;
    fs::remove_dir_all(&scratch).doing("remove", &scratch)
}
