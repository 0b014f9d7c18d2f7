//! `cube pod run`: a pod from a specification as Kubernetes writes it, which outlives this command.
#![forbid(unsafe_code)]

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use cube_guest::{
    ContainerSpec, PidNamespace, PodSpec, ProcessSpec, RootFs, SecuritySpec, Stdio, TerminalSize,
    VolumeSource, VolumeSpec,
};

use super::failure::Failure;
use super::image_disks;
use super::images::{StoreArgs, print};
use super::pod_net::{NetArgs, PodNetwork};
use super::pod_spec::{self, Container, Spec};
use super::process::process;
use super::size::parse_memory;
use crate::client::detached::{Detached, DetachedError, DetachedOptions};
use crate::client::{Install, PodDisk, PodRequest, base_directory};
use crate::pod::new_token;

/// Start pods of several containers.
#[derive(Debug, Args)]
pub(crate) struct PodArgs {
    #[command(subcommand)]
    command: PodCommand,
}

#[derive(Debug, Subcommand)]
enum PodCommand {
    Run(RunArgs),
}

/// Start a pod in the background, and print its name.
///
/// The specification is a Kubernetes Pod (apiVersion v1) in YAML or JSON. Its volumes are emptyDir and nfs. What Cube
/// does not obey is refused by name.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cube pod run web.yaml
  cube pod run --memory 512M --log-dir /var/log/web web.yaml
  cube pod run -p 8080:80 web.yaml
  cube exec web -- hostname
  cube stop web")]
struct RunArgs {
    /// vCPUs of the machine, 1 to 32.
    #[arg(long, default_value_t = 1, value_name = "N",
          value_parser = clap::value_parser!(u8).range(1..=32))]
    cpus: u8,

    /// Memory of the machine: a number and a unit (128M, 64MiB, 1G).
    #[arg(long, short, default_value = "128M", value_name = "SIZE", value_parser = parse_memory)]
    memory: u32,

    /// Size of each container's writable layer, and of an emptyDir on a disk without a sizeLimit.
    #[arg(long, default_value = "1G", value_name = "SIZE",
          value_parser = super::size::parse_bytes)]
    disk_size: u64,

    /// Directory for the containers' logs; otherwise they go with the pod.
    #[arg(long, value_name = "DIR")]
    log_dir: Option<PathBuf>,

    /// Guest kernel, an ELF vmlinux; otherwise CUBE_KERNEL or /usr/lib/cube/vmlinux.
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,

    #[command(flatten)]
    net: NetArgs,

    #[command(flatten)]
    store: StoreArgs,

    /// The specification; `-` is standard input.
    #[arg(value_name = "SPEC.yaml")]
    spec: PathBuf,
}

/// Runs `cube pod`.
pub(crate) fn run(arguments: PodArgs) -> Result<ExitCode, Failure> {
    let PodCommand::Run(arguments) = arguments.command;
    let text = read(&arguments.spec)?;
    let pod = pod_spec::parse(&text)
        .map_err(|error| Failure::usage(format!("{}: {error}", arguments.spec.display())))?;
    let id = pod.metadata.name.clone();
    let (mut disks, mut containers) = (Vec::new(), Vec::new());
    let of_once = pod.spec.containers.iter().filter(|c| c.stdin_once);
    let stdin_once = of_once.map(|container| container.name.clone()).collect();
    for (index, container) in pod.spec.containers.iter().enumerate() {
        let (spec, of_it) = resolve(&arguments, container, index)?;
        disks.extend(of_it);
        containers.push(ContainerSpec {
            pid_namespace: match pod.spec.share_process_namespace {
                true => PidNamespace::Pod,
                false => PidNamespace::Container,
            },
            ..spec
        });
    }
    let (volumes, of_them) = volumes(&arguments, &pod.spec)?;
    disks.extend(of_them);
    let base = base_directory().map_err(Failure::new)?;
    let log_directory = arguments.log_dir.as_ref().map(std::path::absolute);
    let log_directory = log_directory.transpose().map_err(Failure::usage)?;
    let install = Install::find(arguments.kernel.as_deref()).map_err(Failure::new)?;
    let mut network = PodNetwork::connect(&arguments.net, &base, &id, arguments.cpus)?;
    if network.is_none() {
        pod.spec.check_without_network().map_err(Failure::usage)?;
    }
    let request = PodRequest {
        install,
        cpus: arguments.cpus,
        memory_mib: arguments.memory,
        disks,
        nets: network
            .as_mut()
            .map(PodNetwork::take_device)
            .into_iter()
            .collect(),
        guest: PodSpec {
            hostname: pod.spec.hostname.unwrap_or_else(|| id.clone()),
            volumes,
            containers,
            network: network.as_ref().map(PodNetwork::spec),
            ..PodSpec::default()
        },
        timeline: false,
        console: None,
        id: id.clone(),
    };
    let with = DetachedOptions {
        log_directory,
        stdin_once,
        network_lock: None,
    };
    start(&base, request, with, network)?;
    Ok(print(&format!("{id}\n")))
}

