//! What tar programs write: sparse files, long names, large numbers, attributes; and the kinds of
//! images and compression.

use std::fs::{self, File};
use std::io::Cursor;
use std::os::unix::fs::FileExt;
use std::process::Command;

use cube::image::tar::{EntryKind, Stream, TarReader};
use cube::image::{Digest, tree_digest};
use serde_json::json;

use crate::archive::layout::{self, Compression, config, descriptor, pack, write_layout};
use crate::archive::tar::{Entry, SparseFormat, header, seal, tar};
use crate::place::Place;

/// A file with holes at the start, in the middle and at the end, pieces not aligned to blocks.
fn sparse_file(path: &std::path::Path) -> Vec<u8> {
    let file = File::create_new(path).unwrap();
    file.set_len(3 << 20).unwrap();
    for index in 0..60_u64 {
        let text = format!("piece {index}").repeat(900);
        file.write_all_at(text.as_bytes(), 4096 * 3 + index * 40_960)
            .unwrap();
    }
    fs::read(path).unwrap()
}

#[test]
fn sparse_files_of_gnu_tar_in_all_formats() {
    for format in [
        "--format=gnu",
        "--format=posix --sparse-version=0.0",
        "--format=posix --sparse-version=0.1",
        "--format=posix --sparse-version=1.0",
    ] {
        let place = Place::new();
        let tree = place.path("tree");
        fs::create_dir(&tree).unwrap();
        let content = sparse_file(&tree.join("holes"));
        fs::write(tree.join("after"), "still here").unwrap();
        let archive = place.path("layer.tar");
        let status = Command::new("tar")
            .args(format.split(' '))
            .args(["--sparse", "--hole-detection=raw", "-cf"])
            .arg(&archive)
            .arg("-C")
            .arg(&tree)
            .args(["holes", "after"])
            .status();
        assert!(status.unwrap().success());
        let bytes = fs::read(&archive).unwrap();
        assert!(bytes.len() < 1 << 20, "{format}: the archive is not sparse");
        let image = place.open(&place.import_tars(&[bytes]).unwrap());
        assert!(image.content("holes") == content, "{format}");
        assert_eq!(image.content("after"), b"still here", "{format}");
        assert_eq!(image.find("holes").unwrap().layout, 4);
    }
}

#[test]
fn a_terabyte_of_hole_costs_nothing() {
    let place = Place::new();
    let size = 1 << 40;
    let pieces = vec![(0, 5), (size / 2 + 7, 3), (size - 1, 1)];
    let mut entry = Entry::file("big", b"startmidE");
    entry.sparse = Some((size, pieces, SparseFormat::Pax10));
    let mut empty = Entry::file("empty", b"");
    empty.sparse = Some((size, vec![], SparseFormat::Pax10));
    let image = place.build(&[&[entry, empty]]);
    let inode = image.find("big").unwrap();
    assert_eq!(inode.size, size);
    let read = |at: u64, count: usize| {
        let (place_of, _) = image.map(&inode, at);
        let mut bytes = vec![0; count];
        let disk = File::open(place.path("disk")).unwrap();
        disk.read_exact_at(&mut bytes, place_of.expect("data"))
            .unwrap();
        bytes
    };
    assert_eq!(read(0, 6), b"start\0");
    assert_eq!(read(size / 2 + 6, 5), b"\0mid\0");
    assert_eq!(read(size - 2, 2), b"\0E");
    assert_eq!(image.map(&inode, size / 4).0, None);
    assert_eq!(image.map(&image.find("empty").unwrap(), 1 << 30).0, None);
    let metadata = fs::metadata(&place.store.list().unwrap()[0].disk_parts()[0].0).unwrap();
    assert!(metadata.len() < 1 << 20);
}

