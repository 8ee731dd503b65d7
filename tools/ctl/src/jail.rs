//! How a run confines its VMM: as strictly as the host allows.

use std::error::Error;
use std::ffi::{CStr, CString};
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::mount::{MountPropagationFlags, mount_bind, mount_change};
use rustix::process::{getegid, geteuid};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// The first of the users that jails have: far above those of people and services, one for each process.
const FIRST_USER: u32 = 0x7000_0000;
/// The jail's name; it is the only one below its base directory.
const ID: &str = "run";

/// How strict it is, strictest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Jailed,
    Rootless,
}

/// What confines a VMM besides itself.
#[derive(Debug)]
pub struct Jail {
    /// Its mode and the jailer; `None` if no jail can be made.
    jailer: Option<(Mode, PathBuf)>,
    vesicle: PathBuf,
    base: PathBuf,
    /// User and group of the VMM.
    owner: (u32, u32),
    /// The file whose owner that is, if it is no user of its own.
    owned: Option<PathBuf>,
    /// Files that it uses, by the paths they have here and in the jail, and whether it writes to them.
    files: Vec<(PathBuf, bool)>,
    /// Why there is no stricter one.
    why_not: String,
}

impl Jail {
    /// None: the VMM has only its own confinement.
    pub fn none(vesicle: &Path) -> Self {
        Self {
            jailer: None,
            vesicle: vesicle.to_owned(),
            base: PathBuf::new(),
            owner: (geteuid().as_raw(), getegid().as_raw()),
            owned: None,
            files: Vec::new(),
            why_not: String::new(),
        }
    }

    /// The strictest that `jailer` can make here, with its directory in `dir`; none if there is no jailer.
    ///
    /// # Errors
    /// The VMM is not there.
    pub fn strictest(jailer: Option<&Path>, vesicle: &Path, dir: &Path) -> Result<Self, Box<dyn Error>> {
        let mut jail = Self { base: dir.join("jail"), ..Self::none(vesicle) };
        let Some(jailer) = jailer else { return Ok(jail) };
        let own = jail.owner;
        let modes: &[Mode] = if own.0 == 0 { &[Mode::Jailed, Mode::Rootless] } else { &[Mode::Rootless] };
        for mode in modes {
            let user = FIRST_USER + std::process::id();
            jail.owner = if *mode == Mode::Jailed { (user, user) } else { own };
            jail.jailer = Some((*mode, jailer.to_owned()));
            // What a host allows is found out by trying: the VMM is there for as long as it takes to print its version.
            match jail.command(&[])?.arg("--version").stdin(Stdio::null()).output() {
                Ok(output) if output.status.success() => return Ok(jail),
                Ok(output) => {
                    let said = String::from_utf8_lossy(&output.stderr);
                    jail.why_not = format!("{} {}", output.status, said.trim().replace('\n', " "));
                }
                Err(error) => jail.why_not = error.to_string(),
            }
        }
        (jail.jailer, jail.owner) = (None, own);
        Ok(jail)
    }

    /// Brings a file into the jail, where it has the path that is returned. The VMM writes to it if `write` says so.
    ///
    /// # Errors
    /// There is no such file, or there is no place for it.
    pub fn bring(&mut self, file: &Path, write: bool) -> io::Result<PathBuf> {
        let Some((mode, _)) = self.jailer else { return Ok(file.to_owned()) };
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", file.display()));
        let file = file.canonicalize().map_err(named)?;
        let found = fs::metadata(&file)?;
        // A user of its own can do what everybody can. Where that is not enough it is the file's owner.
        let needed = if write { 0o006 } else { 0o004 };
        if mode == Mode::Jailed && found.mode() & needed != needed {
            self.owner = (found.uid(), found.gid());
            self.owned = Some(file.clone());
        }
        let inside = self.inside(&file);
        make_open(inside.parent().unwrap_or(&inside))?;
        File::create(inside)?;
        self.files.push((file.clone(), write));
        Ok(file)
    }

    /// Gives a file of ours to the VMM, and brings it.
    ///
    /// # Errors
    /// As [`Self::bring`].
    pub fn give(&mut self, file: &Path) -> io::Result<PathBuf> {
        if matches!(self.jailer, Some((Mode::Jailed, _))) {
            fs::set_permissions(file, fs::Permissions::from_mode(0o666))?;
        }
        self.bring(file, true)
    }

    fn inside(&self, file: &Path) -> PathBuf {
        let name = self.vesicle.file_name().unwrap_or_default();
        self.base.join(name).join(ID).join("root").join(file.strip_prefix("/").unwrap_or(file))
    }

