//! `cube run`: a container from a local image in a microVM of its own, in the foreground.
#![forbid(unsafe_code)]

use std::io::{self, IsTerminal};
use std::path::PathBuf;

use clap::Args;
use cube_guest::{ContainerSpec, PodSpec, ProcessSpec, RootFs, SecuritySpec, Stdio, TerminalSize};

use super::asked::Asked;
use super::failure::{Failure, STATUS_HELP};
use super::image_disks::{self, Resolved};
use super::images::StoreArgs;
use super::pod_net::{NetArgs, PodNetwork};
use super::process::{ProcessOptions, process};
use super::signals::Signals;
use super::size::parse_memory;
use super::stay::{Attachment, stay};
use super::terminal;
use super::timeline::{Timeline, TimelineFormat};
use crate::client::pod::new_id;
use crate::client::{Install, Pod, PodRequest, base_directory};
use crate::pod::{new_token, seccomp_profile};

/// The terminal's size when there is none to ask.
const DEFAULT_SIZE: TerminalSize = TerminalSize {
    rows: 24,
    columns: 80,
};
/// The container's id within its pod.
const CONTAINER: &str = "main";

/// Run a container in a microVM of its own.
#[derive(Debug, Args)]
#[command(after_help = format!("\
Examples:
  cube run busybox -- echo hello
  cube run -it busybox                    a shell on this terminal
  tar c . | cube run -i busybox -- tar t  standard input passed on
  cube run --cpus 4 --memory 1G --env DEBUG=1 --user nobody build -- make -j4
  cube run -p 8080:80 web                 port 8080 of this host leads to port 80 of the pod
  cube run --timeline busybox -- true     where the time goes

{STATUS_HELP}"))]
pub(crate) struct RunArgs {
    /// vCPUs of the machine, 1 to 32.
    #[arg(long, default_value_t = 1, value_name = "N",
          value_parser = clap::value_parser!(u8).range(1..=32))]
    cpus: u8,

    /// Memory of the machine: a number and a unit (128M, 64MiB, 1G).
    #[arg(long, short, default_value = "128M", value_name = "SIZE", value_parser = parse_memory)]
    memory: u32,

    /// Set a variable, or pass one of this environment on. May be given many times.
    #[arg(long, short, value_name = "NAME[=VALUE]")]
    env: Vec<String>,

    /// Working directory; made if it is not there.
    #[arg(long, short, value_name = "DIR")]
    workdir: Option<String>,

    /// User, and group: names or numbers.
    #[arg(long, short, value_name = "USER[:GROUP]")]
    user: Option<String>,

    /// Replace the image's entrypoint; its command is not used then.
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,

    /// Pass standard input on.
    #[arg(long, short)]
    interactive: bool,

    /// Give the container a terminal.
    #[arg(long, short)]
    tty: bool,

    /// Make the container's root file system read-only.
    #[arg(long)]
    read_only: bool,

    /// Limit the container's system calls to what an OCI seccomp profile (JSON) allows.
    #[arg(long, value_name = "FILE")]
    seccomp: Option<PathBuf>,

    /// Size of the writable layer.
    #[arg(long, default_value = "1G", value_name = "SIZE",
          value_parser = super::size::parse_bytes)]
    disk_size: u64,

    /// Name the container sees as its own; otherwise the pod's id.
    #[arg(long, value_name = "NAME", value_parser = parse_hostname)]
    hostname: Option<String>,

    /// Show on standard error where the time went.
    #[arg(long, value_name = "FORMAT", num_args = 0..=1, require_equals = true,
          default_missing_value = "table")]
    timeline: Option<TimelineFormat>,

    /// Guest kernel, an ELF vmlinux; otherwise CUBE_KERNEL or /usr/lib/cube/vmlinux.
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,

    /// Write what the guest's kernel says on its console to a file: for a guest that does not boot.
    /// It makes the boot slower.
    #[arg(long, value_name = "FILE")]
    console: Option<PathBuf>,

    #[command(flatten)]
    net: NetArgs,

    #[command(flatten)]
    store: StoreArgs,

    /// Name of a local image (`cube images`), or the path of one to import.
    image: String,

    /// Command and arguments, instead of the image's.
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// A host name: labels of letters, digits and hyphens (RFC 1123, section 2.1), at most 63 characters.
fn parse_hostname(text: &str) -> Result<String, String> {
    let is_label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    if text.len() <= 63 && text.split('.').all(is_label) {
        Ok(text.to_owned())
    } else {
        Err("a host name has at most 63 letters, digits, hyphens and dots".to_owned())
    }
}

