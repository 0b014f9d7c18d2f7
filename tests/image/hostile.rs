//! Bad images: each gets a sentence that names the layer and the fault, and leaves nothing.

use std::fs;
use std::path::Path;

use cube::image::{Digest, tree_digest};
use proptest::prelude::*;

use crate::archive::layout::{
    Compression, blob, compress, config, descriptor, write_layout, write_manifest,
};
use crate::archive::tar::{Entry, SparseFormat, tar};
use crate::place::Place;

#[track_caller]
fn refused(layers: &[&[Entry]], ending: &str) {
    let error = Place::new().refuse(layers);
    let number = layers.len();
    assert!(
        error.starts_with(&format!("layer {number} of /")),
        "{error}"
    );
    assert!(error.ends_with(ending), "{error}");
}

#[test]
fn paths_that_lead_out_or_are_too_long() {
    refused(
        &[&[Entry::file("a/../../b", b"")]],
        "has the entry `a/../../b`, whose path has a `..` component",
    );
    refused(
        &[&[Entry::file("/etc/passwd", b"")]],
        "has the entry `/etc/passwd`, whose path is absolute; paths in a layer count from the image's root",
    );
    refused(
        &[&[Entry::file("x".repeat(256), b"")]],
        "whose path has a component longer than 255 bytes",
    );
    refused(
        &[&[Entry::file("x/".repeat(2100) + "y", b"")]],
        "whose path is longer than 4,095 bytes",
    );
    refused(
        &[&[Entry::link("a", b'1', "../b")]],
        "a hard link to `../b`, whose path has a `..` component",
    );
}

#[test]
fn whiteouts_of_nothing() {
    refused(
        &[&[Entry::file("a/.wh.", b"")]],
        "a whiteout of nothing: `.wh.` must be followed by a name",
    );
    refused(
        &[&[Entry::file("a/.wh...", b"")]],
        "a whiteout of nothing: `.wh.` must be followed by a name",
    );
    refused(
        &[&[Entry::file("a", b""), Entry::file(".wh.a", b"")]],
        "has the entry `a`, a whiteout of nothing: no layer below has that path",
    );
    refused(
        &[&[Entry::file("d/a", b"")], &[Entry::file("d/.wh.b", b"")]],
        "has the entry `d/b`, a whiteout of nothing: no layer below has that path",
    );
}

#[test]
fn links_to_nothing() {
    refused(
        &[&[Entry::link("a", b'1', "b")]],
        "has the entry `a`, a hard link to `b`, which does not exist",
    );
    refused(
        &[&[Entry::directory("d"), Entry::link("a", b'1', "d")]],
        "a hard link to `d`, which is a directory",
    );
    refused(
        &[&[Entry::link("a", b'2', "")]],
        "a symbolic link to nothing",
    );
    refused(
        &[&[
            Entry::link("a", b'2', "b"),
            Entry::link("b", b'2', "a"),
            Entry::file("a/c", b""),
        ]],
        "has the entry `a/c`, whose path goes through too many symbolic links",
    );
    refused(
        &[&[Entry::file("a", b""), Entry::file("a/b", b"")]],
        "has the entry `a/b`, one of whose parents is not a directory",
    );
}

#[test]
fn what_cannot_be_stored() {
    refused(
        &[&[Entry::file(".", b"")]],
        "which puts something that is not a directory at the root",
    );
    refused(
        &[&[Entry::new("a", b'Q')]],
        "an entry of a type that is not supported",
    );
    let mut entry = Entry::file("a", b"");
    entry.xattrs = vec![(b"user.a".to_vec(), vec![0; 65_536])];
    refused(
        &[&[entry.clone()]],
        "with the extended attribute `user.a`, whose value is longer than 65,535 bytes",
    );
    entry.xattrs = (0..5)
        .map(|i| (format!("user.{i}").into(), vec![0; 60_000]))
        .collect();
    refused(
        &[&[entry]],
        "whose extended attributes are longer than 256 KiB together",
    );
    let mut entry = Entry::file("a", b"x");
    entry.sparse = Some((
        u64::MAX / 2,
        vec![(u64::MAX / 2 - 1, 1)],
        SparseFormat::Pax10,
    ));
    let error = Place::new().refuse(&[&[entry]]);
    assert!(error.contains("do not fit into the 16 TiB"), "{error}");
}

#[test]
fn sparse_maps_that_lie() {
    for (size, pieces, fault) in [
        (
            10,
            vec![(0, 4), (2, 4)],
            "pieces overlap or are out of order",
        ),
        (5, vec![(0, 4), (4, 4)], "reaches past the file's end"),
        (10, vec![(0, 4)], "does not add up to the bytes stored"),
        (u64::MAX, vec![(u64::MAX, 8)], "a sparse map out of range"),
    ] {
        let mut entry = Entry::file("a", b"12345678");
        entry.sparse = Some((size, pieces, SparseFormat::Pax10));
        let error = Place::new().refuse(&[&[entry]]);
        assert!(
            error.contains("entry `a`") && error.contains(fault),
            "{error}"
        );
    }
}

#[test]
fn archives_that_end_early() {
    let whole = tar(&[Entry::file("a", vec![1; 3000])]);
    let error = Place::new().refuse_tars(&[whole[..2000].to_vec()]);
    assert!(
        error.ends_with("is truncated: it ends inside entry `a`"),
        "{error}"
    );
    let error = Place::new().refuse_tars(&[whole[..300].to_vec()]);
    assert!(
        error.ends_with("is truncated: it ends inside a header"),
        "{error}"
    );
    let error =
        Place::new().refuse_tars(&[b"no tar at all, but long enough to be a header ".repeat(20)]);
    assert!(
        error.contains("checksum is wrong; is this a tar archive?"),
        "{error}"
    );
}

