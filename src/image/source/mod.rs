//! Where an image comes from: an OCI image layout (a directory, or a tar of one) or a Docker archive
//! (what `docker save` writes). Gives the verified configuration and readers of the layers.
//!
//! - [`files`] reads named files of the directory or the tar.
//! - [`oci`] follows index → manifest → configuration.
//! - [`docker`] follows `manifest.json`.
#![forbid(unsafe_code)]

mod config;
mod docker;
mod files;
mod oci;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

pub use config::ImageConfig;

use super::digest::{Digest, DigestError};
use super::layer::stream::Expected;
use super::tar::TarError;
use config::ConfigFile;
use files::Files;

/// The largest index, manifest or configuration accepted, in bytes (what registries accept).
const MAX_JSON: u64 = 4 << 20;
/// The most layers accepted.
const MAX_LAYERS: usize = 1000;

/// Why an image cannot be read. Each is a sentence that names the file.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// There is nothing at the path.
    #[error("there is no image at {}", .0.display())]
    Missing(PathBuf),
    /// A file could not be read.
    #[error("{} cannot be read: {error}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// It is an archive and the archive is bad.
    #[error("the archive {} {error}", .path.display())]
    Archive {
        /// The archive.
        path: PathBuf,
        /// What is wrong.
        error: TarError,
    },
    /// Neither kind of image.
    #[error(
        "{} is neither an OCI image layout nor a Docker archive: {fault}",
        .path.display()
    )]
    Unknown {
        /// The directory or file.
        path: PathBuf,
        /// What is missing.
        fault: &'static str,
    },
    /// A file that the image refers to is not there.
    #[error("the image {} has no file `{name}`, which it refers to", .path.display())]
    Absent {
        /// The image.
        path: PathBuf,
        /// The file in it.
        name: String,
    },
    /// A file does not have the digest under which the image refers to it.
    #[error("`{name}` of the image {} has the digest {found}, not the one that it must have", .path.display())]
    WrongDigest {
        /// The image.
        path: PathBuf,
        /// The file in it.
        name: String,
        /// The digest it has.
        found: Digest,
    },
    /// A file is malformed.
    #[error("`{name}` of the image {}: {fault}", .path.display())]
    Malformed {
        /// The image.
        path: PathBuf,
        /// The file in it.
        name: String,
        /// What is wrong.
        fault: String,
    },
    /// The image is well-formed, and Cube cannot choose or run it.
    #[error("the image {} {fault}", .path.display())]
    Unfit {
        /// The image.
        path: PathBuf,
        /// Why, and what to do.
        fault: String,
    },
}

/// An image, resolved to what runs on this machine.
#[derive(Debug)]
pub struct Source {
    /// Where it is.
    path: PathBuf,
    files: Files,
    /// Digest of the manifest; of a Docker archive, of the configuration.
    pub digest: Digest,
    /// The name that the image gives itself, made complete with the file's name if it only has a tag.
    pub name: String,
    /// When it was made, as in its configuration.
    pub created: Option<String>,
    /// What its containers run.
    pub config: ImageConfig,
    /// The layers, lowest first.
    pub layers: Vec<SourceLayer>,
}

/// One layer of a [`Source`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceLayer {
    /// The file's name in the image.
    name: String,
    /// What it must be.
    pub expected: Expected,
}

impl Source {
    /// Opens the image at `path`, or, with a colon and a tag after the path, the image of that tag
    /// there. Index, manifest and configuration are read and verified.
    ///
    /// # Errors
    /// [`SourceError`].
    pub fn open(path: &Path) -> Result<Self, SourceError> {
        let (path, tag) = split_tag(path)?;
        let files = Files::open(&path)?;
        let kind = [files.has("oci-layout"), files.has("manifest.json")];
        let found = match kind {
            [true, _] => oci::resolve(&files, tag.as_deref())?,
            [false, true] => docker::resolve(&files, tag.as_deref())?,
            _ => {
                let fault = match path.is_dir() {
                    true => "it has no file `oci-layout`",
                    false => "it has neither `oci-layout` nor `manifest.json` in it",
                };
                return Err(SourceError::Unknown { path, fault });
            }
        };
        let ConfigFile {
            created, config, ..
        } = found.config;
        let name = complete_name(&path, found.reference);
        Ok(Self {
            name,
            path,
            files,
            digest: found.digest,
            created,
            config,
            layers: found.layers,
        })
    }

    /// Where the image is, without a tag.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens a layer's blob, unverified; gives its size too.
    ///
    /// # Errors
    /// [`SourceError`].
    pub fn open_layer(&self, layer: &SourceLayer) -> Result<(impl Read + Send, u64), SourceError> {
        self.files.open_file(&layer.name)
    }
}

