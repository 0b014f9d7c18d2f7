//! The store: what is known is not read again, what is removed goes, what is killed leaves nothing
//! behind that harms.

use std::fs;
use std::path::Path;
use std::sync::Barrier;

use cube::image::{ImageRecord, ImportProgress, NoProgress, Store, StoreError};

use crate::archive::layout::{Compression, write_layout};
use crate::archive::tar::{Entry, tar};
use crate::place::Place;

/// Counts the layers that are read.
#[derive(Default)]
struct Counter {
    read: usize,
    known: usize,
    merged: bool,
}

impl ImportProgress for Counter {
    fn layer(&mut self, _index: usize, _count: usize, bytes: Option<u64>) {
        match bytes {
            Some(_) => self.read += 1,
            None => self.known += 1,
        }
    }
    fn read(&mut self, _bytes: u64) {}
    fn merging(&mut self) {
        self.merged = true;
    }
}

fn layout(place: &Place, name: &str, files: &[&str]) -> std::path::PathBuf {
    let tars: Vec<_> = files
        .iter()
        .map(|file| tar(&[Entry::file(file, vec![b'x'; 6000])]))
        .collect();
    let path = place.path(name);
    write_layout(&path, &tars, Compression::Gzip);
    path
}

fn count(place: &Place, directory: &str) -> usize {
    fs::read_dir(place.path("store").join(directory))
        .unwrap()
        .count()
}

#[test]
fn known_layers_and_images_are_not_read_again() {
    let place = Place::new();
    let (one, two) = (
        layout(&place, "one", &["base", "a"]),
        layout(&place, "two", &["base", "b"]),
    );
    let import = |path: &Path, name| {
        let mut counter = Counter::default();
        let record = place.store.import(path, name, &mut counter).unwrap();
        (record, counter.read, counter.known, counter.merged)
    };
    let (first, read, known, _) = import(&one, None);
    assert_eq!((read, known), (2, 0));
    let (_, read, known, _) = import(&two, None);
    assert_eq!((read, known), (1, 1));
    let (again, read, known, merged) = import(&one, Some("other"));
    assert_eq!((read, known, merged), (0, 0, false));
    assert_eq!(again.digest, first.digest);
    assert_eq!(again.names, ["one:latest", "other:latest"]);
    assert_eq!(again.disk_parts(), first.disk_parts());
}

#[test]
fn names_and_digests_are_resolved() {
    let place = Place::new();
    let record = place.import(&layout(&place, "one", &["a"])).unwrap();
    let hex = record.digest.hex();
    for reference in [
        "one",
        "one:latest",
        &hex,
        &hex[..6],
        &format!("sha256:{}", &hex[..12]),
    ] {
        assert_eq!(
            place.store.resolve(reference).unwrap(),
            record,
            "{reference}"
        );
    }
    for reference in ["two", "one:2", &hex[..5], "", "sha256:"] {
        let error = place.store.resolve(reference).unwrap_err();
        assert!(matches!(error, StoreError::NotFound(_)), "{error}");
    }
    for name in ["", "a b", "a\n", &"n".repeat(600)] {
        let error = place
            .store
            .import(&place.path("one"), Some(name), &mut NoProgress)
            .unwrap_err();
        assert!(matches!(error, StoreError::BadName(_)), "{error}");
    }
}

#[test]
fn a_path_is_imported_where_an_image_is_asked_for() {
    let place = Place::new();
    let path = layout(&place, "one", &["a"]);
    let by_path = place
        .store
        .resolve_or_import(path.to_str().unwrap(), &mut NoProgress)
        .unwrap();
    let by_name = place
        .store
        .resolve_or_import("one", &mut NoProgress)
        .unwrap();
    assert_eq!(by_path, by_name);
}