#[test]
fn a_file_of_gnu_tar_larger_than_octal_sizes() {
    // 9 GiB does not fit 11 octal digits: base 256 in GNU archives, a PAX record in POSIX ones.
    let size = 9_u64 << 30;
    let mut gnu = header(&Entry::new("big", b'0'), b'0', 0);
    gnu[124..136].copy_from_slice(&[&[0x80, 0, 0, 0][..], &size.to_be_bytes()].concat());
    let gnu = seal(gnu).to_vec();
    let record = format!("20 size={size}\n");
    assert_eq!(record.len(), 19);
    let record = format!("19 size={size}\n");
    let mut posix = seal(header(&Entry::new("pax", b'x'), b'x', 19)).to_vec();
    posix.extend_from_slice(record.as_bytes());
    posix.resize(1024, 0);
    posix.extend_from_slice(&seal(header(&Entry::new("big", b'0'), b'0', 0)));
    for bytes in [gnu, posix] {
        let mut reader = TarReader::new(Stream(Cursor::new(bytes)));
        let entry = reader.next_entry().unwrap().unwrap();
        assert_eq!((entry.kind, entry.size), (EntryKind::Regular, size));
        assert_eq!(reader.remaining(), size);
        let error = reader.next_entry().unwrap_err().to_string();
        assert_eq!(error, "is truncated: it ends inside entry `big`");
    }
}

#[test]
fn names_times_owners_and_attributes_of_gnu_tar() {
    for format in ["gnu", "posix"] {
        let place = Place::new();
        let tree = place.path("tree");
        let long = "n".repeat(255);
        let deep = tree.join("a".repeat(200)).join("b".repeat(200)).join(&long);
        fs::create_dir_all(deep.parent().unwrap()).unwrap();
        fs::write(&deep, "deep").unwrap();
        std::os::unix::fs::symlink("t".repeat(4000), tree.join("long-link")).unwrap();
        fs::hard_link(&deep, tree.join("other-name")).unwrap();
        fs::write(tree.join("plain"), vec![7; 5000]).unwrap();
        fs::create_dir(tree.join("empty")).unwrap();
        assert!(
            Command::new("mkfifo")
                .arg(tree.join("fifo"))
                .status()
                .unwrap()
                .success()
        );
        let archive = place.path("layer.tar");
        let mut command = Command::new("tar");
        command
            .arg(format!("--format={format}"))
            .arg("-cf")
            .arg(&archive)
            .arg("-C")
            .arg(&tree);
        assert!(command.arg(".").status().unwrap().success());
        let record = place.import_tars(&[fs::read(&archive).unwrap()]).unwrap();
        let found = place.open(&record).listing();
        let expected = tree_digest::of_directory(&tree, &[]).unwrap();
        assert_eq!(found.differences(&expected), [[0; 0]; 0], "{format}");
        assert_eq!(found.digest(), expected.digest(), "{format}");
    }
}

#[test]
fn layouts_and_archives_compressed_and_not_give_the_same_disk() {
    let tars = [
        tar(&[Entry::directory("d"), Entry::file("d/a", vec![1; 9000])]),
        tar(&[Entry::file("d/b", b"small")]),
    ];
    let mut metadata = Vec::new();
    for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
        let place = Place::new();
        let layout = place.path("layout");
        write_layout(&layout, &tars, compression);
        let archive = place.path("archive.tar");
        pack(&layout, &archive);
        for path in [&layout, &archive] {
            let fresh = Place::new();
            let record = fresh.import(path).unwrap();
            assert_eq!(fresh.open(&record).content("d/b"), b"small");
            metadata.push(record.metadata.digest);
        }
    }
    assert!(metadata.iter().all(|digest| *digest == metadata[0]));
}

