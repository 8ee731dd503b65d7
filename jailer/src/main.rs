//! Puts a VMM into a jail and becomes it.
//!
//! A jail is a user of its own without capabilities, a root directory with nothing in it but what the launcher put
//! there, limits, a cgroup, namespaces as asked for, and a Landlock layer. `SECURITY.md` says what each of them stops.
//! The steps are in [`run`], in the order that they depend on each other. Everything is done by descriptor: nothing that
//! lies in the jail's directory leads out of it ([`directory`]).

#![cfg_attr(not(test), no_main)]

mod args;
mod cgroup;
mod directory;
mod error;
mod process;

use std::convert::Infallible;
use std::ffi::{CStr, OsStr, OsString, c_char, c_int};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::process::{getegid, geteuid};

use args::{Arguments, Request};
use directory::Directory;
use error::{Error, Failed};

/// Exit statuses.
const FAILURE: c_int = 1;
const BAD_ARGUMENTS: c_int = 153;

/// The C entry point: what Rust's own sets up before it (the bounds of the stack read from /proc, handlers for its
/// overflow) would be a tenth of what a jail costs. Not every libc lets the standard library know the arguments.
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn main(count: c_int, arguments: *const *const c_char) -> c_int {
    let started = Started::now();
    let argument = |index| {
        // SAFETY: libc passes `count` strings, which nobody changes.
        let argument: &'static CStr = unsafe { CStr::from_ptr(*arguments.add(index)) };
        OsStr::from_bytes(argument.to_bytes()).to_owned()
    };
    let arguments = (1..usize::try_from(count).unwrap_or_default()).map(argument);
    let (error, status) = match args::parse(arguments, geteuid().as_raw(), getegid().as_raw()) {
        Ok(Request::Print(text)) => {
            print!("{text}");
            return 0;
        }
        Ok(Request::Jail(arguments)) => {
            let Err(error) = run(*arguments, started);
            (error.to_string(), FAILURE)
        }
        Err(what) => (what, BAD_ARGUMENTS),
    };
    eprintln!("vesicle-jailer: {error}");
    status
}

/// Clocks at the start, for the VMM's figures.
#[derive(Debug, Clone, Copy)]
struct Started {
    monotonic: Duration,
    /// Processor time of this process then.
    cpu: Duration,
    /// Processor time of the processes before this one.
    before: Duration,
}

impl Started {
    fn now() -> Self {
        Self {
            monotonic: clock(libc::CLOCK_MONOTONIC),
            cpu: clock(libc::CLOCK_PROCESS_CPUTIME_ID),
            before: Duration::ZERO,
        }
    }

    /// The same in a child, whose processor time begins anew.
    fn in_child(self, parent: Duration) -> Self {
        Self { cpu: Duration::ZERO, before: parent.saturating_sub(self.cpu), ..self }
    }
}

fn clock(id: libc::clockid_t) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: it writes one timespec. Both clocks exist on every Linux; one that did not would leave zero.
    unsafe { libc::clock_gettime(id, &raw mut time) };
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// The steps. Does not return if the VMM runs.
fn run(mut arguments: Arguments, started: Started) -> Result<Infallible, Error> {
    process::take_descriptors(arguments.descriptors())?;
    let program = process::open_program(&arguments.exec_file)?;
    // What is the host's comes first, while it can be reached.
    let null = arguments.daemonize.then(|| open("/dev/null", OFlags::CLOEXEC)).transpose()?;
    // Nobody can make its device node in a user namespace.
    let kvm =
        (arguments.rootless && arguments.kvm_fd.is_none()).then(|| open("/dev/kvm", OFlags::empty())).transpose()?;
    arguments.kvm_fd = arguments.kvm_fd.or(kvm.as_ref().map(AsRawFd::as_raw_fd));
    process::limit(&arguments)?;
    cgroup::join(&arguments)?;
    if arguments.rootless {
        process::enter_user_namespace(arguments.uid, arguments.gid)?;
    }
    if let Some(path) = &arguments.netns {
        process::join_network(path)?;
    }
    let directory = Directory::create(&arguments)?;
    directory.furnish(!arguments.rootless, arguments.kvm_fd.is_none())?;

    let before = clock(libc::CLOCK_PROCESS_CPUTIME_ID);
    let to_parent = process::fork(&arguments, |pid| directory.write_pid(&arguments.exec_name, pid))?;
    let started = if to_parent.is_some() { started.in_child(before) } else { started };
    let error = become_vmm(&arguments, &program, &directory, null.as_ref(), started);
    let Some(to_parent) = to_parent else { return Err(error) };
    process::report(to_parent, &error);
    std::process::exit(FAILURE);
}

/// The steps of the process that becomes the VMM. Returns only if something fails.
fn become_vmm(
    arguments: &Arguments,
    program: &OwnedFd,
    directory: &Directory,
    null: Option<&OwnedFd>,
    started: Started,
) -> Error {
    // The VMM reads which of its pages were touched, in a jail without /proc. Where the host has none, it goes without.
    let own = openat(CWD, "/proc/self", OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).ok();
    let jailed = || {
        process::enter(directory.fd(), arguments.mount_ns)?;
        if let Some(null) = null {
            process::silence(null)?;
        }
        process::isolate_core()?;
        process::drop_privileges(arguments)?;
        process::confine(program, own.as_ref(), arguments.mount_ns)
    };
    match jailed() {
        Ok(()) => process::execute(program, vmm_arguments(arguments, own.as_ref(), started)),
        Err(error) => error,
    }
}

fn open(path: &str, flags: OFlags) -> Result<OwnedFd, Error> {
    openat(CWD, path, OFlags::RDWR | flags, Mode::empty()).failed(|| format!("open {path}"))
}

/// The VMM's command line: what a jailer tells it, then what the launcher does.
fn vmm_arguments(arguments: &Arguments, proc: Option<&OwnedFd>, started: Started) -> Vec<OsString> {
    let us = |time: Duration| time.as_micros();
    let own = [
        arguments.exec_name.clone(),
        format!("--id={}", arguments.id),
        format!("--start-time-us={}", us(started.monotonic)),
        format!("--start-time-cpu-us={}", us(started.cpu)),
        format!("--parent-cpu-time-us={}", us(started.before)),
    ];
    let proc = proc.map(|proc| format!("--proc-fd={}", proc.as_raw_fd()));
    let own = own.into_iter().chain(arguments.descriptor_flags()).chain(proc).map(OsString::from);
    own.chain(arguments.rest.iter().cloned()).collect()
}
