//! What `--help` says, word for word: a change of the command line shows in review.

use std::path::Path;
use std::process::Command;

use crate::fixture::text;

/// Compares with `tests/cli/help/<name>.txt`; `CUBE_UPDATE_SNAPSHOTS=1` writes it.
fn assert_snapshot(name: &str, arguments: &[&str]) {
    let output = Command::new(env!("CARGO_BIN_EXE_cube"))
        .args(arguments)
        .output()
        .unwrap();
    assert!(output.status.success());
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/cli/help/{name}.txt"));
    let said = text(&output.stdout);
    if std::env::var_os("CUBE_UPDATE_SNAPSHOTS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &said).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap();
    assert_eq!(
        said,
        expected,
        "CUBE_UPDATE_SNAPSHOTS=1 updates {}",
        path.display()
    );
}

#[test]
fn help_is_as_reviewed() {
    assert_snapshot("cube", &["--help"]);
    assert_snapshot("net-ls", &["net", "ls", "--help"]);
    assert_snapshot("net-attach", &["net", "attach", "--help"]);
    assert_snapshot("net-detach", &["net", "detach", "--help"]);
    assert_snapshot("pod-run", &["pod", "run", "--help"]);
    for command in [
        "run",
        "pod",
        "ps",
        "exec",
        "logs",
        "stop",
        "images",
        "import",
        "rmi",
        "bench",
        "completions",
    ] {
        assert_snapshot(command, &[command, "--help"]);
    }
}

#[test]
fn both_ways_to_ask_give_the_version() {
    let version = |arguments: &[&str]| {
        let cube = Command::new(env!("CARGO_BIN_EXE_cube"))
            .args(arguments)
            .output()
            .unwrap();
        text(&cube.stdout)
    };
    let expected = format!("cube {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(
        (version(&["version"]), version(&["--version"])),
        (expected.clone(), expected)
    );
}

#[test]
fn completions_are_scripts() {
    for (shell, word) in [
        ("bash", "complete -F"),
        ("zsh", "#compdef cube"),
        ("fish", "complete -c cube"),
    ] {
        let cube = Command::new(env!("CARGO_BIN_EXE_cube"))
            .args(["completions", shell])
            .output()
            .unwrap();
        assert!(text(&cube.stdout).contains(word), "{shell}");
    }
}
