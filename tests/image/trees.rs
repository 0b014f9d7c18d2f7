//! Generated odd trees come back from the disk as they were in the layers.

use cube::image::NoProgress;
use cube::image::layer::Metadata;
use cube::image::tree_digest;
use proptest::prelude::*;

use crate::archive::layout::{Compression, write_layout};
use crate::archive::odd_trees::{Model, Operation, Step, layers};
use crate::archive::tar::Entry;
use crate::place::Place;

fn check(layers: &[Vec<Step>]) {
    let mut model = Model::default();
    let tars = model.tars(layers);
    let place = Place::new();
    let path = place.path("layout");
    write_layout(&path, &tars, Compression::None);
    let record = place.store.import(&path, None, &mut NoProgress).unwrap();
    let (expected, found) = (model.listing(), place.open(&record).listing());
    assert_eq!(found.differences(&expected), Vec::<Vec<u8>>::new());
    assert_eq!(found.digest(), expected.digest());
    assert_eq!(
        tree_digest::of_layers(&path).unwrap().digest(),
        expected.digest()
    );
    // The same layers give the same bytes, in another store, too.
    let again = Place::new()
        .store
        .import(&path, None, &mut NoProgress)
        .unwrap();
    assert_eq!(again.metadata, record.metadata);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn any_tree_comes_back(layers in layers()) {
        check(&layers);
    }
}

#[test]
fn a_directory_of_many_blocks() {
    let place = Place::new();
    let mut model = Model::default();
    let entries: Vec<_> = (0..5000)
        .filter_map(|i| {
            let name = format!("{:x}-{}", i * 7919 % 5000, "n".repeat(i % 50));
            let operation = Operation::File(u64::try_from(i % 300).unwrap(), 3);
            let metadata = Metadata {
                mode: 0o644,
                mtime: 9,
                ..Metadata::default()
            };
            let path = vec![b"many".to_vec(), name.into_bytes()];
            model.create(&Step {
                path,
                operation,
                metadata,
                spelling: (false, false),
            })
        })
        .collect();
    let image = place.build(&[&entries]);
    assert!(image.find("many").unwrap().size > 40 * 4096);
    assert_eq!(image.listing().digest(), model.listing().digest());
}

#[test]
fn a_path_a_thousand_directories_deep() {
    let place = Place::new();
    let path = "d/".repeat(1000) + "end";
    let image = place.build(&[&[Entry::file(&path, b"deep")]]);
    assert_eq!(image.content(&path), b"deep");
    assert_eq!(image.listing().len(), 1002);
}
