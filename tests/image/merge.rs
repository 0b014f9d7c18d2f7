//! How layers lie over one another.

use crate::archive::tar::{Entry, tar};
use crate::place::Place;

#[test]
fn an_upper_file_replaces_a_lower_one_and_a_directory_keeps_its_entries() {
    let place = Place::new();
    let mut changed = Entry::directory("d");
    changed.mode = 0o700;
    let image = place.build(&[
        &[
            Entry::directory("d"),
            Entry::file("d/a", b"1"),
            Entry::file("d/b", b"2"),
            Entry::file("f", b"x"),
        ],
        &[
            changed,
            Entry::file("d/a", b"new"),
            Entry::directory("f"),
            Entry::file("f/in", b"y"),
        ],
    ]);
    assert_eq!(image.content("d/a"), b"new");
    assert_eq!(image.content("d/b"), b"2");
    assert_eq!(image.find("d").unwrap().mode, 0o040_700);
    assert_eq!(image.content("f/in"), b"y");
}

#[test]
fn a_file_over_a_directory_hides_all_below() {
    let place = Place::new();
    let image = place.build(&[&[Entry::file("d/e/f", b"1")], &[Entry::file("d", b"2")]]);
    assert_eq!(image.content("d"), b"2");
}

#[test]
fn whiteouts_hide_lower_layers_only_wherever_they_are_in_the_layer() {
    let place = Place::new();
    let image = place.build(&[
        &[
            Entry::file("d/a", b"1"),
            Entry::file("d/b", b"2"),
            Entry::file("e/x", b"3"),
        ],
        &[
            Entry::file("d/a", b"again"),
            Entry::file("d/.wh.a", b""),
            Entry::file(".wh.e", b""),
            Entry::file("e/y", b"4"),
        ],
    ]);
    assert_eq!(image.content("d/a"), b"again");
    assert_eq!(image.content("d/b"), b"2");
    assert!(!image.exists("e/x"));
    assert_eq!(image.content("e/y"), b"4");
    assert!(!image.exists("d/.wh.a"));
}

#[test]
fn opaque_directories_hide_what_lower_layers_have_in_them() {
    let place = Place::new();
    let image = place.build(&[
        &[
            Entry::file("d/a", b"1"),
            Entry::file("d/sub/b", b"2"),
            Entry::file("keep", b"3"),
        ],
        &[
            Entry::file("d/new", b"4"),
            Entry::file("d/.wh..wh..opq", b""),
            Entry::file("unknown/.wh..wh..opq", b""),
            Entry::file(".wh..wh.plnk/1.2", b"aufs"),
        ],
    ]);
    assert!(!image.exists("d/a") && !image.exists("d/sub"));
    assert_eq!(image.content("d/new"), b"4");
    assert_eq!(image.content("keep"), b"3");
    assert!(!image.exists(".wh..wh.plnk"));
}

#[test]
fn hard_links_reach_across_layers_and_survive_their_first_name() {
    let place = Place::new();
    let image = place.build(&[
        &[Entry::file("a", vec![3; 9000])],
        &[Entry::link("b", b'1', "a"), Entry::link("c", b'1', "/./b")],
        &[Entry::file(".wh.a", b"")],
    ]);
    assert!(!image.exists("a"));
    let (b, c) = (image.find("b").unwrap(), image.find("c").unwrap());
    assert_eq!((b.nid, b.links), (c.nid, 2));
    assert_eq!(image.content("c"), vec![3; 9000]);
}

#[test]
fn parents_that_are_links_are_followed_inside_the_image() {
    let place = Place::new();
    let image = place.build(&[
        &[
            Entry::directory("usr/lib"),
            Entry::link("lib", b'2', "usr/lib"),
            Entry::link("out", b'2', "/../../usr"),
            Entry::link("later", b'2', "made/by/need"),
        ],
        &[
            Entry::file("lib/x", b"1"),
            Entry::file("out/y", b"2"),
            Entry::file("later/z", b"3"),
            Entry::link("w", b'1', "lib/x"),
        ],
        &[Entry::file("lib/.wh.x", b"")],
    ]);
    assert!(!image.exists("usr/lib/x"));
    assert_eq!(image.content("w"), b"1");
    assert_eq!(image.content("usr/y"), b"2");
    assert_eq!(image.content("made/by/need/z"), b"3");
    assert_eq!(image.content("lib"), b"usr/lib");
}

#[test]
fn missing_parents_are_roots_and_later_entries_describe_them() {
    let place = Place::new();
    let mut described = Entry::directory("./a/");
    described.uid = 70_000;
    described.mtime = (5, 6);
    let image = place.build(&[&[Entry::file("./a/b/c", b"1"), described]]);
    let (a, b) = (image.find("a").unwrap(), image.find("a/b").unwrap());
    assert_eq!((a.uid, a.mtime, a.mode), (70_000, (5, 6), 0o040_755));
    assert_eq!((b.uid, b.gid, b.mtime, b.mode), (0, 0, (0, 0), 0o040_755));
}

#[test]
fn the_last_of_duplicates_counts() {
    let place = Place::new();
    let image = place.build(&[&[
        Entry::file("a", b"1"),
        Entry::link("b", b'1', "a"),
        Entry::file("a", b"2"),
        Entry::link("b", b'1', "b"),
    ]]);
    assert_eq!(
        (image.content("a"), image.content("b")),
        (b"2".to_vec(), b"1".to_vec())
    );
}

#[test]
fn layers_that_nothing_is_left_of_are_not_on_the_disk() {
    let place = Place::new();
    let tars = [
        tar(&[Entry::file("a", vec![1; 50_000])]),
        tar(&[Entry::file("a", vec![2; 10_000])]),
    ];
    let record = place.import_tars(&tars).unwrap();
    assert_eq!(record.disk_parts().len(), 2);
    assert_eq!(place.open(&record).content("a"), vec![2; 10_000]);
}

#[test]
fn an_image_without_files_is_an_empty_root() {
    let place = Place::new();
    let record = place.import_tars(&[]).unwrap();
    let image = place.open(&record);
    assert_eq!(image.listing().len(), 1);
    assert_eq!(image.find("").unwrap().mode, 0o040_755);
}

#[test]
fn most_inodes_are_small_when_times_agree() {
    let place = Place::new();
    let entries: Vec<_> = (0..100)
        .map(|i| Entry::file(format!("f{i}"), b""))
        .collect();
    let image = place.build(&[&entries]);
    assert!(image.find("f7").unwrap().compact);
}
