//! Writes tar archives with everything that a test wants to say.

use std::fmt::Write as _;

/// How the map of a sparse file is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SparseFormat {
    Gnu,
    Pax00,
    Pax01,
    Pax10,
}

/// One entry; what is default is an empty regular file of root's, mode 0644.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) path: Vec<u8>,
    pub(crate) flag: u8,
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: (i64, u32),
    pub(crate) link: Vec<u8>,
    pub(crate) device: (u32, u32),
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// The content; of a sparse file the stored pieces end to end.
    pub(crate) content: Vec<u8>,
    /// Size with holes, pieces, format.
    pub(crate) sparse: Option<Sparse>,
}

/// Size with holes, pieces (offset, length), format.
pub(crate) type Sparse = (u64, Vec<(u64, u64)>, SparseFormat);

impl Entry {
    pub(crate) fn new(path: impl AsRef<[u8]>, flag: u8) -> Self {
        Self {
            path: path.as_ref().to_vec(),
            flag,
            mode: if flag == b'5' { 0o755 } else { 0o644 },
            uid: 0,
            gid: 0,
            mtime: (0, 0),
            link: Vec::new(),
            device: (0, 0),
            xattrs: Vec::new(),
            content: Vec::new(),
            sparse: None,
        }
    }

    pub(crate) fn file(path: impl AsRef<[u8]>, content: impl AsRef<[u8]>) -> Self {
        Self {
            content: content.as_ref().to_vec(),
            ..Self::new(path, b'0')
        }
    }

    pub(crate) fn directory(path: impl AsRef<[u8]>) -> Self {
        Self::new(path, b'5')
    }

    pub(crate) fn link(path: impl AsRef<[u8]>, flag: u8, target: impl AsRef<[u8]>) -> Self {
        Self {
            link: target.as_ref().to_vec(),
            ..Self::new(path, flag)
        }
    }
}

/// An archive of these entries.
pub(crate) fn tar(entries: &[Entry]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for entry in entries {
        write(entry, &mut bytes);
    }
    bytes.resize(bytes.len() + 1024, 0);
    bytes
}

/// A header block; what does not fit is cut: extensions have it.
pub(crate) fn header(entry: &Entry, flag: u8, size: u64) -> [u8; 512] {
    let mut block = [0; 512];
    put(&mut block, 0..100, &entry.path);
    octal(&mut block, 100..108, entry.mode.into());
    octal(&mut block, 108..116, entry.uid.min(0o777_7777).into());
    octal(&mut block, 116..124, entry.gid.min(0o777_7777).into());
    octal(&mut block, 124..136, size);
    octal(
        &mut block,
        136..148,
        u64::try_from(entry.mtime.0)
            .unwrap_or(0)
            .min(0o777_7777_7777),
    );
    block[156] = flag;
    put(&mut block, 157..257, &entry.link);
    let magic: &[u8; 8] = if flag == b'S' {
        b"ustar  \0"
    } else {
        b"ustar\x0000"
    };
    put(&mut block, 257..265, magic);
    octal(&mut block, 329..337, entry.device.0.into());
    octal(&mut block, 337..345, entry.device.1.into());
    block
}

/// Fills in the checksum.
pub(crate) fn seal(mut block: [u8; 512]) -> [u8; 512] {
    block[148..156].fill(b' ');
    let sum: u64 = block.iter().map(|&b| u64::from(b)).sum();
    octal(&mut block, 148..155, sum);
    block
}

fn write(entry: &Entry, bytes: &mut Vec<u8>) {
    let mut records = records(entry);
    let mut content = entry.content.clone();
    let mut flag = entry.flag;
    let mut shown = entry.clone();
    let mut more_map = Vec::new();
    match &entry.sparse {
        None => {}
        Some((_, _, SparseFormat::Gnu)) => flag = b'S',
        Some((size, pieces, format)) => {
            content = pax_sparse(*size, pieces, *format, &entry.path, &mut records, content);
            if *format != SparseFormat::Pax00 {
                shown.path = b"GNUSparseFile.0/made-up".to_vec();
                records.retain(|(key, _)| key != b"path");
            }
        }
    }
    if !records.is_empty() {
        let body: Vec<u8> = records
            .iter()
            .flat_map(|(key, value)| record(key, value))
            .collect();
        let name = Entry::new("PaxHeaders/x", b'x');
        bytes.extend_from_slice(&seal(header(&name, b'x', body.len() as u64)));
        padded(bytes, &body);
    }
    let mut block = header(&shown, flag, content.len() as u64);
    if let Some((size, pieces, SparseFormat::Gnu)) = &entry.sparse {
        more_map = gnu_sparse(&mut block, *size, pieces);
    }
    bytes.extend_from_slice(&seal(block));
    bytes.extend_from_slice(&more_map);
    padded(bytes, &content);
}

