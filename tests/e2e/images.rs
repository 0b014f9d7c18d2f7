//! Images as the guest sees them.

use crate::fixture::{import, machine, text};

#[test]
fn an_image_of_real_packages_runs() {
    import("large", "CUBE_TEST_IMAGE_LARGE");
    let output = machine().cube(&[
        "run",
        "large",
        "--",
        "/bin/sh",
        "-c",
        "find /usr -xdev | wc -l",
    ]);
    let files: u32 = text(&output.stdout).trim().parse().unwrap();
    assert!(files > 1000, "{files} files: {}", text(&output.stderr));
}
