//! Guests in a jail: where their files are, so that a path means the same inside and outside.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use rustix::fs::Mode as Bits;
use tempfile::TempDir;

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

/// A directory for a guest's files that lives as long as this. In a jail, the jail lies beside it.
#[derive(Debug)]
pub struct Place {
    mode: Mode,
    base: TempDir,
    files: PathBuf,
}

impl Place {
    /// An empty one.
    pub fn new(mode: Mode) -> Self {
        let base = tempfile::tempdir().unwrap();
        if mode == Mode::Plain {
            return Self { mode, files: base.path().to_owned(), base };
        }
        // What a test makes, the VMM's user may use: sockets, images, files that come later.
        rustix::process::umask(Bits::empty());
        fs::set_permissions(base.path(), Permissions::from_mode(0o755)).unwrap();
        let files = base.path().join("files");
        let place = Self { mode, files: files.clone(), base };
        let inside = place.inside(&files);
        fs::create_dir_all(&inside).unwrap();
        symlink(&inside, &files).unwrap();
        for directory in inside.ancestors().take_while(|directory| *directory != place.base.path()) {
            place.give(directory);
        }
        place.give(place.base.path());
        place
    }

    /// Where the files are, seen from inside and outside.
    pub fn path(&self) -> &Path {
        &self.files
    }

    /// How the VMM is run.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Brings a file into the jail, at its own path.
    pub fn bring(&self, file: &Path) {
        let inside = self.inside(file);
        if self.mode == Mode::Plain || inside.exists() && !file.starts_with(self.base.path()) {
            return;
        }
        if file.starts_with(self.base.path()) {
            // A copy that has the mode of what it was copied from.
            return fs::set_permissions(file, Permissions::from_mode(0o666)).unwrap();
        }
        fs::create_dir_all(inside.parent().unwrap()).unwrap();
        fs::copy(file, &inside).unwrap();
        fs::set_permissions(&inside, Permissions::from_mode(0o666)).unwrap();
    }

    /// The command that runs the VMM; its arguments follow.
    pub fn command(&self) -> Command {
        let vesicle = Path::new(env!("CARGO_BIN_EXE_vesicle"));
        match self.mode {
            Mode::Plain => Command::new(vesicle),
            Mode::Jailed | Mode::JailedWithoutMounts => self.jailer(&JAILER, vesicle),
            Mode::Rootless => {
                // The user may not be allowed to go where they were built.
                let bin = self.base.path().join("bin");
                fs::create_dir_all(&bin).unwrap();
                let [jailer, vesicle] = [&*JAILER, vesicle].map(|program| {
                    let copy = bin.join(program.file_name().unwrap());
                    fs::copy(program, &copy).unwrap();
                    copy
                });
                let mut command = self.jailer(&jailer, &vesicle);
                command.uid(self.mode.user()).gid(self.mode.user());
                command
            }
        }
    }

    fn jailer(&self, jailer: &Path, vesicle: &Path) -> Command {
        let mut command = Command::new(jailer);
        command.args(["--id", "story", "--exec-file"]).arg(vesicle).arg("--chroot-base-dir").arg(self.base.path());
        let user = self.mode.user().to_string();
        match self.mode {
            Mode::Rootless => command.arg("--rootless"),
            _ => command.args(["--uid", &user, "--gid", &user]),
        };
        if self.mode == Mode::JailedWithoutMounts {
            command.arg("--no-mount-ns");
        }
        command.arg("--");
        command
    }

    /// Where a path of the jail is on the host.
    fn inside(&self, path: &Path) -> PathBuf {
        self.base.path().join("vesicle/story/root").join(path.strip_prefix("/").unwrap())
    }

    fn give(&self, path: &Path) {
        chown(path, Some(self.mode.user()), Some(self.mode.user())).unwrap();
    }
}
