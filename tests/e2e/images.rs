//! Images as the guest sees them.

use std::process::{Command, Stdio};

use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;

use crate::archive::layout::extend_layout;
use crate::archive::odd_trees::{Model, layers};
use crate::fixture::{given, import, import_path, machine, text, tree_digest};

#[test]
fn an_image_of_real_packages_runs() {
    import("large", "CUBE_TEST_IMAGE_LARGE");
    let script = "find /usr -xdev | wc -l";
    let output = machine().cube(&["run", "large", "--", "sh", "-c", script]);
    let files = text(&output.stdout).trim().parse::<u32>();
    assert!(files.is_ok_and(|files| files > 1000), "{output:?}");
}

/// Real packages, and generated odd trees in layers of their own over them.
#[test]
fn the_guest_sees_what_is_in_the_layers() {
    let directory = tempfile::tempdir().unwrap();
    let (image, mut random) = (directory.path().join("odd"), TestRunner::deterministic());
    let mut tars = Vec::new();
    for tree in 0..8 {
        let mut layers = layers().new_tree(&mut random).unwrap().current();
        let steps = layers.iter_mut().flatten();
        steps.for_each(|step| *step = step.clone().for_a_container(&format!("odd{tree}")));
        tars.extend(Model::default().tars(&layers));
    }
    extend_layout(&given("CUBE_TEST_IMAGE_LARGE"), &image, &tars);
    import_path("odd", &image);
    // What the container's start mounts over the image. `/dev` is where the tool can be put and executed.
    let kernel_s = ["dev", "proc", "sys"];
    let script = format!(
        "cat > /dev/digest && chmod +x /dev/digest && /dev/digest directory / {}",
        kernel_s.join(" ")
    );
    let machine = machine();
    let arguments = [
        "run", "-i", "--memory", "512M", "odd", "--", "sh", "-c", &script,
    ];
    let mut run = machine.command(&arguments);
    let tool = std::fs::File::open(tree_digest()).unwrap();
    let seen = run.stdin(Stdio::from(tool)).output().unwrap();
    let mut layers = Command::new(tree_digest());
    let expected = layers
        .arg("layers")
        .arg(&image)
        .args(kernel_s)
        .output()
        .unwrap();
    assert!(text(&expected.stdout).contains(" paths"), "{expected:?}");
    assert_eq!(
        text(&seen.stdout),
        text(&expected.stdout),
        "{}",
        text(&seen.stderr)
    );
}