#[test]
fn removing_the_last_name_removes_what_no_other_image_uses() {
    let place = Place::new();
    let one = place
        .import(&layout(&place, "one", &["base", "a"]))
        .unwrap();
    place
        .store
        .import(&place.path("one"), Some("second"), &mut NoProgress)
        .unwrap();
    let two = place
        .import(&layout(&place, "two", &["base", "b"]))
        .unwrap();
    assert_eq!(place.store.remove("second").unwrap().image, None);
    assert_eq!((count(&place, "layers"), count(&place, "metadata")), (3, 2));
    // A pod that has the disk open keeps it.
    let open = fs::File::open(&one.disk_parts()[0].0).unwrap();
    assert_eq!(place.store.remove("one").unwrap().image, Some(one.digest));
    assert_eq!((count(&place, "layers"), count(&place, "metadata")), (2, 1));
    assert_eq!(open.metadata().unwrap().len(), one.metadata.size);
    assert!(matches!(
        place.store.remove("one"),
        Err(StoreError::NotFound(_))
    ));
    place.open(&two).listing();
    place.store.remove(&two.digest.to_string()).unwrap();
    for directory in ["layers", "metadata", "images", "tmp", "locks"] {
        assert_eq!(count(&place, directory), 0, "{directory}");
    }
}

#[test]
fn what_a_killed_import_leaves_is_swept_and_its_layers_are_used() {
    let place = Place::new();
    let path = layout(&place, "one", &["base", "a"]);
    let record = place.import(&path).unwrap();
    // As after a kill between the last layer and the record.
    fs::remove_file(
        place
            .path("store/images")
            .join(format!("{}.json", record.digest.hex())),
    )
    .unwrap();
    fs::remove_file(&record.disk_parts()[0].0).unwrap();
    fs::create_dir(place.path("store/tmp/half")).unwrap();
    fs::write(place.path("store/tmp/half/data"), "half").unwrap();
    assert!(place.store.list().unwrap().is_empty());
    let mut counter = Counter::default();
    let again = place.store.import(&path, None, &mut counter).unwrap();
    assert_eq!((counter.read, counter.known), (0, 2));
    assert_eq!(again, record);
    assert_eq!(count(&place, "tmp"), 0);
    place.open(&again).listing();
}

#[test]
fn a_file_that_went_missing_is_made_again() {
    let place = Place::new();
    let path = layout(&place, "one", &["base", "a"]);
    let record = place.import(&path).unwrap();
    fs::remove_dir_all(record.disk_parts()[1].0.parent().unwrap()).unwrap();
    assert_eq!(place.import(&path).unwrap(), record);
    place.open(&record).listing();
}

#[test]
fn damaged_files_of_the_store_are_named() {
    let place = Place::new();
    let path = layout(&place, "one", &["a"]);
    let record = place.import(&path).unwrap();
    let layer = record.disk_parts()[1].0.parent().unwrap().to_owned();
    fs::write(layer.join("index"), "not an index").unwrap();
    fs::remove_file(&record.disk_parts()[0].0).unwrap();
    let error = place.import(&path).unwrap_err().to_string();
    assert!(error.starts_with(&layer.display().to_string()), "{error}");
    assert!(
        error.ends_with("remove the file and import the image again"),
        "{error}"
    );
    fs::write(place.path("store/names.json"), "{").unwrap();
    let error = place.store.list().unwrap_err().to_string();
    assert!(
        error.contains("names.json of the image store is damaged"),
        "{error}"
    );
}

#[test]
fn imports_and_removals_at_the_same_time() {
    let place = Place::new();
    let paths = [
        layout(&place, "one", &["base", "a"]),
        layout(&place, "two", &["base", "b"]),
    ];
    let barrier = Barrier::new(6);
    let records: Vec<ImageRecord> = std::thread::scope(|scope| {
        let imports: Vec<_> = (0..4)
            .map(|index| {
                let (barrier, path, root) = (&barrier, &paths[index % 2], place.store.root());
                scope.spawn(move || {
                    let store = Store::open(root).unwrap();
                    barrier.wait();
                    let import = || store.import(path, None, &mut NoProgress).unwrap();
                    (0..4).for_each(|_| drop(import()));
                    import()
                })
            })
            .collect();
        for name in ["one", "two"] {
            let (barrier, store) = (&barrier, &place.store);
            scope.spawn(move || {
                barrier.wait();
                for _ in 0..20 {
                    match store.remove(name) {
                        Ok(_) | Err(StoreError::NotFound(_)) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
        imports
            .into_iter()
            .map(|import| import.join().unwrap())
            .collect()
    });
    assert_eq!(records[0].digest, records[2].digest);
    // Whatever the order was, what is listed is whole, and the rest can come back.
    for record in place.store.list().unwrap() {
        place.open(&record).listing();
    }
    for path in &paths {
        let record = place.import(path).unwrap();
        place.open(&record).listing();
    }
    assert_eq!(count(&place, "tmp"), 0);
}
