//! A running `cube-vmm`: its standard output is the timeline, its standard input the lifetime.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStderr, ChildStdout, Command, Stdio};

use cube::vmm::timeline::{Entry, Stage};
use tempfile::TempDir;

use crate::payload;

pub(crate) struct Process {
    child: Child,
    timeline: BufReader<ChildStdout>,
    stderr: ChildStderr,
    stages: Vec<Stage>,
    _directory: TempDir,
}

/// How it ended.
pub(crate) struct Ended {
    pub(crate) status: i32,
    pub(crate) message: String,
    pub(crate) stages: Vec<Stage>,
    /// Exits by name, as the last stage has them.
    pub(crate) exits: BTreeMap<String, u64>,
}

/// `{"cpus": 1, "memory_mib": 32}` with the kernel and what `more` says beyond or instead.
pub(crate) fn spec(kernel: &str, more: &str) -> String {
    let mut spec = serde_json::json!({"cpus": 1, "memory_mib": 32, "kernel": {"path": kernel}});
    let more: serde_json::Value = serde_json::from_str(&format!("{{{more}}}")).unwrap();
    for (name, value) in more.as_object().unwrap() {
        spec[name] = value.clone();
    }
    spec.to_string()
}

impl Process {
    /// Runs `code` in a machine.
    pub(crate) fn start(code: &[u8], more: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let kernel = directory.path().join("kernel");
        std::fs::write(&kernel, payload::elf(code)).unwrap();
        let spec_path = directory.path().join("spec.json");
        std::fs::write(&spec_path, spec(kernel.to_str().unwrap(), more)).unwrap();
        let command =
            r#"exec "$0" --spec "$1" --count-exits --timeline-fd 3 --lifetime-fd 4 3>&1 4<&0"#;
        let mut child = Command::new("sh")
            .args(["-c", command, env!("CARGO_BIN_EXE_cube-vmm")])
            .arg(spec_path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let timeline = BufReader::new(child.stdout.take().unwrap());
        let stderr = child.stderr.take().unwrap();
        Self {
            child,
            timeline,
            stderr,
            stages: Vec::new(),
            _directory: directory,
        }
    }

    fn next(&mut self) -> Option<Entry> {
        let mut line = String::new();
        self.timeline.read_line(&mut line).unwrap();
        let entry: Entry = serde_json::from_str((!line.is_empty()).then_some(&line)?).unwrap();
        self.stages.push(entry.stage);
        Some(entry)
    }

    /// Returns when the machine has reached `stage`.
    pub(crate) fn wait_for(&mut self, stage: Stage) {
        while !self.stages.contains(&stage) {
            assert!(
                self.next().is_some(),
                "the machine never reached {stage:?}: {}",
                self.message()
            );
        }
    }

    pub(crate) fn signal(&self, signal: i32) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let signal = rustix::process::Signal::from_named_raw(signal).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Closes the other end of its `--lifetime-fd`.
    pub(crate) fn close_lifetime(&mut self) {
        drop(self.child.stdin.take());
    }

    fn message(&mut self) -> String {
        let mut message = String::new();
        self.stderr.read_to_string(&mut message).unwrap();
        message
    }

    /// Waits for its end.
    pub(crate) fn end(mut self) -> Ended {
        // What comes through the lifetime is not its end.
        if let Some(stdin) = &mut self.child.stdin {
            let _ = stdin.write_all(b"still here");
        }
        let mut exits = BTreeMap::new();
        while let Some(entry) = self.next() {
            exits = entry.exits;
        }
        let message = self.message();
        let lifetime = self.child.stdin.take();
        let status = self.child.wait().unwrap();
        drop(lifetime);
        let status = status
            .code()
            .unwrap_or_else(|| panic!("cube-vmm: {status}"));
        Ended {
            status,
            message,
            stages: self.stages,
            exits,
        }
    }
}
