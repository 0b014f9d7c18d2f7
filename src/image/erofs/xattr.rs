//! Extended attributes as EROFS stores them behind an inode (kernel documentation,
//! filesystems/erofs, "Xattrs"): a 12-byte header, then entries of 4 bytes, name and value, each
//! rounded up to 4 bytes. All are inline; none are shared.
#![forbid(unsafe_code)]

use crate::image::layer::Xattr;

/// The longest value: its size has 16 bits.
pub const MAX_VALUE: usize = 65_535;
/// Size of the header of an inode's attributes.
const HEADER: usize = 12;
/// Size of an entry without name and value, and what everything is rounded to.
const UNIT: usize = 4;

/// Prefixes that EROFS replaces by a number (`EROFS_XATTR_INDEX_*`).
const NAMESPACES: [(&[u8], u8); 5] = [
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
];

/// Splits a name into the number of its namespace and the rest; `None` if EROFS has no such
/// namespace.
#[must_use]
pub fn namespace(name: &[u8]) -> Option<(u8, &[u8])> {
    NAMESPACES.iter().find_map(|(prefix, index)| {
        let rest = name.strip_prefix(*prefix)?;
        // The ACL names are complete; the others need a name of their own.
        (rest.is_empty() == (matches!(*index, 2 | 3))).then_some((*index, rest))
    })
}

/// Bytes that `xattrs` take behind an inode, 0 if there are none; `None` if that is more than an inode
/// can have (its count of 4-byte units has 16 bits).
#[must_use]
pub fn body_size(xattrs: &[Xattr]) -> Option<usize> {
    if xattrs.is_empty() {
        return Some(0);
    }
    let size = xattrs
        .iter()
        .map(entry_size)
        .try_fold(HEADER, usize::checked_add)?;
    (unit_count(size) <= usize::from(u16::MAX)).then_some(size)
}

/// The inode's `i_xattr_icount` for a body of `size` bytes: the header counts as one unit.
#[must_use]
pub fn unit_count(size: usize) -> usize {
    match size {
        0 => 0,
        _ => size.saturating_sub(HEADER) / UNIT + 1,
    }
}

fn entry_size(xattr: &Xattr) -> usize {
    let name = namespace(&xattr.name).map_or(0, |(_, rest)| rest.len());
    (UNIT + name)
        .saturating_add(xattr.value.len())
        .next_multiple_of(UNIT)
}

/// Appends the body, [`body_size`] bytes long.
pub fn encode(xattrs: &[Xattr], output: &mut Vec<u8>) {
    if xattrs.is_empty() {
        return;
    }
    output.extend_from_slice(&[0; HEADER]);
    for xattr in xattrs {
        let Some((index, rest)) = namespace(&xattr.name) else {
            continue;
        };
        let start = output.len();
        // Both were checked where the layer was read; a longer one would be cut, not misread.
        output.push(u8::try_from(rest.len()).unwrap_or(u8::MAX));
        output.push(index);
        output.extend_from_slice(
            &u16::try_from(xattr.value.len())
                .unwrap_or(u16::MAX)
                .to_le_bytes(),
        );
        output.extend_from_slice(rest);
        output.extend_from_slice(&xattr.value);
        let end = start + (output.len() - start).next_multiple_of(UNIT);
        output.resize(end, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn xattr(name: &str, value: usize) -> Xattr {
        Xattr {
            name: name.into(),
            value: vec![7; value],
        }
    }

    #[test]
    fn namespaces_need_a_name_and_acls_have_none() {
        assert_eq!(namespace(b"user.a"), Some((1, &b"a"[..])));
        assert_eq!(
            namespace(b"security.capability"),
            Some((6, &b"capability"[..]))
        );
        assert_eq!(namespace(b"system.posix_acl_access"), Some((2, &b""[..])));
        for name in [
            "user.",
            "system.posix_acl_accessx",
            "com.apple.x",
            "",
            "user",
        ] {
            assert_eq!(namespace(name.as_bytes()), None, "{name}");
        }
    }

    #[test]
    fn the_size_announced_is_the_size_encoded() {
        for value in [0, 1, 2, 3, 4, 100, MAX_VALUE] {
            let xattrs = [xattr("user.abc", value), xattr("trusted.x", 5)];
            let mut bytes = Vec::new();
            encode(&xattrs, &mut bytes);
            assert_eq!(Some(bytes.len()), body_size(&xattrs));
            assert_eq!(HEADER + (unit_count(bytes.len()) - 1) * UNIT, bytes.len());
        }
    }

    #[test]
    fn more_than_an_inode_can_have_is_noticed() {
        let four: Vec<_> = (0..4)
            .map(|i| xattr(&format!("user.{i}"), MAX_VALUE))
            .collect();
        assert_eq!(body_size(&four), None);
        assert!(body_size(&four[..3]).is_some());
    }
}
