//! The merged tree of an image: layers applied one over the other, in memory, without their contents.
//!
//! Inodes live in an arena and directories map names to them, so a hard link is a second name of the
//! same inode, whichever layer made it. Rules (OCI image specification, "Applying Changesets"):
//! whiteouts hide what lower layers have and never what their own layer has; an entry replaces what is
//! there, except that a directory over a directory only changes its metadata; parents are looked up as
//! in a chroot, symbolic links followed; parents that nobody made are root's, mode 0755.
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

use std::collections::{BTreeMap, VecDeque};

use super::layer::{Action, Change, MAX_INODES, Metadata, Node};
use super::tar::display;

/// Symbolic links followed in one lookup, as in Linux (MAXSYMLINKS).
const MAX_LINKS: usize = 40;
/// Components passed in one lookup, those of followed links included.
const MAX_STEPS: usize = 8192;

/// Index of an inode in its tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InodeId(u32);

impl InodeId {
    /// The root directory of every tree.
    pub const ROOT: Self = Self(0);

    /// As an index into a table with an element for each inode.
    #[must_use]
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// An inode.
#[derive(Debug, Clone)]
pub struct Inode<C> {
    /// Owner, mode, time, attributes.
    pub metadata: Metadata,
    /// What it is.
    pub node: Node<C>,
    /// Index of the layer whose blob has its content.
    pub layer: usize,
    /// Entries of a directory, without `.` and `..`.
    pub children: BTreeMap<Vec<u8>, InodeId>,
    /// Parent of a directory; the root is its own.
    pub parent: InodeId,
}

/// Why a layer cannot be applied. The texts continue a sentence that names the layer.
#[derive(Debug, thiserror::Error)]
#[error("has the entry `{entry}`, {fault}")]
pub struct TreeError {
    /// Path of the entry, made printable.
    pub entry: String,
    /// What is wrong with it.
    pub fault: String,
}

/// The tree.
#[derive(Debug, Clone)]
pub struct Tree<C> {
    inodes: Vec<Inode<C>>,
}

/// Why a lookup found nothing.
enum Miss {
    Absent,
    NotDirectory,
    TooManyLinks,
    TooManyInodes,
}

impl Miss {
    fn fault(&self) -> &'static str {
        match self {
            Self::Absent => "whose parent directory does not exist",
            Self::NotDirectory => "one of whose parents is not a directory",
            Self::TooManyLinks => "whose path goes through too many symbolic links",
            Self::TooManyInodes => "which is beyond the 4,194,304 files that an image may have",
        }
    }
}

impl<C> Default for Tree<C> {
    fn default() -> Self {
        Self {
            inodes: vec![implied_directory(InodeId::ROOT)],
        }
    }
}

/// A directory that no entry describes.
fn implied_directory<C>(parent: InodeId) -> Inode<C> {
    Inode {
        metadata: Metadata {
            mode: 0o755,
            ..Metadata::default()
        },
        node: Node::Directory,
        layer: 0,
        children: BTreeMap::new(),
        parent,
    }
}

impl<C> Tree<C> {
    /// Applies the changes of the layer with index `layer` over what is there.
    ///
    /// # Errors
    /// [`TreeError`]; the tree is then of no use.
    pub fn apply(&mut self, layer: usize, changes: Vec<Change<C>>) -> Result<(), TreeError> {
        self.hide(&changes)?;
        for Change { path, action } in changes {
            let result = match action {
                Action::Whiteout | Action::Opaque => Ok(()),
                Action::Create(metadata, node) => self.create(layer, &path, metadata, node),
                Action::HardLink(target) => self.hard_link(&path, &target),
            };
            result.map_err(|fault| TreeError {
                entry: display(&path),
                fault,
            })?;
        }
        Ok(())
    }

    /// The inode `id`.
    #[must_use]
    pub fn inode(&self, id: InodeId) -> Option<&Inode<C>> {
        self.inodes.get(id.index())
    }

