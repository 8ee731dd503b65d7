//! The jail's directory, `BASE/NAME/ID/root`.
//!
//! The base is the operator's. What lies below may have been planted by a VMM that lived there before, or by whoever
//! shares its user: it is reached by descriptor only, no symbolic link is followed, and what is already there is used
//! only if it is what would have been made.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::OwnedFd;

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Uid, chownat, fchmod, fchown, fstat, major, makedev,
    minor, mkdirat, mknodat, openat, openat2, stat, unlinkat,
};
use rustix::io::Errno;
use rustix::process::Pid;

use crate::args::Arguments;
use crate::error::{Error, Failed};

/// Where miscellaneous character devices are (linux/major.h), and those with numbers of their own.
const MISC: u32 = 10;
const KVM: (u32, u32) = (MISC, 232);
const TUN: (u32, u32) = (MISC, 200);
const URANDOM: (u32, u32) = (1, 9);
/// Its number differs from boot to boot.
const USERFAULTFD: &str = "/dev/userfaultfd";

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// The root of a jail.
#[derive(Debug)]
pub struct Directory {
    root: OwnedFd,
    /// The VMM's user and group.
    owner: (Uid, Gid),
}

impl Directory {
    /// Makes the directory, or takes over the one that a launcher has filled.
    ///
    /// # Errors
    /// Something else lies in its place, or the system refuses something.
    pub fn create(arguments: &Arguments) -> Result<Self, Error> {
        let base = &arguments.base;
        let mut opened = openat(CWD, base, DIRECTORY, Mode::empty());
        if opened.as_ref().is_err_and(|error| *error == Errno::NOENT) {
            fs::create_dir_all(base).failed(|| format!("make {}", base.display()))?;
            opened = openat(CWD, base, DIRECTORY, Mode::empty());
        }
        let mut root = opened.failed(|| format!("open {}", base.display()))?;
        for (name, mode) in [(&*arguments.exec_name, 0o755), (&arguments.id, 0o755), ("root", 0o700)] {
            root = subdirectory(&root, name, mode)?;
        }
        let directory = Self { root, owner: (Uid::from_raw(arguments.uid), Gid::from_raw(arguments.gid)) };
        directory.hand_over(&directory.root, "the jail's root")?;
        Ok(directory)
    }

    /// Makes the directories that a VMM expects, and the device nodes that it opens: `/dev/kvm` only if `kvm` says so,
    /// and none at all in a jail that was made without root.
    ///
    /// # Errors
    /// Something else lies in their place, or only root could make them.
    pub fn furnish(&self, devices: bool, kvm: bool) -> Result<(), Error> {
        let own = |parent: &OwnedFd, name: &str| {
            let made = subdirectory(parent, name, 0o700)?;
            self.hand_over(&made, name).map(|()| made)
        };
        own(&self.root, "run")?;
        let dev = own(&self.root, "dev")?;
        let net = own(&dev, "net")?;
        if !devices {
            return Ok(());
        }
        if kvm {
            self.make_device(&dev, "kvm", KVM)?;
        }
        self.make_device(&net, "tun", TUN)?;
        self.make_device(&dev, "urandom", URANDOM)?;
        match stat(USERFAULTFD) {
            Ok(host) => self.make_device(&dev, "userfaultfd", (major(host.st_rdev), minor(host.st_rdev))),
            Err(_) => Ok(()),
        }
    }

    /// What is right already, as in a jail that is used again, is left alone.
    fn hand_over(&self, directory: &OwnedFd, name: &str) -> Result<(), Error> {
        let found = fstat(directory).failed(|| format!("look at {name}"))?;
        if !self.owns(&found) {
            fchown(directory, Some(self.owner.0), Some(self.owner.1))
                .failed(|| format!("give {name} to the VMM's user"))?;
        }
        if Mode::from_raw_mode(found.st_mode) != Mode::RWXU {
            fchmod(directory, Mode::RWXU).failed(|| format!("restrict {name}"))?;
        }
        Ok(())
    }

    fn owns(&self, found: &Stat) -> bool {
        (found.st_uid, found.st_gid) == (self.owner.0.as_raw(), self.owner.1.as_raw())
    }

    fn make_device(&self, parent: &OwnedFd, name: &str, (major, minor): (u32, u32)) -> Result<(), Error> {
        let number = makedev(major, minor);
        // Exclusive by nature: what exists stays as it is.
        match mknodat(parent, name, FileType::CharacterDevice, Mode::RUSR | Mode::WUSR, number) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error).failed(|| format!("make the device {name}")),
        }
        let node = beneath(parent, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
            .failed(|| format!("open the device {name}"))?;
        let found = fstat(&node).failed(|| format!("look at the device {name}"))?;
        let device = FileType::from_raw_mode(found.st_mode) == FileType::CharacterDevice && found.st_rdev == number;
        // A second name would give the VMM's user what somebody else uses.
        if !device || found.st_nlink != 1 {
            return Err(Error::Refused(format!(
                "dev/{name} in the jail exists and is not the device {major}:{minor} with one name; remove it"
            )));
        }
        if self.owns(&found) {
            return Ok(());
        }
        chownat(&node, "", Some(self.owner.0), Some(self.owner.1), AtFlags::EMPTY_PATH)
            .failed(|| format!("give the device {name} to the VMM's user"))
    }

    /// Writes down which process lives here.
    ///
    /// # Errors
    /// A directory lies in the file's place, or the system refuses something.
    pub fn write_pid(&self, name: &str, pid: Pid) -> Result<(), Error> {
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

/// Opens `name`, which no symbolic link and no `..` leads out of `directory`.
fn beneath(directory: &OwnedFd, name: &str, flags: OFlags, mode: Mode) -> rustix::io::Result<OwnedFd> {
    openat2(directory, name, flags, mode, ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS)
}

/// Opens a directory, which is made if there is nothing in its place.
fn subdirectory(parent: &OwnedFd, name: &str, mode: u32) -> Result<OwnedFd, Error> {
    let open = || beneath(parent, name, DIRECTORY, Mode::empty());
    let mut opened = open();
    if opened.as_ref().is_err_and(|error| *error == Errno::NOENT) {
        match mkdirat(parent, name, Mode::from(mode)) {
            Ok(()) | Err(Errno::EXIST) => opened = open(),
            Err(error) => return Err(error).failed(|| format!("make the directory {name} of the jail")),
        }
    }
    opened.map_err(|error| match error {
        Errno::LOOP | Errno::NOTDIR => {
            Error::Refused(format!("{name} in the jail's directory exists and is no directory; remove it"))
        }
        error => Error::System { what: format!("open the directory {name} of the jail"), source: error.into() },
    })
}
