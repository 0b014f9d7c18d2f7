//! `cube import`: puts an image into the store.
#![forbid(unsafe_code)]

use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::process::ExitCode;

use indicatif::{ProgressBar, ProgressStyle};

use super::images::{ImageJson, StoreArgs, json, print};
use crate::image::{ImportProgress, NoProgress, StoreError};

/// Arguments of `cube import`.
#[derive(Debug, clap::Args)]
#[command(
    about = "Put an image into the store",
    long_about = "Put an image into the store: an OCI image layout (a directory or a tar of one) or a \
                  Docker archive (`docker save`). Layers that are there already are not read again.",
    after_help = "Examples:\n  cube import ./debian\n  cube import ./layout:12 debian:12\n  \
                  cube import saved.tar example.org/app:1"
)]
pub(crate) struct Args {
    #[command(flatten)]
    store: StoreArgs,
    /// The directory or archive; if it holds several images, a colon and a tag after it
    path: PathBuf,
    /// The image's name [default: the one it gives itself, or the file's name with its tag]
    name: Option<String>,
    /// Print JSON instead of name and digest
    #[arg(long)]
    json: bool,
}

/// Runs `cube import`.
///
/// # Errors
/// The store's, or the image's: a sentence that names the file and the fault.
pub(crate) fn run(args: Args) -> Result<ExitCode, StoreError> {
    let store = args.store.open()?;
    let name = args.name.as_deref();
    let record = store.import(&args.path, name, progress().as_mut())?;
    if args.json {
        return Ok(print(&json(&ImageJson::from(&record))));
    }
    let names = record.names.join(", ");
    Ok(print(&format!("{names}  {}\n", record.digest)))
}

/// What shows an import's progress: bars if standard error is a terminal, else nothing.
#[must_use]
pub(crate) fn progress() -> Box<dyn ImportProgress> {
    match io::stderr().is_terminal() {
        true => Box::new(Bars(ProgressBar::hidden())),
        false => Box::new(NoProgress),
    }
}

/// One bar at a time, on standard error.
struct Bars(ProgressBar);

impl Bars {
    fn show(&mut self, length: u64, message: String, template: &str) {
        self.0.finish_and_clear();
        self.0 = ProgressBar::new(length).with_message(message);
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.0.set_style(style);
        }
        self.0.tick();
    }
}

impl ImportProgress for Bars {
    fn layer(&mut self, index: usize, count: usize, bytes: Option<u64>) {
        // One that is there already takes no time to see.
        if let Some(bytes) = bytes {
            let message = format!("layer {} of {count}", index + 1);
            let template =
                "{msg} [{bar:30}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec}";
            self.show(bytes, message, template);
        }
    }

    fn read(&mut self, bytes: u64) {
        self.0.set_position(bytes);
    }

    fn merging(&mut self) {
        self.show(0, "joining the layers".to_owned(), "{msg}");
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
