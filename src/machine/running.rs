//! A machine whose vCPUs have threads: the parts, and what is asked of all of them.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;

use io_uring::IoUring;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::eventfd::EventFd;

use super::console::Console;
use super::populate::Populating;
use super::shell::Shell;
use super::snapshot::{Identity, SnapshotError, identity};
use super::{Error, chain};
use crate::devices::bus::Bus;
use crate::devices::virtio::{Device, VirtioMmio, Windows};
use crate::kvm::{Kvm, Vcpu, Vm};
use crate::memory::{self, GuestRam, MmioDevice};
use crate::sandbox::seccomp::ThreadKind;
use crate::sandbox::{Confining, Sandbox};
use crate::snapshot::Id;
use crate::snapshot::memory::Pristine;
use crate::snapshot::pagemap::Pagemap;
use crate::snapshot::working_set::Run;

/// Snapshots that a Diff without a record may be merged into, besides the one that was loaded.
const MAX_OWN: usize = 1024;

/// A machine that has started. What its memory slots refer to comes last: the VM is dropped first.
pub struct Machine {
    /// The vCPUs until they have threads, then second handles of them, made when they are first needed.
    pub(super) handles: Vec<VcpuFd>,
    pub(super) vcpus: Vec<Vcpu>,
    pub(super) vcpu_event: Arc<EventFd>,
    pub(super) bus: Arc<Bus>,
    pub(super) console: Console,
    pub(super) kvm: Kvm,
    pub(super) vm: Arc<Vm>,
    pub(super) ram: GuestRam,
    /// The working set of the snapshot that it came from, until [`Self::start_populating`].
    pub(super) working_set: Vec<Run>,
    /// What populates it.
    pub(super) populating: Option<Populating>,
    /// Signalled when the page fault handler that has its memory is gone.
    pub(super) handler_gone: Option<Arc<EventFd>>,
    /// The record of written pages begins at the last snapshot, or at the load.
    has_base: bool,
    /// The snapshot that it came from, and the last that is complete; at first the same.
    loaded: Option<Id>,
    last: Option<Id>,
    /// Those since the load or the last reset, of which it remembers the latest.
    own: Vec<Id>,
    /// The memory file that a Diff was being merged into when that failed.
    half_merged: Option<Identity>,
    /// A snapshot was begun since the load.
    saved: bool,
    /// A reset has taken pages back since.
    rewound: bool,
    windows: Windows,
    /// QueueNotify registers of devices that are not plugged in yet.
    kicks: Vec<EventFd>,
    /// Whether [`Self::provide`] has these four, as far as the host let it.
    provided: bool,
    /// What relative paths are relative to.
    pub(super) directory: PathBuf,
    pagemap: Option<Pagemap>,
    pub(super) pristine: Option<Pristine>,
    undertaker: Option<IoUring>,
    /// Its threads, until it runs for the first time.
    pub(super) confining: Confining,
}

impl Machine {
    /// Makes a machine of a shell that has its content. It lacks virtio devices and the threads of its vCPUs.
    pub fn assemble(shell: Shell, console: Console) -> Self {
        let Shell { kvm, vcpu_fds, bus, vm, ram, windows, kicks, vcpu_event, confining } = shell;
        Self {
            handles: vcpu_fds,
            vcpus: Vec::new(),
            vcpu_event,
            bus,
            console,
            kvm,
            vm,
            ram,
            working_set: Vec::new(),
            populating: None,
            handler_gone: None,
            has_base: false,
            loaded: None,
            last: None,
            own: Vec::new(),
            half_merged: None,
            saved: false,
            rewound: false,
            windows,
            kicks,
            provided: false,
            directory: PathBuf::new(),
            pagemap: None,
            pristine: None,
            undertaker: None,
            confining,
        }
    }

    /// Has what it may need later, when this process can neither open nor ask for it any more. Whoever misses something
    /// then says so.
    pub fn provide(&mut self, proc: Option<BorrowedFd<'_>>) {
        if !std::mem::replace(&mut self.provided, true) {
            self.directory = std::env::current_dir().unwrap_or_default();
            self.pagemap = Pagemap::open(proc).ok();
            self.pristine =
                Pristine::map(&self.ram).inspect_err(|error| log::warn!("{}.", chain(error))).ok().flatten();
            self.undertaker =
                self.vm.undertaker().inspect_err(|error| log::debug!("no deferred teardown: {error}")).ok();
        }
    }

    /// The page tables of this process.
    pub fn pagemap(&self) -> Result<&Pagemap, SnapshotError> {
        self.pagemap.as_ref().ok_or(SnapshotError::NoPagemap)
    }

