//! Who a container runs as: `user[:group]` resolved against the image's own `/etc/passwd` and
//! `/etc/group`, with Docker's rules.
//!
//! Both files are the image's, so hostile: a line that is not well-formed is skipped.
#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::arithmetic_side_effects
    )
)]

/// The largest user and group id that Docker takes.
const MAX_ID: u32 = i32::MAX as u32;
/// The kernel's NGROUPS_MAX.
const MAX_GROUPS: usize = 65_536;

/// Who a process runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Supplementary groups.
    pub(crate) groups: Vec<u32>,
    /// Home directory.
    pub(crate) home: Vec<u8>,
}

impl Identity {
    /// Adds supplementary groups.
    pub(crate) fn join(&mut self, groups: &[u32]) {
        for group in groups {
            if !self.groups.contains(group) && self.groups.len() < MAX_GROUPS {
                self.groups.push(*group);
            }
        }
    }
}

/// Why a user cannot be resolved.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UserError {
    /// A name that no entry has.
    #[error("the user `{0}` is not in the image's /etc/passwd")]
    NoUser(String),
    /// A name that no entry has.
    #[error("the group `{0}` is not in the image's /etc/group")]
    NoGroup(String),
    /// A number out of range.
    #[error("the user or group id {0} is larger than {MAX_ID}")]
    TooLarge(String),
}

struct User<'a> {
    name: &'a [u8],
    uid: u32,
    gid: u32,
    home: &'a [u8],
}

struct Group<'a> {
    name: &'a [u8],
    gid: u32,
    members: &'a [u8],
}

/// Resolves `asked` (`""`, `user`, `uid`, `user:group` in any mix).
///
/// - An empty user is root. A number need not be in `passwd`.
/// - Without a group, the user's `passwd` entry gives the group, and `group` the supplementary ones.
/// - With a group, there are no supplementary ones.
///
/// # Errors
/// A name without an entry, a number out of range.
pub(crate) fn resolve(asked: &str, passwd: &[u8], group: &[u8]) -> Result<Identity, UserError> {
    let (user, asked_group) = match asked.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (asked, None),
    };
    let number = parse_id(user)?;
    let wanted_uid = if user.is_empty() { Some(0) } else { number };
    let found = lines(passwd).filter_map(parse_user).find(|entry| {
        (!user.is_empty() && entry.name == user.as_bytes()) || wanted_uid == Some(entry.uid)
    });
    let mut identity = match (&found, wanted_uid) {
        (Some(entry), _) => Identity {
            uid: entry.uid,
            gid: entry.gid,
            groups: Vec::new(),
            home: if entry.home.is_empty() {
                b"/".to_vec()
            } else {
                entry.home.to_vec()
            },
        },
        (None, Some(uid)) => Identity {
            uid,
            gid: 0,
            groups: Vec::new(),
            home: b"/".to_vec(),
        },
        (None, None) => return Err(UserError::NoUser(user.to_owned())),
    };
    if let Some(asked) = asked_group {
        identity.gid = find_group(asked, group)?;
    } else if let Some(entry) = found {
        identity.groups = memberships(entry.name, group);
    }
    Ok(identity)
}

fn find_group(asked: &str, group: &[u8]) -> Result<u32, UserError> {
    let number = parse_id(asked)?;
    lines(group)
        .filter_map(parse_group)
        .find(|entry| entry.name == asked.as_bytes() || number == Some(entry.gid))
        .map(|entry| entry.gid)
        .or(number)
        .ok_or_else(|| UserError::NoGroup(asked.to_owned()))
}

fn memberships(user: &[u8], group: &[u8]) -> Vec<u32> {
    lines(group)
        .filter_map(parse_group)
        .filter(|entry| {
            entry
                .members
                .split(|&byte| byte == b',')
                .any(|member| member == user)
        })
        .map(|entry| entry.gid)
        .take(MAX_GROUPS)
        .collect()
}

/// A number in what was asked for; `None` if it is a name.
fn parse_id(asked: &str) -> Result<Option<u32>, UserError> {
    if asked.is_empty() || !asked.bytes().all(|byte| byte.is_ascii_digit()) {
        return Ok(None);
    }
    match asked.parse() {
        Ok(id) if id <= MAX_ID => Ok(Some(id)),
        _ => Err(UserError::TooLarge(asked.to_owned())),
    }
}

fn lines(file: &[u8]) -> impl Iterator<Item = &[u8]> {
    file.split(|&byte| byte == b'\n').map(<[u8]>::trim_ascii)
}

/// `name:password:uid:gid:comment:home:shell`, passwd(5). The home and what follows may be missing.
fn parse_user(line: &[u8]) -> Option<User<'_>> {
    let mut fields = line.split(|&byte| byte == b':');
    let name = fields.next().filter(|name| !name.is_empty())?;
    let _password = fields.next()?;
    let (uid, gid) = (parse_number(fields.next()?)?, parse_number(fields.next()?)?);
    let _comment = fields.next();
    let home = fields.next().unwrap_or_default();
    Some(User {
        name,
        uid,
        gid,
        home,
    })
}

/// `name:password:gid:members`, group(5).
fn parse_group(line: &[u8]) -> Option<Group<'_>> {
    let mut fields = line.split(|&byte| byte == b':');
    let name = fields.next().filter(|name| !name.is_empty())?;
    let _password = fields.next()?;
    let gid = parse_number(fields.next()?)?;
    let members = fields.next().unwrap_or_default();
    Some(Group { name, gid, members })
}

fn parse_number(field: &[u8]) -> Option<u32> {
    let number = str::from_utf8(field).ok()?.parse().ok()?;
    (number <= MAX_ID).then_some(number)
}

#[cfg(test)]
mod tests;
