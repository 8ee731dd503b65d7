//! A process seen from outside: its start, its CPU time and its memory.

use std::error::Error;
use std::ffi::{CString, c_char, c_int, c_void};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;
use std::ptr;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

/// A child of this process, and when it began to execute its program. What the C library does in a child before that takes
/// a quarter of a millisecond of the child's own time (it resets each signal), and a fork's copy of this process takes its
/// time to go away: neither is the program's.
#[derive(Debug)]
pub struct Child {
    id: Pid,
    started: Instant,
    cpu_before: Duration,
    ended: Option<ExitStatus>,
}

/// What a child reads, and writes, in this process's memory before it executes its program.
struct Launch {
    path: CString,
    arguments: Vec<*const c_char>,
    streams: [RawFd; 3],
    started: Instant,
    cpu: io::Result<Duration>,
    result: io::Result<()>,
}

impl Child {
    /// Starts `program` with `arguments` and standard streams.
    pub fn start(program: &Path, arguments: &[&str], streams: [BorrowedFd<'_>; 3]) -> io::Result<Self> {
        let path = CString::new(program.as_os_str().as_bytes())?;
        let words = arguments.iter().map(|word| CString::new(*word)).collect::<Result<Vec<_>, _>>()?;
        let pointers = [path.as_ptr()].into_iter().chain(words.iter().map(|word| word.as_ptr())).chain([ptr::null()]);
        let mut launch = Launch {
            arguments: pointers.collect(),
            path,
            streams: streams.map(|stream| stream.as_raw_fd()),
            started: Instant::now(),
            cpu: Ok(Duration::ZERO),
            result: Ok(()),
        };
        let mut stack = vec![0_u128; 4096];
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
        // SAFETY: this thread waits until the child has executed its program or has ended, so that until then the child
        // is alone with `launch` and `stack`, whose end it is given.
        let id = unsafe {
            libc::clone(execute, stack.as_mut_ptr_range().end.cast(), flags, ptr::from_mut(&mut launch).cast())
        };
        let id = Pid::from_raw(id).ok_or_else(io::Error::last_os_error)?;
        let mut child = Self { id, started: launch.started, cpu_before: Duration::ZERO, ended: None };
        if let Err(error) = launch.result {
            child.wait()?;
            return Err(error);
        }
        child.cpu_before = launch.cpu?;
        Ok(child)
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.id.as_raw_pid().unsigned_abs()
    }

    /// When it was about to execute its program.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// CPU time that all of its threads have used since.
    pub fn cpu_time(&self) -> io::Result<Duration> {
        Ok(cpu_time(self.id())?.saturating_sub(self.cpu_before))
    }

    /// Ends it (SIGKILL).
    pub fn kill(&self) {
        if self.ended.is_none() {
            let _ = kill_process(self.id, Signal::KILL);
        }
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        loop {
            match self.reap(WaitOptions::empty()) {
                Ok(Some(status)) => return Ok(status),
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
        }
    }

    /// Its status, if it has ended.
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        self.reap(WaitOptions::NOHANG)
    }

    fn reap(&mut self, options: WaitOptions) -> io::Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            self.ended = waitpid(Some(self.id), options)?.map(|(_, status)| ExitStatus::from_raw(status.as_raw()));
        }
        Ok(self.ended)
    }
}

/// The child, from its first instruction until it executes its program.
extern "C" fn execute(launch: *mut c_void) -> c_int {
    // SAFETY: it is the `Launch` of `Child::start`, which waits meanwhile.
    let launch = unsafe { &mut *launch.cast::<Launch>() };
    for (stream, number) in launch.streams.into_iter().zip(0..) {
        // SAFETY: it changes descriptors of the child's alone.
        unsafe { libc::dup2(stream, number) };
    }
    // SAFETY: it changes a handler of the child's alone; Rust's runtime had it ignored.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    launch.cpu = clock(libc::CLOCK_PROCESS_CPUTIME_ID);
    launch.started = Instant::now();
    // SAFETY: both are valid, and `arguments` ends with a null.
    unsafe { libc::execv(launch.path.as_ptr(), launch.arguments.as_ptr()) };
    launch.result = Err(io::Error::last_os_error());
    // SAFETY: it ends the child without running what is this process's to run.
    unsafe { libc::_exit(127) }
}

fn clock(id: libc::clockid_t) -> io::Result<Duration> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is valid for writing.
    if unsafe { libc::clock_gettime(id, &mut time) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0)))
}

