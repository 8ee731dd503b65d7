//! The VMM process: parse, log, threads.

#![no_main]

use std::ffi::{CStr, OsStr, c_char, c_int};
use std::fmt::Display;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::exit;
use std::thread::JoinHandle;

use vesicle::api::routes::config_commands;
use vesicle::api::server::{self, Limits};
use vesicle::cli::{self, ApiSocket, Cli, Options};
use vesicle::config::{LoggerConfig, MetricsConfig};
use vesicle::control::{self, Command, CommandSender, Reply, Subscription};
use vesicle::devices::boot_timer::{self, BootTimer};
use vesicle::log;
use vesicle::machine::lifecycle::{Ending, Vmm};
use vesicle::machine::{Host, chain, restore_terminal};
use vesicle::metrics::METRICS;
use vesicle::sandbox::landlock::Grants;
use vesicle::sandbox::seccomp::ThreadKind;
use vesicle::sandbox::{self, Confining, Sandbox};
use vesicle::signals::{Termination, install_fatal_handlers};
use vesicle::snapshot::format;
use vesicle::socket::{self, Existing, SocketFile};

/// Exit statuses (SPEC.md, "Exit status").
const FAILURE: i32 = 1;
const BAD_CONFIGURATION: i32 = 152;
const BAD_ARGUMENTS: i32 = 153;

/// Lifecycle events a slow reader of GET /events may lag behind.
const EVENT_BACKLOG: usize = 16;

/// The C entry point instead of Rust's: what the latter sets up before `main`, and again for every
/// thread (stack overflow handlers, the bounds of the stack read from /proc), costs a tenth of the
/// time to the first answer, and the handlers in [`vesicle::signals`] replace it.
///
/// It is called by libc, once, with the arguments: not every libc lets the standard library know them.
#[unsafe(no_mangle)]
extern "C" fn main(count: c_int, arguments: *const *const c_char) -> c_int {
    let argument = |index| {
        // SAFETY: libc passes `count` strings, which nobody changes.
        let argument: &'static CStr = unsafe { CStr::from_ptr(*arguments.add(index)) };
        OsStr::from_bytes(argument.to_bytes())
    };
    run((1..usize::try_from(count).unwrap_or_default()).map(argument))
}

fn run(arguments: impl Iterator<Item = &'static OsStr>) -> c_int {
    // Before any thread: they inherit the signal mask. And before anything is written: the reader may be gone.
    install_fatal_handlers(restore_terminal);
    let options = match cli::parse(arguments) {
        Ok(Cli::Run(options)) => *options,
        Ok(Cli::Print(text)) => return print(&text),
        Ok(Cli::DescribeSnapshot(path)) => match format::version_of(&path) {
            Ok(version) => return print(&cli::snapshot_version(version)),
            Err(error) => fail(FAILURE, format!("--describe-snapshot {path:?}: {}", chain(&error))),
        },
        Err(error) => fail(BAD_ARGUMENTS, error),
    };
    // Before anything is opened here: a number that nobody passed in must not come to mean something of ours.
    let passed: Vec<OwnedFd> = options.passed_fds.iter().map(|fd| take_over("pass-fd", *fd)).collect();
    let kvm = options.kvm_fd.map(|fd| take_over("kvm-fd", fd));
    let proc = options.proc_fd.map(|fd| take_over("proc-fd", fd));
    // One heap for all threads: each further one would cost address space, page faults and memory,
    // and no thread here allocates where it is in a hurry.
    // SAFETY: called before there are threads; it changes no memory that is in use.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1)
    };
    log::init(&options.id);
    let sandbox =
        confine(&options, proc.as_ref().map(AsFd::as_fd)).unwrap_or_else(|error| fail(FAILURE, chain(&error)));
    let api_socket = match &options.api_sock {
        Some(ApiSocket::Path(path)) => Some(path.clone()),
        _ => None,
    };
    let prepared = prepare(&options, Host { kvm, proc, passed, api_socket, sandbox: sandbox.clone() });
    let (mut vmm, sender, events) = prepared.unwrap_or_else(|error| fail(FAILURE, chain(error.as_ref())));
    configure(&mut vmm, &options);
    if let Some(path) = &options.prepare
        && let Err(refusal) = vmm.prepare(path, options.working_set_path.as_deref())
    {
        fail(BAD_CONFIGURATION, format!("--prepare: {refusal}"));
    }
    let mut confining = Confining::default();
    let confined = confining.thread();
    let api = options.api_sock.as_ref().map(|socket| serve(socket, &options, sender, events, sandbox, confined));
    // What it takes to serve cannot be done any more once the machine runs.
    if options.config_file.is_some() {
        // A start that a client asks for comes from a thread that is confined; this one need not.
        confining.wait();
        if let Err(refusal) = vmm.execute(Command::Start) {
            vmm.remove_sockets();
            drop(api);
            fail(BAD_CONFIGURATION, refusal);
        }
    }
    let Ending { status, .. } = vmm.run();
    if let Some((thread, socket_file)) = api {
        // The thread ends once the last event is out. The machine is left to the kernel to take
        // down: its threads may still be in the guest.
        let _ = thread.join();
        drop(socket_file);
    }
    exit(status.into())
}

