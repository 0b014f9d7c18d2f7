//! What a reader may rely on without reading everything: who imports whom, how long a file or function
//! gets, where `unsafe` lives, that the code map names real paths.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

const MAX_FILE_LINES: usize = 600;
const MAX_FUNCTION_LINES: usize = 80;

/// A file in the tree: its path from the root, and its text.
struct Source {
    path: String,
    text: String,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn walk(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).expect("a directory of the tree is readable") {
        let path = entry.expect("a directory entry is readable").path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if path.is_dir() {
            if name != "target" && !name.starts_with(".git") {
                walk(&path, found);
            }
        } else {
            found.push(path);
        }
    }
}

fn files() -> Vec<PathBuf> {
    let mut found = Vec::new();
    walk(root(), &mut found);
    found.sort();
    found
}

fn rust_sources() -> Vec<Source> {
    let sources: Vec<Source> = files()
        .into_iter()
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .map(|path| Source {
            text: fs::read_to_string(&path).expect("a source file is UTF-8"),
            path: path
                .strip_prefix(root())
                .expect("below the root")
                .display()
                .to_string(),
        })
        .collect();
    assert!(sources.len() > 10, "the walk found the tree");
    sources
}

fn assert_none(what: &str, offences: &[String]) {
    assert!(offences.is_empty(), "{what}:\n  {}", offences.join("\n  "));
}

/// (directory, what nothing below it may mention).
const LAYERS: &[(&str, &[&str])] = &[
    (
        "src/vmm/",
        &[
            "crate::pod",
            "crate::client",
            "crate::image",
            "crate::net",
            "crate::cli",
            "crate::cri",
            "tokio",
        ],
    ),
    (
        "src/pod/",
        &[
            "crate::cli",
            "crate::cri",
            "crate::client",
            "crate::image",
            "tokio",
        ],
    ),
    (
        "src/image/",
        &[
            "crate::cli",
            "crate::cri",
            "crate::client",
            "crate::pod",
            "crate::vmm",
        ],
    ),
    (
        "src/net/",
        &[
            "crate::cli",
            "crate::cri",
            "crate::client",
            "crate::pod",
            "crate::vmm",
        ],
    ),
    ("src/client/", &["crate::cli", "crate::cri"]),
    ("guest/", &["tokio", "cube::"]),
];

#[test]
fn layers_import_only_what_is_below_them() {
    let mut offences = Vec::new();
    for source in rust_sources() {
        for (directory, forbidden) in LAYERS.iter().filter(|(d, _)| source.path.starts_with(d)) {
            for (number, line) in code_lines(&source.text) {
                for word in forbidden.iter().filter(|word| mentions(line, word)) {
                    offences.push(format!("{}:{number}: {directory} uses {word}", source.path));
                }
            }
        }
    }
    assert_none("a layer reaches upwards", &offences);
}

/// Lines outside comments, numbered from 1.
fn code_lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines()
        .enumerate()
        .map(|(index, line)| (index + 1, line))
        .filter(|(_, line)| !line.trim_start().starts_with("//"))
}

/// Whether `line` has `word` with no identifier character before it or (unless it ends a path) after it.
fn mentions(line: &str, word: &str) -> bool {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + word.len()..].chars().next();
        !before.is_some_and(is_word) && (word.ends_with(':') || !after.is_some_and(is_word))
    })
}

#[test]
fn files_have_one_job() {
    let long: Vec<String> = rust_sources()
        .iter()
        .map(|source| (source.text.lines().count(), &source.path))
        .filter(|(lines, _)| *lines > MAX_FILE_LINES)
        .map(|(lines, path)| format!("{path}: {lines} lines"))
        .collect();
    assert_none(&format!("files over {MAX_FILE_LINES} lines"), &long);
}

/// First line (from 1) and length of each function with a body of several lines. rustfmt opens the body
/// with a `{` at the end of a line and closes it at the column where the function began.
fn functions(text: &str) -> Vec<(usize, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let starts = lines
        .iter()
        .enumerate()
        .filter(|(_, line)| begins_function(line));
    let mut found = Vec::new();
    for (start, line) in starts {
        let header = lines[start..]
            .iter()
            .position(|line| line.ends_with(['{', ';', '}']));
        if !header.is_some_and(|at| lines[start + at].ends_with('{')) {
            continue;
        }
        let indent = &line[..line.len() - line.trim_start().len()];
        let closing = format!("{indent}}}");
        if let Some(length) = lines[start..].iter().position(|line| *line == closing) {
            found.push((start + 1, length + 1));
        }
    }
    found
}

fn begins_function(line: &str) -> bool {
    let words: Vec<&str> = line.split_whitespace().take(5).collect();
    words
        .iter()
        .position(|word| *word == "fn")
        .is_some_and(|at| {
            words[..at].iter().all(|word| {
                word.starts_with("pub") || ["const", "unsafe", "extern", "\"C\""].contains(word)
            })
        })
}

#[test]
fn functions_fit_a_screen() {
    let mut offences = Vec::new();
    let mut seen = 0;
    for source in rust_sources() {
        for (line, length) in functions(&source.text) {
            seen += 1;
            if length > MAX_FUNCTION_LINES {
                offences.push(format!("{}:{line}: {length} lines", source.path));
            }
        }
    }
    assert!(seen > 50, "the scan found functions");
    assert_none(
        &format!("functions over {MAX_FUNCTION_LINES} lines"),
        &offences,
    );
}