#[test]
fn docker_archives_old_and_new() {
    let place = Place::new();
    let tars = [
        tar(&[Entry::file("a", b"1")]),
        tar(&[Entry::file("b", b"2")]),
    ];
    let diff_ids: Vec<_> = tars.iter().map(|tar| Digest::of(tar)).collect();
    let config = config(&diff_ids).to_string();
    let name = format!("{}.json", Digest::of(config.as_bytes()).hex());
    let manifest = json!([{
        "Config": name, "RepoTags": ["example.org/app:1"], "Layers": ["one/layer.tar", "two/layer.tar"],
    }]);
    // Old archives hold a layer once and link to it.
    let entries = [
        Entry::file(&name, config),
        Entry::directory("one/"),
        Entry::file("one/layer.tar", &tars[0]),
        Entry::file("three/layer.tar", &tars[1]),
        Entry::link("two/layer.tar", b'2', "../three/layer.tar"),
        Entry::file("manifest.json", manifest.to_string()),
    ];
    let path = place.path("saved.tar");
    fs::write(&path, tar(&entries)).unwrap();
    let record = place.import(&path).unwrap();
    assert_eq!(record.names, ["example.org/app:1"]);
    assert_eq!(record.config.cmd, ["/bin/sh"]);
    assert_eq!(record.config.working_dir, "/srv");
    let image = place.open(&record);
    assert_eq!(
        (image.content("a"), image.content("b")),
        (b"1".to_vec(), b"2".to_vec())
    );
}

#[test]
fn the_platform_is_chosen_from_an_index() {
    let place = Place::new();
    let path = place.path("layout");
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let mut manifests = Vec::new();
    for (architecture, content) in [("arm64", "wrong"), ("amd64", "right")] {
        let bytes = tar(&[Entry::file("which", content)]);
        let mut config = config(&[Digest::of(&bytes)]);
        config["architecture"] = architecture.into();
        let layer = descriptor("application/vnd.oci.image.layer.v1.tar", &path, &bytes);
        let config = config.to_string();
        let config = descriptor(
            "application/vnd.oci.image.config.v1+json",
            &path,
            config.as_bytes(),
        );
        let manifest =
            json!({ "schemaVersion": 2, "mediaType": kind, "config": config, "layers": [layer] });
        let mut manifest = descriptor(kind, &path, manifest.to_string().as_bytes());
        manifest["platform"] = json!({ "os": "linux", "architecture": architecture });
        manifests.push(manifest);
    }
    let mut attestation = manifests[0].clone();
    attestation["platform"] = json!({ "os": "unknown", "architecture": "unknown" });
    manifests.push(attestation);
    let inner = json!({ "schemaVersion": 2, "manifests": manifests }).to_string();
    let outer = descriptor(
        "application/vnd.oci.image.index.v1+json",
        &path,
        inner.as_bytes(),
    );
    layout::write_index(&path, &[outer]);
    let image = place.open(&place.import(&path).unwrap());
    assert_eq!(image.content("which"), b"right");
}

#[test]
fn one_of_several_images_is_chosen_by_tag() {
    let place = Place::new();
    let path = place.path("layout");
    let mut manifests = Vec::new();
    for tag in ["one", "two"] {
        write_layout(&path, &[tar(&[Entry::file("tag", tag)])], Compression::None);
        let index: serde_json::Value =
            serde_json::from_slice(&fs::read(path.join("index.json")).unwrap()).unwrap();
        let mut manifest = index["manifests"][0].clone();
        manifest["annotations"]["org.opencontainers.image.ref.name"] = tag.into();
        manifests.push(manifest);
    }
    layout::write_index(&path, &manifests);
    let error = place.import(&path).unwrap_err().to_string();
    assert!(
        error.ends_with("write a colon and a tag after the path, one of one, two"),
        "{error}"
    );
    let record = place.import(&place.path("layout:two")).unwrap();
    assert_eq!(record.names, ["layout:two"]);
    assert_eq!(place.open(&record).content("tag"), b"two");
}

/// `umoci insert` ends a layer with the last byte of its last file.
#[test]
fn a_layer_may_end_with_its_last_files_content() {
    let place = Place::new();
    let whole = tar(&[Entry::file("a", b"first"), Entry::file("b", vec![7; 700])]);
    let end = 512 + 512 + 512 + 700;
    for length in [end, end + 1, end + 323] {
        let record = place.import_tars(&[whole[..length].to_vec()]).unwrap();
        assert_eq!(place.open(&record).content("b"), vec![7; 700]);
    }
    let error = Place::new().refuse_tars(&[whole[..end - 1].to_vec()]);
    assert!(error.ends_with("it ends inside entry `b`"), "{error}");
}
