//! Plays an attacker who has taken over a thread of the VMM: it confines itself as that thread would, with the same
//! code, and then tries what such an attacker would. The integration tests run it, in a jail and without.
//!
//! `attacker --thread api|vmm|vcpu|memory --layers none|seccomp|landlock --outside DIR --neighbour PID`
//!
//! It prints a line per attempt: its name, a tab, and `done`, `refused` or `trapped` (by the system-call filter).

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::ffi::{CString, c_int, c_long, c_void};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use vesicle::config::{LandlockConfig, SandboxConfig, SeccompConfig};
use vesicle::sandbox::Sandbox;
use vesicle::sandbox::landlock::Grants;
use vesicle::sandbox::seccomp::ThreadKind;

/// The last system call was trapped by the filter.
static TRAPPED: AtomicBool = AtomicBool::new(false);

/// Instead of ending the process, as in the VMM: the call fails, and the next one is tried.
fn survive_traps() {
    extern "C" fn trapped(_: c_int, _: *mut libc::siginfo_t, context: *mut c_void) {
        TRAPPED.store(true, Ordering::SeqCst);
        // SAFETY: the kernel passes a valid context, which is restored when the handler returns.
        unsafe {
            (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_RAX as usize] = -i64::from(libc::ENOSYS)
        };
    }
    // SAFETY: all-zero is a valid `sigaction`; the handler is async-signal-safe.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = trapped as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        assert_eq!(libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut()), 0);
    }
}

/// Where to attack.
struct Target {
    /// A directory that belongs to somebody else.
    outside: PathBuf,
    /// A process that is somebody else's.
    neighbour: c_long,
}

impl Target {
    fn path(&self, name: &str) -> CString {
        CString::new(self.outside.join(name).to_str().unwrap()).unwrap()
    }
}

/// An attempt, and the errors that only come after the permission was checked.
type Attempt = (&'static str, fn(&Target) -> c_long, &'static [c_int]);

/// A raw system call; what it takes is up to the kernel to refuse.
macro_rules! call {
    ($number:expr $(, $argument:expr)*) => {
        // SAFETY: every pointer among the arguments is valid for the call, or null, which the kernel checks.
        unsafe { libc::syscall($number $(, ($argument) as c_long)*) }
    };
}

fn unix_address(name: &[u8]) -> (libc::sockaddr_un, u32) {
    // SAFETY: all-zero is a valid address.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as u16;
    for (to, from) in address.sun_path.iter_mut().zip(name) {
        *to = *from as i8;
    }
    (address, 2 + name.len() as u32)
}

fn connect_unix(name: &[u8]) -> c_long {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    let socket = call!(libc::SYS_socket, libc::AF_UNIX, kind, 0);
    if socket < 0 {
        return socket;
    }
    let (address, length) = unix_address(name);
    call!(libc::SYS_connect, socket, &raw const address, length)
}

/// By the system call that libc opens files with, which is the one that a filter may allow.
fn open(path: &CString, flags: c_int) -> c_long {
    // SAFETY: the path is a string.
    c_long::from(unsafe { libc::open(path.as_ptr(), flags | libc::O_CLOEXEC, 0o600) })
}