/// Gives up what no part of the process will need. Before any thread: they inherit it.
fn confine(options: &Options, proc: Option<BorrowedFd<'_>>) -> Result<Sandbox, sandbox::Error> {
    let sandbox = Sandbox::new(&options.sandbox)?;
    let mut needed = Grants::default();
    if let Some(ApiSocket::Path(path)) = &options.api_sock {
        needed.siblings(path, true);
    }
    let Options { config_file, metadata, prepare, working_set_path, .. } = options;
    for file in [config_file, metadata, prepare, working_set_path].into_iter().flatten() {
        needed.read(file);
    }
    for file in [&options.logger.log_path, &options.metrics_path].into_iter().flatten() {
        needed.siblings(file, true);
    }
    sandbox.confine_process(&needed, proc)?;
    ::log::info!("Confined: {sandbox}.");
    Ok(sandbox)
}

/// Owns a descriptor that was passed in.
fn take_over(flag: &str, fd: RawFd) -> OwnedFd {
    // SAFETY: F_GETFD only asks whether there is such a descriptor.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        fail(BAD_ARGUMENTS, format!("--{flag} {fd}: there is no such descriptor"));
    }
    // SAFETY: it is open, was there before this process opened anything, and is named once.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

type Prepared = (Vmm, CommandSender, Subscription);

fn prepare(options: &Options, host: Host) -> Result<Prepared, Box<dyn std::error::Error>> {
    let termination = Termination::new()?;
    let (sender, receiver) = control::channel()?;
    let (subscribers, events) = control::events(EVENT_BACKLOG);
    let boot_timer = options.boot_timer.then(BootTimer::default);
    let mmds_limit = options.mmds_limit.unwrap_or(options.max_payload);
    let vmm = Vmm::new(options.id.clone(), boot_timer, mmds_limit, receiver, subscribers, termination, host)?;
    Ok((vmm, sender, events))
}

/// What the command line and the configuration file say, as the API would say it; the start is not part of it.
fn configure(vmm: &mut Vmm, options: &Options) {
    let mut execute = |command| {
        if let Err(refusal) | Ok(Reply::DoesNotFit(refusal)) = vmm.execute(command) {
            vmm.remove_sockets();
            fail(BAD_CONFIGURATION, refusal)
        }
    };
    // First, so that the log has the reason if the rest fails.
    if options.logger != LoggerConfig::default() {
        execute(Command::SetLogger(options.logger.clone()));
    }
    if let Some(metrics_path) = options.metrics_path.clone() {
        execute(Command::SetMetrics(MetricsConfig { metrics_path, emit_id: false, properties: Vec::new() }));
    }
    if let Some(path) = &options.metadata {
        execute(metadata(path));
    }
    if let Some(path) = &options.config_file {
        config_file(path).into_iter().for_each(execute);
    }
}

/// Cold, since inlined it would take two pages of stack and four of code from every start.
#[cold]
fn config_file(path: &Path) -> Vec<Command> {
    let json = std::fs::read(path)
        .unwrap_or_else(|error| fail(BAD_CONFIGURATION, format!("--config-file {path:?} cannot be read: {error}")));
    config_commands(&json).unwrap_or_else(|error| fail(BAD_CONFIGURATION, format!("--config-file {path:?}: {error}")))
}

/// Cold, for the same reason.
#[cold]
fn metadata(path: &Path) -> Command {
    let read = || Ok::<_, Box<dyn std::error::Error>>(serde_json::from_slice(&std::fs::read(path)?)?);
    Command::PutMetadata(
        read().unwrap_or_else(|error| fail(BAD_CONFIGURATION, format!("--metadata {path:?}: {error}"))),
    )
}

fn serve(
    socket: &ApiSocket,
    options: &Options,
    sender: CommandSender,
    events: Subscription,
    sandbox: Sandbox,
    confined: impl Send + 'static,
) -> (JoinHandle<()>, Option<SocketFile>) {
    let (listener, file): (UnixListener, _) = match socket {
        ApiSocket::Path(path) => match socket::bind(path, Existing::Replaced) {
            Ok((listener, file)) => (listener, Some(file)),
            Err(error) => fail(FAILURE, chain(&error)),
        },
        // SAFETY: the number came from the command line and this is the only place that uses it.
        ApiSocket::Descriptor(fd) => match unsafe { socket::adopt(*fd) } {
            Ok(listener) => (listener, None),
            Err(error) => fail(BAD_ARGUMENTS, chain(&error)),
        },
    };
    let limits = Limits { max_payload: options.max_payload, ..Limits::default() };
    let confine = move || {
        if let Err(error) = sandbox.confine_thread(ThreadKind::Api) {
            fail(FAILURE, chain(&error));
        }
        drop(confined);
    };
    match server::spawn(listener, limits, sender, events, confine) {
        Ok(thread) => {
            record_startup(options);
            (thread, file)
        }
        Err(error) => fail(FAILURE, format!("cannot start the API thread: {error}")),
    }
}

/// How long it took from the launcher's decision to here, if the launcher said when that was.
fn record_startup(options: &Options) {
    if let Some(start) = options.start_time_us {
        METRICS.api_server.process_startup_time_us.set(boot_timer::monotonic_us().saturating_sub(start));
    }
    if let Some(start) = options.start_time_cpu_us {
        let cpu = boot_timer::process_cpu_time().as_micros() as u64;
        let parent = options.parent_cpu_time_us.unwrap_or(0);
        METRICS.api_server.process_startup_time_cpu_us.set(cpu.saturating_sub(start).saturating_add(parent));
    }
}

fn fail(status: i32, error: impl Display) -> ! {
    restore_terminal();
    // Whoever read it may be gone, and the status is all that is left to tell.
    let _ = writeln!(io::stderr(), "vesicle: {error}");
    if log::has_file() {
        ::log::error!("{error}");
    }
    exit(status);
}

/// Prints what was asked for; the exit status.
fn print(text: &str) -> c_int {
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => 0,
        Err(_) => FAILURE,
    }
}
