//! The named files of an image: a directory's, or those in a tar, which is scanned once.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek};
use std::path::{Path, PathBuf};

use super::{Section, SourceError};
use crate::image::tar::{EntryKind, TarEntry, TarError, TarInput, TarReader};

/// The most files of an archive.
const MAX_FILES: usize = 100_000;

/// The files.
#[derive(Debug)]
pub(super) enum Files {
    /// Of a directory.
    Directory(PathBuf),
    /// Of a tar.
    Archive(Archive),
}

/// A tar and where its files are.
#[derive(Debug)]
pub(super) struct Archive {
    path: PathBuf,
    file: File,
    members: HashMap<String, Member>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Member {
    /// Offset and size of a file's content.
    File(u64, u64),
    /// Another name: old Docker archives hold a layer once and link to it.
    Link(String),
}

impl Files {
    pub(super) fn open(path: &Path) -> Result<Self, SourceError> {
        if path.is_dir() {
            return Ok(Self::Directory(path.to_owned()));
        }
        let failed = |error| SourceError::Io {
            path: path.to_owned(),
            error,
        };
        let file = File::open(path).map_err(failed)?;
        let input = Seekable::new(file.try_clone().map_err(failed)?).map_err(failed)?;
        let members = scan(input).map_err(|error| match error {
            Scan::Tar(error) => SourceError::Archive {
                path: path.to_owned(),
                error,
            },
            Scan::Compressed => SourceError::Unknown {
                path: path.to_owned(),
                fault: "it is compressed; decompress it first",
            },
            Scan::TooMany => SourceError::Unknown {
                path: path.to_owned(),
                fault: "it is an archive of more than 100,000 files",
            },
        })?;
        Ok(Self::Archive(Archive {
            path: path.to_owned(),
            file,
            members,
        }))
    }

    /// Where they are.
    pub(super) fn path(&self) -> &Path {
        match self {
            Self::Directory(path) => path,
            Self::Archive(archive) => &archive.path,
        }
    }

    pub(super) fn has(&self, name: &str) -> bool {
        match self {
            Self::Directory(path) => path.join(name).is_file(),
            Self::Archive(archive) => archive.find(name).is_some(),
        }
    }

    /// Opens a file; gives its size too. Of a directory, only names that Cube made are ever opened:
    /// those with a component `..` do not exist.
    pub(super) fn open_file(&self, name: &str) -> Result<(Section, u64), SourceError> {
        let absent = || SourceError::Absent {
            path: self.path().to_owned(),
            name: name.to_owned(),
        };
        let failed = |error| SourceError::Io {
            path: self.path().join(name),
            error,
        };
        match self {
            Self::Directory(_) if name.split('/').any(|c| matches!(c, "" | "..")) => Err(absent()),
            Self::Directory(path) => {
                let file = match File::open(path.join(name)) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(absent()),
                    result => result.map_err(failed)?,
                };
                let size = file.metadata().map_err(failed)?.len();
                // One byte more than the size, so that a file that grows does not look right.
                Ok((
                    Section {
                        file,
                        offset: 0,
                        remaining: size.saturating_add(1),
                    },
                    size,
                ))
            }
            Self::Archive(archive) => {
                let (offset, size) = archive.find(name).ok_or_else(absent)?;
                let file = archive.file.try_clone().map_err(failed)?;
                Ok((
                    Section {
                        file,
                        offset,
                        remaining: size,
                    },
                    size,
                ))
            }
        }
    }
}

impl Archive {
    /// Offset and size of a file; one link is followed.
    fn find(&self, name: &str) -> Option<(u64, u64)> {
        let member = match self.members.get(name)? {
            Member::Link(target) => self.members.get(target)?,
            member => member,
        };
        match member {
            Member::File(offset, size) => Some((*offset, *size)),
            Member::Link(_) => None,
        }
    }
}

enum Scan {
    Tar(TarError),
    Compressed,
    TooMany,
}

/// Finds the files of an archive without reading their contents.
fn scan(mut input: Seekable) -> Result<HashMap<String, Member>, Scan> {
    let mut magic = [0; 4];
    let failed = |error| Scan::Tar(TarError::Io(error));
    let count = input.peek(&mut magic).map_err(failed)?;
    if matches!(&magic[..count], [0x1f, 0x8b, ..] | [0x28, 0xb5, 0x2f, 0xfd]) {
        return Err(Scan::Compressed);
    }
    let mut reader = TarReader::new(input);
    let mut members = HashMap::new();
    while let Some(entry) = reader.next_entry().map_err(Scan::Tar)? {
        if members.len() >= MAX_FILES {
            return Err(Scan::TooMany);
        }
        if let Some(name) = resolve("", &entry.path)
            && let Some(member) = member(&entry, &name, reader.position())
        {
            members.insert(name, member);
        }
    }
    Ok(members)
}

fn member(entry: &TarEntry, name: &str, position: u64) -> Option<Member> {
    match entry.kind {
        EntryKind::Regular if entry.sparse.is_none() => Some(Member::File(position, entry.size)),
        EntryKind::HardLink => resolve("", &entry.link).map(Member::Link),
        EntryKind::Symlink => {
            let directory = name.rsplit_once('/').map_or("", |(directory, _)| directory);
            resolve(directory, &entry.link).map(Member::Link)
        }
        _ => None,
    }
}

/// A path relative to a directory of the archive, without `.` and `..`; `None` if it leads out.
fn resolve(directory: &str, path: &[u8]) -> Option<String> {
    let path = std::str::from_utf8(path).ok()?;
    let mut parts: Vec<&str> = Vec::new();
    for part in directory.split('/').chain(path.split('/')) {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            _ => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

/// A file that is skipped by seeking.
struct Seekable {
    file: BufReader<File>,
    position: u64,
    length: u64,
}

impl Seekable {
    fn new(file: File) -> io::Result<Self> {
        let length = file.metadata()?.len();
        Ok(Self {
            file: BufReader::new(file),
            position: 0,
            length,
        })
    }

    /// The first bytes of the file, which are read again afterwards.
    fn peek(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = (&mut self.file).take(bytes.len() as u64).read(bytes)?;
        self.file.rewind()?;
        Ok(count)
    }
}

impl Read for Seekable {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read(buffer)?;
        self.position += count as u64;
        Ok(count)
    }
}

impl TarInput for Seekable {
    fn skip(&mut self, count: u64) -> io::Result<()> {
        let end = self
            .position
            .checked_add(count)
            .filter(|end| *end <= self.length);
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        let step = i64::try_from(count).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        self.file.seek_relative(step)?;
        self.position = end;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_resolved_within_the_archive() {
        assert_eq!(
            resolve("abc", b"../def/layer.tar").as_deref(),
            Some("def/layer.tar")
        );
        assert_eq!(resolve("", b"./a//b/./c").as_deref(), Some("a/b/c"));
        assert_eq!(resolve("a", b"../../etc/passwd"), None);
    }
}