/// Runs the container; `origin` is the beginning of the program.
pub(crate) fn run(mut arguments: RunArgs, origin: u64) -> Result<u8, Failure> {
    let mut timeline = Timeline::new(origin);
    if arguments.interactive && arguments.tty && !io::stdin().is_terminal() {
        return Err(Failure::usage(
            "-i with -t needs a terminal as standard input: leave -t out to pass a pipe or file on",
        ));
    }
    // From here on a signal is the container's, and nothing is left behind by one that comes early.
    let signals = Signals::catch().map_err(Failure::new)?;
    let format = arguments.timeline;
    let image = image_disks::resolve(&arguments.store, &arguments.image, arguments.disk_size, 0)?;
    timeline.mark("image resolved");
    let (interactive, tty) = (arguments.interactive, arguments.tty);
    let base = base_directory().map_err(Failure::new)?;
    let id = new_id().map_err(Failure::new)?;
    let mut network = PodNetwork::connect(&arguments.net, &base, &id, arguments.cpus)?;
    if network.is_some() {
        timeline.mark("network made");
    }
    let (request, stdio) = request(&mut arguments, id, image, network.as_mut())?;
    let started = Pod::start(&base, request, |api| Asked::of(api, CONTAINER, &stdio));
    let (pod, asked) = started.map_err(Failure::new)?;
    timeline.mark("machine spawned");
    let outcome = stay(
        pod,
        asked,
        Attachment {
            container: CONTAINER.to_owned(),
            tty,
            interactive,
            signals,
            timeline,
        },
    );
    if let Some(network) = network {
        network.disconnect();
    }
    if let Some(format) = format {
        eprint!("{}", outcome.timeline.render(format));
    }
    outcome.result
}

fn request(
    arguments: &mut RunArgs,
    id: String,
    image: Resolved,
    network: Option<&mut PodNetwork>,
) -> Result<(PodRequest, Stdio), Failure> {
    let install = Install::find(arguments.kernel.as_deref()).map_err(Failure::new)?;
    let process = container_process(arguments, &image).map_err(Failure::usage)?;
    let stdio = stdio(arguments).map_err(Failure::new)?;
    let [image_serial, writable_serial] = image_disks::serials(0);
    let container = ContainerSpec {
        id: CONTAINER.to_owned(),
        rootfs: RootFs {
            image: image_serial,
            writable: Some(writable_serial),
            read_only: arguments.read_only,
        },
        process: ProcessSpec {
            stdio: stdio.clone(),
            ..process
        },
        security: security(arguments)?,
        ..ContainerSpec::default()
    };
    let guest = PodSpec {
        hostname: arguments.hostname.take().unwrap_or_else(|| id.clone()),
        containers: vec![container],
        exit_with_containers: true,
        network: network.as_ref().map(|network| network.spec()),
        ..PodSpec::default()
    };
    let request = PodRequest {
        id,
        install,
        cpus: arguments.cpus,
        memory_mib: arguments.memory,
        disks: image.disks,
        nets: network.map(PodNetwork::take_device).into_iter().collect(),
        guest,
        timeline: arguments.timeline.is_some(),
        console: arguments.console.take(),
    };
    Ok((request, stdio))
}

fn security(arguments: &RunArgs) -> Result<SecuritySpec, Failure> {
    let Some(path) = &arguments.seccomp else {
        return Ok(SecuritySpec::default());
    };
    let json = std::fs::read(path).map_err(|error| {
        let path = path.display();
        Failure::new(format!("cannot read the seccomp profile {path}: {error}"))
    })?;
    let seccomp = seccomp_profile::compile(&json)
        .map_err(|error| Failure::usage(format!("{}: {error}", path.display())))?;
    Ok(SecuritySpec {
        seccomp,
        ..SecuritySpec::default()
    })
}

fn container_process(
    arguments: &mut RunArgs,
    image: &Resolved,
) -> Result<ProcessSpec, super::process::ProcessError> {
    let options = ProcessOptions {
        entrypoint: arguments.entrypoint.take(),
        arguments: std::mem::take(&mut arguments.command),
        env: std::mem::take(&mut arguments.env),
        workdir: arguments.workdir.take(),
        user: arguments.user.take(),
    };
    process(&arguments.image, image.process.clone(), options, |name| {
        std::env::var(name).ok()
    })
}

fn stdio(arguments: &RunArgs) -> io::Result<Stdio> {
    if arguments.tty {
        return Ok(Stdio::Terminal {
            token: new_token()?,
            size: terminal::size().unwrap_or(DEFAULT_SIZE),
        });
    }
    let stdin = arguments.interactive.then(new_token).transpose()?;
    Ok(Stdio::Pipes {
        stdin,
        stdout: Some(new_token()?),
        stderr: Some(new_token()?),
    })
}
