//! `cargo xtask kernel`: the slim guest kernel, built from Debian's source and a configuration fragment.
//!
//! A configuration is a file `guest/kernel/NAME.config`. The result is found by the hash of the fragment, the build
//! script, the patches and the version of the source package, so that one machine builds it once.
#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use clap::Args;

use crate::cache::{Cache, Found, Key};
use crate::error::{Doing, Error, Result};
use crate::progress::Progress;
use crate::steps::{Outcome, Steps};
use crate::{apt, binaries, run};

/// Debian's package, and the file in it.
const SOURCE_PACKAGE: &str = "linux-source-6.1";
const SOURCE_FILE: &str = "/usr/src/linux-source-6.1.tar.xz";
/// Objects that make reports for the default configuration, roughly: for the progress bar.
const EXPECTED_OBJECTS: u64 = 1_450;
/// Free space that a build needs for the source tree and its objects.
const BUILD_BYTES: u64 = 3 << 30;

/// Options of `cargo xtask kernel`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cargo xtask kernel                  build or find the kernel, print its size and path
  cargo xtask kernel --path           print the path alone, for scripts
  cargo xtask kernel --config NAME    use guest/kernel/NAME.config")]
pub(crate) struct Options {
    /// Configuration: the name of a file in guest/kernel, without `.config`
    #[arg(long, default_value = "cube")]
    config: String,
    /// Print the path of vmlinux and nothing else
    #[arg(long)]
    path: bool,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let kernel = step(&mut Steps::new(1), &options.config)?;
    if options.path {
        println!("{}", kernel.display());
    } else {
        print!("{}", describe(&kernel)?);
    }
    Ok(ExitCode::SUCCESS)
}

/// The step that builds or finds the kernel; gives the path of `vmlinux`.
pub(crate) fn step(steps: &mut Steps, config: &str) -> Result<PathBuf> {
    steps.step("slim kernel", || {
        let found = find_or_build(&Cache::of_user()?, config)?;
        Ok((found.directory.join("vmlinux"), Outcome::from(found.cached)))
    })
}

fn find_or_build(cache: &Cache, config: &str) -> Result<Found> {
    let recipe = Recipe::read(config)?;
    let key = recipe.key(&apt::version(SOURCE_PACKAGE)?);
    cache.entry("kernel", &key, |directory| {
        apt::ensure(&[apt::KERNEL])?;
        require_space(directory)?;
        build(&recipe, directory)
    })
}

/// What goes into a kernel, the source apart.
#[derive(Debug)]
struct Recipe {
    fragment: PathBuf,
    script: PathBuf,
    /// Name and content: the fragment, the script, the patches.
    files: Vec<(String, Vec<u8>)>,
}

impl Recipe {
    fn read(config: &str) -> Result<Self> {
        let directory = binaries::root().join("guest/kernel");
        let fragment = directory.join(format!("{config}.config"));
        if config.contains('/') || !fragment.is_file() {
            return Err(Error::Said(format!(
                "there is no kernel configuration `{config}`: {} does not exist",
                fragment.display()
            )));
        }
        let script = directory.join("build.sh");
        let mut paths = vec![fragment.clone(), script.clone()];
        paths.extend(patches(&directory.join("patches"))?);
        let mut files = Vec::new();
        for path in paths {
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            files.push((name, fs::read(&path).doing("read", &path)?));
        }
        Ok(Self {
            fragment,
            script,
            files,
        })
    }

    fn key(&self, source_version: &str) -> Key {
        let mut ingredients: Vec<(&str, &[u8])> = self
            .files
            .iter()
            .map(|(name, content)| (name.as_str(), content.as_slice()))
            .collect();
        ingredients.push((SOURCE_PACKAGE, source_version.as_bytes()));
        Key::of(&ingredients)
    }
}

fn patches(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(directory).doing("read", directory)? {
        paths.push(entry.doing("read", directory)?.path());
    }
    paths.sort();
    Ok(paths)
}

fn build(recipe: &Recipe, directory: &Path) -> Result<()> {
    let mut progress = Progress::new("compiling the kernel", EXPECTED_OBJECTS);
    let mut command = Command::new("bash");
    command
        .arg(&recipe.script)
        .arg(SOURCE_FILE)
        .arg(&recipe.fragment)
        .arg(directory);
    run::each_line(&mut command, |line| {
        if is_object(line) {
            progress.advance();
        }
    })?;
    progress.finish();
    Ok(())
}