/// The files where `unsafe` may live. A new one needs a reason good enough to be read here.
const UNSAFE_FILES: &[&str] = &[
    "guest/src/bench_init.rs",
    "guest/src/init/sys.rs",
    "src/bin/cube-bench-floor.rs",
    "src/client/vmm_process.rs",
    "src/net/namespace.rs",
    "src/net/tap.rs",
    "src/vmm/files.rs",
    "src/vmm/kvm.rs",
    "src/vmm/memory.rs",
    "src/vmm/seccomp.rs",
    "src/vmm/signals.rs",
    "src/vmm/stats.rs",
    "src/vmm/vcpu.rs",
    "src/vmm/virtio/iovec.rs",
    "src/vmm/virtio/net/tap.rs",
    "xtask/src/probe.rs",
];

#[test]
fn unsafe_lives_in_a_short_list_of_files() {
    let mut offences = Vec::new();
    let mut used = BTreeSet::new();
    for source in rust_sources() {
        let mut previous_safety = false;
        for (index, line) in source.text.lines().enumerate() {
            let code = line.trim_start();
            if code.starts_with("//") || code.starts_with("#[") {
                previous_safety |= code.contains("SAFETY:") || code.contains("# Safety");
                continue;
            }
            let unsafe_here = !source.path.starts_with("tests/tidy") && mentions(code, "unsafe");
            if unsafe_here {
                used.insert(source.path.clone());
                let at = format!("{}:{}", source.path, index + 1);
                if !UNSAFE_FILES.contains(&source.path.as_str()) {
                    offences.push(format!("{at}: not one of UNSAFE_FILES"));
                } else if !previous_safety {
                    offences.push(format!("{at}: no SAFETY comment above"));
                }
            }
            // A comment covers the statement under it, which may take several lines to reach its `unsafe`.
            if code.is_empty() || code.ends_with(';') || code.ends_with('}') || code.ends_with(',')
            {
                previous_safety = false;
            }
        }
    }
    for listed in UNSAFE_FILES
        .iter()
        .filter(|listed| !used.contains(**listed))
    {
        offences.push(format!(
            "{listed}: listed in UNSAFE_FILES, has no unsafe code"
        ));
    }
    assert_none("unsafe code", &offences);
}

#[test]
fn hostile_bytes_are_parsed_without_panics() {
    let guarded = [
        "unwrap_used",
        "expect_used",
        "indexing_slicing",
        "arithmetic_side_effects",
    ];
    let mut offences = Vec::new();
    for source in rust_sources() {
        let parses = source.path.starts_with("src/vmm/virtio/") && !source.path.contains("test");
        if parses {
            for lint in guarded.iter().filter(|lint| !source.text.contains(*lint)) {
                offences.push(format!("{}: does not deny clippy::{lint}", source.path));
            }
        }
    }
    assert_none("files that read guest bytes", &offences);
}

/// Paths in backquotes that end in `/`, `.rs`, `.md`, `.toml`, `.yaml`, `.json` or `.config`.
fn named_paths(text: &str) -> Vec<String> {
    let endings = [
        "/", ".rs", ".md", ".toml", ".yaml", ".json", ".config", ".sh",
    ];
    text.split('`')
        .skip(1)
        .step_by(2)
        .filter(|word| {
            !word.contains(char::is_whitespace) && !word.contains(['<', '*', '$', '{', '~'])
        })
        .filter(|word| {
            !word.starts_with('/') && endings.iter().any(|ending| word.ends_with(ending))
        })
        .map(str::to_owned)
        .collect()
}

#[test]
fn the_code_map_names_what_is_there() {
    let text =
        fs::read_to_string(root().join("ARCHITECTURE.md")).expect("ARCHITECTURE.md is there");
    let paths = named_paths(&text);
    assert!(paths.len() > 10, "the code map names paths");
    let missing: Vec<String> = paths
        .iter()
        .filter(|path| !root().join(path).exists())
        .cloned()
        .collect();
    assert_none("ARCHITECTURE.md names paths that are not there", &missing);

    let mut unnamed = Vec::new();
    for directory in ["src", "src/vmm", "guest/src"] {
        for entry in fs::read_dir(root().join(directory))
            .expect("a source directory")
            .flatten()
        {
            let path = entry.path();
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            let path = path
                .strip_prefix(root())
                .expect("below the root")
                .display()
                .to_string();
            let is_entry = ["lib.rs", "mod.rs", "main.rs", "tests.rs"].contains(&name.as_str());
            if !is_entry && !text.contains(path.trim_end_matches(".rs")) {
                unnamed.push(path);
            }
        }
    }
    assert_none("not in ARCHITECTURE.md's code map", &unnamed);
}

#[test]
fn documents_link_to_what_is_there() {
    let mut broken = Vec::new();
    for path in files()
        .iter()
        .filter(|path| path.extension().is_some_and(|e| e == "md"))
    {
        let text = fs::read_to_string(path).expect("a document is UTF-8");
        for link in text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next())
        {
            let target = link.split('#').next().unwrap_or_default();
            let outside = target.is_empty() || target.contains("://");
            if !outside && !path.parent().expect("a parent").join(target).exists() {
                broken.push(format!("{}: {link}", path.display()));
            }
        }
    }
    assert_none("documents link to files that are not there", &broken);
}

#[test]
fn names_say_what_a_thing_is() {
    let empty = [
        "manager", "helper", "helpers", "common", "util", "utils", "misc",
    ];
    let offences: Vec<String> = rust_sources()
        .iter()
        .filter(|source| {
            let stem = Path::new(&source.path)
                .file_stem()
                .unwrap_or_default()
                .to_string_lossy();
            empty.contains(&stem.as_ref())
        })
        .map(|source| source.path.clone())
        .collect();
    assert_none("file names that say nothing", &offences);
}
