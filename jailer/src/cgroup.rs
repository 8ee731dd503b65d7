//! Control groups, version 2. Their paths are the operator's: they may lead through symbolic links.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::statfs;

use crate::args::Arguments;
use crate::error::{Error, Failed};

/// `CGROUP2_SUPER_MAGIC` of linux/magic.h.
const CGROUP2: u64 = 0x6367_7270;
/// Where systems mount the hierarchy. The list of mounts is not read: it is long on a busy host.
const ROOTS: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];

/// Makes the cgroup that is asked for, if any, and moves this process into it.
///
/// # Errors
/// There is no version 2 hierarchy, or it refuses something.
pub fn join(arguments: &Arguments) -> Result<(), Error> {
    if arguments.cgroups.is_empty() && arguments.parent_cgroup.is_none() {
        return Ok(());
    }
    let root = root()?;
    let parent = arguments.parent_cgroup.clone().unwrap_or_else(|| PathBuf::from(&arguments.exec_name));
    let group = if arguments.cgroups.is_empty() {
        root.join(parent)
    } else {
        let group = root.join(&parent).join(&arguments.id);
        fs::create_dir_all(&group).failed(|| format!("make the cgroup {}", group.display()))?;
        for (file, value) in &arguments.cgroups {
            if let Some((controller, _)) = file.split_once('.') {
                enable(&root, &parent, controller)?;
            }
            write(&group.join(file), value)?;
        }
        group
    };
    // 0 is who writes.
    write(&group.join("cgroup.procs"), "0")
}

fn root() -> Result<PathBuf, Error> {
    let version_2 = |path: &&str| statfs(*path).is_ok_and(|fs| fs.f_type as u64 == CGROUP2);
    let root = ROOTS.iter().find(|path| version_2(path));
    root.map(PathBuf::from)
        .ok_or_else(|| Error::Refused(format!("there is no cgroup v2 hierarchy at {}", ROOTS.join(" or "))))
}

/// Makes a controller available below every group from the root to `parent`.
fn enable(root: &Path, parent: &Path, controller: &str) -> Result<(), Error> {
    // Files of the core, such as cgroup.max.depth, are everywhere.
    if controller == "cgroup" {
        return Ok(());
    }
    let mut group = root.to_owned();
    for part in std::iter::once(Path::new("")).chain(parent.iter().map(Path::new)) {
        group.push(part);
        let enabled = fs::read_to_string(group.join("cgroup.subtree_control")).unwrap_or_default();
        if !enabled.split_whitespace().any(|name| name == controller) {
            write(&group.join("cgroup.subtree_control"), &format!("+{controller}"))?;
        }
    }
    Ok(())
}

fn write(file: &Path, value: &str) -> Result<(), Error> {
    fs::OpenOptions::new()
        .write(true)
        .open(file)
        .and_then(|mut open| std::io::Write::write_all(&mut open, value.as_bytes()))
        .failed(|| format!("write {value:?} to {}", file.display()))
}
