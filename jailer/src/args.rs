//! The command line, which is the one that launchers know, and a few flags of our own.

use std::ffi::OsString;
use std::fmt::Display;
use std::os::fd::RawFd;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use lexopt::{Arg, Parser};

/// What `--help` prints.
pub const HELP: &str = "\
Puts a VMM into a jail and becomes it.

Usage: vesicle-jailer --id ID --exec-file FILE --uid UID --gid GID [OPTION]... [-- ARGUMENT_OF_THE_VMM...]

  --id ID                      name of the instance: 1 to 64 letters, digits and hyphens
  --exec-file FILE             the VMM, a static program; it is executed from where it is, not copied
  --uid UID, --gid GID         user and group that the VMM runs as
  --chroot-base-dir DIR        where jails are: this one is DIR/NAME_OF_FILE/ID/root [default: /srv/jailer]
  --netns PATH                 join this network namespace
  --new-pid-ns                 give the VMM a PID namespace of its own
  --daemonize                  detach from the terminal; standard streams become /dev/null
  --cgroup FILE=VALUE          write VALUE into FILE of the cgroup parent/ID, which is made; may be repeated
  --parent-cgroup PATH         the cgroup's parent, or without --cgroup the cgroup itself [default: the file's name]
  --cgroup-version 2           the only one there is
  --resource-limit NAME=VALUE  fsize (bytes) or no-file (descriptors, default 2048); may be repeated
  --pass-fd N                  leave descriptor N open and tell the VMM; may be repeated
  --kvm-fd N                   descriptor N is /dev/kvm: no device node is needed
  --no-mount-ns                without a mount namespace: a root directory of its own, and Landlock
  --rootless                   without root: a user namespace; user and group are ours unless named
  --version, --help

The jail's process id is in NAME_OF_FILE.pid in its root. With --daemonize and --new-pid-ns the jailer ends with
status 0 as soon as the VMM runs. Exit status: 1 if the jail cannot be made, 153 for bad arguments.
";

/// What is asked for.
#[derive(Debug, Default)]
pub struct Arguments {
    /// `[A-Za-z0-9-]`, 1 to 64 characters.
    pub id: String,
    /// The VMM.
    pub exec_file: PathBuf,
    /// Last component of `exec_file`.
    pub exec_name: String,
    /// The VMM's user.
    pub uid: u32,
    /// The VMM's group.
    pub gid: u32,
    /// Where jails are.
    pub base: PathBuf,
    /// A network namespace to join.
    pub netns: Option<PathBuf>,
    /// A PID namespace of its own.
    pub new_pid_ns: bool,
    /// Detached.
    pub daemonize: bool,
    /// Files of the cgroup and what to write into them.
    pub cgroups: Vec<(String, String)>,
    /// Relative to the root of the hierarchy.
    pub parent_cgroup: Option<PathBuf>,
    /// `RLIMIT_FSIZE` in bytes.
    pub fsize: Option<u64>,
    /// `RLIMIT_NOFILE`.
    pub no_file: u64,
    /// Descriptors that stay open.
    pub pass_fds: Vec<RawFd>,
    /// `/dev/kvm`.
    pub kvm_fd: Option<RawFd>,
    /// A mount namespace of its own.
    pub mount_ns: bool,
    /// A user namespace instead of privileges.
    pub rootless: bool,
    /// For the VMM.
    pub rest: Vec<OsString>,
}

/// What the command line asks for.
#[derive(Debug)]
pub enum Request {
    /// A jail.
    Jail(Box<Arguments>),
    /// This text.
    Print(String),
}

fn bad(flag: &str, value: impl Display, expected: &str) -> String {
    format!("--{flag} {value}: {expected}")
}

/// Parses what follows the program's name. `user` and `group` are who runs this.
///
/// # Errors
/// The first thing that is wrong, in a sentence.
pub fn parse(arguments: impl IntoIterator<Item = OsString>, user: u32, group: u32) -> Result<Request, String> {
    let mut parser = Parser::from_args(arguments);
    let (mut id, mut exec_file, mut uid, mut gid) = (None, None, None, None);
    let mut parsed = Arguments { base: "/srv/jailer".into(), no_file: 2048, mount_ns: true, ..Arguments::default() };
    // What follows `--` is the VMM's; lexopt would parse on.
    loop {
        if let Some(rest) = parser.try_raw_args()
            && rest.peek().is_some_and(|next| next == "--")
        {
            parsed.rest = rest.skip(1).collect();
            break;
        }
        let Some(argument) = parser.next().map_err(|error| error.to_string())? else { break };
        let Arg::Long(flag) = argument else { return Err(argument.unexpected().to_string()) };
        let flag = flag.to_owned();
        match flag.as_str() {
            "help" => return Ok(Request::Print(HELP.to_owned())),
            "version" => return Ok(Request::Print(format!("Vesicle jailer v{}\n", env!("CARGO_PKG_VERSION")))),
            "new-pid-ns" => parsed.new_pid_ns = true,
            "daemonize" => parsed.daemonize = true,
            "no-mount-ns" => parsed.mount_ns = false,
            "rootless" => parsed.rootless = true,
            _ => {
                let value = parser.value().map_err(|error| error.to_string())?;
                let text = value.to_str().ok_or_else(|| bad(&flag, value.display(), "must be UTF-8"))?;
                match flag.as_str() {
                    "id" => id = Some(text.to_owned()),
                    "exec-file" => exec_file = Some(PathBuf::from(text)),
                    "uid" => uid = Some(owner(&flag, text)?),
                    "gid" => gid = Some(owner(&flag, text)?),
                    _ => set(&mut parsed, &flag, text)?,
                }
            }
        }
    }
    parsed.id = checked_id(id.ok_or("--id is missing")?)?;
    parsed.exec_file = exec_file.ok_or("--exec-file is missing")?;
    let no_file = || bad("exec-file", parsed.exec_file.display(), "names no file");
    let named = parsed.exec_file.file_name().ok_or_else(no_file)?;
    // A link's target is what launchers look for in the jail's path. One that leads nowhere is refused when it is opened.
    let real = parsed.exec_file.canonicalize().ok();
    let name = real.as_deref().and_then(Path::file_name).unwrap_or(named).to_str();
    parsed.exec_name = name.ok_or_else(no_file)?.to_owned();
    // Without root one stays who one is.
    let rootless = parsed.rootless;
    parsed.uid = uid.or(rootless.then_some(user)).ok_or("--uid is missing")?;
    parsed.gid = gid.or(rootless.then_some(group)).ok_or("--gid is missing")?;
    Ok(Request::Jail(Box::new(parsed)))
}