const ATTEMPTS: &[Attempt] = &[
    ("read another tenant's file", |t| open(&t.path("secret"), libc::O_RDONLY), &[]),
    ("write another tenant's file", |t| open(&t.path("secret"), libc::O_WRONLY), &[]),
    ("make a file in another tenant's directory", |t| open(&t.path("new"), libc::O_CREAT | libc::O_WRONLY), &[]),
    ("remove another tenant's file", |t| call!(libc::SYS_unlink, t.path("victim").as_ptr()), &[]),
    ("list the root directory", |_| open(&c"/".to_owned(), libc::O_RDONLY | libc::O_DIRECTORY), &[]),
    ("read a process's environment in /proc", |_| open(&c"/proc/1/environ".to_owned(), libc::O_RDONLY), &[]),
    (
        "execute a program",
        |t| call!(libc::SYS_execve, t.path("program").as_ptr(), std::ptr::null::<c_void>(), std::ptr::null::<c_void>()),
        &[libc::ENOEXEC],
    ),
    ("connect to another tenant's socket", |t| connect_unix(t.path("socket").as_bytes()), &[]),
    ("connect to an abstract socket", |t| connect_unix(format!("\0vesicle-{}", t.neighbour).as_bytes()), &[]),
    (
        "connect over TCP",
        |_| {
            let socket = call!(libc::SYS_socket, libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
            if socket < 0 {
                return socket;
            }
            // 127.0.0.1, port 1.
            let address: [u8; 16] = [2, 0, 0, 1, 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];
            call!(libc::SYS_connect, socket, address.as_ptr(), 16)
        },
        &[libc::ECONNREFUSED, libc::ENETUNREACH],
    ),
    ("open a UDP socket", |_| call!(libc::SYS_socket, libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0), &[]),
    ("open a netlink socket", |_| call!(libc::SYS_socket, libc::AF_NETLINK, libc::SOCK_RAW, 0), &[]),
    ("signal another process", |t| call!(libc::SYS_kill, t.neighbour, 0), &[]),
    // The neighbour ignores both, of which the second is what calls a vCPU out of the guest.
    ("abort another process", |t| call!(libc::SYS_tkill, t.neighbour, libc::SIGABRT), &[]),
    ("kick another process", |t| call!(libc::SYS_tgkill, t.neighbour, t.neighbour, 36), &[]),
    ("trace another process", |t| call!(libc::SYS_ptrace, libc::PTRACE_SEIZE, t.neighbour, 0, 0), &[]),
    (
        "read another process's memory",
        |t| {
            let mut byte = 0_u8;
            let local = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
            let remote = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 1 };
            call!(libc::SYS_process_vm_readv, t.neighbour, &raw const local, 1, &raw const remote, 1, 0)
        },
        &[libc::EFAULT],
    ),
    (
        "take another process's descriptor",
        |t| {
            let process = call!(libc::SYS_pidfd_open, t.neighbour, 0);
            if process < 0 { process } else { call!(libc::SYS_pidfd_getfd, process, 0, 0) }
        },
        &[libc::EBADF],
    ),
    ("start a process", |_| call!(libc::SYS_clone, libc::CLONE_THREAD, 0, 0, 0, 0), &[libc::EINVAL]),
    ("make a user namespace", |_| call!(libc::SYS_unshare, libc::CLONE_NEWUSER), &[libc::EINVAL]),
    ("make a mount namespace", |_| call!(libc::SYS_unshare, libc::CLONE_NEWNS), &[]),
    (
        "mount a file system",
        |_| {
            let (kind, at) = (c"tmpfs".as_ptr(), c"/nowhere".as_ptr());
            call!(libc::SYS_mount, kind, at, kind, 0, std::ptr::null::<c_void>())
        },
        &[libc::ENOENT],
    ),
    ("change the root directory", |_| call!(libc::SYS_chroot, c"/".as_ptr()), &[]),
    ("make a device node", |t| call!(libc::SYS_mknod, t.path("node").as_ptr(), libc::S_IFCHR | 0o600, 0x103), &[]),
    ("become root", |_| call!(libc::SYS_setresuid, 0, 0, 0), &[]),
    (
        "load a BPF program",
        |_| {
            // Two instructions: r0 = 0; exit.
            let program: [u64; 2] = [0xb7, 0x95];
            let mut attributes = [0_u64; 9];
            (attributes[0], attributes[1]) = (1 | 2 << 32, program.as_ptr() as u64);
            attributes[2] = c"GPL".as_ptr() as u64;
            call!(libc::SYS_bpf, 5, attributes.as_ptr(), size_of_val(&attributes))
        },
        &[],
    ),
    (
        "set up an io_uring",
        |_| {
            let mut parameters = [0_u8; 120];
            call!(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr())
        },
        &[],
    ),
    (
        "watch the host's performance counters",
        |_| {
            let mut attributes = [0_u64; 16];
            // A software event (the CPU clock) on CPU 0, of all processes.
            attributes[0] = 1 | 128 << 32;
            call!(libc::SYS_perf_event_open, attributes.as_ptr(), -1, 0, -1, 0)
        },
        &[],
    ),
    ("handle page faults", |_| call!(libc::SYS_userfaultfd, libc::O_CLOEXEC), &[]),
    ("load a kernel module", |_| call!(libc::SYS_finit_module, -1, c"".as_ptr(), 0), &[libc::EBADF]),
    ("restart the host", |_| call!(libc::SYS_reboot, 0, 0, 0, 0), &[libc::EINVAL]),
    (
        "add a key to a keyring",
        |_| call!(libc::SYS_add_key, c"user".as_ptr(), c"a".as_ptr(), c"b".as_ptr(), 1, -3),
        &[],
    ),
    (
        "map executable memory",
        |_| {
            let (prot, flags) = (libc::PROT_READ | libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            call!(libc::SYS_mmap, 0, 4096, prot, flags, -1, 0)
        },
        &[],
    ),
    (
        "make memory executable",
        |_| {
            static mut CODE: [u64; 1024] = [0; 1024];
            let page = ((&raw mut CODE) as usize + 4095) & !4095;
            call!(libc::SYS_mprotect, page, 4096, libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC)
        },
        &[],
    ),
    (
        "put keys into the terminal",
        |_| call!(libc::SYS_ioctl, 0, libc::TIOCSTI, c"x".as_ptr()),
        &[libc::ENOTTY, libc::EIO],
    ),
];

fn attack(target: &Target) {
    for (name, attempt, past_the_check) in ATTEMPTS {
        TRAPPED.store(false, Ordering::SeqCst);
        let result = attempt(target);
        let error = io::Error::last_os_error().raw_os_error().unwrap_or(0);
        let outcome = match TRAPPED.load(Ordering::SeqCst) {
            true => "trapped",
            false if result >= 0 || past_the_check.contains(&error) => "done",
            false => "refused",
        };
        println!("{name}\t{outcome}");
    }
}

fn main() {
    let (mut thread, mut layers, mut outside, mut neighbour) = (None, String::new(), PathBuf::new(), 0);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().unwrap();
        match argument.as_str() {
            "--thread" => {
                let name = value();
                thread = ThreadKind::ALL.into_iter().find(|kind| kind.name() == name);
            }
            "--layers" => layers = value(),
            "--outside" => outside = value().into(),
            "--neighbour" => neighbour = value().parse().unwrap(),
            // What a jailer says.
            _ => {}
        }
    }
    let target = Target { outside, neighbour };
    let config = SandboxConfig {
        seccomp: if layers == "seccomp" { SeccompConfig::BuiltIn } else { SeccompConfig::Off },
        landlock: (layers == "landlock").then(LandlockConfig::default),
    };
    survive_traps();
    let sandbox = Sandbox::new(&config).unwrap();
    sandbox.confine_process(&Grants::default(), None).unwrap();
    let kind = thread.unwrap();
    if matches!(kind, ThreadKind::Vmm | ThreadKind::Vcpu) {
        let mut grants = Grants::default();
        grants.siblings(Path::new("/run/drive"), true);
        sandbox.confine_paths(&grants).unwrap();
    }
    if kind == ThreadKind::Vmm {
        sandbox.filter(kind).unwrap();
        return attack(&target);
    }
    let confined = std::thread::spawn(move || {
        // The vmm thread starts those of vCPUs, which keep its paths; the others are older, and give up all.
        let confine = if kind == ThreadKind::Vcpu { Sandbox::filter } else { Sandbox::confine_thread };
        confine(&sandbox, kind).unwrap();
        attack(&target);
    });
    confined.join().unwrap();
}
