//! A vCPU and its thread.
//!
//! ```text
//!  Parked ──Run──▶ Running ──Park──▶ Parked
//!    └───────────────┴──Stop, or an exit nobody can handle──▶ Exited
//! ```
//!
//! It has no thread until the process gives up what it does not need, which is before any vCPU runs: a guest may take
//! over this process.
//!
//! The vmm thread states a [`Wish`]; the thread follows it between two entries into the guest and
//! says so through one eventfd that all vCPUs share. To break into KVM_RUN the vmm thread sets
//! `immediate_exit` in the shared `kvm_run` page and then sends a signal whose handler does
//! nothing: whichever side of the entry the vCPU is on, it comes out, so no kick is lost.

use std::ffi::c_int;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use kvm_bindings::{
    KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, KVMIO, kvm_pre_fault_memory,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_mut_ref;

use super::{Error, Vm};

/// Touched only where it is used: deep enough for a device access, small enough for 32 of them.
const STACK_SIZE: usize = 128 << 10;

/// Where the guest's accesses go.
pub trait Exits: Send + Sync {
    /// IN from `port`.
    fn io_in(&self, port: u16, data: &mut [u8]);
    /// OUT to `port`.
    fn io_out(&self, port: u16, data: &[u8]);
    /// A load from `gpa` outside RAM.
    fn mmio_read(&self, gpa: u64, data: &mut [u8]);
    /// A store to `gpa` outside RAM.
    fn mmio_write(&self, gpa: u64, data: &[u8]);
}

/// What the vmm thread wants a vCPU to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// Execute guest code.
    Run,
    /// Stay out of the guest, with every exit completed.
    Park,
    /// End the thread.
    Stop,
}

/// Why a vCPU stopped for good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// The guest asked for it: triple fault, or a system event.
    GuestEnd(&'static str),
    /// The VMM or KVM cannot go on; a sentence a person can act on.
    Failure(String),
}

/// What a vCPU is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Run {
    /// Parked.
    Parked,
    /// In the guest or handling an exit.
    Running,
    /// Ended, on request (`None`) or with a reason.
    Exited(Option<Report>),
}

/// What the thread and its handle share.
#[derive(Debug)]
struct Shared {
    inner: Mutex<Inner>,
    changed: Condvar,
    /// Tells the vmm thread that some vCPU parked or exited.
    to_vmm: Arc<EventFd>,
}

#[derive(Debug)]
struct Inner {
    wish: Wish,
    state: Run,
    immediate_exit: ImmediateExit,
    /// The vCPU when its thread has exited: to close it is the vmm thread's part, the thread's filter has no call for it.
    retired: Option<VcpuFd>,
    /// The thread's id in the kernel, once it runs.
    thread: Option<libc::c_long>,
}

/// `immediate_exit` of the vCPU's `kvm_run` page.
#[derive(Debug)]
struct ImmediateExit(*const AtomicU8);

// SAFETY: the pointee is an atomic in a mapping shared with the kernel; it may be used from any
// thread. It is used only under `Shared::inner` while the state is not `Exited`, and the thread
// enters `Exited` under that lock before it gives the mapping away.
unsafe impl Send for ImmediateExit {}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Parks as long as that is the wish; the one that it ends with.
    fn awaited(&self) -> Wish {
        let mut inner = self.lock();
        while inner.wish == Wish::Park {
            if matches!(inner.state, Run::Parked) {
                inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
            } else {
                inner.state = Run::Parked;
                // The vmm thread takes the lock at once, and may have other wishes meanwhile.
                drop(inner);
                self.notify_vmm();
                inner = self.lock();
            }
        }
        // SAFETY: the thread that owns the page is this one. Cleared under the lock that sets it: a later wish is never
        // wiped out.
        unsafe { &*inner.immediate_exit.0 }.store(0, Ordering::SeqCst);
        inner.wish
    }

    fn notify_vmm(&self) {
        // An overflowing counter is already readable, so a failed write loses nothing.
        let _ = self.to_vmm.write(1);
    }
}

/// The vmm thread's handle of a vCPU. Dropping it ends the thread and waits for that.
#[derive(Debug)]
pub struct Vcpu {
    shared: Arc<Shared>,
    /// `None` once it is joined.
    thread: Option<JoinHandle<()>>,
    /// Open as long as this lives.
    fd: RawFd,
    /// The id of this process.
    process: u32,
}

