//! A [`Tree`] as files of this machine, for mke2fs to read.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};

use super::Error;
use super::directory::own;
use super::ext4::{Corrections, Needs};
use super::tree::{Inode, Kind, Meta, Node, Tree};

/// The last second that an ext4 time can say.
const MAX_TIME: u64 = (1 << 34) - (1 << 31) - 1;

/// Lays the files out below `root`, a directory that is made; what cannot be had there is left for the corrections.
/// The contents move there from the tree's store.
pub fn lay_out(tree: &Tree, root: &Path) -> Result<(Corrections, Needs), Error> {
    let mut layout =
        Layout { tree, first: HashMap::new(), corrections: Corrections::default(), needs: Needs::default() };
    layout.directory(&tree.root, root, &mut Vec::new())?;
    Ok((layout.corrections, layout.needs))
}

struct Layout<'a> {
    tree: &'a Tree,
    /// Where the inodes are that may have further names.
    first: HashMap<usize, PathBuf>,
    corrections: Corrections,
    needs: Needs,
}

impl Layout<'_> {
    /// Lays out a directory as `path`, which is `inside` in the image.
    fn directory(&mut self, node: &Node, path: &Path, inside: &mut Vec<u8>) -> Result<(), Error> {
        let Inode { meta, .. } = &self.tree.inodes[node.inode];
        self.needs.add(0);
        fs::create_dir(path).map_err(Error::io("make", path))?;
        for (name, child) in node.children.iter().flatten() {
            let length = inside.len();
            inside.push(b'/');
            inside.extend_from_slice(name.as_bytes());
            match child.children {
                Some(_) => self.directory(child, &path.join(name), inside)?,
                None => self.file(child.inode, &path.join(name), inside)?,
            }
            inside.truncate(length);
        }
        let inside = if inside.is_empty() { b"/" } else { inside.as_slice() };
        self.permissions(path, inside, meta.permissions, 0o700)?;
        // Some mke2fs leave the root directory as it is in every new file system.
        if inside == b"/" {
            self.corrections.mode(inside, 0o40_000 | meta.permissions)?;
            self.corrections.owner(inside, meta.owner, (u32::MAX, u32::MAX))?;
        } else {
            self.corrections.owner(inside, meta.owner, own())?;
        }
        self.rest(path, inside, node.inode, meta)
    }

    fn file(&mut self, number: usize, path: &Path, inside: &[u8]) -> Result<(), Error> {
        let Inode { kind, meta } = &self.tree.inodes[number];
        if let Kind::Device(..) | Kind::Fifo = kind {
            self.needs.add(0);
            return self.node(kind, meta, inside);
        }
        if let Some(first) = self.first.get(&number) {
            return fs::hard_link(first, path).map_err(Error::io("make", path));
        }
        match kind {
            Kind::Link(target) => {
                self.needs.add(0);
                symlink(OsStr::from_bytes(target), path).map_err(Error::io("make", path))?;
            }
            Kind::File(size) => {
                self.needs.add(*size);
                let stored = self.tree.store.join(number.to_string());
                fs::rename(&stored, path).map_err(Error::io("move", &stored))?;
                self.permissions(path, inside, meta.permissions, 0o400)?;
            }
            Kind::Directory | Kind::Device(..) | Kind::Fifo => {}
        }
        self.first.insert(number, path.to_owned());
        self.corrections.owner(inside, meta.owner, own())?;
        self.rest(path, inside, number, meta)
    }

    /// A node of a kind that takes root to make.
    fn node(&mut self, kind: &Kind, meta: &Meta, inside: &[u8]) -> Result<(), Error> {
        let format = match kind {
            Kind::Device(letter, major, minor) => {
                self.corrections.node(inside, &[letter, &major.to_string(), &minor.to_string()])?;
                if *letter == "c" { 0o20_000 } else { 0o60_000 }
            }
            _ => {
                self.corrections.node(inside, &["p"])?;
                0o10_000
            }
        };
        self.corrections.mode(inside, format | meta.permissions)?;
        self.corrections.owner(inside, meta.owner, (0, 0))
    }

    /// Sets permissions, and `needed` besides while mke2fs has to read it.
    fn permissions(&mut self, path: &Path, inside: &[u8], permissions: u32, needed: u32) -> Result<(), Error> {
        let outside = Permissions::from_mode(permissions | needed);
        fs::set_permissions(path, outside).map_err(Error::io("change", path))?;
        if permissions & needed == needed {
            return Ok(());
        }
        let format = if needed == 0o700 { 0o40_000 } else { 0o100_000 };
        self.corrections.mode(inside, format | permissions)
    }

    /// Sets the time and the attributes.
    fn rest(&mut self, path: &Path, inside: &[u8], number: usize, meta: &Meta) -> Result<(), Error> {
        let time = Timespec { tv_sec: meta.time.min(MAX_TIME).cast_signed(), tv_nsec: 0 };
        let times = Timestamps { last_access: time, last_modification: time };
        let set = utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW);
        set.map_err(|error| Error::io("change", path)(error.into()))?;
        for (index, (name, value)) in meta.attributes.iter().enumerate() {
            let stored = self.tree.store.join(format!("{number}-{index}"));
            fs::write(&stored, value).map_err(Error::io("write", &stored))?;
            self.corrections.attribute(inside, name, &stored)?;
        }
        Ok(())
    }
}
