//! A store with one image, a fake machine, and `cube` run with them.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use serde_json::json;
use sha2::{Digest, Sha256};

use crate::fake_machine::{MODE, script};

/// Everything that `cube` needs, in a directory that goes with it.
pub(crate) struct Cube {
    directory: tempfile::TempDir,
    mode: &'static str,
}

/// Bytes as text.
pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// An OCI layout with an empty layer.
pub(crate) fn layout(directory: &Path) {
    let blobs = directory.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let blob = |kind: &str, bytes: &[u8]| {
        let digest = hex::encode(Sha256::digest(bytes));
        fs::write(blobs.join(&digest), bytes).unwrap();
        json!({ "mediaType": kind, "digest": format!("sha256:{digest}"), "size": bytes.len() })
    };
    // Two blocks of zeroes: an archive with nothing in it.
    let layer = blob("application/vnd.oci.image.layer.v1.tar", &[0; 1024]);
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "config": { "Env": ["FROM_IMAGE=yes"], "Cmd": ["echo", "the image's command"], "User": "7:8" },
        "rootfs": { "type": "layers", "diff_ids": [layer["digest"]] },
    });
    let config = blob(
        "application/vnd.oci.image.config.v1+json",
        config.to_string().as_bytes(),
    );
    let manifest = json!({ "schemaVersion": 2, "config": config, "layers": [layer] });
    let manifest = blob(
        "application/vnd.oci.image.manifest.v1+json",
        manifest.to_string().as_bytes(),
    );
    let index = json!({ "schemaVersion": 2, "manifests": [manifest] });
    fs::write(directory.join("index.json"), index.to_string()).unwrap();
    fs::write(
        directory.join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )
    .unwrap();
}

impl Cube {
    /// A place where machines do what `mode` says, with an image `img`.
    pub(crate) fn new(mode: &'static str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        layout(&directory.path().join("layout"));
        for file in ["kernel", "init"] {
            fs::write(directory.path().join(file), file).unwrap();
        }
        script(directory.path());
        let cube = Self { directory, mode };
        let import = cube.command(&["import", "layout", "img"]).output().unwrap();
        assert!(import.status.success(), "{}", text(&import.stderr));
        cube
    }

    /// The directory of everything.
    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    /// `cube`, not started.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cube"));
        command.args(arguments);
        self.set_up(&mut command);
        command
    }

    /// Gives `command` everything that `cube` needs.
    pub(crate) fn set_up(&self, command: &mut Command) {
        let path = |name| self.directory.path().join(name);
        command
            .current_dir(self.directory.path())
            .env("CUBE_STORE", path("store"))
            .env("CUBE_RUN_DIR", path("run"))
            // What these tests are about needs no network, and the host they run on keeps its own.
            .env("CUBE_NET", "none")
            .env("CUBE_VMM", path("fake-vmm"))
            .env("CUBE_KERNEL", path("kernel"))
            .env("CUBE_INIT", path("init"))
            .env(MODE, self.mode)
            .stdin(Stdio::null());
    }

    /// Runs `cube` to its end and looks for leavings.
    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        let output = self.command(arguments).output().unwrap();
        self.assert_nothing_left();
        output
    }

    /// Runs a shell script as the container.
    pub(crate) fn shell(&self, options: &[&str], script: &str) -> Output {
        self.run(&self.arguments(options, script))
    }

    /// Starts a shell script as the container, with pipes.
    pub(crate) fn start(&self, options: &[&str], script: &str) -> Child {
        let mut command = self.command(&self.arguments(options, script));
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command.spawn().unwrap()
    }

    /// Arguments of `cube` for a shell script as the container.
    pub(crate) fn arguments<'a>(&self, options: &[&'a str], script: &'a str) -> Vec<&'a str> {
        [&["run"], options, &["img", "--", "sh", "-c", script]].concat()
    }

    /// No pod directory, nothing unfinished in the store.
    pub(crate) fn assert_nothing_left(&self) {
        for directory in ["run", "store/tmp"] {
            let left: Vec<_> = fs::read_dir(self.path().join(directory))
                .into_iter()
                .flatten()
                .map(|entry| entry.unwrap().file_name())
                // What is there for all pods.
                .filter(|name| !name.as_encoded_bytes().starts_with(b"."))
                .collect();
            assert!(left.is_empty(), "left in {directory}: {left:?}");
        }
    }
}
