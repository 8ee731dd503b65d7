//! What makes this process a jailed one: descriptors, limits, namespaces, its root, and in the end no privileges.

use std::ffi::{CString, OsString, c_char};
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use landlock::{Access, AccessFs, BitFlags, PathBeneath, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus};
use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, openat};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree};
use rustix::process::{
    Pid, Resource, Rlimit, Signal, WaitOptions, chroot, fchdir, getpid, getsid, kill_process, pivot_root, setpgid,
    setrlimit, setsid, waitpid,
};
use rustix::thread::{CapabilitySet, CapabilitySets, CoreSchedulingScope, Gid, LinkNameSpaceType, Uid, UnshareFlags};

use crate::args::Arguments;
use crate::error::{Error, Failed};

/// Closes what was inherited besides the standard streams and `keep`. A standard stream that is not open becomes
/// `/dev/null`: its number must not come to mean something of ours.
///
/// # Errors
/// A descriptor to keep is not open, or the kernel is older than 5.9.
pub fn take_descriptors(mut keep: Vec<RawFd>) -> Result<(), Error> {
    for stream in 0..3 {
        // SAFETY: F_GETFD only asks; what is opened gets the lowest free number, which is this one.
        if unsafe {
            libc::fcntl(stream, libc::F_GETFD) < 0 && libc::open(c"/dev/null".as_ptr(), libc::O_RDWR) != stream
        } {
            return Err(Error::Refused(format!("standard stream {stream} is not open")));
        }
    }
    keep.sort_unstable();
    keep.dedup();
    let mut first = 3;
    for fd in keep {
        // SAFETY: F_SETFD only changes a flag; it fails for what is not open.
        if unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } < 0 {
            return Err(Error::Refused(format!("descriptor {fd} is not open")));
        }
        close_range(first, fd - 1)?;
        first = fd + 1;
    }
    close_range(first, RawFd::MAX)
}

fn close_range(first: RawFd, last: RawFd) -> Result<(), Error> {
    if first > last {
        return Ok(());
    }
    // SAFETY: nothing of this process owns a descriptor yet.
    match unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()).failed(|| "close inherited descriptors"),
    }
}

/// Opens the VMM, for nothing but its execution.
///
/// # Errors
/// It is not a regular file.
pub fn open_program(path: &Path) -> Result<OwnedFd, Error> {
    let program = openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .failed(|| format!("open {}", path.display()))?;
    let found = fstat(&program).failed(|| format!("look at {}", path.display()))?;
    if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile {
        return Err(Error::Refused(format!("--exec-file {} is not a regular file", path.display())));
    }
    Ok(program)
}

/// Sets the resource limits. There is no core dump: it would hold the guest's memory.
///
/// # Errors
/// A limit is above the one that holds already.
pub fn limit(arguments: &Arguments) -> Result<(), Error> {
    let mut limits = vec![(Resource::Core, 0, "core"), (Resource::Nofile, arguments.no_file, "no-file")];
    limits.extend(arguments.fsize.map(|bytes| (Resource::Fsize, bytes, "fsize")));
    for (resource, value, name) in limits {
        let limit = Rlimit { current: Some(value), maximum: Some(value) };
        setrlimit(resource, limit).failed(|| format!("limit {name} to {value}"))?;
    }
    Ok(())
}

/// Joins the network namespace at `path`, wherever that leads.
///
/// # Errors
/// It is none.
pub fn join_network(path: &Path) -> Result<(), Error> {
    let namespace = fs::File::open(path).failed(|| format!("open the network namespace {}", path.display()))?;
    rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
        .failed(|| format!("join the network namespace {}", path.display()))
}

