use std::collections::BTreeMap;
use std::io::Write;
use std::process::{Command, Stdio};

use super::*;
use crate::vmm::memory;
use crate::vmm::spec::{FileSource, HostLimits, InitramfsFile, MachineSpec};

const INIT: &[u8] = b"#!/bin/sh\nexit\n";

fn spec(memory_mib: u32, files: &[(&str, &str)]) -> ValidSpec {
    let json = format!(r#"{{"kernel":{{"path":"/k"}},"cpus":1,"memory_mib":{memory_mib}}}"#);
    let mut spec = MachineSpec::from_json(json.as_bytes()).unwrap();
    let files = files.iter().map(|(path, content)| InitramfsFile {
        path: (*path).into(),
        content: (*content).into(),
    });
    let init = FileSource::Path("/i".into());
    spec.initramfs = Some(InitramfsSpec {
        init,
        files: files.collect(),
    });
    spec.validate(HostLimits { memory: 1 << 40 }).unwrap()
}

fn build(spec: &ValidSpec, init: &[u8]) -> Result<Vec<u8>, BootError> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(init).unwrap();
    let init = Opened::for_reading(&FileSource::Path(file.path().into()), "init").unwrap();
    let memory = memory::allocate(spec.memory_bytes(), false).unwrap();
    let ramdisk = load(&memory, spec.initramfs.as_ref().unwrap(), init, spec)?;
    assert_eq!(ramdisk.address % PAGE, 0);
    assert!(ramdisk.address >= layout::HIGH_MEMORY);
    let mut archive = vec![0; ramdisk.length as usize];
    memory
        .read_slice(&mut archive, GuestAddress(ramdisk.address))
        .unwrap();
    Ok(archive)
}

/// Name → (mode, content), as a reader of the format finds them.
fn parse(archive: &[u8]) -> BTreeMap<String, (u32, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut rest = archive;
    loop {
        assert_eq!(&rest[..6], b"070701");
        let field = |n: usize| {
            let digits = std::str::from_utf8(&rest[6 + 8 * n..14 + 8 * n]).unwrap();
            u32::from_str_radix(digits, 16).unwrap()
        };
        let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
        let name = String::from_utf8(rest[110..110 + name_size - 1].to_vec()).unwrap();
        if name == TRAILER {
            return found;
        }
        let start = (110 + name_size).next_multiple_of(4);
        assert!(
            found
                .insert(name, (mode, rest[start..start + size].to_vec()))
                .is_none()
        );
        rest = &rest[start + size.next_multiple_of(4)..];
    }
}

#[test]
fn the_archive_holds_init_and_the_files_with_their_directories() {
    let spec = spec(
        4,
        &[("cube/pod.json", "{}"), ("cube/deep/er", "x"), ("top", "")],
    );
    let found = parse(&build(&spec, INIT).unwrap());
    let expected = [
        ("cube", DIRECTORY, b"".as_slice()),
        ("cube/deep", DIRECTORY, b""),
        ("cube/deep/er", PRIVATE_FILE, b"x"),
        ("cube/pod.json", PRIVATE_FILE, b"{}"),
        ("init", EXECUTABLE, INIT),
        ("top", PRIVATE_FILE, b""),
    ];
    let expected =
        expected.map(|(name, mode, content)| (name.to_string(), (mode, content.to_vec())));
    assert_eq!(found, BTreeMap::from(expected));
}

#[test]
fn cpio_reads_the_archive() {
    let archive = build(&spec(4, &[("cube/pod.json", "{}")]), INIT).unwrap();
    let mut cpio = Command::new("cpio")
        .args(["--list", "--quiet"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the test needs cpio (Debian package `cpio`)");
    cpio.stdin.take().unwrap().write_all(&archive).unwrap();
    let output = cpio.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        "init\ncube\ncube/pod.json\n"
    );
}

#[test]
fn what_does_not_fit_into_memory_is_refused() {
    let error = build(&spec(2, &[]), &vec![0; 1 << 20])
        .unwrap_err()
        .to_string();
    assert!(error.contains("does not fit into 2 MiB"), "{error}");
    build(&spec(3, &[]), &vec![0; 1 << 20]).unwrap();
}

#[test]
fn a_kernel_that_reaches_into_it_is_refused() {
    use crate::vmm::boot::{EntryPoint, LoadedKernel, Rest};
    let ramdisk = Ramdisk {
        address: 0x20_0000,
        length: 7,
    };
    let entry = |end| {
        let ramdisk = Some(ramdisk);
        let kernel = LoadedKernel { entry: 5, end };
        Rest { ramdisk }.entry(kernel, &spec(4, &[]))
    };
    assert_eq!(entry(0x20_0000).unwrap(), EntryPoint(5));
    let error = entry(0x20_0001).unwrap_err().to_string();
    assert!(error.contains("7 bytes does not fit into 4 MiB"), "{error}");
}

proptest::proptest! {
    #[test]
    fn any_names_and_contents_survive(files in proptest::collection::btree_map("[a-z]{1,9}", ".{0,40}", 0..6)) {
        let files: Vec<_> = files
            .iter()
            .filter(|(name, _)| *name != "init")
            .map(|(name, content)| (name.as_str(), content.as_str()))
            .collect();
        let found = parse(&build(&spec(4, &files), INIT).unwrap());
        proptest::prop_assert_eq!(found.len(), files.len() + 1);
        for (name, content) in files {
            proptest::prop_assert_eq!(&found[name].1, content.as_bytes());
        }
    }
}

/// 128 MiB: the archive's huge page, and the descriptors below. What the guest touches does not grow by it, which
/// the suite's budget holds.
#[test]
fn huge_pages_hold_the_archive_and_the_descriptors_below_it() {
    const MIB: u64 = 1 << 20;
    let used = |address: u64, memory| wholly_used(address * MIB, memory * MIB).map(in_mib);
    assert_eq!(used(127, 128), [126..128, 124..126]);
    assert_eq!(used(255, 256), [254..256, 250..254]);
    // The descriptors of the last 64 MiB, which are half a section, come after those of the whole one.
    assert_eq!(used(191, 192), [190..192, 186..188]);
    assert_eq!(used(63, 64), [62..64, 60..60]);
    // The archive lies at the end of low memory, the kernel begins at the end of all.
    assert_eq!(used(3070, 4096), [3070..3072, 5054..5118]);
}

fn in_mib(range: Range<u64>) -> Range<u64> {
    assert_eq!(range.start % (1 << 20), 0);
    range.start >> 20..range.end >> 20
}

proptest::proptest! {
    #[test]
    fn huge_pages_are_asked_for_inside_of_memory(mib in 2u64..8192, below in 0u64..64) {
        let low = (mib << 20).min(layout::HOLE_START);
        let address = low.saturating_sub(below << 18) & !(PAGE - 1);
        for range in wholly_used(address, mib << 20) {
            let within = |(start, length): &(u64, u64)| *start <= range.start && range.end <= start + length;
            proptest::prop_assert!(range.is_empty() || memory::ranges(mib << 20).iter().any(within), "{:?}", range);
        }
    }
}