/// CPU time that all threads of process `id` have used.
fn cpu_time(id: u32) -> io::Result<Duration> {
    let id = libc::pid_t::try_from(id).map_err(io::Error::other)?;
    let mut number = 0;
    // SAFETY: `number` is valid for writing.
    match unsafe { libc::clock_getcpuclockid(id, &mut number) } {
        0 => clock(number),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// What the threads of process `id` do within 100 ms, for whoever looks for the cause of a hang.
pub fn threads(id: u32) -> String {
    let look = || -> Vec<(String, u64)> {
        let tasks = fs::read_dir(format!("/proc/{id}/task")).into_iter().flatten().flatten().map(|entry| entry.path());
        let read = |path: &Path, name: &str| fs::read_to_string(path.join(name)).unwrap_or_default();
        let first = |text: String| text.split_ascii_whitespace().next().and_then(|word| word.parse().ok());
        tasks
            .map(|path| (read(&path, "comm").trim().to_owned(), first(read(&path, "schedstat")).unwrap_or(0)))
            .collect()
    };
    let before = look();
    std::thread::sleep(Duration::from_millis(100));
    let used = |(before, after): (&(String, u64), &(String, u64))| {
        format!("thread {} runs {} ms of 100", after.0, after.1.saturating_sub(before.1) / 1_000_000)
    };
    before.iter().zip(&look()).map(used).collect::<Vec<_>>().join(", ")
}

/// Resident memory in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Resident {
    /// Resident, except guest RAM.
    pub outside: u64,
    /// Of it, private and dirty: what another such process would need again. Counted as anonymous pages, since those of a
    /// program in a tmpfs are always dirty.
    pub dirty: u64,
    /// Guest RAM.
    pub guest: u64,
}

/// Memory of process `id`. `images` are files that may be mapped into guest RAM.
pub fn resident(id: u32, images: &[&Path]) -> Result<Resident, Box<dyn Error>> {
    Ok(parse_smaps(&fs::read_to_string(format!("/proc/{id}/smaps"))?, images))
}

/// Mappings as large as this are guest RAM.
const RAM: u64 = 8 << 20;

/// Adds up /proc/PID/smaps. Guest RAM is what is large or left out of core dumps, and the images.
fn parse_smaps(smaps: &str, images: &[&Path]) -> Resident {
    let mut total = Resident::default();
    let (mut name, mut size, mut rss, mut dirty) = ("", 0, 0, 0);
    for line in smaps.lines() {
        let mut words = line.split_ascii_whitespace();
        let key = words.next().unwrap_or_default();
        let kib = || words.clone().next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0) << 10;
        match key {
            "Size:" => size = kib(),
            "Rss:" => rss = kib(),
            "Anonymous:" => dirty = kib(),
            // The last line of a mapping.
            "VmFlags:" => {
                let is_image = images.iter().any(|path| path.to_str() == Some(name));
                if size >= RAM || is_image || words.any(|flag| flag == "dd") {
                    total.guest += rss;
                } else {
                    total.outside += rss;
                    total.dirty += dirty;
                }
            }
            // The first: addresses, permissions, offset, device, inode, path.
            _ if !key.ends_with(':') => {
                name = words.nth(4).unwrap_or_default();
                (size, rss, dirty) = (0, 0, 0);
            }
            _ => {}
        }
    }
    total
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn guest_ram_is_told_from_the_rest() {
        let mapping = |range: &str, path: &str, size: u64, rss: u64, dirty: u64, flags: &str| {
            format!(
                "{range} rw-p 00000000 00:01 5 {path}\nSize: {size} kB\nRss: {rss} kB\nAnonymous: {dirty} kB\n\
                 VmFlags: rd wr {flags}\n"
            )
        };
        let smaps = [
            mapping("1000-2000", "/bin/vmm", 2000, 900, 8, "mr"),
            mapping("3000-4000", "[heap]", 100, 60, 60, "ac"),
            mapping("5000-6000", "", 131_072, 40_000, 40_000, "ac"),
            mapping("7000-8000", "/dev/shm/vmlinux", 4000, 3000, 10, "ac"),
            mapping("9000-a000", "", 4, 4, 4, "ac dd"),
        ];
        let resident = parse_smaps(&smaps.concat(), &[Path::new("/dev/shm/vmlinux")]);
        assert_eq!(resident, Resident { outside: 960 << 10, dirty: 68 << 10, guest: 43_004 << 10 });
    }

    #[test]
    fn a_program_is_started_and_its_time_begins_with_it() {
        let null = fs::File::open("/dev/null").unwrap();
        let before = Instant::now();
        let start = |program: &str, arguments: &[&str]| Child::start(Path::new(program), arguments, [null.as_fd(); 3]);
        let mut child = start("/bin/sh", &["-c", "kill -STOP $$; exit 3"]).unwrap();
        assert!(child.started() > before);
        while !fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap().contains(") T ") {
            std::thread::yield_now();
        }
        let used = child.cpu_time().unwrap();
        assert!(used > Duration::ZERO && used < cpu_time(child.id()).unwrap());
        assert_eq!(child.try_wait().unwrap(), None);
        kill_process(child.id, Signal::CONT).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(3));
        assert_eq!(start("/no/such/program", &[]).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn this_process_has_used_time_and_memory() {
        let id = std::process::id();
        assert!(cpu_time(id).unwrap() > Duration::ZERO);
        assert!(resident(id, &[]).unwrap().outside > 0);
    }
}