    /// Starts the threads of the vCPUs, unless it has, each under its filter. `paths` says whether they give up all paths
    /// themselves: otherwise they keep those that the calling thread has.
    pub fn start_vcpus(&mut self, sandbox: &Sandbox, paths: bool) -> Result<(), Error> {
        if !self.vcpus.is_empty() {
            return Ok(());
        }
        for (id, fd) in (0..).zip(std::mem::take(&mut self.handles)) {
            let (sandbox, held) = (sandbox.clone(), self.confining.thread());
            let confine = move || {
                let _held = held;
                let confine = if paths { Sandbox::confine_thread } else { Sandbox::filter };
                confine(&sandbox, ThreadKind::Vcpu).map_err(|error| chain(&error))
            };
            self.vcpus.push(Vcpu::spawn(id, fd, Arc::clone(&self.bus), Arc::clone(&self.vcpu_event), confine)?);
        }
        Ok(())
    }

    /// Has the working set populated. What cannot be done costs time and nothing else.
    pub fn start_populating(&mut self, sandbox: &Sandbox) {
        let runs = std::mem::take(&mut self.working_set);
        if !runs.is_empty() {
            let started = Populating::start(self.ram.memory().clone(), runs, sandbox.clone(), self.confining.thread());
            self.populating = started.inspect_err(|error| log::warn!("{}.", chain(error))).ok();
        }
    }

    /// Puts the virtio devices in, once.
    pub fn plug(&mut self, devices: Vec<Device>) -> Result<(), Error> {
        let mut plugged = Vec::with_capacity(devices.len());
        for (index, (device, kick)) in devices.into_iter().zip(std::mem::take(&mut self.kicks)).enumerate() {
            let place = MmioDevice::nth(index).ok_or(Error::TooManyDevices)?;
            let window = self.windows.get(index).ok_or(Error::TooManyDevices)?;
            let line = self.bus.io_apic.line(place.irq);
            plugged.push(Arc::new(VirtioMmio::new(device, self.ram.memory().clone(), line, window, kick)));
        }
        let _ = self.bus.slots.set(plugged);
        Ok(())
    }

    /// Which pages were written, by the guest or by this process, since the last call or the start; a bit
    /// each, for every slot. `None` unless that is tracked.
    pub fn take_written(&self) -> Result<Option<Vec<Vec<u64>>>, Error> {
        let Some(mut written) = self.ram.take_written() else { return Ok(None) };
        for ((index, slot), words) in (0..).zip(self.ram.slots()).zip(&mut written) {
            for (word, by_guest) in words.iter_mut().zip(self.vm.take_dirty_log(index, slot.size)?) {
                *word |= by_guest;
            }
        }
        Ok(Some(written))
    }

    /// A snapshot begins. Returns whether the record of written pages, which it takes, begins at a memory file; should the
    /// snapshot fail, the record begins nowhere any more.
    pub fn begin_saving(&mut self) -> bool {
        self.saved = true;
        std::mem::take(&mut self.has_base)
    }

    /// A Diff is about to be merged into `file`, which is whole again when the snapshot is complete.
    ///
    /// # Errors
    /// The file cannot be looked at.
    pub fn begin_merging(&mut self, file: &File) -> io::Result<()> {
        self.half_merged = Some(identity(file)?);
        Ok(())
    }

    /// It came from snapshot `id`: the first Diff begins there.
    pub fn has_been_loaded(&mut self, id: Id) {
        (self.has_base, self.loaded, self.last) = (true, Some(id), Some(id));
    }

    /// Snapshot `id` is complete: the next Diff begins here.
    pub fn has_been_saved(&mut self, id: Id) {
        (self.has_base, self.rewound, self.last, self.half_merged) = (true, false, Some(id), None);
        if self.own.len() == MAX_OWN {
            self.own.remove(0);
        }
        self.own.push(id);
    }

    /// Whether a Diff merged into `file`, which is of snapshot `id`, is all that the guest has.
    pub fn follows(&self, file: &File, id: Id) -> bool {
        if self.has_base && memory::is_tracked(self.ram.memory()) {
            return self.last == Some(id);
        }
        // Without a record it is all that the guest has changed since the load.
        let half_merged = self.half_merged.is_some() && identity(file).ok() == self.half_merged;
        half_merged || self.loaded == Some(id) || self.own.contains(&id)
    }

    /// A reset has taken it back.
    pub fn has_been_reset(&mut self) {
        self.rewound = self.saved;
        // What these have of pages that were taken back no Diff without a record would change.
        self.own.clear();
        self.half_merged = None;
    }

    /// Whether a Diff would miss what a reset took back: there is no record of it, and no page differs for it from the
    /// memory file that was loaded.
    pub fn lacks_pages_for_a_diff(&self) -> bool {
        self.rewound && !(self.has_base && memory::is_tracked(self.ram.memory()))
    }

    /// From now on the guest does without.
    pub fn stop_populating(&self) {
        if let Some(populating) = &self.populating {
            populating.stop();
        }
    }

    /// Has a handle for each vCPU in `handles`; none runs.
    pub fn take_handles(&mut self) -> Result<(), Error> {
        if self.handles.is_empty() {
            let take =
                |(index, vcpu): (usize, &Vcpu)| Ok(vcpu.second_handle(&self.vm)?.ok_or(SnapshotError::Ended(index))?);
            self.handles = self.vcpus.iter().enumerate().map(take).collect::<Result<_, Error>>()?;
        }
        Ok(())
    }
}
