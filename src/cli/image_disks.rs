//! An image in the store as what a pod needs of it: disks, and the process it is made for.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use super::failure::Failure;
use super::images::StoreArgs;
use super::import::progress;
use super::process::ImageProcess;
use crate::client::{NamedFile, PodDisk};
use crate::image::{ImageConfig, Store, WritableError};

/// virtio-blk serials of the image's and the writable disk of a pod's first containers, by their number.
pub(crate) fn serials(container: usize) -> [String; 2] {
    [format!("image{container}"), format!("rw{container}")]
}

/// An image ready to run.
#[derive(Debug)]
pub(crate) struct Resolved {
    /// The process that the image is made for.
    pub(crate) process: ImageProcess,
    /// The image's disk and the writable one.
    pub(crate) disks: Vec<PodDisk>,
}

/// Finds the image, or imports it if `reference` is a path, and makes a writable layer of `disk_size`
/// bytes, which has no name and is gone with the pod. `container` numbers the pod's first containers.
pub(crate) fn resolve(
    store: &StoreArgs,
    reference: &str,
    disk_size: u64,
    container: usize,
) -> Result<Resolved, Failure> {
    let store = store.open().map_err(Failure::new)?;
    let record = store
        .resolve_or_import(reference, progress().as_mut())
        .map_err(Failure::new)?;
    let mut parts = Vec::new();
    for (path, size) in record.disk_parts() {
        let file = NamedFile::open("image's file", &path).map_err(Failure::new)?;
        parts.push((file, Some(size)));
    }
    let [image_serial, writable_serial] = serials(container);
    let image = PodDisk {
        serial: image_serial,
        parts,
        read_only: true,
    };
    Ok(Resolved {
        process: image_process(record.config),
        disks: vec![image, writable(&store, writable_serial, disk_size)?],
    })
}

/// A disk of `size` bytes for a volume, empty, which has no name and is gone with the pod.
pub(crate) fn empty(store: &StoreArgs, serial: String, size: u64) -> Result<PodDisk, Failure> {
    let store = store.open().map_err(Failure::new)?;
    writable(&store, serial, size)
}

fn writable(store: &Store, serial: String, size: u64) -> Result<PodDisk, Failure> {
    let file = store
        .writable()
        .clone_unnamed(size)
        .map_err(|error| match error {
            WritableError::Size(_) => Failure::usage(error),
            error => Failure::new(error),
        })?;
    let file = NamedFile {
        file,
        path: PathBuf::from("the writable layer"),
    };
    Ok(PodDisk {
        serial,
        parts: vec![(file, Some(size))],
        read_only: false,
    })
}

fn image_process(config: ImageConfig) -> ImageProcess {
    ImageProcess {
        entrypoint: config.entrypoint,
        command: config.cmd,
        env: config.env,
        workdir: config.working_dir,
        user: config.user,
    }
}
