//! Volumes of files: a set replaces another at once, as the kubelet's atomic writer does it.
//!
//! ```text
//! config.yaml ──▶ ..data/config.yaml         what programs open
//! ..data ──▶ ..2026_11_25_02_08_00.123456789  swapped by one rename
//! ..2026_11_25_02_08_00.123456789/config.yaml
//! ```
//! Runs in a process of its own, with the volume as its root: a container may have it mounted writable and
//! put any link there.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, symlink};
use std::time::{SystemTime, UNIX_EPOCH};

use cube_guest::files::{FileEntry, FileSet, MAX_FILES, MAX_SET};
use cube_guest::frame::{self, FrameError};
use rustix::fs::{Gid, Mode, Uid};

use crate::error::{Context, Error};

/// The link that is swapped.
const DATA: &str = "..data";
/// What becomes it.
const NEXT: &str = "..data_tmp";

/// Makes `directory` the root of this process and replaces its content by the set that comes from
/// `stream`.
///
/// # Errors
/// A set that is malformed, too large or cut short: the old content stays.
pub(crate) fn replace(directory: &str, stream: &mut impl Read) -> Result<(), Error> {
    let enter = || {
        rustix::process::chroot(directory)?;
        rustix::process::chdir("/")
    };
    enter().context(|| format!("enter {directory}"))?;
    replace_here(stream)
}

fn replace_here(stream: &mut impl Read) -> Result<(), Error> {
    let set = match frame::read::<FileSet>(stream) {
        Ok(Some(set)) => set,
        Ok(None) => return Err(Error::Refused("the stream ended before its files".into())),
        Err(FrameError::Io(error)) => {
            return Err(error).context(|| "read the list of files".into());
        }
        // Not the sentence of serde_json, which may quote a value.
        Err(_) => return Err(Error::Refused("the list of files is malformed".into())),
    };
    validate(&set)?;
    let new = format!("..{}", timestamp(SystemTime::now()));
    // Directories are as the modes below say, whatever this process was started with.
    let umask = rustix::process::umask(Mode::empty());
    let replaced = write_set(&set, &new, stream).and_then(|()| swap(&set, &new));
    rustix::process::umask(umask);
    if replaced.is_err() {
        let _ = fs::remove_dir_all(&new);
    }
    replaced
}

/// Checks names and sizes.
fn validate(set: &FileSet) -> Result<(), Error> {
    if set.files.len() > MAX_FILES {
        return Err(Error::Refused(format!(
            "{} files are more than a set may have: {MAX_FILES}",
            set.files.len()
        )));
    }
    let sum = set
        .files
        .iter()
        .try_fold(0_u64, |sum, file| sum.checked_add(file.size));
    if sum.is_none_or(|sum| sum > MAX_SET) {
        return Err(Error::Refused(format!(
            "the files are larger than a set may be: {MAX_SET} bytes"
        )));
    }
    let mut paths = BTreeSet::new();
    for file in &set.files {
        let is_name = |part: &str| {
            !matches!(part, "" | ".") && !part.starts_with("..") && !part.contains('\0')
        };
        if !file.path.split('/').all(is_name) {
            return Err(Error::Refused(format!(
                "the path `{}` is not relative, or a part of it is empty, `.` or begins with `..`",
                file.path.escape_debug()
            )));
        }
        if !paths.insert(&*file.path) {
            return Err(Error::Refused(format!(
                "the path `{}` comes twice",
                file.path.escape_debug()
            )));
        }
    }
    Ok(())
}

fn write_set(set: &FileSet, directory: &str, stream: &mut impl Read) -> Result<(), Error> {
    make_directories(directory)?;
    let mut buffer = vec![0; 32 << 10];
    for entry in &set.files {
        let path = format!("{directory}/{}", entry.path);
        if let Some((parent, _)) = path.rsplit_once('/') {
            make_directories(parent)?;
        }
        let file = write_file(&path, entry, stream, &mut buffer)?;
        let own = || {
            let owner = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
            rustix::fs::fchown(&file, Some(owner.0), Some(owner.1))?;
            rustix::fs::fchmod(&file, Mode::from_raw_mode(entry.mode & 0o7777))
        };
        own().context(|| format!("set mode and owner of {}", entry.path))?;
    }
    Ok(())
}

fn make_directories(path: &str) -> Result<(), Error> {
    let made = fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path);
    made.context(|| format!("make the directory {path}"))
}

fn write_file(
    path: &str,
    entry: &FileEntry,
    stream: &mut impl Read,
    buffer: &mut [u8],
) -> Result<File, Error> {
    let mut options = OpenOptions::new();
    let mut file = options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .context(|| format!("make the file {}", entry.path))?;
    let mut left = entry.size;
    while left > 0 {
        let most = left.min(buffer.len() as u64) as usize;
        let read = stream.read(&mut buffer[..most]);
        let read = read.context(|| format!("read the content of {}", entry.path))?;
        if read == 0 {
            return Err(Error::Refused(format!(
                "the stream ended {left} bytes before the end of {}",
                entry.path
            )));
        }
        let written = file.write_all(&buffer[..read]);
        written.context(|| format!("write {}", entry.path))?;
        left -= read as u64;
    }
    Ok(file)
}

/// Makes `new` the content, then removes what was before.
fn swap(set: &FileSet, new: &str) -> Result<(), Error> {
    let swap = || {
        let _ = fs::remove_file(NEXT);
        symlink(new, NEXT)?;
        fs::rename(NEXT, DATA)?;
        let tops: BTreeSet<&str> = set.files.iter().map(|file| top(&file.path)).collect();
        for name in &tops {
            match symlink(format!("{DATA}/{name}"), name) {
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                made => made?,
            }
        }
        for entry in fs::read_dir(".")?.flatten() {
            let name = entry.file_name();
            let is_kept = name
                .to_str()
                .is_some_and(|name| name == DATA || name == new || tops.contains(name));
            if is_kept {
                continue;
            }
            match entry.file_type()?.is_dir() {
                true => fs::remove_dir_all(name)?,
                false => fs::remove_file(name)?,
            }
        }
        Ok(())
    };
    swap()
        .map_err(|error: std::io::Error| error)
        .context(|| "put the new files in place".into())
}

fn top(path: &str) -> &str {
    path.split('/').next().unwrap_or(path)
}

/// `YYYY_MM_DD_hh_mm_ss.nnnnnnnnn` in UTC.
fn timestamp(now: SystemTime) -> String {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // Years of 365.2425 days that begin in March: the leap day is each year's last (Hinnant's civil_from_days).
    let day = days + 719_468;
    let (era, day) = (day / 146_097, day % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let date = day - (153 * month + 2) / 5 + 1;
    let (month, year) = match month {
        0..10 => (month + 3, year + era * 400),
        _ => (month - 9, year + era * 400 + 1),
    };
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let nanos = since.subsec_nanos();
    format!("{year:04}_{month:02}_{date:02}_{hour:02}_{minute:02}_{second:02}.{nanos:09}")
}

#[cfg(test)]
mod tests;
