//! What the layers of an image come to, in memory.
//!
//! Names and links are only ever followed here, where there is nothing beside the image. The contents of files are kept
//! under numbers, and get the names they have in the image when everything is known: then every directory is one that
//! was just made, and no link is in anything's way.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use super::Error;
use super::directory::{MOUNT_POINTS, RESOLVER};

/// The longest path in an image, in bytes: it is made below another directory, and the system's limit is 4,096.
const MAX_PATH: usize = 3072;
/// The longest name, in bytes, that a Linux file system takes.
const MAX_NAME: usize = 255;
/// Most directories in each other.
const MAX_DEPTH: usize = 256;
/// As many links may follow each other as in Linux.
const MAX_LINKS: usize = 40;
/// Most bytes of content, over all layers.
pub const MAX_CONTENT: u64 = 64 << 30;
/// Most bytes that names, links and attributes may take in memory, and about what one more name takes.
pub const MAX_NAMES: u64 = 512 << 20;
const NAME_COST: u64 = 256;

/// What there is to a file besides its content and names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Meta {
    /// The permission bits, with set-user-ID, set-group-ID and sticky.
    pub permissions: u32,
    /// The numbers of the owner and the group.
    pub owner: (u32, u32),
    /// When it was modified, in seconds since 1970.
    pub time: u64,
    /// The extended attributes.
    pub attributes: Attributes,
}

/// Names and values of extended attributes.
pub type Attributes = Vec<(Vec<u8>, Vec<u8>)>;

/// What an inode is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A directory; what is in it is in its [`Node`].
    Directory,
    /// A regular file of so many bytes.
    File(u64),
    /// A symbolic link.
    Link(Vec<u8>),
    /// A device node: its letter, and its numbers.
    Device(&'static str, u32, u32),
    /// A FIFO.
    Fifo,
}

/// A file, whatever names it has. Its number is its place in [`Tree::inodes`].
#[derive(Debug)]
pub struct Inode {
    /// What it is.
    pub kind: Kind,
    /// The rest.
    pub meta: Meta,
}

type Children = BTreeMap<OsString, Node>;

/// A name.
#[derive(Debug)]
pub struct Node {
    /// The number of what it names.
    pub inode: usize,
    /// The layer that it came with, or was last given by.
    layer: u32,
    /// Of a directory.
    pub children: Option<Children>,
}

impl Node {
    /// Takes away what was there below `layer`; true if nothing is left.
    fn forget_lower(&mut self, layer: u32) -> bool {
        if let Some(children) = &mut self.children {
            children.retain(|_, child| !child.forget_lower(layer));
        }
        self.layer < layer && self.children.as_ref().is_none_or(BTreeMap::is_empty)
    }
}

/// The files of an image.
#[derive(Debug)]
pub struct Tree {
    /// Where the contents are, each under its inode's number.
    pub store: PathBuf,
    /// What the names name, by its number.
    pub inodes: Vec<Inode>,
    /// The root directory.
    pub root: Node,
    layer: u32,
    /// Bytes of content so far, over all layers.
    pub content: u64,
    /// Bytes of memory that names and what belongs to them take.
    pub names: u64,
}

/// Where a path leads: the names from the root on, of which only the last may be a link or missing.
type Place = Vec<OsString>;

impl Tree {
    /// An image with nothing in it. Contents are kept in `store`, a directory that is made.
    pub fn new(store: PathBuf) -> Result<Self, Error> {
        fs::create_dir(&store).map_err(Error::io("make", &store))?;
        let meta = Meta { permissions: 0o755, ..Meta::default() };
        let root = Node { inode: 0, layer: 0, children: Some(Children::new()) };
        Ok(Self { store, inodes: vec![Inode { kind: Kind::Directory, meta }], root, layer: 0, content: 0, names: 0 })
    }

    /// From now on names come with a layer of their own.
    pub fn begin_layer(&mut self) {
        self.layer += 1;
    }

