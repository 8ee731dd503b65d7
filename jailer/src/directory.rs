//! The jail's directory, `BASE/NAME/ID/root`.
//!
//! The base is the operator's. What lies below may have been planted by a VMM that lived there before, or by whoever
//! shares its user: it is reached by descriptor only, no symbolic link is followed, and what is already there is used
//! only if it is what would have been made.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Uid, chownat, fchmod, fchown, fstat, makedev, mkdirat,
    mknodat, openat2, unlinkat,
};
use rustix::io::Errno;

use crate::args::Arguments;
use crate::error::{Error, Failed};

/// Directories of a jail, which belong to its user.
const DIRECTORIES: [&str; 3] = ["dev", "dev/net", "run"];
/// Where miscellaneous character devices are (linux/major.h), and those with numbers of their own.
const MISC: u32 = 10;
const KVM: (u32, u32) = (MISC, 232);
const TUN: (u32, u32) = (MISC, 200);
const URANDOM: (u32, u32) = (1, 9);

/// The root of a jail.
#[derive(Debug)]
pub struct Directory {
    root: OwnedFd,
    owner: (Uid, Gid),
}

impl Directory {
    /// Makes the directory, or takes over the one that a launcher has filled.
    ///
    /// # Errors
    /// Something else lies in its place, or the system refuses something.
    pub fn create(arguments: &Arguments) -> Result<Self, Error> {
        let base = &arguments.base;
        fs::create_dir_all(base).failed(|| format!("make {}", base.display()))?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut directory =
            rustix::fs::openat(CWD, base, flags, Mode::empty()).failed(|| format!("open {}", base.display()))?;
        for name in [arguments.exec_name.as_str(), &arguments.id] {
            directory = subdirectory(&directory, name, Mode::from(0o755), flags)?;
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = subdirectory(&directory, "root", Mode::RWXU, flags)?;
        let owner = (Uid::from_raw(arguments.uid), Gid::from_raw(arguments.gid));
        Ok(Self { root, owner })
    }

    /// Gives it to the VMM's user, with the directories that the VMM expects.
    ///
    /// # Errors
    /// Something else lies in their place.
    pub fn furnish(&self) -> Result<(), Error> {
        self.hand_over(&self.root, "the jail's root")?;
        for path in DIRECTORIES {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let made = subdirectory(&self.root, path, Mode::RWXU, flags)?;
            self.hand_over(&made, path)?;
        }
        Ok(())
    }

    fn hand_over(&self, directory: &OwnedFd, name: &str) -> Result<(), Error> {
        fchown(directory, Some(self.owner.0), Some(self.owner.1))
            .failed(|| format!("give {name} to the VMM's user"))?;
        fchmod(directory, Mode::RWXU).failed(|| format!("restrict {name}"))
    }

    /// Makes the device nodes that a VMM opens.
    ///
    /// # Errors
    /// Something else lies in their place, or only root could make them.
    pub fn make_devices(&self, kvm: bool) -> Result<(), Error> {
        if kvm {
            self.make_device("dev/kvm", KVM)?;
        }
        self.make_device("dev/net/tun", TUN)?;
        self.make_device("dev/urandom", URANDOM)?;
        match misc_minor("userfaultfd") {
            Some(minor) => self.make_device("dev/userfaultfd", (MISC, minor)),
            None => Ok(()),
        }
    }

    fn make_device(&self, path: &str, (major, minor): (u32, u32)) -> Result<(), Error> {
        let number = makedev(major, minor);
        let (parent, name) = parent(&self.root, path)?;
        // Exclusive by nature: what exists stays as it is.
        match mknodat(&parent, name, FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, number) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error).failed(|| format!("make the device {path}")),
        }
        let node = beneath(&parent, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
            .failed(|| format!("open {path}"))?;
        let found = fstat(&node).failed(|| format!("look at {path}"))?;
        let device = FileType::from_raw_mode(found.st_mode) == FileType::CharacterDevice && found.st_rdev == number;
        // A second name would give the VMM's user what somebody else uses.
        if !device || found.st_nlink != 1 {
            return Err(Error::Refused(format!(
                "{path} in the jail exists and is not the device {major}:{minor} with one name; remove it"
            )));
        }
        chownat(&node, "", Some(self.owner.0), Some(self.owner.1), AtFlags::EMPTY_PATH)
            .failed(|| format!("give {path} to the VMM's user"))
    }

    /// Writes down which process lives here.
    ///
    /// # Errors
    /// A directory lies in the file's place, or the system refuses something.
    pub fn write_pid(&self, name: &str, pid: u32) -> Result<(), Error> {
        let name = format!("{name}.pid");
        // Whatever had the name, it loses it, and is not touched.
        match unlinkat(&self.root, &*name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error).failed(|| format!("replace {name} in the jail")),
        }
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        let file = beneath(&self.root, &name, flags, Mode::from(0o644)).failed(|| format!("make {name}"))?;
        File::from(file).write_all(pid.to_string().as_bytes()).failed(|| format!("write {name}"))
    }

    /// Its descriptor.
    pub fn fd(&self) -> &OwnedFd {
        &self.root
    }
}

/// Opens `path`, which no symbolic link and no `..` leads out of `directory`.
fn beneath(directory: impl AsFd, path: &str, flags: OFlags, mode: Mode) -> rustix::io::Result<OwnedFd> {
    openat2(directory, path, flags, mode, ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS)
}

/// The directory that `path` is in, and its name there.
fn parent<'a>(directory: &OwnedFd, path: &'a str) -> Result<(OwnedFd, &'a str), Error> {
    let (parent, name) = path.rsplit_once('/').unwrap_or((".", path));
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = beneath(directory, parent, flags, Mode::empty()).failed(|| format!("open {parent} of the jail"))?;
    Ok((opened, name))
}

/// Makes a directory if there is none, and opens it if it is one.
fn subdirectory(directory: &OwnedFd, path: &str, mode: Mode, flags: OFlags) -> Result<OwnedFd, Error> {
    let (parent, name) = parent(directory, path)?;
    match mkdirat(&parent, name, mode) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error).failed(|| format!("make the directory {path} of the jail")),
    }
    beneath(&parent, name, flags, Mode::empty()).map_err(|error| match error {
        Errno::LOOP | Errno::NOTDIR => {
            Error::Refused(format!("{path} in the jail's directory exists and is no directory; remove it"))
        }
        error => Error::System { what: format!("open the directory {path} of the jail"), source: error.into() },
    })
}

/// The number of a miscellaneous device, if this kernel has it.
fn misc_minor(name: &str) -> Option<u32> {
    let list = io::read_to_string(File::open("/proc/misc").ok()?).ok()?;
    list.lines().find_map(|line| {
        let (minor, found) = line.trim().split_once(' ')?;
        (found == name).then(|| minor.parse().ok())?
    })
}
