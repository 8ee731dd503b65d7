//! Signals: the ones that ask the process to end become events, the ones that mean it cannot go on
//! become documented exit statuses, and so do panics.

use std::ffi::c_int;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::log;
use crate::metrics::METRICS;
use crate::os::checked;
use crate::sandbox::syscalls;

/// Exit status and words per fatal signal (SPEC.md, "Exit status"); [`refused`] finds those of SIGSYS.
const FATAL: [(c_int, u8, &str); 8] = [
    (libc::SIGSYS, 148, ""),
    (libc::SIGBUS, 149, "SIGBUS: a mapped file was truncated or memory failed\n"),
    (libc::SIGSEGV, 150, "SIGSEGV: invalid memory access\n"),
    (libc::SIGXFSZ, 151, "SIGXFSZ: a file would exceed the size limit\n"),
    (libc::SIGXCPU, 154, "SIGXCPU: the CPU time limit is used up\n"),
    (libc::SIGPIPE, 155, "SIGPIPE sent by another process\n"),
    (libc::SIGHUP, 156, "SIGHUP: the terminal is gone\n"),
    (libc::SIGILL, 157, "SIGILL: invalid instruction\n"),
];

/// Exit status after a panic and where memory cannot be had, as a shell reports what abort(3) ends.
const ABORTED: c_int = 134;

/// Gives the fatal signals and panics their handlers. `at_exit` must be async-signal-safe.
pub fn install_fatal_handlers(at_exit: fn()) {
    std::panic::set_hook(Box::new(|panic| {
        METRICS.vmm.panic_count.inc();
        log::last_words(format_args!("{panic}"));
        leave(ABORTED);
    }));
    // SAFETY: written once, before there are threads or handlers.
    unsafe { AT_EXIT = Some(at_exit) };
    for (signal, _, _) in FATAL {
        // SAFETY: all-zero is a valid `sigaction`; the handler is async-signal-safe.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = end as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
            let mut inherited: libc::sigaction = std::mem::zeroed();
            libc::sigaction(signal, &action, &mut inherited);
            // Started under nohup: keep to it.
            if signal == libc::SIGHUP && inherited.sa_sigaction == libc::SIG_IGN {
                libc::sigaction(signal, &inherited, std::ptr::null_mut());
            }
        }
    }
}

static mut AT_EXIT: Option<fn()> = None;

/// Ends the process. Async-signal-safe.
fn leave(status: c_int) -> ! {
    // SAFETY: `_exit` is async-signal-safe, and so is `AT_EXIT` by contract, which nothing writes any more.
    unsafe {
        if let Some(at_exit) = AT_EXIT {
            at_exit();
        }
        libc::_exit(status);
    }
}

/// abort(3), in the place of libc's, which sends this thread a signal: that no filter allows. The standard library, which
/// calls it where memory cannot be had and where a panic ends in another, has said so on standard error.
#[cfg(target_env = "musl")]
#[unsafe(no_mangle)]
extern "C" fn abort() -> ! {
    if log::has_file() {
        log::write_in_handler(b"aborted: standard error has the reason\n");
    }
    leave(ABORTED);
}

extern "C" fn end(signal: c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid `siginfo_t`; its pid is set for SIGPIPE.
    if signal == libc::SIGPIPE && unsafe { (*info).si_pid() == libc::getpid() } {
        // Our own write to a peer that went away: the writer gets EPIPE and deals with it.
        return;
    }
    let Some((_, status, text)) = FATAL.iter().find(|(fatal, _, _)| *fatal == signal) else { return };
    if signal == libc::SIGSYS {
        // SAFETY: the kernel passes a valid `siginfo_t` of this signal, and the registers it interrupted.
        unsafe { refused(&*info, &*context.cast()) };
    } else {
        log::write_in_handler(text.as_bytes());
    }
    leave((*status).into());
}