    /// Adds a directory, a link, a device or a FIFO at `path`. A directory that is there keeps what is in it.
    pub fn add(&mut self, path: &[u8], kind: Kind, meta: Meta) -> Result<(), Error> {
        let place = self.locate(path)?;
        self.charge(&meta, &kind)?;
        self.inodes.push(Inode { kind, meta });
        self.name(path, &place, self.inodes.len() - 1)
    }

    /// Adds a file at `path`, with all that `content` reads.
    pub fn add_file(&mut self, path: &[u8], meta: Meta, content: &mut dyn Read) -> Result<u64, Error> {
        let place = self.locate(path)?;
        let number = self.inodes.len();
        let stored = self.store.join(number.to_string());
        let mut file = File::create_new(&stored).map_err(Error::io("write", &stored))?;
        let size = self.copy(content, &mut file, &stored)?;
        self.charge(&meta, &Kind::File(size))?;
        self.inodes.push(Inode { kind: Kind::File(size), meta });
        self.name(path, &place, number)?;
        Ok(size)
    }

    /// Reads what no file needs, within the same bounds.
    pub fn skip(&mut self, content: &mut dyn Read) -> Result<(), Error> {
        self.copy(content, &mut io::sink(), Path::new("")).map(drop)
    }

    /// Gives the file at `target` a further name.
    pub fn link(&mut self, path: &[u8], target: &[u8]) -> Result<(), Error> {
        let (place, target_place) = (self.locate(path)?, self.locate(target)?);
        self.charge(&Meta::default(), &Kind::Fifo)?;
        match self.node(&target_place) {
            Some(Node { inode, children: None, .. }) => self.name(path, &place, *inode),
            Some(_) => Err(Error::entry(path, "is a hard link to a directory")),
            None => Err(Error::entry(path, "is a hard link to what is not there")),
        }
    }

    /// Takes away what lower layers have at `path`.
    pub fn white_out(&mut self, path: &[u8]) -> Result<(), Error> {
        let place = self.locate(path)?;
        let layer = self.layer;
        let Some((last, parents)) = place.split_last() else { return Ok(()) };
        if let Some(children) = self.node_mut(parents).and_then(|parent| parent.children.as_mut())
            && children.get_mut(last).is_some_and(|node| node.forget_lower(layer))
        {
            children.remove(last);
        }
        Ok(())
    }

    /// Takes away what lower layers have in the directory at `path`.
    pub fn make_opaque(&mut self, path: &[u8]) -> Result<(), Error> {
        let place = self.locate(path)?;
        let layer = self.layer;
        if let Some(node) = self.node_mut(&place) {
            node.forget_lower(layer);
        }
        Ok(())
    }

    /// Adds what a guest needs that cannot write to its root, unless it is there.
    pub fn complete(&mut self) -> Result<(), Error> {
        self.begin_layer();
        for (name, permissions) in MOUNT_POINTS {
            let kind = self.node(&[name.into()]).map(|node| &self.inodes[node.inode].kind);
            match kind {
                Some(Kind::Directory) => {}
                Some(_) => return Err(Error::entry(name.as_bytes(), "has to be a directory")),
                None => {
                    self.add(name.as_bytes(), Kind::Directory, Meta { permissions, ..Meta::default() })?;
                }
            }
        }
        // Through /etc wherever it leads.
        let place = self.locate(RESOLVER.as_bytes())?;
        if self.node(&place).is_none() {
            let meta = Meta { permissions: 0o644, ..Meta::default() };
            self.add_file(RESOLVER.as_bytes(), meta, &mut io::empty())?;
        }
        Ok(())
    }

