//! A directory of the host's as the source of an image. mke2fs reads it where it is.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::process::{getegid, geteuid};

use super::Error;
use super::ext4::{Corrections, Needs};

/// What is made where it is missing, for guests that cannot write to their root: mount points, with permissions.
pub const MOUNT_POINTS: [(&str, u32); 5] =
    [("dev", 0o755), ("proc", 0o555), ("sys", 0o555), ("run", 0o755), ("tmp", 0o1777)];
/// A name where a guest's own resolver configuration can be put.
pub const RESOLVER: &str = "etc/resolv.conf";

/// The owner of what this process makes.
pub fn own() -> (u32, u32) {
    (geteuid().as_raw(), getegid().as_raw())
}

/// Looks through `root`: what an image of it takes, and what has to change in one.
pub fn survey(root: &Path) -> Result<(Corrections, Needs), Error> {
    let (mut corrections, mut needs) = (Corrections::default(), Needs::default());
    let permissions = fs::metadata(root).map_err(Error::io("read", root))?.mode();
    corrections.mode(b"/", permissions)?;
    corrections.owner(b"/", (0, 0), (u32::MAX, u32::MAX))?;
    walk(root, &mut Vec::new(), &mut corrections, &mut needs)?;
    for (name, permissions) in MOUNT_POINTS {
        let inside = format!("/{name}");
        match fs::symlink_metadata(root.join(name)) {
            Ok(meta) if meta.is_dir() => {}
            Ok(_) => return Err(Error::entry(inside.as_bytes(), "has to be a directory")),
            Err(_) => corrections.directory(inside.as_bytes(), permissions)?,
        }
    }
    if fs::symlink_metadata(root.join("etc")).is_err() {
        corrections.directory(b"/etc", 0o755)?;
    }
    let etc_is_ours = fs::symlink_metadata(root.join("etc")).map_or(true, |meta| meta.is_dir());
    if etc_is_ours && fs::symlink_metadata(root.join(RESOLVER)).is_err() {
        corrections.empty_file(format!("/{RESOLVER}").as_bytes(), 0o644)?;
    }
    Ok((corrections, needs))
}

/// Counts what is in `dir`, which is `inside` in the image. What is the caller's becomes root's.
fn walk(dir: &Path, inside: &mut Vec<u8>, corrections: &mut Corrections, needs: &mut Needs) -> Result<(), Error> {
    let own = own();
    for entry in fs::read_dir(dir).map_err(Error::io("read", dir))? {
        let entry = entry.map_err(Error::io("read", dir))?;
        let path = entry.path();
        let meta = fs::symlink_metadata(&path).map_err(Error::io("read", &path))?;
        needs.add(if meta.is_file() { meta.len() } else { 0 });
        let length = inside.len();
        inside.push(b'/');
        inside.extend_from_slice(entry.file_name().as_bytes());
        let theirs = |id, own| if id == own { 0 } else { id };
        let found = (meta.uid(), meta.gid());
        corrections.owner(inside, (theirs(found.0, own.0), theirs(found.1, own.1)), found)?;
        if meta.is_dir() {
            walk(&path, inside, corrections, needs)?;
        }
        inside.truncate(length);
    }
    Ok(())
}