/// Says which system call a filter refused, and its second argument, which is what tells one ioctl from another: one
/// line, put together without allocation or locks.
fn refused(info: &libc::siginfo_t, context: &libc::ucontext_t) {
    // `si_syscall` of asm-generic/siginfo.h: after three integers, padding and the address of the call.
    const SYSCALL: usize = 24;
    const _: () = assert!(size_of::<libc::siginfo_t>() >= SYSCALL + size_of::<c_int>());
    // SAFETY: the field lies within the structure, as just asserted, is aligned, and any bits are an integer.
    let number = unsafe { std::ptr::from_ref(info).byte_add(SYSCALL).cast::<c_int>().read() };
    let name = syscalls::name(number.into()).unwrap_or("unknown");
    let argument = context.uc_mcontext.gregs[libc::REG_RSI as usize];
    let mut line = [0; 160];
    let mut rest = &mut line[..];
    // It is longer than the longest name needs.
    let _ = writeln!(
        rest,
        "SIGSYS: the filter of this thread refuses the system call {name} ({number}, {argument:#x}); the process ends"
    );
    let left = rest.len();
    log::write_in_handler(&line[..line.len() - left]);
}

/// SIGTERM and SIGINT as a descriptor. Call before any thread starts: threads inherit the mask.
#[derive(Debug)]
pub struct Termination(OwnedFd);

impl Termination {
    /// Blocks both signals and makes them readable.
    pub fn new() -> io::Result<Self> {
        // SAFETY: `set` is initialised by `sigemptyset`; the descriptor is checked and then owned.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            libc::sigaddset(&mut set, libc::SIGTERM);
            libc::sigaddset(&mut set, libc::SIGINT);
            libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
            let fd = libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            checked(fd)?;
            Ok(Self(OwnedFd::from_raw_fd(fd)))
        }
    }
}

impl AsRawFd for Termination {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::alloc::{Layout, handle_alloc_error};
    use std::fmt;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use crate::sandbox::seccomp::{Filters, ThreadKind};

    use super::*;

    /// A text that dies while it is written.
    struct Fatal(fn());

    impl fmt::Display for Fatal {
        fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
            (self.0)();
            Ok(())
        }
    }

    /// A name, how a thread dies, a part of what is said of that, and the exit status.
    type Death = (&'static str, fn(), &'static str, i32);

    const DEATHS: [Death; 5] = [
        ("panic", || panic!("a mistake"), "a mistake", 134),
        ("memory", || handle_alloc_error(Layout::new::<[u8; 12345]>()), "12345 bytes", 134),
        ("access", invalid_access, "SIGSEGV", 150),
        // These hold the log's lock: who wanted to take it would wait for ever.
        ("panic in a line", || ::log::error!("{}", Fatal(|| panic!("a mistake"))), "a mistake", 134),
        ("access in a line", || ::log::error!("{}", Fatal(invalid_access)), "SIGSEGV", 150),
    ];

    fn invalid_access() {
        // SAFETY: it is meant to fail: nothing is ever mapped in the first page, and the process ends.
        unsafe { std::ptr::without_provenance::<u8>(8).read_volatile() };
    }

    #[test]
    #[ignore = "ends its process: a_thread_that_dies_says_so_and_ends_the_process runs it in one of its own"]
    fn a_thread_that_dies() {
        log::init("vm");
        install_fatal_handlers(|| {});
        let asked = |variable: &str, name: &str| std::env::var(variable).as_deref() == Ok(name);
        let kind = ThreadKind::ALL.into_iter().find(|kind| asked("THREAD", kind.name())).unwrap();
        let (_, die, ..) = DEATHS.into_iter().find(|(death, ..)| asked("DEATH", death)).unwrap();
        Filters::BuiltIn.install(kind).unwrap();
        die();
    }

    #[test]
    fn a_thread_that_dies_says_so_and_ends_the_process_under_every_filter() {
        for (kind, (death, _, words, code)) in
            ThreadKind::ALL.into_iter().flat_map(|kind| DEATHS.map(|death| (kind, death)))
        {
            let mut command = Command::new(std::env::current_exe().unwrap());
            command.args(["--ignored", "--exact", "signals::tests::a_thread_that_dies"]);
            // For the trace of a failed allocation the standard library asks for the working directory.
            command.envs([("THREAD", kind.name()), ("DEATH", death)]).env_remove("RUST_BACKTRACE");
            let output = command.output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!((output.status.code(), output.status.signal()), (Some(code), None), "{kind:?}, {death}: {said}");
            assert!(said.contains(words), "{kind:?}, {death}: {said}");
        }
    }
}
