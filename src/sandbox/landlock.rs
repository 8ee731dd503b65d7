//! Landlock: which part of the file system, of the network and of other processes stays in reach.
//!
//! A layer only narrows; it binds the thread that installs it and the threads that this one starts later; what is open
//! stays open. So the layers follow the process's life:
//!
//! | when | who | what is left |
//! |---|---|---|
//! | before any thread | the process | no program is executed, no TCP, no signals to and no abstract sockets of others; with `--allow-path` only those paths, the devices and what the command line names |
//! | before they serve | API thread, memory threads | no path at all |
//! | when the machine is built | vmm thread, and the vCPUs' that it starts then | the directories of what was configured, and removing the sockets |
//!
//! What the host's kernel does not know yet is left out (see [`Landlock::new`] for the least that will do). Until ABI 9
//! nothing here keeps a thread from connecting to a socket that has a path; the system-call filters do, save for vsock.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use landlock::{
    ABI, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError,
    Scope,
};

use crate::config::LandlockConfig;

/// The newest ABI whose rights are used; an older kernel knows some of them.
const NEWEST: ABI = ABI::V9;

/// Why there is no confinement.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel has none.
    #[error(
        "this host's kernel has no Landlock (5.13 or later, with landlock among its lsm=): --no-landlock goes without"
    )]
    Absent(#[source] io::Error),
    /// The kernel has an older one.
    #[error("this host's kernel has Landlock ABI {found}; --landlock-abi asks for {wanted}")]
    TooOld {
        /// What it has.
        found: u8,
        /// What it should have.
        wanted: u8,
    },
    /// A path that `--allow-path` names.
    #[error("--allow-path {path:?} cannot be opened")]
    Path {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A layer.
    #[error("Landlock refuses a layer")]
    Layer(#[from] RulesetError),
}

/// Paths that stay in reach, and what for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Grants(Vec<(PathBuf, BitFlags<AccessFs>)>);

impl Grants {
    /// A rule costs the kernel a walk to its path, so there is one for each, however often it is named.
    fn add(&mut self, path: &Path, access: impl Into<BitFlags<AccessFs>>) {
        match self.0.iter_mut().find(|(known, _)| known == path) {
            Some((_, granted)) => *granted |= access.into(),
            None => self.0.push((path.to_owned(), access.into())),
        }
    }

    fn extend(&mut self, others: &Self) {
        for (path, access) in &others.0 {
            self.add(path, *access);
        }
    }

    /// Files at or below `path` may be read.
    pub fn read(&mut self, path: &Path) {
        self.add(path, AccessFs::ReadFile | AccessFs::ReadDir);
    }

    /// Files at or below `path` may be read, written, made and removed, sockets too.
    pub fn write(&mut self, path: &Path) {
        let read = AccessFs::ReadFile | AccessFs::ReadDir;
        let write = AccessFs::WriteFile | AccessFs::Truncate | AccessFs::MakeReg | AccessFs::RemoveFile;
        self.add(path, read | write | AccessFs::MakeSock | AccessFs::ResolveUnix);
    }

    /// The device at `path` may be opened and controlled.
    pub fn device(&mut self, path: &Path) {
        self.add(path, AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev);
    }

    /// Sockets in the directory of `socket` may be connected to, and removed.
    pub fn socket(&mut self, socket: &Path) {
        self.add(&directory(socket), AccessFs::RemoveFile | AccessFs::ResolveUnix);
    }

    /// Files in the directory of `file` may be removed.
    pub fn removal(&mut self, file: &Path) {
        self.add(&directory(file), AccessFs::RemoveFile);
    }

    /// What may be done in the directory of `file` is what may be done with the file.
    pub fn siblings(&mut self, file: &Path, write: bool) {
        let directory = directory(file);
        if write { self.write(&directory) } else { self.read(&directory) }
    }
}

/// Where a file is.
fn directory(file: &Path) -> PathBuf {
    match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        Some(_) => ".".into(),
        None => "/".into(),
    }
}

/// Whether a layer is in force that leaves only some paths.
static PATHS_RESTRICTED: AtomicBool = AtomicBool::new(false);

/// Whether a file may be out of reach though the user may open it.
pub fn restricts_paths() -> bool {
    PATHS_RESTRICTED.load(Ordering::Relaxed)
}

/// The layers of this process.
#[derive(Debug)]
pub struct Landlock {
    abi: u8,
    /// What was asked for with `--allow-path`.
    allowed: Grants,
}

impl Landlock {
    /// Checks that the host's kernel has what is asked for.
    ///
    /// # Errors
    /// It has no Landlock, or too old a one; or a path that is to be allowed is not there.
    pub fn new(config: &LandlockConfig) -> Result<Self, Error> {
        let abi = kernel_abi().map_err(Error::Absent)?;
        if abi < config.least_abi {
            return Err(Error::TooOld { found: abi, wanted: config.least_abi });
        }
        let mut allowed = Grants::default();
        for allow in &config.allow {
            if let Err(source) = std::fs::symlink_metadata(&allow.path) {
                return Err(Error::Path { path: allow.path.clone(), source });
            }
            if allow.write { allowed.write(&allow.path) } else { allowed.read(&allow.path) }
        }
        Ok(Self { abi, allowed })
    }

    /// The host's ABI.
    pub fn abi(&self) -> u8 {
        self.abi
    }

    /// The first layer. `needed` is what the command line names and `proc` this process's directory in /proc, if it was
    /// passed in; they and the devices stay in reach if other paths are to be given up.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn confine_process(&self, needed: &Grants, proc: Option<BorrowedFd<'_>>) -> Result<(), Error> {
        let mut grants = Grants::default();
        let mut files = BitFlags::from(AccessFs::Execute);
        if !self.allowed.0.is_empty() {
            files = every_right();
            grants = self.allowed.clone();
            grants.extend(needed);
            for device in ["/dev/kvm", "/dev/net/tun", "/dev/userfaultfd"] {
                grants.device(Path::new(device));
            }
            // A process may look at its own memory map.
            grants.read(Path::new("/proc/self"));
            PATHS_RESTRICTED.store(true, Ordering::Relaxed);
        }
        let ruleset = Ruleset::default()
            .handle_access(files)?
            .handle_access(AccessNet::BindTcp | AccessNet::ConnectTcp)?
            .scope(Scope::Signal | Scope::AbstractUnixSocket)?;
        restrict(ruleset, &grants, proc.filter(|_| !self.allowed.0.is_empty()))
    }

    /// The layer of a thread that keeps no path.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn confine_thread(&self) -> Result<(), Error> {
        restrict(Ruleset::default().handle_access(every_right())?, &Grants::default(), None)
    }

    /// The layer of the vmm thread and of those it starts from now on: `grants`, and what was asked for with
    /// `--allow-path`.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn confine_vmm(&self, grants: &Grants) -> Result<(), Error> {
        let mut all = self.allowed.clone();
        all.extend(grants);
        restrict(Ruleset::default().handle_access(every_right())?, &all, None)?;
        PATHS_RESTRICTED.store(true, Ordering::Relaxed);
        Ok(())
    }
}

