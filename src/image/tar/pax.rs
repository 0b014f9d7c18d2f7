//! PAX extended headers: records `<length> <key>=<value>\n`, where length counts the whole record.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use super::sparse::Map;

type Fault = &'static str;

/// Prefix of the keys that carry extended attributes, as GNU tar, Docker and BuildKit write them.
const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";

/// What extension headers say about the entry that follows them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Extensions {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    pub(super) mtime: Option<(i64, u32)>,
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(super) sparse: PaxSparse,
}

/// The `GNU.sparse.*` records.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct PaxSparse {
    /// The file's real name, where `path` holds a made-up one (formats 0.1 and 1.0).
    pub(super) name: Option<Vec<u8>>,
    /// Size with holes: `size` (0.0 and 0.1) or `realsize` (1.0).
    pub(super) size: Option<u64>,
    major: Option<u64>,
    /// Offsets and lengths in turn (0.0 and 0.1).
    numbers: Vec<u64>,
}

impl PaxSparse {
    /// Whether the map is in front of the content (1.0).
    pub(super) fn is_version_1(&self) -> bool {
        self.major == Some(1)
    }

    /// Adds the extents that the records gave (0.0 and 0.1).
    pub(super) fn fill(&self, map: &mut Map) -> Result<(), Fault> {
        for pair in self.numbers.chunks(2) {
            match pair {
                [offset, length] => map.push(*offset, *length)?,
                _ => return Err("a sparse map with an offset and no length"),
            }
        }
        Ok(())
    }
}

impl Extensions {
    /// Applies the records of one PAX header; a later record replaces an earlier one.
    pub(super) fn parse(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        let mut rest = bytes;
        while !rest.is_empty() {
            // Some writers pad with NULs.
            if rest.iter().all(|&b| b == 0) {
                break;
            }
            let (key, value, after) = record(rest)?;
            self.apply(key, value)?;
            rest = after;
        }
        Ok(())
    }

    fn apply(&mut self, key: &[u8], value: &[u8]) -> Result<(), Fault> {
        match key {
            b"path" => self.path = text(value)?,
            b"linkpath" => self.link = text(value)?,
            b"size" => self.size = optional(value)?,
            b"uid" => self.uid = optional(value)?,
            b"gid" => self.gid = optional(value)?,
            b"mtime" if value.is_empty() => self.mtime = None,
            b"mtime" => self.mtime = Some(time(value)?),
            b"GNU.sparse.name" => self.sparse.name = text(value)?,
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => self.sparse.size = optional(value)?,
            b"GNU.sparse.major" => self.sparse.major = optional(value)?,
            b"GNU.sparse.map" => {
                self.sparse.numbers.clear();
                for item in value.split(|&b| b == b',').filter(|_| !value.is_empty()) {
                    self.sparse.numbers.push(decimal(item)?);
                }
            }
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                // Format 0.0 repeats the two in turn.
                let is_length = key.ends_with(b"numbytes");
                if is_length != (self.sparse.numbers.len() % 2 == 1) {
                    return Err("a sparse map whose offsets and lengths are out of turn");
                }
                self.sparse.numbers.push(decimal(value)?);
            }
            _ => {
                if let Some(name) = key.strip_prefix(XATTR_PREFIX) {
                    self.xattrs.insert(name.to_vec(), value.to_vec());
                }
            }
        }
        Ok(())
    }
}

/// Key, value, and what follows the record.
type Record<'a> = (&'a [u8], &'a [u8], &'a [u8]);

/// Splits the first record off.
fn record(bytes: &[u8]) -> Result<Record<'_>, Fault> {
    const FAULT: Fault = "a PAX record that is not `length key=value`";
    let space = bytes
        .iter()
        .take(20)
        .position(|&b| b == b' ')
        .ok_or(FAULT)?;
    let (digits, _) = bytes.split_at_checked(space).ok_or(FAULT)?;
    let length = usize::try_from(decimal(digits)?).map_err(|_| FAULT)?;
    let (record, rest) = bytes.split_at_checked(length).ok_or(FAULT)?;
    let body = record.get(space.saturating_add(1)..).ok_or(FAULT)?;
    let body = body.strip_suffix(b"\n").ok_or(FAULT)?;
    let equals = body.iter().position(|&b| b == b'=').ok_or(FAULT)?;
    let (key, value) = body.split_at_checked(equals).ok_or(FAULT)?;
    Ok((key, value.get(1..).unwrap_or_default(), rest))
}

/// A path; an empty value takes an earlier record back.
fn text(value: &[u8]) -> Result<Option<Vec<u8>>, Fault> {
    match value {
        [] => Ok(None),
        _ if value.contains(&0) => Err("a path with a NUL in it"),
        _ => Ok(Some(value.to_vec())),
    }
}

fn optional(value: &[u8]) -> Result<Option<u64>, Fault> {
    match value {
        [] => Ok(None),
        _ => decimal(value).map(Some),
    }
}

/// An unsigned decimal number.
pub(super) fn decimal(digits: &[u8]) -> Result<u64, Fault> {
    if digits.is_empty() {
        return Err("a number without digits");
    }
    digits.iter().try_fold(0_u64, |value, &byte| match byte {
        b'0'..=b'9' => value
            .checked_mul(10)
            .and_then(|v| v.checked_add(u64::from(byte & 0xf)))
            .ok_or("a number out of range"),
        _ => Err("a number that is not decimal"),
    })
}

/// Seconds with an optional fraction, possibly negative; digits past nanoseconds are cut off.
fn time(value: &[u8]) -> Result<(i64, u32), Fault> {
    let (negative, digits) = match value.strip_prefix(b"-") {
        Some(digits) => (true, digits),
        None => (false, value),
    };
    let mut parts = digits.splitn(2, |&b| b == b'.');
    let seconds = i64::try_from(decimal(parts.next().unwrap_or_default())?)
        .map_err(|_| "a time out of range")?;
    let fraction = parts.next().unwrap_or_default();
    let mut nanoseconds = 0_u64;
    for position in 0..9 {
        let digit = fraction.get(position).copied().unwrap_or(b'0');
        nanoseconds = nanoseconds
            .saturating_mul(10)
            .saturating_add(decimal(&[digit])?);
    }
    let nanoseconds = u32::try_from(nanoseconds).unwrap_or_default();
    Ok(match (negative, nanoseconds) {
        (false, _) => (seconds, nanoseconds),
        (true, 0) => (seconds.saturating_neg(), 0),
        // -1.25 s is 0.75 s after -2 s.
        (true, _) => (
            seconds.saturating_neg().saturating_sub(1),
            1_000_000_000_u32.saturating_sub(nanoseconds),
        ),
    })
}