/// Enters a user namespace, in which this process may do what a jail takes, to itself and to nothing else.
///
/// # Errors
/// The host does not allow it.
pub fn enter_user_namespace(uid: u32, gid: u32) -> Result<(), Error> {
    let (outer_uid, outer_gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    unshare(
        UnshareFlags::NEWUSER,
        "make a user namespace (kernel.unprivileged_userns_clone, or AppArmor, may forbid it)",
    )?;
    for (file, content) in [
        ("setgroups", "deny".to_owned()),
        ("uid_map", format!("{uid} {outer_uid} 1")),
        ("gid_map", format!("{gid} {outer_gid} 1")),
    ] {
        fs::write(format!("/proc/self/{file}"), content).failed(|| format!("write the user namespace's {file}"))?;
    }
    Ok(())
}

fn unshare(flags: UnshareFlags, what: &str) -> Result<(), Error> {
    // SAFETY: this process has one thread, and none of the flags touches memory or descriptors.
    unsafe { rustix::thread::unshare_unsafe(flags) }.failed(|| what)
}

/// Makes the jail's directory the root of the file system. With a mount namespace nothing else is left in it; without
/// one the rest is only out of reach.
///
/// # Errors
/// This takes CAP_SYS_ADMIN or CAP_SYS_CHROOT.
pub fn enter(root: &OwnedFd, mount_namespace: bool) -> Result<(), Error> {
    fchdir(root).failed(|| "enter the jail")?;
    if !mount_namespace {
        chroot(".").failed(|| "make the jail the root directory")?;
        return Ok(());
    }
    // The working directory goes along into the new namespace; descriptors would not.
    unshare(UnshareFlags::NEWNS, "make a mount namespace")?;
    // Whatever is mounted here stays here, and what the host mounts stays out.
    rustix::mount::mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)
        .failed(|| "make the mounts private")?;
    // The new root has to be a mount: a copy of the one it is on, which begins here and executes nothing. What the
    // launcher has mounted below comes along.
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(CWD, ".", flags).failed(|| "make a mount of the jail")?;
    restrict(&tree)?;
    move_mount(&tree, "", CWD, ".", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).failed(|| "mount the jail")?;
    fchdir(&tree).failed(|| "enter the jail's mount")?;
    // The old root comes to lie over the new one, and goes.
    pivot_root(".", ".").failed(|| "change the root")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).failed(|| "drop the old root")?;
    rustix::process::chdir("/").failed(|| "enter the new root")
}

/// On what is mounted nothing is executed, and no privileges are gained.
fn restrict(tree: &OwnedFd) -> Result<(), Error> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    let (fd, size) = (tree.as_raw_fd(), size_of_val(&attributes));
    let flags = libc::AT_EMPTY_PATH | libc::AT_RECURSIVE;
    // SAFETY: the path is an empty string, the structure is as long as `size` says, and both live for the call.
    match unsafe { libc::syscall(libc::SYS_mount_setattr, fd, c"".as_ptr(), flags, &attributes, size) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()).failed(|| "restrict the jail's mount"),
    }
}

/// Forks as it is asked for. Returns in the process that is to become the VMM, with the end of a pipe that it has to
/// report a failure to. Its parent waits for that report or for the VMM to be executed, and ends; above a daemon's parent
/// there is the process that was started, which ends as that one does. `born` is told the process id in the namespace that
/// this was started in, and if it fails there will be no VMM.
///
/// # Errors
/// There are no resources for another process, or `born` fails, or there is no VMM for any other reason.
pub fn fork(arguments: &Arguments, born: impl Fn(Pid) -> Result<(), Error>) -> Result<Option<OwnedFd>, Error> {
    if !arguments.daemonize && !arguments.new_pid_ns {
        born(getpid())?;
        return Ok(None);
    }
    // A launcher may have it ignored, and nobody would hear how a child ends.
    // SAFETY: there is no handler.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
    let leader = getsid(None).is_ok_and(|session| session == getpid());
    if arguments.daemonize {
        if let Some(child) = fork_once()? {
            std::process::exit(await_end(child)?);
        }
        // The VMM will not be the leader of this session: a daemon never gets a terminal again.
        setsid().failed(|| "begin a session")?;
    }
    if arguments.new_pid_ns {
        unshare(UnshareFlags::NEWPID, "make a PID namespace")?;
    }
    let ((reader, writer), (told, go)) = (pipe()?, pipe()?);
    if let Some(child) = fork_once()? {
        drop(writer);
        let known = born(child).and_then(|()| rustix::io::write(&go, &[0]).map(drop).failed(|| "let the VMM begin"));
        if known.is_err() {
            end(child);
        }
        known?;
        std::process::exit(await_execution(reader, child)?);
    }
    // A VMM that nobody knows of would be one that nobody ends.
    drop(go);
    if fs::File::from(told).read_exact(&mut [0]).is_err() {
        return Err(Error::Refused("the jailer ended before the VMM could begin".into()));
    }
    // When the leader of a session ends, all of the session get SIGHUP.
    if leader && !arguments.daemonize {
        setsid().failed(|| "begin a session")?;
    }
    Ok(Some(writer))
}