/// Whether a line of make's says that an object was made: `  CC      mm/slub.o`.
fn is_object(line: &str) -> bool {
    line.starts_with("  ")
        && ["CC", "AS", "AR", "LD"]
            .iter()
            .any(|tool| line[2..].starts_with(tool))
}

fn require_space(directory: &Path) -> Result<()> {
    let free = free_bytes(directory)?;
    if free < BUILD_BYTES {
        return Err(Error::Said(format!(
            "building the kernel needs {} MiB free in {}, which has {} MiB: free some, or set XDG_CACHE_HOME elsewhere",
            BUILD_BYTES >> 20,
            directory.display(),
            free >> 20
        )));
    }
    Ok(())
}

/// Free bytes of the file system that holds `path`, for this user.
pub(crate) fn free_bytes(path: &Path) -> Result<u64> {
    let stat = rustix::fs::statvfs(path).doing("ask for the free space of", path)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Path and sizes, one fact a line.
fn describe(kernel: &Path) -> Result<String> {
    let sections_path = kernel.with_file_name("size");
    let sections = fs::read_to_string(&sections_path).doing("read", &sections_path)?;
    let length = kernel.metadata().doing("read", kernel)?.len();
    let (text, data, bss) = totals(&sections);
    Ok(format!(
        "path  {}\nfile  {} KiB\ntext  {} KiB (code and read-only data)\ndata  {} KiB\nbss   {} KiB\n",
        kernel.display(),
        length >> 10,
        text >> 10,
        data >> 10,
        bss >> 10
    ))
}

/// Sums the sections that `size -A` lists into text, data and bss.
fn totals(sections: &str) -> (u64, u64, u64) {
    let (mut text, mut data, mut bss) = (0, 0, 0);
    for line in sections.lines() {
        let mut words = line.split_whitespace();
        let (Some(name), Some(size)) = (
            words.next(),
            words.next().and_then(|w| w.parse::<u64>().ok()),
        ) else {
            continue;
        };
        match name {
            ".bss" | ".brk" => bss += size,
            _ if name.starts_with(".text") || name.starts_with(".rodata") => text += size,
            _ if name.starts_with(".data") || name.starts_with(".init") => data += size,
            _ => {}
        }
    }
    (text, data, bss)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_follows_the_fragment_the_script_the_patches_and_the_source() {
        let recipe = |content: &str| Recipe {
            fragment: PathBuf::new(),
            script: PathBuf::new(),
            files: vec![("cube.config".into(), content.into())],
        };
        assert_eq!(recipe("A=y").key("6.1.1"), recipe("A=y").key("6.1.1"));
        assert_ne!(recipe("A=y").key("6.1.1"), recipe("A=y").key("6.1.2"));
        assert_ne!(recipe("A=y").key("6.1.1"), recipe("B=y").key("6.1.1"));
    }

    #[test]
    fn the_default_recipe_has_fragment_script_and_patches() {
        let recipe = Recipe::read("cube").unwrap();
        assert_eq!(recipe.files[0].0, "cube.config");
        assert_eq!(recipe.files[1].0, "build.sh");
        assert!(
            recipe.files[2..]
                .iter()
                .all(|(name, _)| name.ends_with(".patch"))
        );
    }

    #[test]
    fn a_configuration_that_is_not_there_is_named() {
        for name in ["nope", "../kernel/cube"] {
            let error = Recipe::read(name).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn objects_are_counted_and_other_lines_are_not() {
        assert!(is_object("  CC      mm/slub.o"));
        assert!(is_object("  AR      built-in.a"));
        assert!(!is_object("  GEN     include/x.h"));
        assert!(!is_object("error: CC"));
        assert!(!is_object(""));
    }

    #[test]
    fn sections_are_summed() {
        let text = "vmlinux  :\nsection size addr\n.text 100 0\n.rodata 10 0\n.data 5 0\n.init.text 7 0\n.bss 3 0\nTotal 125\n";
        assert_eq!(totals(text), (110, 12, 3));
    }
}