    /// Size of a table with an element for each inode, also those that no name leads to any more.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.inodes.len()
    }

    /// The inodes that have a name, each once, with the number of links: the root, then its entries by
    /// name, then theirs, level by level.
    #[must_use]
    pub fn reachable(&self) -> Vec<(InodeId, u32)> {
        let mut order = vec![InodeId::ROOT];
        let mut links = vec![0_u32; self.inodes.len()];
        if let Some(root) = links.first_mut() {
            *root = 2;
        }
        let mut next = 0_usize;
        while let Some(&id) = order.get(next) {
            next = next.saturating_add(1);
            for &child in self
                .inode(id)
                .into_iter()
                .flat_map(|inode| inode.children.values())
            {
                let is_directory = self.is_directory(child);
                let Some(count) = links.get_mut(child.index()) else {
                    continue;
                };
                if *count == 0 {
                    order.push(child);
                }
                // A directory has its own `.`, its name, and the `..` of those in it.
                *count = count.saturating_add(if is_directory { 2 } else { 1 });
                if is_directory && let Some(parent) = links.get_mut(id.index()) {
                    *parent = parent.saturating_add(1);
                }
            }
        }
        let count = |id: InodeId| links.get(id.index()).copied().unwrap_or_default();
        order.into_iter().map(|id| (id, count(id))).collect()
    }

    /// Whiteouts first: they look at the lower layers alone, wherever in the layer they are.
    fn hide(&mut self, changes: &[Change<C>]) -> Result<(), TreeError> {
        let mut removed = Vec::new();
        for change in changes {
            match change.action {
                Action::Whiteout => match self.lookup(&change.path) {
                    Some((parent, name)) => removed.push((parent, name)),
                    None => {
                        let fault = "a whiteout of nothing: no layer below has that path";
                        let entry = display(&change.path);
                        return Err(TreeError {
                            entry,
                            fault: fault.to_owned(),
                        });
                    }
                },
                // An opaque directory that is new hides nothing.
                Action::Opaque => {
                    if let Ok(id) = self.walk(&change.path, None) {
                        let children = self.inode(id).into_iter().flat_map(|i| i.children.keys());
                        removed.extend(children.map(|name| (id, name.clone())));
                    }
                }
                _ => {}
            }
        }
        for (parent, name) in removed {
            if let Some(parent) = self.inodes.get_mut(parent.index()) {
                parent.children.remove(&name);
            }
        }
        Ok(())
    }

    fn create(
        &mut self,
        layer: usize,
        path: &[u8],
        metadata: Metadata,
        node: Node<C>,
    ) -> Result<(), String> {
        let existing = if path.is_empty() {
            Some(InodeId::ROOT)
        } else {
            self.lookup(path)
                .and_then(|(parent, name)| self.child(parent, &name))
        };
        if let Some(id) = existing.filter(|&id| self.is_directory(id))
            && matches!(node, Node::Directory)
        {
            if let Some(inode) = self.inodes.get_mut(id.index()) {
                inode.metadata = metadata;
            }
            return Ok(());
        }
        let (parent, name) = self.parent(path, layer)?;
        let inode = Inode {
            metadata,
            node,
            layer,
            children: BTreeMap::new(),
            parent,
        };
        let id = self.insert(inode).map_err(|miss| miss.fault().to_owned())?;
        self.link(parent, name, id);
        Ok(())
    }

    fn hard_link(&mut self, path: &[u8], target: &[u8]) -> Result<(), String> {
        let found = self
            .lookup(target)
            .and_then(|(parent, name)| self.child(parent, &name));
        let shown = display(target);
        let id = found.ok_or_else(|| format!("a hard link to `{shown}`, which does not exist"))?;
        if self.is_directory(id) {
            return Err(format!("a hard link to `{shown}`, which is a directory"));
        }
        let (parent, name) = self.parent(path, 0)?;
        self.link(parent, name, id);
        Ok(())
    }

    /// The directory that `path` belongs in, made if need be, and its name in there.
    fn parent(&mut self, path: &[u8], layer: usize) -> Result<(InodeId, Vec<u8>), String> {
        let (directory, name) = split(path);
        let parent = self
            .walk_making(directory, layer)
            .map_err(|miss| miss.fault().to_owned())?;
        Ok((parent, name.to_vec()))
    }

    /// The directory and the name under which `path` exists; a link at its end is not followed.
    fn lookup(&self, path: &[u8]) -> Option<(InodeId, Vec<u8>)> {
        let (directory, name) = split(path);
        let parent = self.walk(directory, None).ok()?;
        self.child(parent, name).map(|_| (parent, name.to_vec()))
    }

    fn walk_making(&mut self, path: &[u8], layer: usize) -> Result<InodeId, Miss> {
        loop {
            let mut missing = None;
            match self.walk(path, Some(&mut missing)) {
                Err(Miss::Absent) => {}
                result => return result,
            }
            let Some((parent, name)) = missing else {
                return Err(Miss::Absent);
            };
            let directory = Inode {
                layer,
                ..implied_directory(parent)
            };
            let id = self.insert(directory)?;
            self.link(parent, name, id);
        }
    }

    /// The directory at `path`, links followed. If it is absent, `missing` gets the first directory
    /// and name that would have to be made.
    fn walk(
        &self,
        path: &[u8],
        mut missing: Option<&mut Option<(InodeId, Vec<u8>)>>,
    ) -> Result<InodeId, Miss> {
        let mut rest: VecDeque<&[u8]> = path.split(|&b| b == b'/').collect();
        let mut current = InodeId::ROOT;
        let (mut links, mut steps) = (0_usize, 0_usize);
        while let Some(component) = rest.pop_front() {
            steps = steps.saturating_add(1);
            if steps > MAX_STEPS {
                return Err(Miss::TooManyLinks);
            }
            if component == b".." {
                current = self.inode(current).map_or(current, |inode| inode.parent);
            }
            if matches!(component, b"" | b"." | b"..") {
                continue;
            }
            let Some(id) = self.child(current, component) else {
                if let Some(missing) = missing.take() {
                    *missing = Some((current, component.to_vec()));
                }
                return Err(Miss::Absent);
            };
            match self.inode(id).map(|inode| &inode.node) {
                Some(Node::Directory) => current = id,
                Some(Node::Symlink(target)) => {
                    links = links.saturating_add(1);
                    if links > MAX_LINKS {
                        return Err(Miss::TooManyLinks);
                    }
                    if target.starts_with(b"/") {
                        current = InodeId::ROOT;
                    }
                    for component in target.split(|&b| b == b'/').rev() {
                        rest.push_front(component);
                    }
                }
                _ => return Err(Miss::NotDirectory),
            }
        }
        Ok(current)
    }

    fn insert(&mut self, inode: Inode<C>) -> Result<InodeId, Miss> {
        match u32::try_from(self.inodes.len()) {
            Ok(id) if self.inodes.len() < MAX_INODES => {
                self.inodes.push(inode);
                Ok(InodeId(id))
            }
            _ => Err(Miss::TooManyInodes),
        }
    }

    fn link(&mut self, parent: InodeId, name: Vec<u8>, id: InodeId) {
        if let Some(parent) = self.inodes.get_mut(parent.index()) {
            parent.children.insert(name, id);
        }
    }

    fn child(&self, parent: InodeId, name: &[u8]) -> Option<InodeId> {
        self.inode(parent)?.children.get(name).copied()
    }

    fn is_directory(&self, id: InodeId) -> bool {
        matches!(
            self.inode(id),
            Some(Inode {
                node: Node::Directory,
                ..
            })
        )
    }
}

/// Splits a path into its directory and its name.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&b| b == b'/') {
        Some(slash) => (
            path.get(..slash).unwrap_or_default(),
            path.get(slash.saturating_add(1)..).unwrap_or_default(),
        ),
        None => (&[], path),
    }
}
