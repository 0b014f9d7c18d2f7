//! Prints the canonical digest of a file tree: of an image's layers, or of a directory, such as a
//! mounted image inside a guest. Equal digests mean equal trees.
//!
//! ```text
//! tree-digest layers IMAGE
//! tree-digest directory DIR [PATH-TO-SKIP…]
//! ```
//! Built static (`-C target-feature=+crt-static` with an explicit target) it runs in any guest.
#![forbid(unsafe_code)]

use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::process::ExitCode;

use cube::image::tree_digest::{self, Listing};

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let listing = match &arguments[..] {
        [kind, path] if kind == "layers" => {
            tree_digest::of_layers(Path::new(path)).map_err(|error| error.to_string())
        }
        [kind, path, skip @ ..] if kind == "directory" => {
            let skip: Vec<_> = skip.iter().map(|path| path.clone().into_vec()).collect();
            tree_digest::of_directory(Path::new(path), &skip).map_err(|error| error.to_string())
        }
        _ => {
            eprintln!(
                "usage: tree-digest layers IMAGE | tree-digest directory DIR [PATH-TO-SKIP…]"
            );
            return ExitCode::from(2);
        }
    };
    report(listing)
}

fn report(listing: Result<Listing, String>) -> ExitCode {
    match listing {
        Ok(listing) => {
            println!("{} {} paths", listing.digest(), listing.len());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("tree-digest: {error}");
            ExitCode::FAILURE
        }
    }
}