fn set(parsed: &mut Arguments, flag: &str, text: &str) -> Result<(), String> {
    match flag {
        "chroot-base-dir" => parsed.base = text.into(),
        "netns" => parsed.netns = Some(text.into()),
        "cgroup" => {
            let (file, value) = text.split_once('=').ok_or_else(|| bad(flag, text, "must be FILE=VALUE"))?;
            let legal = file.contains('.') && !file.starts_with('.') && !file.contains('/') && !value.is_empty();
            if !legal || value.contains('\n') {
                return Err(bad(flag, text, "must be a file such as cpu.weight, =, and one line"));
            }
            parsed.cgroups.push((file.to_owned(), value.to_owned()));
        }
        "cgroup-version" if text == "2" => {}
        "cgroup-version" => {
            return Err(bad(flag, text, "only 2 is supported: version 1 cannot confine a process as a whole"));
        }
        "parent-cgroup" => {
            let path = Path::new(text);
            if text.is_empty() || !path.components().all(|part| matches!(part, Component::Normal(_))) {
                return Err(bad(flag, text, "must be a relative path without .."));
            }
            parsed.parent_cgroup = Some(path.to_owned());
        }
        "resource-limit" => match text.split_once('=') {
            Some(("fsize", value)) => parsed.fsize = Some(number(flag, value)?),
            Some(("no-file", value)) => parsed.no_file = number(flag, value)?,
            _ => return Err(bad(flag, text, "must be fsize=BYTES or no-file=NUMBER")),
        },
        "pass-fd" => parsed.pass_fds.push(descriptor(flag, text)?),
        "kvm-fd" => parsed.kvm_fd = Some(descriptor(flag, text)?),
        _ => return Err(format!("unknown flag --{flag}; --help lists them")),
    }
    Ok(())
}

fn number<N: FromStr>(flag: &str, text: &str) -> Result<N, String> {
    text.parse().map_err(|_| bad(flag, text, "must be a number"))
}

/// A user or group. The highest number is none: to the kernel it says to stay who one is.
fn owner(flag: &str, text: &str) -> Result<u32, String> {
    let number = number(flag, text)?;
    if number < u32::MAX { Ok(number) } else { Err(bad(flag, text, "must be a number below 4294967295")) }
}

fn descriptor(flag: &str, text: &str) -> Result<RawFd, String> {
    let number: RawFd = number(flag, text)?;
    if number > 2 { Ok(number) } else { Err(bad(flag, text, "must be the number of a descriptor above 2")) }
}

fn checked_id(id: String) -> Result<String, String> {
    let legal = id.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    if legal && (1..=64).contains(&id.len()) {
        return Ok(id);
    }
    Err(bad("id", id, "must be 1 to 64 letters, digits and hyphens"))
}

impl Arguments {
    /// Descriptors that stay open: those named here, and the VMM's own API socket.
    pub fn descriptors(&self) -> Vec<RawFd> {
        self.pass_fds.iter().copied().chain(self.kvm_fd).chain(self.api_socket()).collect()
    }

    /// What the VMM is told about descriptors that it would not know otherwise.
    pub fn descriptor_flags(&self) -> Vec<String> {
        let untold = self.pass_fds.iter().filter(|fd| self.api_socket() != Some(**fd));
        untold.map(|fd| format!("--pass-fd={fd}")).chain(self.kvm_fd.map(|fd| format!("--kvm-fd={fd}"))).collect()
    }

    /// The listening socket that the VMM is told of, if it is one passed in.
    fn api_socket(&self) -> Option<RawFd> {
        let mut words = self.rest.iter().filter_map(|word| word.to_str());
        let socket = words.find_map(|word| word.strip_prefix("--api-sock").map(str::to_owned))?;
        let value = if socket.is_empty() { words.next()? } else { socket.strip_prefix('=')? };
        value.strip_prefix("fd:")?.parse().ok().filter(|fd| *fd > 2)
    }
}

#[cfg(test)]
#[path = "args_tests.rs"]
mod tests;