/// Writes an image whose one layer's blob is `stored` where the manifest promises `promised`.
fn swap(place: &Place, promised: &[u8], stored: &[u8], diff_id: Digest) -> String {
    let path = place.path("layout");
    let layer = descriptor("application/vnd.oci.image.layer.v1.tar", &path, promised);
    write_manifest(&path, &config(&[diff_id]), &[layer]);
    fs::write(
        path.join("blobs/sha256").join(Digest::of(promised).hex()),
        stored,
    )
    .unwrap();
    let error = place.import(&path).unwrap_err().to_string();
    assert!(tree_digest::of_layers(&path).is_err());
    assert!(place.store.list().unwrap().is_empty());
    error
}

#[test]
fn layers_with_the_wrong_digest_or_size() {
    let (good, bad) = (
        tar(&[Entry::file("a", b"1")]),
        tar(&[Entry::file("a", b"2")]),
    );
    let error = swap(&Place::new(), &good, &bad, Digest::of(&good));
    assert!(
        error.contains("does not have the digest that the manifest gives"),
        "{error}"
    );
    // A wrong digest explains all else that is wrong.
    let garbage = vec![0x55; good.len()];
    let error = swap(&Place::new(), &good, &garbage, Digest::of(&good));
    assert!(
        error.contains("does not have the digest that the manifest gives"),
        "{error}"
    );
    let error = swap(
        &Place::new(),
        &good,
        &good[..good.len() - 512],
        Digest::of(&good),
    );
    assert!(
        error.ends_with("is 1536 bytes long, and the manifest says 2048"),
        "{error}"
    );
    let error = swap(&Place::new(), &good, &good, Digest::of(&bad));
    assert!(error.contains("does not have the diff id"), "{error}");
}

#[test]
fn compressed_layers_that_are_damaged() {
    for compression in [Compression::Gzip, Compression::Zstd] {
        let good = compress(&tar(&[Entry::file("a", vec![9; 100_000])]), compression);
        let cut = good[..good.len() / 2].to_vec();
        let place = Place::new();
        let error = swap(&place, &cut, &cut, Digest::of(b""));
        assert!(error.contains("cannot be read: "), "{error}");
    }
}

#[test]
fn images_that_are_none() {
    let place = Place::new();
    let at = |name: &str| place.path(name).display().to_string();
    let error = |path: &Path| place.import(path).unwrap_err().to_string();
    assert_eq!(
        error(&place.path("none")),
        format!("there is no image at {}", at("none"))
    );
    fs::create_dir(place.path("empty")).unwrap();
    assert!(error(&place.path("empty")).ends_with("it has no file `oci-layout`"));
    fs::write(place.path("text"), "hello").unwrap();
    assert_eq!(
        error(&place.path("text")),
        format!(
            "the archive {} is truncated: it ends inside a header",
            at("text")
        )
    );
    fs::write(place.path("other.tar"), tar(&[Entry::file("a", b"")])).unwrap();
    assert!(
        error(&place.path("other.tar"))
            .ends_with("it has neither `oci-layout` nor `manifest.json` in it")
    );
    fs::write(place.path("x.tar.gz"), compress(b"x", Compression::Gzip)).unwrap();
    assert!(error(&place.path("x.tar.gz")).ends_with("it is compressed; decompress it first"));
}

#[test]
fn manifests_and_configurations_that_are_wrong() {
    let place = Place::new();
    let path = place.path("layout");
    let error = || place.import(&path).unwrap_err().to_string();
    let bytes = tar(&[]);
    let layer = descriptor("application/vnd.oci.image.layer.v1.tar", &path, &bytes);
    write_manifest(&path, &config(&[]), &[layer]);
    assert!(error().ends_with("it has 1 layers, of 1,000 at most, and its configuration has 0"));
    let mut other = config(&[]);
    other["architecture"] = "riscv64".into();
    write_manifest(&path, &other, &[]);
    assert!(
        error().ends_with("is for linux/riscv64; Cube runs linux/amd64"),
        "{}",
        error()
    );
    write_manifest(&path, &config(&[]), &[]);
    let config = blob(&path, config(&[]).to_string().as_bytes());
    let file = path.join("blobs/sha256").join(config.hex());
    fs::write(&file, "{}").unwrap();
    assert!(error().contains("has the digest"), "{}", error());
    fs::remove_file(&file).unwrap();
    assert!(error().ends_with("which it refers to"), "{}", error());
    fs::write(path.join("index.json"), "[]").unwrap();
    assert!(error().contains("`index.json` of the image"), "{}", error());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A layer with some bytes changed is imported or refused; it never panics, hangs or leaves a disk
    /// that fsck refuses.
    #[test]
    fn changed_bytes_are_refused_or_harmless(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let mut sparse = Entry::file("s", b"12345678");
        sparse.sparse = Some((100_000, vec![(0, 4), (50_000, 4)], SparseFormat::Pax10));
        let mut rich = Entry::file("d/r", vec![5; 5000]);
        rich.xattrs = vec![(b"user.a".to_vec(), b"b".to_vec())];
        let mut bytes = tar(&[Entry::directory("d"), sparse, rich, Entry::link("l", b'1', "d/r")]);
        for (index, byte) in changes {
            let length = bytes.len();
            bytes[index.index(length)] = byte;
        }
        let place = Place::new();
        let path = place.path("layout");
        write_layout(&path, &[bytes], Compression::None);
        if let Ok(record) = place.import(&path) && record.disk_size() < 1 << 30 {
            let listing = place.open(&record).listing();
            prop_assert_eq!(listing.digest(), tree_digest::of_layers(&path).unwrap().digest());
        }
    }
}
