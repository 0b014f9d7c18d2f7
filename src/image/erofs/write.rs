//! Writes the metadata blob.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

use super::format::{self, Dirent, HOLE, Superblock};
use super::plan::{Place, Plan, names, raw};
use super::{BLOCK_SIZE, xattr};
use crate::image::layer::{Content, Node};
use crate::image::tree::{Inode, InodeId, Tree};

/// A layer's files, as the writer needs them.
#[derive(Debug)]
pub struct LayerBlob {
    /// Size of the data blob in bytes, a multiple of the block size.
    pub data_size: u64,
    /// The tails.
    pub tails: File,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metadata {
    /// Size of the metadata blob in bytes, a multiple of the block size.
    pub size: u64,
    /// Indices of the layers whose data blobs follow it on the disk: those that a file is in.
    pub layers: Vec<usize>,
}

/// Why the metadata could not be written.
#[derive(Debug, thiserror::Error)]
pub enum ErofsError {
    /// Block numbers have 32 bits.
    #[error("the image is larger than the 16 TiB that its file system can have")]
    TooLarge,
    /// A layer's tails could not be read.
    #[error("the stored layer cannot be read: {0}")]
    Tails(io::Error),
    /// The blob could not be written.
    #[error("the image's metadata could not be written: {0}")]
    Write(io::Error),
}

/// Writes the metadata of `tree` to `output`; contents stay in the data blobs of `layers`, to which
/// the inodes' layer numbers refer.
///
/// # Errors
/// [`ErofsError`].
pub fn write_metadata(
    tree: &Tree<Content>,
    layers: &[LayerBlob],
    uuid: [u8; 16],
    output: &mut impl Write,
) -> Result<Metadata, ErofsError> {
    let plan = Plan::new(tree);
    let (used, bases, total) = lay_out(tree, &plan, layers)?;
    let chunked = plan
        .places
        .iter()
        .any(|place| place.layout == format::Layout::Chunked);
    let root = plan.nid(InodeId::ROOT);
    let superblock = Superblock {
        root_nid: u16::try_from(root).map_err(|_| ErofsError::TooLarge)?,
        inodes: plan.places.len() as u64,
        time: plan.time,
        blocks: total,
        uuid,
        chunked,
    };
    let mut writer = Writer {
        tree,
        plan: &plan,
        layers,
        bases,
        output,
        position: 0,
    };
    writer.put(&superblock.encode())?;
    writer.inodes()?;
    writer.blocks()?;
    Ok(Metadata {
        size: writer.position,
        layers: used,
    })
}

/// Which layers' blobs are on the disk, the first block of each (0 if it is not), and the number of
/// blocks of the disk.
fn lay_out(
    tree: &Tree<Content>,
    plan: &Plan,
    layers: &[LayerBlob],
) -> Result<(Vec<usize>, Vec<u32>, u32), ErofsError> {
    let mut wanted = vec![false; layers.len()];
    for place in &plan.places {
        if let Some(inode) = tree.inode(place.id)
            && has_blocks(inode)
        {
            wanted[inode.layer] = true;
        }
    }
    let mut end = plan.blocks;
    let mut bases = vec![0; layers.len()];
    let mut used = Vec::new();
    for (index, layer) in layers
        .iter()
        .enumerate()
        .filter(|(index, _)| wanted[*index])
    {
        bases[index] = u32::try_from(end).map_err(|_| ErofsError::TooLarge)?;
        used.push(index);
        end = end
            .checked_add(layer.data_size / BLOCK_SIZE)
            .ok_or(ErofsError::TooLarge)?;
    }
    // The last number marks holes.
    match u32::try_from(end) {
        Ok(total) if total < HOLE => Ok((used, bases, total)),
        _ => Err(ErofsError::TooLarge),
    }
}

/// Whether something of a file is in its layer's data blob.
fn has_blocks(inode: &Inode<Content>) -> bool {
    match &inode.node {
        Node::File {
            size,
            content: Content::Flat { tail, .. },
        } => *size >= BLOCK_SIZE || (*size > 0 && tail.is_none()),
        Node::File {
            content: Content::Chunked { chunks, .. },
            ..
        } => chunks.iter().any(Option::is_some),
        _ => false,
    }
}

struct Writer<'a, W> {
    tree: &'a Tree<Content>,
    plan: &'a Plan,
    layers: &'a [LayerBlob],
    /// First block of each layer's data blob on the disk.
    bases: Vec<u32>,
    output: &'a mut W,
    position: u64,
}

