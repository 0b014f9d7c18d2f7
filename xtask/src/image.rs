//! `cargo xtask image NAME`: OCI images for the demo and the tests, made from Debian's packages with umoci.
//!
//! Real files, real programs, no registry: packages are downloaded and unpacked (not installed) into root trees, and each
//! tree becomes a layer. The larger image has what importers get wrong: thousands of files, hard and symbolic links,
//! whiteouts, an opaque directory.
#![forbid(unsafe_code)]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use clap::{Args, ValueEnum};

use crate::cache::{Cache, Found, Key};
use crate::error::{Doing, Result};
use crate::steps::{Outcome, Steps};
use crate::{apt, run};

/// Counts up when the way that images are made changes.
const RECIPE: &str = "2";
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const BUSYBOX: &[&str] = &["busybox-static", "base-files", "netbase"];
const USERLAND: &[&str] = &[
    "base-files",
    "bash",
    "coreutils",
    "dash",
    "debianutils",
    "diffutils",
    "findutils",
    "gawk",
    "grep",
    "gzip",
    "hostname",
    "iproute2",
    "libacl1",
    "libattr1",
    "libblkid1",
    "libbpf1",
    "libbsd0",
    "libbz2-1.0",
    "libc-bin",
    "libc6",
    "libcap2",
    "libcrypt1",
    "libelf1",
    "libgcc-s1",
    "libgcrypt20",
    "libgmp10",
    "libgpg-error0",
    "liblz4-1",
    "liblzma5",
    "libmd0",
    "libmnl0",
    "libmount1",
    "libmpfr6",
    "libpcre2-8-0",
    "libreadline8",
    "libselinux1",
    "libsigsegv2",
    "libsmartcols1",
    "libstdc++6",
    "libsystemd0",
    "libtinfo6",
    "libuuid1",
    "libzstd1",
    "ncurses-base",
    "ncurses-bin",
    "netbase",
    "procps",
    "libproc2-0",
    "sed",
    "tar",
    "util-linux",
    "zlib1g",
];
const PROGRAMS: &[&str] = &[
    "libexpat1",
    "libffi8",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "libsqlite3-0",
    "libssl3",
    "perl-base",
    "python3-minimal",
    "python3.11-minimal",
    "tzdata",
];

/// Which image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Name {
    /// busybox and a few files: two MiB, one layer
    Busybox,
    /// bash, coreutils, Python, Perl, time zones: thousands of files, four layers
    DebianTest,
}

/// Options of `cargo xtask image`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cargo xtask image busybox        print the path of an OCI image layout
  cargo xtask image debian-test    thousands of files in four layers")]
pub(crate) struct Options {
    /// The image
    name: Name,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    apt::ensure(&[apt::IMAGES])?;
    let layout = step(&mut Steps::new(1), options.name)?;
    println!("{}", layout.display());
    Ok(ExitCode::SUCCESS)
}

/// The step that makes or finds an image; gives the directory of its OCI layout.
pub(crate) fn step(steps: &mut Steps, name: Name) -> Result<PathBuf> {
    let title = match name {
        Name::Busybox => "image busybox",
        Name::DebianTest => "image debian-test",
    };
    steps.step(title, || {
        let found = find_or_make(&Cache::of_user()?, name)?;
        Ok((found.directory.join("oci"), Outcome::from(found.cached)))
    })
}

fn find_or_make(cache: &Cache, name: Name) -> Result<Found> {
    let packages: Vec<&str> = match name {
        Name::Busybox => BUSYBOX.to_vec(),
        Name::DebianTest => USERLAND.iter().chain(PROGRAMS).copied().collect(),
    };
    let key = Key::of(&[
        ("recipe", RECIPE.as_bytes()),
        ("image", format!("{name:?}").as_bytes()),
        ("packages", packages.join(" ").as_bytes()),
    ]);
    cache.entry("images", &key, |directory| {
        let scratch = directory.join("scratch");
        fs::create_dir(&scratch).doing("create", &scratch)?;
        let image = Image::new(directory.join("oci"))?;
        match name {
            Name::Busybox => busybox(&image, &scratch)?,
            Name::DebianTest => debian(&image, &scratch)?,
        }
        fs::remove_dir_all(&scratch).doing("remove", &scratch)
    })
}

