//! `cube rmi`: removes images from the store.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use super::images::{StoreArgs, print};
use crate::image::StoreError;

/// Arguments of `cube rmi`.
#[derive(Debug, clap::Args)]
#[command(
    about = "Remove images from the store",
    long_about = "Remove names of images, and with the last name of an image its files that no other \
                  image uses. A digest, or its first digits, stands for all names of the image. \
                  Pods that run it are not disturbed.",
    after_help = "Examples:\n  cube rmi debian:12\n  cube rmi 4bb2d49b1c0e"
)]
pub(crate) struct Args {
    #[command(flatten)]
    store: StoreArgs,
    /// Names or digests
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

/// Runs `cube rmi`. Every name is tried; those that failed are reported, and the last failure is
/// returned.
///
/// # Errors
/// The store's.
pub(crate) fn run(args: Args) -> Result<ExitCode, StoreError> {
    let store = args.store.open()?;
    let mut failure = None;
    let mut done = String::new();
    for name in &args.names {
        match store.remove(name) {
            Ok(removed) => {
                done.extend(
                    removed
                        .names
                        .iter()
                        .map(|name| format!("Untagged: {name}\n")),
                );
                done.extend(removed.image.map(|digest| format!("Deleted: {digest}\n")));
            }
            Err(error) => {
                if let Some(earlier) = failure.replace(error) {
                    eprintln!("cube: {earlier}");
                }
            }
        }
    }
    let status = print(&done);
    match failure {
        Some(error) => Err(error),
        None => Ok(status),
    }
}