/// Starts the pod and waits until it runs. What was made for one that does not is undone.
fn start(
    base: &Path,
    request: PodRequest,
    mut with: DetachedOptions,
    network: Option<PodNetwork>,
) -> Result<(), Failure> {
    let lock = network.as_ref().map(PodNetwork::lock_copy).transpose()?;
    with.network_lock = lock.flatten();
    let started = Detached::start(base, request, with);
    let ready = started
        .map_err(DetachedError::from)
        .and_then(Detached::wait_ready);
    if let Some(network) = network {
        match &ready {
            // Where only its API failed, its process may live.
            Ok(_) | Err(DetachedError::Api(_)) => network.hand_over(),
            Err(_) => network.disconnect(),
        }
    }
    ready.map(drop).map_err(Failure::new)
}

fn read(path: &Path) -> Result<String, Failure> {
    let failed = |error| Failure::usage(format!("cannot read {}: {error}", path.display()));
    if path == Path::new("-") {
        let mut text = String::new();
        io::stdin().read_to_string(&mut text).map_err(failed)?;
        return Ok(text);
    }
    std::fs::read_to_string(path).map_err(failed)
}

/// What the guest makes of the volumes, and the disks that some of them are on.
fn volumes(arguments: &RunArgs, spec: &Spec) -> Result<(Vec<VolumeSpec>, Vec<PodDisk>), Failure> {
    let (mut volumes, mut disks) = (Vec::new(), Vec::new());
    for wanted in spec.volumes(arguments.disk_size).map_err(Failure::usage)? {
        if let (Some(size), VolumeSource::Disk { serial, .. }) =
            (wanted.disk_size, &wanted.spec.source)
        {
            disks.push(image_disks::empty(&arguments.store, serial.clone(), size)?);
        }
        volumes.push(wanted.spec);
    }
    Ok((volumes, disks))
}

fn resolve(
    arguments: &RunArgs,
    container: &Container,
    index: usize,
) -> Result<(ContainerSpec, Vec<PodDisk>), Failure> {
    let resources = container.resources().map_err(Failure::usage)?;
    let (image, disk_size) = (&container.image, arguments.disk_size);
    let resolved = image_disks::resolve(&arguments.store, image, disk_size, index)?;
    let (command, options) = container.options();
    let mut of_image = resolved.process;
    if !command.is_empty() {
        of_image.entrypoint = command;
        of_image.command = Vec::new();
    }
    let process = process(image, of_image, options, |_| None).map_err(Failure::usage)?;
    let stdio = stdio(container).map_err(Failure::new)?;
    let context = &container.security_context;
    let [image, writable] = image_disks::serials(index);
    let spec = ContainerSpec {
        id: container.name.clone(),
        rootfs: RootFs {
            image,
            writable: Some(writable),
            read_only: context.read_only_root_filesystem,
        },
        process: ProcessSpec {
            stdio,
            no_new_privileges: context.allow_privilege_escalation == Some(false),
            ..process
        },
        resources,
        mounts: container.mounts(),
        security: SecuritySpec {
            privileged: context.privileged,
            ..SecuritySpec::default()
        },
        ..ContainerSpec::default()
    };
    Ok((spec, resolved.disks))
}

/// The streams of a container: a terminal has the size of the first client's window once there is one.
fn stdio(container: &Container) -> io::Result<Stdio> {
    if container.tty {
        return Ok(Stdio::Terminal {
            token: new_token()?,
            size: TerminalSize {
                rows: 24,
                columns: 80,
            },
        });
    }
    Ok(Stdio::Pipes {
        stdin: container.stdin.then(new_token).transpose()?,
        stdout: Some(new_token()?),
        stderr: Some(new_token()?),
    })
}
