//! `cargo xtask demo`: everything from a bare machine to the output of a container in a microVM.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use clap::Args;

use crate::cache::Cache;
use crate::error::Result;
use crate::steps::{Outcome, Steps};
use crate::testbed::{self, Job, Limits, Outer};
use crate::{binaries, doctor, image, kernel, run, setup, test};

/// What the container runs unless told otherwise.
const SCRIPT: &str = "echo \"Hello from a container in a microVM.\"; . /etc/os-release; echo \"image   $PRETTY_NAME\"; \
                      echo \"kernel  $(uname -r)\"; echo \"memory  $(grep MemTotal /proc/meminfo | tr -s ' ' | cut -d' ' -f2-)\"; \
                      echo \"root    $(grep ' / ' /proc/mounts | cut -d' ' -f1,3)\"; ps";
/// The image's name in the demo's store.
pub(crate) const IMAGE: &str = "demo";

/// Options of `cargo xtask demo`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cargo xtask demo
  cargo xtask demo -- cat /proc/cpuinfo")]
pub(crate) struct Options {
    /// A command to run in the container instead of the demo's
    #[arg(last = true, value_name = "CMD")]
    command: Vec<OsString>,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let direct = doctor::kvm_runs_linux();
    let mut steps = Steps::new(if direct { 6 } else { 7 });
    setup::install(&mut steps)?;
    let kernel = kernel::step(&mut steps, "cube")?;
    let outer = if direct {
        None
    } else {
        Some(testbed::step(&mut steps)?)
    };
    let init = binaries::init(&mut steps)?;
    let cube = binaries::host(&mut steps, binaries::Profile::Release)?.join("cube");
    let layout = image::step(&mut steps, image::Name::Busybox)?;
    let store = Cache::of_user()?.root().join("demo-store");
    steps.step("import", || {
        Ok((import(&cube, &layout, &store)?, Outcome::Done))
    })?;
    eprintln!("{}\n", test::place(direct));
    let parts = Parts {
        cube: &cube,
        kernel: &kernel,
        init: &init,
        store: &store,
    };
    show(&parts, outer.as_ref(), &options.command)
}

/// What the demo runs with.
pub(crate) struct Parts<'a> {
    /// The command.
    pub(crate) cube: &'a Path,
    /// The guest's kernel.
    pub(crate) kernel: &'a Path,
    /// The guest's init.
    pub(crate) init: &'a Path,
    /// A store with the demo's image ([`import`]).
    pub(crate) store: &'a Path,
}

/// Brings the image at `layout` into `store` under the demo's name.
pub(crate) fn import(cube: &Path, layout: &Path, store: &Path) -> Result<()> {
    let mut import = Command::new(cube);
    import
        .arg("import")
        .arg(layout)
        .arg(IMAGE)
        .env("CUBE_STORE", store);
    run::captured(&mut import).map(drop)
}

/// Runs `command`, or the demo's own script, in a container; gives the container's exit status.
pub(crate) fn show(
    parts: &Parts<'_>,
    outer: Option<&Outer>,
    command: &[OsString],
) -> Result<ExitCode> {
    let words = command_line(parts.cube, command);
    let variables = [
        ("CUBE_KERNEL", parts.kernel.into()),
        ("CUBE_INIT", parts.init.into()),
        ("CUBE_STORE", parts.store.into()),
        // A start is what is shown; the host's network is left as it is.
        ("CUBE_NET", "none".into()),
    ];
    match outer {
        Some(outer) => in_testbed(outer, &words, &variables),
        None => directly(&words, &variables),
    }
}

fn command_line(cube: &Path, command: &[OsString]) -> Vec<OsString> {
    let mut words: Vec<OsString> = vec![cube.into()];
    words.extend(["run", "--timeline", IMAGE, "--"].map(Into::into));
    if command.is_empty() {
        words.extend(["sh", "-c", SCRIPT].map(Into::into));
    } else {
        words.extend_from_slice(command);
    }
    words
}

fn in_testbed(
    outer: &Outer,
    words: &[OsString],
    variables: &[(&str, OsString)],
) -> Result<ExitCode> {
    let mut job = Job::new(words)?;
    for (name, value) in variables {
        job = job.variable(name, value);
    }
    let limits = Limits {
        timeout: Duration::from_secs(300),
        silence: None,
        memory_mib: 2048,
        cpus: 2,
    };
    Ok(ExitCode::from(testbed::exec(
        outer,
        &limits,
        &job,
        std::io::stdout(),
    )?))
}

fn directly(words: &[OsString], variables: &[(&str, OsString)]) -> Result<ExitCode> {
    let mut command = Command::new(words.first().cloned().unwrap_or_default());
    command.args(words.get(1..).unwrap_or_default());
    command.envs(variables.iter().map(|(name, value)| (name, value)));
    run::shown(&mut command)?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_demo_runs_what_it_is_told_or_its_own_script() {
        let words = command_line(Path::new("/t/cube"), &["uname".into(), "-a".into()]);
        assert_eq!(
            words,
            ["/t/cube", "run", "--timeline", "demo", "--", "uname", "-a"]
        );
        let own = command_line(Path::new("/t/cube"), &[]);
        assert_eq!(own.last().unwrap(), SCRIPT);
    }
}