    /// Follows `path` from the root, and links on the way, though not at its end. `..` in a link stops at the root.
    fn locate(&self, path: &[u8]) -> Result<Place, Error> {
        let mut ahead: VecDeque<OsString> = names(path).collect();
        let (mut place, mut links) = (Place::new(), 0);
        while let Some(name) = ahead.pop_front() {
            if name == ".." {
                place.pop();
                continue;
            }
            place.push(name);
            let length: usize = place.iter().map(|name| name.len() + 1).sum();
            if place.len() > MAX_DEPTH || length > MAX_PATH || place.iter().any(|name| name.len() > MAX_NAME) {
                return Err(Error::entry(path, "is too long, or leads too deep"));
            }
            let Some(Kind::Link(target)) = self.node(&place).map(|node| &self.inodes[node.inode].kind) else {
                continue;
            };
            if ahead.is_empty() {
                break;
            }
            links += 1;
            if links > MAX_LINKS {
                return Err(Error::entry(path, "leads through too many links"));
            }
            place.pop();
            if target.starts_with(b"/") {
                place.clear();
            }
            for name in names(target).collect::<Vec<_>>().into_iter().rev() {
                ahead.push_front(name);
            }
        }
        Ok(place)
    }

    fn node(&self, place: &[OsString]) -> Option<&Node> {
        place.iter().try_fold(&self.root, |node, name| node.children.as_ref()?.get(name))
    }

    fn node_mut(&mut self, place: &[OsString]) -> Option<&mut Node> {
        place.iter().try_fold(&mut self.root, |node, name| node.children.as_mut()?.get_mut(name))
    }

    /// Puts an inode at `place`, and directories on the way to it where there is nothing.
    fn name(&mut self, path: &[u8], place: &[OsString], inode: usize) -> Result<(), Error> {
        let is_directory = self.inodes[inode].kind == Kind::Directory;
        let Some((last, parents)) = place.split_last() else {
            if !is_directory {
                return Err(Error::entry(path, "takes the place of the root directory"));
            }
            (self.root.inode, self.root.layer) = (inode, self.layer);
            return Ok(());
        };
        let layer = self.layer;
        let mut node = &mut self.root;
        for name in parents {
            let Some(children) = &mut node.children else { return Err(Error::entry(path, "is below a file")) };
            node = children.entry(name.clone()).or_insert_with(|| {
                let meta = Meta { permissions: 0o755, ..Meta::default() };
                self.inodes.push(Inode { kind: Kind::Directory, meta });
                self.names += NAME_COST + name.len() as u64;
                Node { inode: self.inodes.len() - 1, layer, children: Some(Children::new()) }
            });
        }
        let Some(children) = &mut node.children else { return Err(Error::entry(path, "is below a file")) };
        self.names += last.len() as u64;
        let kept = children.remove(last).and_then(|old| old.children).filter(|_| is_directory);
        let children_of_its_own = if is_directory { Some(kept.unwrap_or_default()) } else { None };
        children.insert(last.clone(), Node { inode, layer, children: children_of_its_own });
        Ok(())
    }

    /// Counts what an entry takes in memory.
    fn charge(&mut self, meta: &Meta, kind: &Kind) -> Result<(), Error> {
        let target = if let Kind::Link(target) = kind { target.len() } else { 0 };
        let attributes: usize = meta.attributes.iter().map(|(name, value)| name.len() + value.len()).sum();
        self.names = self.names.saturating_add(NAME_COST + target as u64 + attributes as u64);
        if self.names > MAX_NAMES {
            return Err(Error::Bomb { limit: MAX_NAMES, what: "bytes of names, links and attributes" });
        }
        Ok(())
    }

    /// Copies all of `content` to `to`, which is at `path`.
    fn copy(&mut self, content: &mut dyn Read, to: &mut dyn io::Write, path: &Path) -> Result<u64, Error> {
        let mut buffer = vec![0; 128 << 10];
        let mut size = 0;
        loop {
            let count = match content.read(&mut buffer) {
                Ok(0) => return Ok(size),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Error::Archive(error)),
            };
            size += count as u64;
            self.content += count as u64;
            if self.content > MAX_CONTENT {
                return Err(Error::Bomb { limit: MAX_CONTENT, what: "bytes" });
            }
            to.write_all(&buffer[..count]).map_err(Error::io("write", path))?;
        }
    }
}

/// The names in a path, without those that mean nothing.
fn names(path: &[u8]) -> impl DoubleEndedIterator<Item = OsString> {
    let names = path.split(|&byte| byte == b'/').filter(|name| !name.is_empty() && *name != b".");
    names.map(|name| OsString::from_vec(name.to_vec()))
}