impl Vcpu {
    /// Starts the thread of vCPU `id`, which begins with `confine` and then parks; if that fails it exits and says why.
    /// `to_vmm` is signalled when it parks again or exits.
    ///
    /// # Errors
    /// The host starts no thread.
    pub fn spawn<E: Exits + 'static>(
        id: u8,
        mut fd: VcpuFd,
        exits: Arc<E>,
        to_vmm: Arc<EventFd>,
        confine: impl FnOnce() -> Result<(), String> + Send + 'static,
    ) -> Result<Self, Error> {
        let raw = fd.as_raw_fd();
        let immediate_exit = ImmediateExit((&raw const fd.get_kvm_run().immediate_exit).cast());
        let inner = Inner { wish: Wish::Park, state: Run::Parked, immediate_exit, retired: None, thread: None };
        let shared = Arc::new(Shared { inner: Mutex::new(inner), changed: Condvar::new(), to_vmm });
        let theirs = Arc::clone(&shared);
        let body = move || {
            let report = match confine() {
                Ok(()) => live(&theirs, &mut fd, exits.as_ref()),
                Err(why) => Some(Report::Failure(why)),
            };
            let mut inner = theirs.lock();
            inner.state = Run::Exited(report);
            inner.retired = Some(fd);
            drop(inner);
            theirs.notify_vmm();
        };
        let thread = std::thread::Builder::new().name(format!("vcpu{id}")).stack_size(STACK_SIZE).spawn(body);
        let thread = Some(thread.map_err(|source| Error::Thread(id, source))?);
        Ok(Self { shared, thread, fd: raw, process: std::process::id() })
    }

    /// States a wish. `Run` takes effect at once; the others when the vCPU has left the guest.
    pub fn wish(&self, wish: Wish) {
        let mut inner = self.shared.lock();
        let waiting = matches!(inner.state, Run::Parked);
        if matches!(inner.state, Run::Exited(_)) {
            return;
        }
        inner.wish = wish;
        if wish == Wish::Run {
            // Seen by the vmm thread at once, so that a park right after it is not taken for done.
            inner.state = Run::Running;
        } else {
            // SAFETY: the state is not `Exited` and the lock is held, so the page is mapped.
            unsafe { &*inner.immediate_exit.0 }.store(1, Ordering::SeqCst);
            if let (false, Some(thread)) = (waiting, inner.thread) {
                // SAFETY: it has no memory to be unsafe with. The thread lives, for it cannot become `Exited` while the
                // lock is held, and the handler of the kick signal does nothing.
                unsafe { libc::syscall(libc::SYS_tgkill, self.process, thread, KICK) };
            }
        }
        drop(inner);
        if waiting {
            self.shared.changed.notify_one();
        }
    }

    /// A handle of the vCPU besides its thread's, if it does not run.
    ///
    /// # Errors
    /// As [`Vm::second_handle`].
    pub fn second_handle(&self, vm: &Vm) -> Result<Option<VcpuFd>, Error> {
        let inner = self.shared.lock();
        if !matches!(inner.state, Run::Parked) {
            return Ok(None);
        }
        // SAFETY: the thread cannot exit while the lock is held, so its descriptor is open.
        unsafe { vm.second_handle(self.fd) }.map(Some)
    }

    /// What it is doing.
    pub fn state(&self) -> Run {
        self.shared.lock().state.clone()
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.wish(Wish::Stop);
        if let Some(thread) = self.thread.take() {
            // The thread ends by returning: a panic ends the process.
            let _ = thread.join();
        }
    }
}

vmm_sys_util::ioctl_iowr_nr!(KVM_PRE_FAULT_MEMORY, KVMIO, 0xd5, kvm_pre_fault_memory);

/// Has `size` bytes of RAM from `gpa` on in the second stage of translation, as if the guest had read them. A hint: hosts
/// before Linux 6.10 do not know it, and what is not done now is done by faults.
pub fn pre_fault(vcpu: &VcpuFd, gpa: u64, size: u64) {
    let mut left = kvm_pre_fault_memory { gpa, size, ..Default::default() };
    while left.size > 0 {
        // SAFETY: `left` is what this ioctl reads, and where it writes how far it came.
        if unsafe { ioctl_with_mut_ref(vcpu, KVM_PRE_FAULT_MEMORY(), &mut left) } < 0 {
            return;
        }
    }
}

/// The thread: follows wishes until it exits, and says why it does.
fn live<E: Exits>(shared: &Shared, fd: &mut VcpuFd, exits: &E) -> Option<Report> {
    // SAFETY: it has no memory to be unsafe with. (The C library's function is missing from a static program: the
    // standard library refers to it weakly.)
    shared.lock().thread = Some(unsafe { libc::syscall(libc::SYS_gettid) });
    loop {
        let wish = shared.awaited();
        if wish == Wish::Stop {
            return None;
        }
        // The guest's watchdogs are told that it stood still; one without kvmclock has none to tell.
        let _ = fd.kvmclock_ctrl();
        if let Err(report) = run_until_kicked(fd, exits) {
            return Some(report);
        }
    }
}