impl<W: Write> Writer<'_, W> {
    fn put(&mut self, bytes: &[u8]) -> Result<(), ErofsError> {
        self.output.write_all(bytes).map_err(ErofsError::Write)?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    /// Writes zeros up to `position`.
    fn pad_to(&mut self, position: u64) -> Result<(), ErofsError> {
        const ZEROS: [u8; BLOCK_SIZE as usize] = [0; BLOCK_SIZE as usize];
        while self.position < position {
            let count = (position - self.position).min(BLOCK_SIZE) as usize;
            self.put(&ZEROS[..count])?;
        }
        Ok(())
    }

    /// All inodes with what is behind them, in the order of their places.
    fn inodes(&mut self) -> Result<(), ErofsError> {
        let mut order: Vec<(u64, usize)> = self
            .plan
            .places
            .iter()
            .enumerate()
            .map(|(i, place)| (place.offset, i))
            .collect();
        order.sort_unstable();
        let mut bytes = Vec::new();
        for (offset, index) in order {
            self.pad_to(offset)?;
            let place = self.plan.places[index];
            let Some(inode) = self.tree.inode(place.id) else {
                continue;
            };
            bytes.clear();
            self.inode(inode, &place, index, &mut bytes)?;
            self.put(&bytes)?;
        }
        self.pad_to(self.position.next_multiple_of(BLOCK_SIZE))
    }

    fn inode(
        &self,
        inode: &Inode<Content>,
        place: &Place,
        index: usize,
        output: &mut Vec<u8>,
    ) -> Result<(), ErofsError> {
        // 32-bit programs see this number; it is unique, because an image has fewer inodes.
        let mut raw = raw(inode, place, index as u32 + 1);
        let base = self.bases.get(inode.layer).copied().unwrap_or_default();
        raw.union = match &inode.node {
            Node::File {
                content: Content::Flat { block, .. },
                ..
            } if has_blocks(inode) => base + block,
            Node::File {
                content: Content::Chunked { bits, .. },
                ..
            } => u32::from(*bits),
            Node::Directory | Node::Symlink(_) if place.blocks > 0 => place.block as u32,
            Node::CharDevice(major, minor) | Node::BlockDevice(major, minor) => {
                format::device(*major, *minor)
            }
            _ => 0,
        };
        raw.encode(place.compact, output);
        xattr::encode(&inode.metadata.xattrs, output);
        match &inode.node {
            Node::File {
                content: Content::Chunked { chunks, .. },
                ..
            } => {
                for chunk in chunks {
                    let block = chunk.map_or(HOLE, |block| base + block);
                    output.extend_from_slice(&block.to_le_bytes());
                }
            }
            Node::File {
                content:
                    Content::Flat {
                        tail: Some(offset), ..
                    },
                ..
            } => {
                let start = output.len();
                output.resize(start + place.inline as usize, 0);
                self.layers[inode.layer]
                    .tails
                    .read_exact_at(&mut output[start..], *offset)
                    .map_err(ErofsError::Tails)?;
            }
            Node::Directory | Node::Symlink(_) => {
                let data = self.own_data(inode, place);
                output.extend_from_slice(&data[data.len() - place.inline as usize..]);
            }
            _ => {}
        }
        Ok(())
    }

    /// Whole blocks of directories and link targets.
    fn blocks(&mut self) -> Result<(), ErofsError> {
        for place in self.plan.places.iter().filter(|place| place.blocks > 0) {
            let Some(inode) = self.tree.inode(place.id) else {
                continue;
            };
            let data = self.own_data(inode, place);
            self.put(&data[..data.len() - place.inline as usize])?;
            self.pad_to(self.position.next_multiple_of(BLOCK_SIZE))?;
        }
        Ok(())
    }

    /// Content of a directory or a symbolic link.
    fn own_data(&self, inode: &Inode<Content>, place: &Place) -> Vec<u8> {
        if let Node::Symlink(target) = &inode.node {
            return target.clone();
        }
        let names = names(place.id, inode);
        let entries: Vec<Dirent<'_>> = names
            .iter()
            .map(|&(name, id)| Dirent {
                name,
                nid: self.plan.nid(id),
                file_type: self
                    .tree
                    .inode(id)
                    .map_or(0, |inode| file_type(&inode.node)),
            })
            .collect();
        let mut data = Vec::with_capacity(place.size as usize);
        format::encode_directory(&entries, &mut data);
        data
    }
}

/// `EROFS_FT_*` (the kernel's `fs_types.h`).
fn file_type(node: &Node<Content>) -> u8 {
    match node {
        Node::File { .. } => 1,
        Node::Directory => 2,
        Node::CharDevice(..) => 3,
        Node::BlockDevice(..) => 4,
        Node::Fifo => 5,
        Node::Symlink(_) => 7,
    }
}