fn pipe() -> Result<(OwnedFd, OwnedFd), Error> {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).failed(|| "make a pipe")
}

/// The child's process id in the parent, `None` in the child.
fn fork_once() -> Result<Option<Pid>, Error> {
    // SAFETY: this process has one thread, so the child may do everything that the parent may.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()).failed(|| "fork"),
        child => Ok(Pid::from_raw(child)),
    }
}

/// Returns when the child is no more.
fn end(child: Pid) {
    let _ = kill_process(child, Signal::KILL);
    let _ = waitpid(Some(child), WaitOptions::empty());
}

/// The exit status of a child, which has said itself what was wrong.
fn await_end(child: Pid) -> Result<i32, Error> {
    let ended = waitpid(Some(child), WaitOptions::empty()).failed(|| "wait for a process of the jailer")?;
    let (exit, signal) = ended.map(|(_, ended)| (ended.exit_status(), ended.terminating_signal())).unwrap_or_default();
    exit.ok_or_else(|| Error::Refused(format!("signal {} ended a process of the jailer", signal.unwrap_or_default())))
}

/// Waits until the child is the VMM, or reports a failure, or ends without a word: each closes the pipe. Returns the exit
/// status that comes of it.
fn await_execution(reader: OwnedFd, child: Pid) -> Result<i32, Error> {
    let mut text = String::new();
    let _ = fs::File::from(reader).read_to_string(&mut text);
    if !text.is_empty() {
        return Err(Error::Refused(text));
    }
    // The group of a child that has executed something cannot be changed, dead or alive. Nor can that of one that leads a
    // session, as a child without --daemonize may: it is taken for the VMM.
    if setpgid(Some(child), None).is_ok() { await_end(child) } else { Ok(0) }
}

/// Tells the process that waits for the VMM why there is none.
pub fn report(writer: OwnedFd, error: &Error) {
    let _ = write!(fs::File::from(writer), "{error}");
}

/// Makes the standard streams `/dev/null`, opened while there was one.
///
/// # Errors
/// None is known.
pub fn silence(null: &OwnedFd) -> Result<(), Error> {
    rustix::stdio::dup2_stdin(null)
        .and_then(|()| rustix::stdio::dup2_stdout(null))
        .and_then(|()| rustix::stdio::dup2_stderr(null))
        .failed(|| "close the standard streams")
}

/// Asks that no other tenant runs on the other thread of a core meanwhile.
///
/// # Errors
/// The kernel has no memory for it. Where a core has one thread, or the kernel no core scheduling, there is nothing to ask
/// for, and that is none.
pub fn isolate_core() -> Result<(), Error> {
    match rustix::thread::create_core_scheduling_cookie(getpid(), CoreSchedulingScope::ThreadGroup) {
        Ok(()) | Err(Errno::NODEV | Errno::INVAL) => Ok(()),
        error => error.failed(|| "have the core to itself (core scheduling)"),
    }
}

