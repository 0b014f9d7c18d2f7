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
use super::footprint;
use super::measure::{self, RunError, ends_within};
use super::plan::{Figures, look, record};
use super::pod::PodCommand;
use crate::client::PodApi;

const NAME: &str = "cube-bench";
/// Containers of the pod that tells what a further one costs.
const MANY: u32 = 8;

/// A pod that runs. Dropping it ends it.
pub(super) struct Background {
    cube: PathBuf,
    base: PathBuf,
    pid: u32,
    deadline: Duration,
}

/// One idle pod to look at, with the memory of a group in which nothing but the pod process is left, and one of
/// [`MANY`] containers.
pub(super) fn measure(
    pod: &PodCommand,
    deadline: Duration,
    directory: &Path,
    taken: &mut Figures,
) -> Result<(), RunError> {
    // Dropped last: a group with a process in it cannot be removed.
    let group = Group::create();
    let one = Background::start(pod, 1, deadline, directory, group.as_ref())?;
    look(one.pid, pod.memory_mib, group.as_ref(), taken).map_err(RunError::Look)?;
    let of_one = one.own_rss_kib(pod).map_err(RunError::Look)?;
    drop(one);
    let many = Background::start(pod, MANY, deadline, directory, None)?;
    let of_many = many.own_rss_kib(pod).map_err(RunError::Look)?;
    let further = of_many.saturating_sub(of_one) as f64 / f64::from(MANY - 1);
    record(taken, "container_kib", further);
    Ok(())
}

impl Background {
    /// Starts a pod of so many idle containers.
    pub(super) fn start(
        pod: &PodCommand,
        containers: u32,
        deadline: Duration,
        directory: &Path,
        group: Option<&Group>,
    ) -> Result<Self, RunError> {
        let spec = write_spec(pod, containers, directory).map_err(RunError::Spawn)?;
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

    /// What the pod process takes apart from guest memory.
    pub(super) fn own_rss_kib(&self, pod: &PodCommand) -> io::Result<u64> {
        footprint::of_process(self.pid, pod.memory_mib).map(|memory| memory.overhead_rss_kib)
    }

    /// The pod's API.
    pub(super) fn api(&self) -> PodApi {
        PodApi::of(&self.base, NAME)
    }

    /// The pod process.
    pub(super) fn pid(&self) -> u32 {
        self.pid
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

/// The name of a container.
pub(super) fn container(number: u32) -> String {
    format!("idle{number}")
}

fn write_spec(pod: &PodCommand, containers: u32, directory: &Path) -> io::Result<PathBuf> {
    let path = directory.join("pod.json");
    let idle = |number| {
        json!({
            "name": container(number),
            "image": pod.image,
            "command": ["sh", "-c", "exec sleep 1000000"],
        })
    };
    let containers: Vec<_> = (0..containers).map(idle).collect();
    let spec = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": NAME},
        "spec": {"containers": containers},
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
        assert!(taken["container_kib"][0] >= 0.0);
        let pods = directory.path().join("pods");
        let spec = fs::read_to_string(pods.join("spec")).expect("a spec");
        assert!(spec.contains("\"image\":\"box\""), "{spec}");
        assert_eq!(spec.matches("\"idle").count(), 8, "the last pod: {spec}");
        let pid = fs::read_to_string(pods.join("pid")).expect("a process id");
        // Whoever adopted it may not have reaped it yet.
        let stat = fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
        assert!(stat.is_err() || stat.is_ok_and(|stat| stat.contains(") Z ")));
    }
}
