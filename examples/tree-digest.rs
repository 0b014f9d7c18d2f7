//! Prints the canonical digest of a file tree: of an image's layers, or of a directory, such as a
//! mounted image inside a guest. Equal digests mean equal trees.
//!
//! ```text
//! tree-digest layers IMAGE [PATH-TO-SKIP…]
//! tree-digest directory DIR [PATH-TO-SKIP…]
//! ```
//! Skipped paths are relative, and are left out with all below. Built static (`-C target-feature=+crt-static` with
//! an explicit target) it runs in any guest, otherwise in one with the same C library.
#![forbid(unsafe_code)]

use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::process::ExitCode;

use cube::image::tree_digest::{self, Listing};

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let [kind, path, skip @ ..] = &arguments[..] else {
        return usage();
    };
    let skip: Vec<_> = skip.iter().map(|path| path.clone().into_vec()).collect();
    let path = Path::new(path);
    let listing = match kind.to_str() {
        Some("layers") => tree_digest::of_layers(path)
            .map(|listing| listing.without(&skip))
            .map_err(|error| error.to_string()),
        Some("directory") => {
            tree_digest::of_directory(path, &skip).map_err(|error| error.to_string())
        }
        _ => return usage(),
    };
    report(listing)
}

fn usage() -> ExitCode {
    eprintln!("usage: tree-digest layers IMAGE|directory DIR [PATH-TO-SKIP…]");
    ExitCode::from(2)
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
