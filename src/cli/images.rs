//! `cube images`: lists what is in the image store.
#![forbid(unsafe_code)]

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use serde::Serialize;

use crate::image::{Digest, ImageConfig, ImageRecord, Store, StoreError};

/// Arguments of `cube images`.
#[derive(Debug, clap::Args)]
#[command(
    about = "List the images in the store",
    after_help = "Examples:\n  cube images\n  cube images --json\n  cube rmi $(cube images --quiet)"
)]
pub(crate) struct Args {
    #[command(flatten)]
    store: StoreArgs,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
    /// Print digests alone
    #[arg(long, short, conflicts_with = "json")]
    quiet: bool,
}

/// Which store a command uses.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct StoreArgs {
    /// The image store [default: $CUBE_STORE, or /var/lib/cube/images for root, or cube/images in the
    /// user's data directory]
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
}

impl StoreArgs {
    /// Opens the store.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub(crate) fn open(&self) -> Result<Store, StoreError> {
        match &self.store {
            Some(path) => Store::open(path),
            None => Store::open(Store::default_path()?),
        }
    }
}

/// An image in JSON output.
#[derive(Debug, Serialize)]
pub(super) struct ImageJson<'a> {
    names: &'a [String],
    digest: Digest,
    #[serde(skip_serializing_if = "Option::is_none")]
    created: Option<&'a str>,
    /// Bytes of the disk that a guest sees.
    disk_size: u64,
    layers: Vec<Digest>,
    config: &'a ImageConfig,
}

impl<'a> From<&'a ImageRecord> for ImageJson<'a> {
    fn from(record: &'a ImageRecord) -> Self {
        Self {
            names: &record.names,
            digest: record.digest,
            created: record.created.as_deref(),
            disk_size: record.disk_size(),
            layers: record.layers.iter().map(|layer| layer.diff_id).collect(),
            config: &record.config,
        }
    }
}

/// Runs `cube images`.
///
/// # Errors
/// The store's. A reader of the output that goes away is not an error.
pub(crate) fn run(args: Args) -> Result<ExitCode, StoreError> {
    let records = args.store.open()?.list()?;
    let text = if args.json {
        let images: Vec<_> = records.iter().map(ImageJson::from).collect();
        json(&images)
    } else if args.quiet {
        records
            .iter()
            .map(|record| format!("{}\n", record.digest))
            .collect()
    } else {
        table(&records)
    };
    Ok(print(&text))
}

/// JSON for a person or a program.
pub(super) fn json(value: &impl Serialize) -> String {
    // Strings, numbers and lists always have a JSON form.
    let text = serde_json::to_string_pretty(value).unwrap_or_default();
    format!("{text}\n")
}

/// Prints to standard output; failure is an exit status, because there is nobody to tell.
pub(super) fn print(text: &str) -> ExitCode {
    let mut output = io::stdout().lock();
    match output
        .write_all(text.as_bytes())
        .and_then(|()| output.flush())
    {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn table(records: &[ImageRecord]) -> String {
    let mut rows = vec![["NAME", "DIGEST", "CREATED", "SIZE"].map(str::to_owned)];
    for record in records {
        let unnamed = ["<none>".to_owned()];
        let names = if record.names.is_empty() {
            &unnamed
        } else {
            record.names.as_slice()
        };
        for name in names {
            rows.push([
                name.clone(),
                record.digest.hex().chars().take(12).collect(),
                record.created.as_deref().map_or("-", day).to_owned(),
                size(record.disk_size()),
            ]);
        }
    }
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: Vec<usize> = (0..3).map(|column| width(column).unwrap_or(0)).collect();
    let line = |row: &[String; 4]| {
        let [name, digest, created, size] = row;
        let (n, d, c) = (widths[0], widths[1], widths[2]);
        format!("{name:n$}  {digest:d$}  {created:c$}  {size}\n")
    };
    rows.iter().map(line).collect()
}

/// The day of an RFC 3339 time.
fn day(time: &str) -> &str {
    time.split('T').next().unwrap_or(time)
}

/// A size for a person, in binary units.
pub(super) fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_readable() {
        assert_eq!(size(0), "0.0 KiB");
        assert_eq!(size(8192), "8.0 KiB");
        assert_eq!(size(123_456_789), "117.7 MiB");
    }

    #[test]
    fn an_empty_table_has_its_heading() {
        assert_eq!(table(&[]), "NAME  DIGEST  CREATED  SIZE\n");
    }
}
