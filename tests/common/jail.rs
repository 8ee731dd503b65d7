//! Guests in a jail: where their files are, so that a path means the same inside and outside.
//!
//! All jails of a kind are one, which all microVMs of a test binary live in, one after the other or at once: a clone finds
//! its snapshot, and a successor the drives.

use std::fs::{self, Permissions};
use std::os::fd::RawFd;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, LazyLock, Mutex, PoisonError, Weak};

use rustix::fs::Mode as Bits;
use tempfile::TempDir;
use vesiclectl::Vesicle;

/// The jailer, which is built with these tests.
pub static JAILER: LazyLock<PathBuf> =
    LazyLock::new(|| Path::new(env!("CARGO_BIN_EXE_vesicle")).with_file_name("vesicle-jailer"));

/// How the VMM is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// It confines itself.
    Plain,
    /// In a jail.
    Jailed,
    /// In a jail without a mount namespace.
    JailedWithoutMounts,
    /// In a jail that an ordinary user makes.
    Rootless,
}

impl Mode {
    /// What `VESICLE_TEST_JAIL` asks for: `jailed`, `no-mount-ns`, `rootless`, or nothing.
    pub fn chosen() -> Self {
        match std::env::var("VESICLE_TEST_JAIL").as_deref() {
            Err(_) | Ok("") => Self::Plain,
            Ok("jailed") => Self::Jailed,
            Ok("no-mount-ns") => Self::JailedWithoutMounts,
            Ok("rootless") => Self::Rootless,
            Ok(other) => panic!("VESICLE_TEST_JAIL is {other}"),
        }
    }

    /// Who the VMM is.
    pub fn user(self) -> u32 {
        match self {
            Self::Plain => 0,
            Self::Jailed | Self::JailedWithoutMounts => 20_000,
            Self::Rootless => 1_000,
        }
    }
}

/// A jail. Its directory is gone when its last user is.
#[derive(Debug)]
struct Jail {
    mode: Mode,
    base: TempDir,
    /// Its directory for files, by the path that it has outside and inside.
    files: PathBuf,
}

/// The jails there are. Who holds this puts a process into one: each writes down there who it is, so it is one at a time.
static JAILS: Mutex<Vec<Weak<Jail>>> = Mutex::new(Vec::new());

impl Jail {
    /// The one of this kind.
    fn of(mode: Mode) -> Arc<Self> {
        let mut jails = JAILS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(jail) = jails.iter().filter_map(Weak::upgrade).find(|jail| jail.mode == mode) {
            return jail;
        }
        // What a test makes, the VMM's user may use: sockets, images, files that come later.
        rustix::process::umask(Bits::empty());
        let base = tempfile::tempdir().unwrap();
        fs::set_permissions(base.path(), Permissions::from_mode(0o755)).unwrap();
        let jail = Self { mode, files: base.path().join("files"), base };
        let inside = jail.inside(&jail.files);
        fs::create_dir_all(&inside).unwrap();
        symlink(&inside, &jail.files).unwrap();
        for directory in inside.ancestors().take_while(|directory| *directory != jail.base.path()) {
            jail.give(directory);
        }
        jail.give(jail.base.path());
        let jail = Arc::new(jail);
        jails.push(Arc::downgrade(&jail));
        jail
    }

    /// Where a path of the jail is on the host.
    fn inside(&self, path: &Path) -> PathBuf {
        self.root().join(path.strip_prefix("/").unwrap())
    }

    fn root(&self) -> PathBuf {
        self.base.path().join("vesicle/story/root")
    }

    fn give(&self, path: &Path) {
        chown(path, Some(self.mode.user()), Some(self.mode.user())).unwrap();
    }

    /// Copies a file into the jail, to its own path, if it is not there.
    fn bring(&self, file: &Path) {
        if file.starts_with(self.base.path()) {
            // It may be a copy that has the mode of what it was copied from.
            return self.give(file);
        }
        copy_once(file, &self.inside(file), 0o666);
    }

    /// The jailer, with the descriptors that it leaves open.
    fn command(&self, passed: &[RawFd]) -> Command {
        let vesicle = Path::new(env!("CARGO_BIN_EXE_vesicle"));
        let user = self.mode.user();
        let mut programs = [JAILER.clone(), vesicle.to_owned()];
        if self.mode == Mode::Rootless {
            // The user may not be allowed to go where they were built.
            for program in &mut programs {
                let copy = self.base.path().join("bin").join(program.file_name().unwrap());
                copy_once(program, &copy, 0o755);
                *program = copy;
            }
        }
        let mut command = Command::new(&programs[0]);
        command.args(["--id", "story", "--exec-file"]).arg(&programs[1]);
        command.arg("--chroot-base-dir").arg(self.base.path());
        match self.mode {
            Mode::Rootless => command.arg("--rootless").uid(user).gid(user),
            _ => command.args(["--uid", &user.to_string(), "--gid", &user.to_string()]),
        };
        if self.mode == Mode::JailedWithoutMounts {
            command.arg("--no-mount-ns");
        }
        command.args(passed.iter().map(|fd| format!("--pass-fd={fd}"))).arg("--");
        command
    }
}

/// Copies a file to where all tests of a jail look for it, and one of them may find none.
fn copy_once(file: &Path, to: &Path, mode: u32) {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    if !to.exists() {
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(file, to).unwrap();
        fs::set_permissions(to, Permissions::from_mode(mode)).unwrap();
    }
}

/// A directory for files of a guest or of a test, as long as this lives. If VMMs are jailed, it is in their jail.
#[derive(Debug)]
pub struct Place {
    mode: Mode,
    dir: TempDir,
    /// Goes after what is in it.
    jail: Option<Arc<Jail>>,
}

impl Place {
    /// An empty one.
    pub fn new(mode: Mode) -> Self {
        if mode == Mode::Plain {
            return Self { mode, dir: tempfile::tempdir().unwrap(), jail: None };
        }
        let jail = Jail::of(mode);
        let dir = tempfile::tempdir_in(&jail.files).unwrap();
        jail.give(dir.path());
        Self { mode, dir, jail: Some(jail) }
    }

    /// Where it is, seen from inside and outside.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// How the VMM is run.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Brings a file into the jail, at its own path.
    pub fn bring(&self, file: &Path) {
        if let Some(jail) = &self.jail {
            jail.bring(file);
        }
    }

    /// The command that runs the VMM, with descriptors that it is told of; its further arguments follow.
    pub fn command(&self, passed: &[RawFd]) -> Command {
        if let Some(jail) = &self.jail {
            return jail.command(passed);
        }
        let mut command = Command::new(env!("CARGO_BIN_EXE_vesicle"));
        command.args(passed.iter().map(|fd| format!("--pass-fd={fd}")));
        command
    }

    /// Starts the VMM.
    pub fn spawn(&self, command: Command) -> Vesicle {
        let Some(jail) = &self.jail else { return Vesicle::spawn(command).unwrap() };
        let _one = JAILS.lock().unwrap_or_else(PoisonError::into_inner);
        let mut vesicle = Vesicle::spawn(command).unwrap();
        let pid = vesicle.child().id().to_string();
        super::wait_until(|| {
            fs::read_to_string(jail.root().join("vesicle.pid")).is_ok_and(|found| found == pid)
                || vesicle.child().try_wait().unwrap().is_some()
        });
        vesicle
    }
}
