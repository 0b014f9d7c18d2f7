#![forbid(unsafe_code)]
//! The volume is a directory of the test's own, entered by a thread with a working directory of its own.

use std::time::Duration;

use proptest::prelude::*;
use rustix::thread::UnshareFlags;

use super::*;

fn entry(path: &str, content: &str) -> FileEntry {
    FileEntry {
        path: path.into(),
        mode: 0o640,
        uid: 0,
        gid: 0,
        size: content.len() as u64,
    }
}

fn stream(files: &[(&str, &str)]) -> Vec<u8> {
    let set = FileSet {
        files: files
            .iter()
            .map(|(path, content)| entry(path, content))
            .collect(),
    };
    let mut bytes = frame::encode(&set).unwrap();
    bytes.extend(files.iter().flat_map(|(_, content)| content.bytes()));
    bytes
}

#[test]
fn timestamps_are_dates() {
    let at = |seconds| timestamp(UNIX_EPOCH + Duration::new(seconds, 5));
    assert_eq!(at(0), "1970_01_01_00_00_00.000000005");
    assert_eq!(at(951_782_399), "2000_02_28_23_59_59.000000005");
    assert_eq!(at(951_782_400), "2000_02_29_00_00_00.000000005");
    assert_eq!(at(1_795_572_480), "2026_11_25_02_08_00.000000005");
    assert_eq!(at(4_107_542_400), "2100_03_01_00_00_00.000000005");
}

#[test]
fn names_that_climb_or_hide_are_refused() {
    for path in [
        "", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "..data/x", "a/..b", "a\0",
    ] {
        let set = FileSet {
            files: vec![entry(path, "")],
        };
        assert!(validate(&set).is_err(), "{path:?}");
    }
    let set = FileSet {
        files: vec![entry("a", ""), entry(".hidden/b", ""), entry("a", "")],
    };
    assert!(validate(&set).unwrap_err().to_string().contains("twice"));
    assert!(
        validate(&FileSet {
            files: set.files[..2].to_vec()
        })
        .is_ok()
    );
}

#[test]
fn a_set_has_its_limits() {
    let mut large = entry("a", "");
    large.size = u64::MAX;
    let files = vec![large, entry("b", "x")];
    assert!(validate(&FileSet { files }).is_err());
    let files = (0..=MAX_FILES).map(|n| entry(&n.to_string(), "")).collect();
    assert!(validate(&FileSet { files }).is_err());
}

proptest! {
    #[test]
    fn any_bytes_are_an_error_before_anything_is_written(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut rest = &bytes[..];
        // No prefix of noise is the frame of a set.
        prop_assert!(replace_here(&mut rest).is_err());
    }
}

/// Runs `check` in a directory of its own, if this user may: only root has a root to change.
fn in_a_volume(check: impl FnOnce() + Send + 'static) {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let directory = std::env::temp_dir().join(format!("cube-files-{}", std::process::id()));
    let _ = fs::remove_dir_all(&directory);
    fs::create_dir_all(&directory).unwrap();
    let inside = directory.clone();
    let thread = std::thread::spawn(move || {
        // The working directory becomes this thread's alone.
        #[expect(deprecated, reason = "FS has no consequences for memory safety")]
        rustix::thread::unshare(UnshareFlags::FS).unwrap();
        rustix::process::chdir(&inside).unwrap();
        check();
    });
    thread.join().unwrap();
    fs::remove_dir_all(directory).unwrap();
}

fn names() -> BTreeSet<String> {
    let entries = fs::read_dir(".").unwrap().flatten();
    entries
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect()
}

#[test]
fn a_set_replaces_another_and_a_broken_one_leaves_it() {
    in_a_volume(|| {
        replace_here(&mut &stream(&[("a", "one"), ("dir/b", "two"), ("gone", "x")])[..]).unwrap();
        assert_eq!(fs::read_to_string("a").unwrap(), "one");
        assert_eq!(fs::read_to_string("dir/b").unwrap(), "two");
        let mode = rustix::fs::stat("a").unwrap().st_mode & 0o7777;
        assert_eq!(mode, 0o640);
        let first = fs::read_link(DATA).unwrap();

        // What a container with the volume mounted writable could do.
        symlink("/etc", NEXT).unwrap();
        replace_here(&mut &stream(&[("a", "three"), ("dir/b", "four")])[..]).unwrap();
        assert_eq!(fs::read_to_string("a").unwrap(), "three");
        let second = fs::read_link(DATA).unwrap();
        assert_ne!(first, second);
        let expected = ["..data", second.to_str().unwrap(), "a", "dir"];
        assert_eq!(names(), expected.map(str::to_owned).into());

        let whole = stream(&[("a", "five"), ("new", "six")]);
        for length in 0..whole.len() {
            assert!(replace_here(&mut &whole[..length]).is_err());
            assert_eq!(
                names(),
                expected.map(str::to_owned).into(),
                "cut at {length}"
            );
        }
        assert_eq!(fs::read_to_string("a").unwrap(), "three");
    });
}