/// Executes guest code until `immediate_exit` is set, which it is with every wish but `Run`. The last MMIO or port access
/// is complete in the guest's registers then: KVM does that before it looks at `immediate_exit`.
fn run_until_kicked<E: Exits>(fd: &mut VcpuFd, exits: &E) -> Result<(), Report> {
    loop {
        match fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => exits.io_out(port, data),
            Ok(VcpuExit::MmioWrite(gpa, data)) => exits.mmio_write(gpa, data),
            Ok(VcpuExit::MmioRead(gpa, data)) => exits.mmio_read(gpa, data),
            Ok(VcpuExit::IoIn(port, data)) => exits.io_in(port, data),
            Ok(VcpuExit::Intr) => {}
            Ok(VcpuExit::Shutdown) => return Err(Report::GuestEnd("triple fault")),
            Ok(VcpuExit::SystemEvent(kind, _)) => return Err(system_event(kind)),
            Ok(VcpuExit::InternalError) => return Err(internal_error(fd)),
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                return Err(Report::Failure(format!(
                    "the processor refused to enter the guest (hardware reason {reason:#x} on host CPU {cpu}): \
                     the host's KVM or microcode is at fault, see its kernel log"
                )));
            }
            Ok(VcpuExit::MemoryFault { gpa, .. }) => {
                return Err(Report::Failure(format!("KVM cannot reach the guest memory at {gpa:#x}")));
            }
            Ok(other) => {
                return Err(Report::Failure(format!("KVM ended the guest with an unexpected exit: {other:?}")));
            }
            Err(error) => match error.errno() {
                libc::EINTR if fd.get_kvm_run().immediate_exit != 0 => return Ok(()),
                libc::EINTR | libc::EAGAIN => {}
                _ => return Err(Report::Failure(format!("KVM_RUN failed: {error}"))),
            },
        }
    }
}

fn system_event(kind: u32) -> Report {
    match kind {
        KVM_SYSTEM_EVENT_SHUTDOWN => Report::GuestEnd("shutdown"),
        KVM_SYSTEM_EVENT_RESET => Report::GuestEnd("reset"),
        KVM_SYSTEM_EVENT_CRASH => Report::GuestEnd("crash"),
        _ => Report::Failure(format!("KVM reported the unknown system event {kind}")),
    }
}

fn internal_error(fd: &mut VcpuFd) -> Report {
    // SAFETY: the exit reason is KVM_EXIT_INTERNAL_ERROR, so `internal` is the member KVM filled.
    let suberror = unsafe { fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
    let what = match suberror {
        1 => "an instruction it cannot emulate",
        2 => "a fault while it delivered another",
        3 => "a fault while it delivered an event",
        4 => "an exit it does not know",
        _ => "an internal error",
    };
    let rip = fd.get_regs().map(|regs| regs.rip).unwrap_or(0);
    let advice = if hardware_virtualization() {
        "the guest kernel is broken or the host's KVM has a bug"
    } else {
        "this host's KVM works without hardware virtualization (no vmx or svm flag in /proc/cpuinfo) and cannot run \
         stock guests: use a host that can, or run in the lab with tools/lab"
    };
    Report::Failure(format!("KVM met {what} at {rip:#x} (KVM_EXIT_INTERNAL_ERROR, suberror {suberror}): {advice}"))
}

/// Whether the processor offers VMX or SVM.
fn hardware_virtualization() -> bool {
    use std::arch::x86_64::__cpuid;
    const VMX: u32 = 1 << 5;
    const SVM: u32 = 1 << 2;
    __cpuid(1).ecx & VMX != 0 || (__cpuid(0x8000_0000).eax >= 0x8000_0001 && __cpuid(0x8000_0001).ecx & SVM != 0)
}

/// The kick: a real-time signal that no libc keeps for itself.
const KICK: c_int = 36;

/// Gives the kick signal a handler that does nothing, so that it interrupts KVM_RUN and nothing
/// else. Before the first vCPU runs.
pub fn install_kick_handler() {
    extern "C" fn nothing(_: c_int) {}
    // SAFETY: all-zero is a valid `sigaction`; the handler touches nothing.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as *const () as usize;
        libc::sigaction(KICK, &action, std::ptr::null_mut());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The vmm thread states the next wish as soon as the vCPU says that it parked, whether it waits by then or not.
    #[test]
    fn a_vcpu_that_is_to_run_and_to_park_at_once_parks_again() {
        install_kick_handler();
        let immediate_exit = Arc::new(AtomicU8::new(0));
        let page = ImmediateExit(Arc::as_ptr(&immediate_exit));
        let shared = Arc::new(Shared {
            inner: Mutex::new(Inner {
                wish: Wish::Park,
                state: Run::Parked,
                immediate_exit: page,
                thread: None,
                retired: None,
            }),
            changed: Condvar::new(),
            to_vmm: Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()),
        });
        let thread = std::thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                // A guest that does nothing until it is called out.
                while shared.awaited() != Wish::Stop {
                    while immediate_exit.load(Ordering::SeqCst) == 0 {
                        std::thread::yield_now();
                    }
                }
            }
        });
        let vcpu = Vcpu { shared, thread: Some(thread), fd: -1, process: std::process::id() };
        for turn in 0..20_000 {
            vcpu.wish(Wish::Run);
            vcpu.wish(Wish::Park);
            let mut parked = libc::pollfd { fd: vcpu.shared.to_vmm.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            while vcpu.state() != Run::Parked {
                // SAFETY: one descriptor, which lives.
                assert_eq!(unsafe { libc::poll(&mut parked, 1, 60_000) }, 1, "turn {turn}");
                vcpu.shared.to_vmm.read().unwrap();
            }
        }
    }
}
