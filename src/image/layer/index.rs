//! The index of a layer: its changes, stored beside its blob.
//!
//! A header line (magic with the format's version), the SHA-256 of what follows, then: size of the
//! data blob, size of the tails, the changes, in postcard form.
#![forbid(unsafe_code)]

use std::io::{self, BufReader, BufWriter, Read, Write};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{Change, Content};

/// Starts every index; the digit is the version of everything that a converted layer consists of.
const MAGIC: &[u8; 16] = b"cube layer v1\n\n\n";

/// A layer as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Index {
    /// Size of the data blob in bytes, a multiple of the block size.
    pub data_size: u64,
    /// Size of the tails in bytes.
    pub tails_size: u64,
    /// What the layer does, in order.
    pub changes: Vec<Change<Content>>,
}

impl Index {
    /// Writes the index.
    ///
    /// # Errors
    /// The output's.
    pub fn write(&self, output: &mut (impl Write + io::Seek)) -> io::Result<()> {
        output.write_all(MAGIC)?;
        output.write_all(&[0; 32])?;
        let hashing = HashingWriter(BufWriter::new(&mut *output), Sha256::new());
        let HashingWriter(mut buffered, hash) =
            postcard::to_io(self, hashing).map_err(io::Error::other)?;
        buffered.flush()?;
        drop(buffered);
        output.seek(io::SeekFrom::Start(MAGIC.len() as u64))?;
        output.write_all(&hash.finalize())
    }

    /// Reads an index that [`Index::write`] wrote.
    ///
    /// # Errors
    /// The input's, or `InvalidData` if it is not one or was changed.
    pub fn read(input: impl Read) -> io::Result<Self> {
        let mut input = BufReader::new(input);
        let (mut magic, mut stored) = ([0; 16], [0; 32]);
        input.read_exact(&mut magic)?;
        input.read_exact(&mut stored)?;
        let mut body = Vec::new();
        input.read_to_end(&mut body)?;
        if magic != *MAGIC || Sha256::digest(&body)[..] != stored {
            return Err(corrupt());
        }
        postcard::from_bytes(&body).map_err(|_| corrupt())
    }
}

fn corrupt() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "it is not a layer's index, or it was damaged",
    )
}

struct HashingWriter<W>(W, Sha256);

impl<W: Write> Write for HashingWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.1.update(bytes);
        self.0.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;
    use crate::image::layer::{Action, Metadata, Node};

    fn index() -> Index {
        let content = Content::Chunked {
            bits: 3,
            chunks: vec![Some(7), None],
        };
        let node = Node::File {
            size: 40_000,
            content,
        };
        let changes = vec![
            Change {
                path: b"a".to_vec(),
                action: Action::Create(Metadata::default(), node),
            },
            Change {
                path: b"b".to_vec(),
                action: Action::Whiteout,
            },
        ];
        Index {
            data_size: 4096,
            tails_size: 3,
            changes,
        }
    }

    #[test]
    fn round_trips() {
        let mut bytes = Cursor::new(Vec::new());
        index().write(&mut bytes).unwrap();
        assert_eq!(Index::read(&bytes.get_ref()[..]).unwrap(), index());
    }

    #[test]
    fn any_changed_byte_is_noticed() {
        let mut bytes = Cursor::new(Vec::new());
        index().write(&mut bytes).unwrap();
        let bytes = bytes.into_inner();
        for position in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[position] ^= 1;
            assert!(Index::read(&changed[..]).is_err(), "byte {position}");
        }
    }
}