/// What the two kinds of images resolve to.
struct Found {
    digest: Digest,
    reference: Option<String>,
    config: ConfigFile,
    layers: Vec<SourceLayer>,
}

/// A path that exists is all path; else what follows the last colon of its last component is a tag.
fn split_tag(path: &Path) -> Result<(PathBuf, Option<String>), SourceError> {
    if path.exists() {
        return Ok((path.to_owned(), None));
    }
    let missing = || SourceError::Missing(path.to_owned());
    let name = path
        .file_name()
        .and_then(|name| name.to_str())
        .ok_or_else(missing)?;
    let (stem, tag) = name.rsplit_once(':').ok_or_else(missing)?;
    let without = path.with_file_name(stem);
    match without.exists() {
        true => Ok((without, Some(tag.to_owned()))),
        false => Err(missing()),
    }
}

/// A reference with a repository is a name; a mere tag, as layouts have them, needs the file's name in
/// front of it.
fn complete_name(path: &Path, reference: Option<String>) -> String {
    let reference = reference.unwrap_or_else(|| "latest".to_owned());
    if reference.contains(['/', ':']) {
        return reference;
    }
    let absolute = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let file = absolute.file_name().unwrap_or_default().to_string_lossy();
    let stem = [".oci.tar", ".tar", ".oci"]
        .iter()
        .find_map(|suffix| file.strip_suffix(suffix))
        .unwrap_or(&file);
    let stem: String = stem
        .chars()
        .map(|c| match c.to_ascii_lowercase() {
            c @ ('a'..='z' | '0'..='9' | '.' | '_' | '-') => c,
            _ => '-',
        })
        .collect();
    format!("{stem}:{reference}")
}

impl Files {
    /// Reads a JSON file whole.
    fn json(&self, name: &str) -> Result<Vec<u8>, SourceError> {
        let (reader, size) = self.open_file(name)?;
        if size > MAX_JSON {
            return Err(
                self.malformed(name, format!("it is {size} bytes long; 4 MiB are accepted"))
            );
        }
        let mut bytes = Vec::new();
        reader
            .take(MAX_JSON)
            .read_to_end(&mut bytes)
            .map_err(|error| SourceError::Io {
                path: self.path().join(name),
                error,
            })?;
        Ok(bytes)
    }

    /// Reads a JSON file that must have this digest.
    fn verified_json(&self, name: &str, digest: Digest) -> Result<Vec<u8>, SourceError> {
        let bytes = self.json(name)?;
        match Digest::of(&bytes) {
            found if found == digest => Ok(bytes),
            found => Err(SourceError::WrongDigest {
                path: self.path().to_owned(),
                name: name.to_owned(),
                found,
            }),
        }
    }

    fn parse<T: serde::de::DeserializeOwned>(
        &self,
        name: &str,
        bytes: &[u8],
    ) -> Result<T, SourceError> {
        serde_json::from_slice(bytes)
            .map_err(|error| self.malformed(name, format!("it is not the JSON expected: {error}")))
    }

    fn malformed(&self, name: &str, fault: String) -> SourceError {
        SourceError::Malformed {
            path: self.path().to_owned(),
            name: name.to_owned(),
            fault,
        }
    }

    fn unfit(&self, fault: impl Into<String>) -> SourceError {
        SourceError::Unfit {
            path: self.path().to_owned(),
            fault: fault.into(),
        }
    }

    fn digest(&self, name: &str, text: &str) -> Result<Digest, SourceError> {
        text.parse()
            .map_err(|error: DigestError| self.malformed(name, error.to_string()))
    }
}

/// Reads a piece of a file.
struct Section {
    file: File,
    offset: u64,
    remaining: u64,
}

impl Read for Section {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        use std::os::unix::fs::FileExt;
        let limit = usize::try_from(self.remaining)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let count = self.file.read_at(&mut buffer[..limit], self.offset)?;
        self.offset += count as u64;
        self.remaining -= count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_completed_with_the_files_name() {
        let name = |path: &str, reference: Option<&str>| {
            complete_name(Path::new(path), reference.map(str::to_owned))
        };
        assert_eq!(name("/no/Debian 12.tar", None), "debian-12:latest");
        assert_eq!(name("/no/debian", Some("12")), "debian:12");
        assert_eq!(name("/no/x.oci.tar", Some("v1.2")), "x:v1.2");
        assert_eq!(name("/no/x", Some("example.org/a:b")), "example.org/a:b");
    }

    #[test]
    fn a_missing_path_is_named() {
        let error = Source::open(Path::new("/no/such/image:tag")).unwrap_err();
        assert_eq!(error.to_string(), "there is no image at /no/such/image:tag");
    }
}