    /// The command that runs the VMM, which is told of the descriptors `passed`. Its further arguments follow.
    ///
    /// # Errors
    /// A path that cannot be one.
    pub fn command(&self, passed: &[RawFd]) -> Result<Command, Box<dyn Error>> {
        let told = passed.iter().map(|fd| format!("--pass-fd={fd}"));
        let Some((mode, jailer)) = &self.jailer else {
            let mut command = Command::new(&self.vesicle);
            command.args(told);
            return Ok(command);
        };
        let (user, group) = self.owner;
        let mut command = Command::new(jailer);
        command.args(["--id", ID, "--exec-file"]).arg(&self.vesicle).arg("--chroot-base-dir").arg(&self.base);
        command.args(["--uid", &user.to_string(), "--gid", &group.to_string()]).args(told);
        let mut flags = UnshareFlags::NEWNS;
        let mut maps = Vec::new();
        if *mode == Mode::Rootless {
            command.arg("--rootless");
            flags |= UnshareFlags::NEWUSER;
            maps = vec![
                ("/proc/self/setgroups", "deny".to_owned()),
                ("/proc/self/uid_map", format!("{user} {user} 1")),
                ("/proc/self/gid_map", format!("{group} {group} 1")),
            ];
        }
        // A jail's device node cannot be opened where devices are not for its file system to have.
        let open = || File::options().read(true).write(true).open("/dev/kvm").ok();
        let kvm = if *mode == Mode::Jailed { open() } else { None };
        command.args(kvm.as_ref().map(|kvm| format!("--kvm-fd={}", kvm.as_raw_fd())));
        command.arg("--");
        let c_string = |path: &Path| CString::new(path.as_os_str().as_bytes());
        let mounts: Vec<_> = self
            .files
            .iter()
            .map(|(file, write)| Ok((c_string(file)?, c_string(&self.inside(file))?, *write)))
            .collect::<io::Result<_>>()?;
        let prepare = move || {
            // SAFETY: the child of a fork has one thread, and neither flag touches memory or descriptors.
            unsafe { unshare_unsafe(flags) }?;
            for (file, content) in &maps {
                fs::write(file, content)?;
            }
            // The jail's files are mounted where nobody else sees it, and are gone with the process.
            kvm.iter().try_for_each(|kvm| fcntl_setfd(kvm, FdFlags::empty()))?;
            mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)?;
            for (file, inside, write) in &mounts {
                mount_bind(file, inside)?;
                if !write {
                    restrict(inside)?;
                }
            }
            Ok(())
        };
        // SAFETY: this process starts a VMM before it has other threads, but for one that waits for signals, so that
        // its child may do what it may.
        unsafe { command.pre_exec(prepare) };
        Ok(command)
    }
}

/// Has what is mounted at a path only be read there: who took over a VMM could otherwise change what the next run starts
/// from, where they are one user.
fn restrict(path: &CStr) -> io::Result<()> {
    let attributes = libc::mount_attr { attr_set: libc::MOUNT_ATTR_RDONLY, attr_clr: 0, propagation: 0, userns_fd: 0 };
    let size = size_of_val(&attributes);
    // SAFETY: path and attributes live for the call, which is told how long these are.
    let done = unsafe {
        libc::syscall(libc::SYS_mount_setattr, libc::AT_FDCWD, path.as_ptr(), 0, &raw const attributes, size)
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Makes a directory, and those above it that there are not, for everybody to enter: the umask may be that of one who
/// shares nothing, but the VMM is another user.
fn make_open(directory: &Path) -> io::Result<()> {
    if directory.is_dir() {
        return Ok(());
    }
    directory.parent().map_or(Ok(()), make_open)?;
    fs::create_dir(directory)?;
    fs::set_permissions(directory, fs::Permissions::from_mode(0o755))
}

/// In one line, for who runs it.
impl fmt::Display for Jail {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match (&self.jailer, &self.owned) {
            (Some((Mode::Jailed, _)), Some(file)) => {
                let (user, file) = (self.owner.0, file.display());
                write!(formatter, "as user {user}, the only one who may use {file} as asked, ")?;
                "in a jail (root directory and mounts of its own), "
            }
            (Some((Mode::Jailed, _)), None) => "in a jail (user, root directory and mounts of its own), ",
            (Some((Mode::Rootless, _)), _) => {
                "in a jail without root (user namespace, root directory and mounts of its own), "
            }
            (None, _) => "without a jail, ",
        };
        formatter.write_str(what)?;
        formatter.write_str("by Landlock and system-call filters")?;
        if !self.why_not.is_empty() {
            write!(formatter, "; nothing stricter is possible here: {}", self.why_not)?;
        }
        Ok(())
    }
}
