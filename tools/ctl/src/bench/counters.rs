//! Counts of events in the processes that this one starts, from the kernel's tracepoints (perf_event_open(2)).

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{FromRawFd, OwnedFd};

/// VM exits, stage-2 faults among them, exits to user space, system calls, interrupts.
const EVENTS: [&str; 5] =
    ["kvm/kvm_exit", "kvm/kvm_page_fault", "kvm/kvm_userspace_exit", "raw_syscalls/sys_enter", "kvm/kvm_inj_virq"];

/// Counters that every process inherits which this thread starts from now on; they count from its exec(2) on.
#[derive(Debug)]
pub struct Counters(Vec<File>);

/// What they counted.
#[derive(Debug, Clone, Copy)]
pub struct Counts {
    /// VM exits.
    pub exits: f64,
    /// VM exits because of a page that the second stage of translation lacks.
    pub faults: f64,
    /// Returns of KVM_RUN.
    pub user: f64,
    /// System calls of all threads.
    pub calls: f64,
    /// Interrupts given to vCPUs.
    pub interrupts: f64,
}

impl Counters {
    /// Opens them. Fails where tracepoints are not available, or not to us.
    pub fn open() -> io::Result<Self> {
        EVENTS.iter().map(|event| open(event)).collect::<Result<_, _>>().map(Self)
    }

    /// What the processes and their threads have done so far.
    pub fn read(&mut self) -> io::Result<Counts> {
        let mut counts = [0.0; EVENTS.len()];
        for (count, file) in counts.iter_mut().zip(&mut self.0) {
            let mut bytes = [0; 8];
            file.read_exact(&mut bytes)?;
            // No count comes near 2^53.
            *count = u64::from_ne_bytes(bytes) as f64;
        }
        let [exits, faults, user, calls, interrupts] = counts;
        Ok(Counts { exits, faults, user, calls, interrupts })
    }
}

/// `struct perf_event_attr` as it was first published (PERF_ATTR_SIZE_VER0).
#[repr(C)]
#[derive(Default)]
struct Attributes {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup_events: u32,
    breakpoint_kind: u32,
    config1: u64,
}

fn open(event: &str) -> io::Result<File> {
    const TRACEPOINT: u32 = 2;
    const DISABLED: u64 = 1 << 0;
    const INHERIT: u64 = 1 << 1;
    const ENABLE_ON_EXEC: u64 = 1 << 12;
    let id = fs::read_to_string(format!("/sys/kernel/tracing/events/{event}/id"))?;
    let attributes = Attributes {
        kind: TRACEPOINT,
        size: size_of::<Attributes>() as u32,
        config: id.trim().parse().map_err(io::Error::other)?,
        flags: DISABLED | INHERIT | ENABLE_ON_EXEC,
        ..Attributes::default()
    };
    let (this_thread, any_cpu, no_group, close_on_exec) = (0, -1, -1, 8);
    // SAFETY: the attributes are valid for reading and say their size.
    let fd = unsafe {
        libc::syscall(libc::SYS_perf_event_open, &raw const attributes, this_thread, any_cpu, no_group, close_on_exec)
    };
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has just returned this descriptor, and nobody else has it.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}