fn records(entry: &Entry) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut records: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    let mut add = |key: &[u8], value: Vec<u8>| records.push((key.to_vec(), value));
    if entry.path.len() > 100 {
        add(b"path", entry.path.clone());
    }
    if entry.link.len() > 100 {
        add(b"linkpath", entry.link.clone());
    }
    for (key, id) in [(b"uid", entry.uid), (b"gid", entry.gid)] {
        if id > 0o777_7777 {
            add(key, id.to_string().into());
        }
    }
    let (seconds, nanoseconds) = entry.mtime;
    if seconds < 0 || nanoseconds != 0 || seconds > 0o777_7777_7777 {
        let text = match (seconds < 0, nanoseconds) {
            (_, 0) => seconds.to_string(),
            (false, n) => format!("{seconds}.{n:09}"),
            (true, n) => format!("-{}.{:09}", -(seconds + 1), 1_000_000_000 - n),
        };
        add(b"mtime", text.into());
    }
    for (name, value) in &entry.xattrs {
        add(&[b"SCHILY.xattr.", name.as_slice()].concat(), value.clone());
    }
    records
}

/// A PAX record, whose length counts itself.
fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    [length.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}

/// Adds the records of a sparse file, and the map in front of the content if it goes there.
fn pax_sparse(
    size: u64,
    pieces: &[(u64, u64)],
    format: SparseFormat,
    path: &[u8],
    records: &mut Vec<(Vec<u8>, Vec<u8>)>,
    content: Vec<u8>,
) -> Vec<u8> {
    let mut add = |key: &str, value: String| records.push((key.into(), value.into()));
    if format == SparseFormat::Pax10 {
        add("GNU.sparse.major", "1".into());
        add("GNU.sparse.minor", "0".into());
        add("GNU.sparse.realsize", size.to_string());
        records.push((b"GNU.sparse.name".to_vec(), path.to_vec()));
        let mut map = format!("{}\n", pieces.len());
        for (offset, length) in pieces {
            write!(map, "{offset}\n{length}\n").unwrap();
        }
        let mut map = map.into_bytes();
        map.resize(map.len().next_multiple_of(512), 0);
        return [map, content].concat();
    }
    add("GNU.sparse.size", size.to_string());
    add("GNU.sparse.numblocks", pieces.len().to_string());
    if format == SparseFormat::Pax01 {
        let list: Vec<_> = pieces
            .iter()
            .map(|(offset, length)| format!("{offset},{length}"))
            .collect();
        add("GNU.sparse.map", list.join(","));
        records.push((b"GNU.sparse.name".to_vec(), path.to_vec()));
    } else {
        for (offset, length) in pieces {
            add("GNU.sparse.offset", offset.to_string());
            add("GNU.sparse.numbytes", length.to_string());
        }
    }
    content
}

/// Writes an old GNU map into the header; gives the blocks that continue it.
fn gnu_sparse(block: &mut [u8; 512], size: u64, pieces: &[(u64, u64)]) -> Vec<u8> {
    let entry = |field: &mut [u8], (offset, length): (u64, u64)| {
        field[..12].copy_from_slice(format!("{offset:011o}\0").as_bytes());
        field[12..24].copy_from_slice(format!("{length:011o}\0").as_bytes());
    };
    for (index, piece) in pieces.iter().take(4).enumerate() {
        entry(&mut block[386 + 24 * index..410 + 24 * index], *piece);
    }
    block[482] = u8::from(pieces.len() > 4);
    block[483..495].copy_from_slice(format!("{size:011o}\0").as_bytes());
    let mut more = Vec::new();
    let rest: Vec<_> = pieces.iter().skip(4).collect();
    let chunks = rest.chunks(21);
    let count = chunks.len();
    for (number, chunk) in chunks.enumerate() {
        let mut block = [0; 512];
        for (index, piece) in chunk.iter().enumerate() {
            entry(&mut block[24 * index..24 * index + 24], **piece);
        }
        block[504] = u8::from(number + 1 < count);
        more.extend_from_slice(&block);
    }
    more
}

fn padded(bytes: &mut Vec<u8>, content: &[u8]) {
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
}

fn put(block: &mut [u8; 512], range: std::ops::Range<usize>, value: &[u8]) {
    let count = value.len().min(range.len());
    block[range.start..range.start + count].copy_from_slice(&value[..count]);
}

fn octal(block: &mut [u8; 512], range: std::ops::Range<usize>, value: u64) {
    let width = range.len() - 1;
    put(block, range, format!("{value:0width$o}").as_bytes());
}
