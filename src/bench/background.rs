//! A pod that outlives its command, as an orchestrator starts it: `cube pod run`. The pod process alone is left, with
//! its API, and that is what is looked at.
#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Pid;
use serde_json::{Value, json};

use super::cgroup::Group;
use super::measure::{self, RunError, ends_within};
use super::plan::{Figures, look};
use super::pod::PodCommand;

const NAME: &str = "cube-bench";

/// A pod that runs. Dropping it ends it.
struct Background {
    cube: PathBuf,
    base: PathBuf,
    pid: u32,
    deadline: Duration,
}

/// One idle pod to look at, with the memory of a group in which nothing but the pod process is left.
pub(super) fn measure(
    pod: &PodCommand,
    deadline: Duration,
    directory: &Path,
    taken: &mut Figures,
) -> Result<(), RunError> {
    // Dropped last: a group with a process in it cannot be removed.
    let group = Group::create();
    let background = Background::start(pod, deadline, directory, group.as_ref())?;
    look(background.pid, pod.memory_mib, group.as_ref(), taken).map_err(RunError::Look)
}

impl Background {
    fn start(
        pod: &PodCommand,
        deadline: Duration,
        directory: &Path,
        group: Option<&Group>,
    ) -> Result<Self, RunError> {
        let spec = write_spec(pod, directory).map_err(RunError::Spawn)?;
        let mut background = Self {
            cube: pod.cube.clone(),
            base: directory.join("pods"),
            pid: 0,
            deadline,
        };
        let memory = format!("{}M", pod.memory_mib);
        let mut command = background.command(&["pod", "run", "--memory", &memory]);
        command.arg(spec);
        // From here on there may be a pod, whatever goes wrong.
        measure::launch(command, directory, group)?.finish(deadline)?;
        background.pid = background
            .listed()
            .ok_or_else(|| RunError::Odd("`cube ps` does not know its process".to_owned()))?;
        Ok(background)
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.cube);
        command.env("CUBE_RUN_DIR", &self.base).args(words);
        command
    }

    /// The pod process, as its API tells it.
    fn listed(&self) -> Option<u32> {
        let output = self
            .command(&["ps", "--json"])
            .stdin(Stdio::null())
            .output()
            .ok()?;
        let pods: Value = serde_json::from_slice(&output.stdout).ok()?;
        u32::try_from(pods.get(0)?.get("pid")?.as_u64()?).ok()
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let mut stop = self.command(&["stop", "--time", "0", NAME]);
        let _ = stop.stdin(Stdio::null()).stderr(Stdio::null()).status();
        // If it has ended already, there is nothing to wait for.
        if let Some(pid) = Pid::from_raw(self.pid.cast_signed()) {
            let _ = ends_within(pid, self.deadline);
        }
    }
}

fn write_spec(pod: &PodCommand, directory: &Path) -> io::Result<PathBuf> {
    let path = directory.join("pod.json");
    let container = json!({
        "name": "idle",
        "image": pod.image,
        "command": ["sh", "-c", "exec sleep 1000000"],
    });
    let spec = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": NAME},
        "spec": {"containers": [container]},
    });
    fs::write(&path, spec.to_string())?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A `cube` whose pod process is `sleep`.
    const FAKE: &str = "#!/bin/sh
mkdir -p \"$CUBE_RUN_DIR\"
case \"$1\" in
pod) setsid sleep 1000 < /dev/null > /dev/null 2>&1 & echo $! > \"$CUBE_RUN_DIR/pid\"; cp \"$5\" \"$CUBE_RUN_DIR/spec\";;
ps) echo \"[{\\\"pid\\\": $(cat \"$CUBE_RUN_DIR/pid\")}]\";;
stop) kill \"$(cat \"$CUBE_RUN_DIR/pid\")\";;
esac
";

    #[test]
    fn the_pod_process_is_looked_at_and_ended() {
        let directory = tempfile::tempdir().expect("a directory");
        let cube = directory.path().join("cube");
        fs::write(&cube, FAKE).expect("a script");
        fs::set_permissions(&cube, fs::Permissions::from_mode(0o755)).expect("a mode");
        let (image, memory_mib) = ("box".to_owned(), 128);
        let pod = PodCommand {
            cube,
            image,
            memory_mib,
            throughput: false,
        };
        let mut taken = Figures::new();
        let deadline = Duration::from_secs(60);
        measure(&pod, deadline, directory.path(), &mut taken).expect("it runs");
        assert_eq!(taken["threads"], [1.0]);
        let pods = directory.path().join("pods");
        let spec = fs::read_to_string(pods.join("spec")).expect("a spec");
        assert!(spec.contains("\"image\":\"box\""), "{spec}");
        let pid = fs::read_to_string(pods.join("pid")).expect("a process id");
        // Whoever adopted it may not have reaped it yet.
        let stat = fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
        assert!(stat.is_err() || stat.is_ok_and(|stat| stat.contains(") Z ")));
    }
}