fn every_right() -> BitFlags<AccessFs> {
    use landlock::Access;
    AccessFs::from_all(NEWEST)
}

/// Puts a layer on this thread that leaves `grants`, and reading below the directory `open`.
fn restrict(ruleset: Ruleset, grants: &Grants, open: Option<BorrowedFd<'_>>) -> Result<(), Error> {
    let mut layer = ruleset.create()?;
    if let Some(open) = open {
        layer = layer.add_rule(PathBeneath::new(open, AccessFs::ReadFile))?;
    }
    for (path, access) in &grants.0 {
        // What is not there cannot be used, and what comes to be there later is not what was meant.
        if let Ok(opened) = PathFd::new(path) {
            layer = layer.add_rule(PathBeneath::new(opened, *access))?;
        }
    }
    layer.restrict_self()?;
    Ok(())
}

/// The ABI of the kernel's Landlock, from 1.
fn kernel_abi() -> io::Result<u8> {
    const VERSION: libc::c_uint = 1;
    // SAFETY: with this flag the call only answers which ABI there is; it takes no memory.
    let abi = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0_usize, VERSION) };
    if abi < 0 { Err(io::Error::last_os_error()) } else { Ok(u8::try_from(abi).unwrap_or(u8::MAX)) }
}

#[cfg(test)]
#[path = "landlock_tests.rs"]
mod tests;