fn busybox(image: &Image, scratch: &Path) -> Result<()> {
    let tree = unpacked(BUSYBOX, scratch, "root")?;
    let bin = tree.join("bin");
    let applets = run::captured(Command::new(bin.join("busybox")).arg("--list"))?;
    for applet in applets.lines().filter(|applet| *applet != "busybox") {
        let link = bin.join(applet);
        symlink("busybox", &link).doing("link", &link)?;
    }
    finish_root(&tree)?;
    image.layer(&tree, "/")?;
    image.configure("sh")
}

fn debian(image: &Image, scratch: &Path) -> Result<()> {
    let tree = unpacked(USERLAND, scratch, "userland")?;
    link_unless_there("dash", &tree.join("bin/sh"))?;
    link_unless_there("gawk", &tree.join("usr/bin/awk"))?;
    finish_root(&tree)?;
    image.layer(&tree, "/")?;
    let tree = unpacked(PROGRAMS, scratch, "programs")?;
    image.layer(&tree, "/")?;
    image.without("/usr/share/doc")?;
    let notes = scratch.join("man");
    fs::create_dir(&notes).doing("create", &notes)?;
    write(
        &notes.join("README"),
        "The manual pages of the layers below are hidden.\n",
    )?;
    image.replaced(&notes, "/usr/share/man")?;
    image.configure("bash")
}

/// Downloads packages and unpacks them into one tree.
fn unpacked(packages: &[&str], scratch: &Path, name: &str) -> Result<PathBuf> {
    let (archives, tree) = (scratch.join(format!("{name}-deb")), scratch.join(name));
    for path in [&archives, &tree] {
        fs::create_dir(path).doing("create", path)?;
    }
    apt::unpack(packages, &archives, &tree)?;
    Ok(tree)
}

/// What installation scripts would have made.
fn finish_root(tree: &Path) -> Result<()> {
    for (name, mode) in [
        ("proc", 0o555),
        ("sys", 0o555),
        ("dev", 0o755),
        ("tmp", 0o1777),
        ("root", 0o700),
    ] {
        let path = tree.join(name);
        fs::create_dir_all(&path).doing("create", &path)?;
        fs::set_permissions(&path, PermissionsExt::from_mode(mode))
            .doing("set the mode of", &path)?;
    }
    let users = "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/var/www:/bin/sh\n\
                 nobody:x:65534:65534:nobody:/nonexistent:/bin/sh\n";
    let groups = "root:x:0:\nadm:x:4:www-data\nwww-data:x:33:\nnogroup:x:65534:\n";
    write(&tree.join("etc/passwd"), users)?;
    write(&tree.join("etc/group"), groups)
}

fn link_unless_there(target: &str, link: &Path) -> Result<()> {
    if link.symlink_metadata().is_ok() {
        return Ok(());
    }
    symlink(target, link).doing("link", link)
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).doing("write", path)
}

/// An OCI image layout with one image, tagged `latest`.
struct Image {
    tagged: String,
}

impl Image {
    fn new(layout: PathBuf) -> Result<Self> {
        run::captured(
            Command::new("umoci")
                .arg("init")
                .arg("--layout")
                .arg(&layout),
        )?;
        let image = Self {
            tagged: format!("{}:latest", layout.display()),
        };
        run::captured(Command::new("umoci").args(["new", "--image", &image.tagged]))?;
        Ok(image)
    }

    fn insert(&self) -> Command {
        let mut command = Command::new("umoci");
        command.args(["insert", "--image", &self.tagged]);
        if !rustix::process::geteuid().is_root() {
            // The tree is this user's: in the image it is root's.
            command.arg("--rootless");
        }
        command
    }

    /// Adds a layer with a tree at `target`.
    fn layer(&self, tree: &Path, target: &str) -> Result<()> {
        run::captured(self.insert().arg(tree).arg(target)).map(drop)
    }

    /// Adds a layer that hides `target` and puts a tree there.
    fn replaced(&self, tree: &Path, target: &str) -> Result<()> {
        run::captured(self.insert().arg("--opaque").arg(tree).arg(target)).map(drop)
    }

    /// Adds a layer that removes `target`.
    fn without(&self, target: &str) -> Result<()> {
        run::captured(self.insert().args(["--whiteout", target])).map(drop)
    }

    fn configure(&self, shell: &str) -> Result<()> {
        let environment = format!("PATH={PATH}");
        let mut command = Command::new("umoci");
        command.args([
            "config",
            "--image",
            &self.tagged,
            "--config.env",
            &environment,
        ]);
        run::captured(command.args(["--config.cmd", shell])).map(drop)
    }
}
