//! Real trees: the files of Debian packages as they are installed here, and the large image of the
//! testbed if there is one.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use cube::image::tree_digest;

use crate::archive::layout::{Compression, write_layout};
use crate::place::Place;

/// Packages that every Debian has, with links, set-uid programs, and thousands of files.
const PACKAGES: [&str; 10] = [
    "base-files",
    "bash",
    "coreutils",
    "dpkg",
    "libc6",
    "login",
    "mount",
    "perl-base",
    "tar",
    "util-linux",
];

/// The files of a package, and the directories that they are in, relative to the root.
fn files(package: &str) -> BTreeSet<String> {
    let output = Command::new("dpkg")
        .args(["-L", package])
        .output()
        .expect("this is a Debian");
    let list = String::from_utf8(output.stdout).unwrap();
    let paths = list
        .lines()
        .filter(|line| line.starts_with('/') && *line != "/.");
    paths
        .filter(|path| fs::symlink_metadata(path).is_ok())
        .map(|path| path[1..].to_owned())
        .collect()
}

/// A tar of these files of this machine.
fn layer(place: &Place, paths: &BTreeSet<String>) -> Vec<u8> {
    let (list, archive) = (place.path("list"), place.path("layer.tar"));
    fs::write(
        &list,
        paths
            .iter()
            .map(|path| format!("{path}\n"))
            .collect::<String>(),
    )
    .unwrap();
    let mut command = Command::new("tar");
    command
        .args([
            "--format=posix",
            "--no-recursion",
            "--xattrs",
            "-C",
            "/",
            "-cf",
        ])
        .arg(&archive);
    let output = command.arg("-T").arg(&list).output().unwrap();
    // 1: a file changed meanwhile, as directories of a living machine do. The archive is whole.
    assert!(matches!(output.status.code(), Some(0 | 1)), "{output:?}");
    fs::read(&archive).unwrap()
}

/// Imports an image and compares the disk with its layers, then that a second import reads nothing.
fn check(place: &Place, path: &Path) -> usize {
    let record = place.import(path).unwrap();
    let (found, expected) = (
        place.open(&record).listing(),
        tree_digest::of_layers(path).unwrap(),
    );
    assert_eq!(found.differences(&expected), Vec::<Vec<u8>>::new());
    assert_eq!(found.digest(), expected.digest());
    found.len()
}

#[test]
fn an_image_of_real_packages_is_read_back_whole() {
    let place = Place::new();
    let (lower, upper) = PACKAGES.split_at(6);
    let layers = [lower, upper].map(|packages| {
        let paths = packages.iter().flat_map(|package| files(package)).collect();
        layer(&place, &paths)
    });
    let path = place.path("debian");
    write_layout(&path, &layers, Compression::Gzip);
    assert!(check(&place, &path) > 1500);
}

#[test]
fn the_disk_holds_what_is_installed_here() {
    let place = Place::new();
    let paths = files("perl-base");
    let path = place.path("perl");
    write_layout(&path, &[layer(&place, &paths)], Compression::Zstd);
    let image = place.open(&place.import(&path).unwrap());
    let mut compared = 0;
    for file in paths.iter().filter(|file| {
        fs::symlink_metadata(Path::new("/").join(file))
            .unwrap()
            .is_file()
    }) {
        // Through the directories of the disk, the way a guest goes.
        if let Some(inode) = image.find(file).filter(|inode| inode.mode >> 12 == 8) {
            assert!(
                image.content(file) == fs::read(Path::new("/").join(file)).unwrap(),
                "{file}"
            );
            assert_eq!(
                u32::from(inode.mode & 0o7777),
                (fs::metadata(Path::new("/").join(file)).unwrap().mode() & 0o7777)
            );
            compared += 1;
        }
    }
    assert!(compared > 100, "{compared} files");
}

#[test]
fn the_large_image_of_the_testbed_is_read_back_whole() {
    // Outside the testbed there is none, and the tests above do the same on a smaller one.
    if let Some(path) = std::env::var_os("CUBE_TEST_IMAGE_LARGE").map(PathBuf::from) {
        check(&Place::new(), &path);
    }
}
