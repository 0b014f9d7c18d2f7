//! Where the parts of an installation are: `cube-vmm`, the guest kernel, `cube-init`.
#![forbid(unsafe_code)]

use std::env;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// Where packages put what is not a command.
const LIBRARY_DIRECTORY: &str = "/usr/lib/cube";

/// A part of the installation cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// It is in none of the places looked at.
    #[error("cannot find the {role}: none of {tried} is there; set {variable} to its path")]
    Missing {
        /// What it is.
        role: &'static str,
        /// The paths, for a sentence.
        tried: String,
        /// The environment variable that overrides the search.
        variable: &'static str,
    },
    /// It is there and cannot be opened.
    #[error("cannot open the {role} {}: {source}", path.display())]
    Open {
        /// What it is.
        role: &'static str,
        /// The file.
        path: PathBuf,
        /// The operating system's answer.
        source: io::Error,
    },
}

/// An open file and the path to call it by in messages.
#[derive(Debug)]
pub struct NamedFile {
    /// The file.
    pub file: File,
    /// Its path when it was opened.
    pub path: PathBuf,
}

impl NamedFile {
    /// Opens the regular file at `path` for reading; `role` says in messages what it is.
    ///
    /// # Errors
    /// It is not there, not readable, or not a regular file.
    pub fn open(role: &'static str, path: &Path) -> Result<Self, InstallError> {
        let fault = |source| InstallError::Open {
            role,
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(fault)?;
        if !file.metadata().map_err(fault)?.is_file() {
            return Err(fault(io::Error::other("it is not a regular file")));
        }
        Ok(Self {
            file,
            path: path.to_owned(),
        })
    }
}

/// The parts of an installation, found.
#[derive(Debug)]
pub struct Install {
    /// The `cube-vmm` binary.
    pub vmm: PathBuf,
    /// The guest kernel, an ELF `vmlinux`.
    pub kernel: NamedFile,
    /// The static `cube-init` binary.
    pub init: NamedFile,
}

impl Install {
    /// Finds the parts: `CUBE_VMM`, `CUBE_KERNEL` and `CUBE_INIT` override; `kernel` overrides those.
    /// Otherwise binaries are beside this program, and kernel and init in `/usr/lib/cube`.
    ///
    /// # Errors
    /// A part is missing or cannot be opened.
    pub fn find(kernel: Option<&Path>) -> Result<Self, InstallError> {
        let beside = env::current_exe()
            .ok()
            .and_then(|exe| exe.parent().map(Path::to_owned));
        let library = Path::new(LIBRARY_DIRECTORY);
        let near = |name: &str| beside.as_ref().map(|directory| directory.join(name));
        let vmm = vec![near("cube-vmm"), Some(library.join("cube-vmm"))];
        let init = vec![near("cube-init"), Some(library.join("cube-init"))];
        let kernel = match kernel {
            Some(path) => path.to_owned(),
            None => find(
                "guest kernel",
                "CUBE_KERNEL",
                vec![Some(library.join("vmlinux"))],
            )?,
        };
        Ok(Self {
            vmm: find("cube-vmm binary", "CUBE_VMM", vmm)?,
            kernel: NamedFile::open("kernel", &kernel)?,
            init: NamedFile::open("init", &find("cube-init binary", "CUBE_INIT", init)?)?,
        })
    }
}

fn find(
    role: &'static str,
    variable: &'static str,
    places: Vec<Option<PathBuf>>,
) -> Result<PathBuf, InstallError> {
    if let Some(path) = env::var_os(variable).filter(|value| !value.is_empty()) {
        return Ok(path.into());
    }
    let places: Vec<PathBuf> = places.into_iter().flatten().collect();
    let tried: Vec<String> = places.iter().map(|p| p.display().to_string()).collect();
    places
        .into_iter()
        .find(|place| place.exists())
        .ok_or_else(|| InstallError::Missing {
            role,
            tried: tried.join(", "),
            variable,
        })
}
