//! Bad input: a sentence that names the fault, status 1 or 2, nothing left behind.

use crate::fixture::{Cube, text};

#[test]
fn wrong_values_are_status_2() {
    let cube = Cube::new("run");
    let cases: [(&[&str], &str); 14] = [
        (&["run"], "<IMAGE>"),
        (&["run", "--nonsense", "img"], "--nonsense"),
        (&["nonsense"], "nonsense"),
        (&["run", "--memory", "0", "img"], "a machine needs memory"),
        (&["run", "--memory", "much", "img"], "`much` is not a size"),
        (&["run", "--memory", "1000000T", "img"], "of this host"),
        (&["run", "--cpus", "0", "img"], "1..=32"),
        (&["run", "--cpus", "33", "img"], "1..=32"),
        (&["run", "--env", "=x", "img"], "`--env =x` has no name"),
        (&["run", "--workdir", "here", "img"], "not an absolute path"),
        (&["run", "--hostname", "a_b", "img"], "a host name has"),
        (
            &["run", "--disk-size", "1K", "img"],
            "writable disk of 1024 bytes",
        ),
        (&["run", "--timeline=xml", "img"], "xml"),
        (&["run", "--entrypoint", "", "img"], "names no command"),
    ];
    for (arguments, fault) in cases {
        let output = cube.run(arguments);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
        assert!(said.contains(fault), "{arguments:?}: {said}");
        assert_eq!(text(&output.stdout), "", "{arguments:?}");
    }
}

#[test]
fn a_seccomp_profile_that_cannot_be_kept_is_status_2_and_names_the_field() {
    let cube = Cube::new("run");
    let profile = r#"{"defaultAction": "SCMP_ACT_NOTIFY"}"#;
    std::fs::write(cube.path().join("profile.json"), profile).unwrap();
    let output = cube.run(&["run", "--seccomp", "profile.json", "img"]);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(
        said.contains("profile.json: the seccomp profile's field `defaultAction`"),
        "{said}"
    );
}

#[test]
fn what_is_not_there_is_status_1_and_named() {
    let cube = Cube::new("run");
    let missing = cube.path().join("missing");
    let missing = missing.to_str().unwrap();
    let cases: [(&[&str], &str, &str); 5] = [
        (&["run", "nowhere"], "CUBE_X", "`nowhere`"),
        (&["run", "img"], "CUBE_KERNEL", missing),
        (&["run", "img"], "CUBE_INIT", missing),
        (&["run", "img"], "CUBE_VMM", missing),
        (
            &["run", "--kernel", "/dev", "img"],
            "CUBE_X",
            "/dev: it is not a regular file",
        ),
    ];
    for (arguments, variable, fault) in cases {
        let output = cube
            .command(arguments)
            .env(variable, missing)
            .output()
            .unwrap();
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{variable}: {said}");
        assert!(
            said.starts_with("cube: ") && said.contains(fault),
            "{variable}: {said}"
        );
        cube.assert_nothing_left();
    }
}