/// Becomes the VMM's user and group, without any capability, for good.
///
/// # Errors
/// This takes CAP_SETUID, CAP_SETGID and CAP_SETPCAP, or a user namespace.
pub fn drop_privileges(arguments: &Arguments) -> Result<(), Error> {
    // Another user's process would no longer end with its launcher, if that is what the launcher wants.
    let end_with_launcher =
        rustix::process::parent_process_death_signal().failed(|| "ask for the launcher's signal")?;
    let drop = |capability: libc::c_ulong| {
        // SAFETY: the call takes numbers only.
        unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) }
    };
    // It ends with the first capability that the kernel does not know.
    let unknown = (0..64).find(|capability| drop(*capability) != 0);
    let error = io::Error::last_os_error();
    if unknown.is_some() && error.raw_os_error() != Some(libc::EINVAL) {
        return Err(error).failed(|| "drop the capabilities that programs could gain");
    }
    // In a user namespace that an ordinary user made, nobody can change groups: the launcher's stay.
    if !arguments.rootless {
        rustix::thread::set_thread_groups(&[]).failed(|| "drop the groups")?;
        let gid = Gid::from_raw(arguments.gid);
        rustix::thread::set_thread_res_gid(gid, gid, gid).failed(|| "change the group")?;
        let uid = Uid::from_raw(arguments.uid);
        rustix::thread::set_thread_res_uid(uid, uid, uid).failed(|| "change the user")?;
    }
    let none = CapabilitySet::empty();
    rustix::thread::set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
        .failed(|| "drop the capabilities")?;
    rustix::thread::clear_ambient_capability_set().failed(|| "drop the ambient capabilities")?;
    if end_with_launcher.is_some() {
        rustix::process::set_parent_process_death_signal(end_with_launcher).failed(|| "keep the launcher's signal")?;
    }
    rustix::thread::set_no_new_privs(true).failed(|| "give up new privileges")
}

/// Leaves nothing of the file system but the jail, the execution of `program`, and reading what is below `own`. Without
/// a mount namespace this is what keeps a process that got out of its root directory from finding anything.
///
/// # Errors
/// The kernel has no Landlock, which can be done without only where there is a mount namespace.
pub fn confine(program: &OwnedFd, own: Option<&OwnedFd>, mount_namespace: bool) -> Result<(), Error> {
    // With a mount namespace it is another directory than the one that was made: the root of another mount.
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = openat(CWD, "/", flags, Mode::empty()).failed(|| "open the new root")?;
    let layer = || {
        let all = AccessFs::from_all(landlock::ABI::V9);
        let never = AccessFs::Execute | AccessFs::MakeChar | AccessFs::MakeBlock | AccessFs::MakeSym;
        let execute: BitFlags<_> = AccessFs::Execute | AccessFs::ReadFile;
        let mut layer = Ruleset::default()
            .handle_access(all)?
            .create()?
            .add_rule(PathBeneath::new(&root, all & !never))?
            .add_rule(PathBeneath::new(program, execute))?;
        if let Some(own) = own {
            layer = layer.add_rule(PathBeneath::new(own, AccessFs::ReadFile))?;
        }
        layer.restrict_self()
    };
    let status = layer().map_err(|error| Error::Refused(format!("Landlock refuses the jail: {error}")))?;
    if status.ruleset == RulesetStatus::NotEnforced && !mount_namespace {
        return Err(Error::Refused("--no-mount-ns needs Landlock, which this host's kernel does not have".into()));
    }
    Ok(())
}

/// Becomes the VMM, with these arguments and an empty environment. Returns only if that fails.
pub fn execute(program: &OwnedFd, arguments: Vec<OsString>) -> Error {
    let strings: Result<Vec<CString>, _> =
        arguments.into_iter().map(|argument| CString::new(argument.into_vec())).collect();
    let Ok(strings) = strings else { return Error::Refused("an argument of the VMM holds a NUL".into()) };
    let mut pointers: Vec<*const c_char> = strings.iter().map(|string| string.as_ptr()).collect();
    pointers.push(std::ptr::null());
    let environment: [*const c_char; 1] = [std::ptr::null()];
    // SAFETY: both lists end with a null pointer, and all strings live until the call has failed.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            program.as_raw_fd(),
            c"".as_ptr(),
            pointers.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    Error::System { what: "execute the VMM".into(), source: io::Error::last_os_error() }
}
