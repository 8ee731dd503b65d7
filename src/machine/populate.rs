//! Pages of a snapshot that are there before the guest asks: in a prepared shell what the memory file holds, beside the
//! running vCPUs the working set.
//!
//! What this does is invisible but for its speed: a page that is populated holds what a fault would have put there.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;

use super::Error;
use crate::kvm::pre_fault;
use crate::memory::{self, GuestMemory, GuestRam};
use crate::metrics::METRICS;
use crate::sandbox::Sandbox;
use crate::sandbox::seccomp::ThreadKind;
use crate::snapshot::memory::data_of;
use crate::snapshot::working_set::Run;

/// Bytes populated per call: the host's memory map is locked no longer than that takes.
const BATCH: u64 = 2 << 20;
/// The thread only makes system calls.
const STACK_SIZE: usize = 64 << 10;

/// The thread's handle. Dropping it ends the thread and waits for that, one batch at most.
#[derive(Debug)]
pub struct Populating {
    /// What it waits for the end of.
    held: Option<Sender<Infallible>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Populating {
    /// Starts it for the pages of `runs`, which are offsets into RAM without the gap. It drops `confining` when it is
    /// confined, and waits for [`Self::begin`].
    ///
    /// # Errors
    /// There can be no further thread.
    pub fn start(
        ram: GuestMemory,
        runs: Vec<Run>,
        sandbox: Sandbox,
        confining: impl Send + 'static,
    ) -> Result<Self, Error> {
        let (held, begun) = mpsc::channel::<Infallible>();
        let stop = Arc::new(AtomicBool::new(false));
        let theirs = Arc::clone(&stop);
        let live = move || {
            let confined = sandbox.confine_thread(ThreadKind::Memory);
            drop(confining);
            match confined {
                Ok(()) => {
                    let _ = begun.recv();
                    populate(&ram, &runs, &theirs);
                }
                // Nothing is lost but time.
                Err(error) => ::log::warn!("The working set is not populated: {}.", super::chain(&error)),
            }
        };
        let thread = std::thread::Builder::new().name("memory".into()).stack_size(STACK_SIZE).spawn(live);
        let thread = thread.map_err(|source| Error::Event("start the thread for the working set", source))?;
        Ok(Self { held: Some(held), stop, thread: Some(thread) })
    }

    /// Lets it work. Whoever waits for the reply to the load, and the guest, go first where there is one processor.
    pub fn begin(&mut self) {
        self.held = None;
    }

    /// Has it end after the batch at hand. It touches nothing that a snapshot or a reset could find wrong meanwhile.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Drop for Populating {
    fn drop(&mut self) {
        self.stop();
        self.begin();
        if let Some(thread) = self.thread.take() {
            // The thread ends by returning: a panic ends the process.
            let _ = thread.join();
        }
    }
}

/// Has what the memory file holds in the page tables of this process and in the second stage of translation: shared with
/// the file until it is written, or a copy where `runs` say that it will be.
pub fn map_ahead(ram: &GuestRam, vcpu: &VcpuFd, runs: &[Run]) {
    let extents = ram.base().and_then(|file| data_of(file, ram.size()).ok());
    let extents = extents.unwrap_or_default().into_iter().map(|range| Run { range, written: false });
    for Run { range, written } in runs.iter().cloned().chain(extents) {
        let mut at = range.start;
        while at < range.end {
            let Some(done) = memory::populate(ram.memory(), at, BATCH.min(range.end - at), written) else { break };
            pre_fault(vcpu, memory::address_of(at), done);
            at += done;
        }
    }
}

fn populate(ram: &GuestMemory, runs: &[Run], stop: &AtomicBool) {
    for Run { range, written } in runs {
        let mut at = range.start;
        while at < range.end {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            // Hosts before Linux 5.14 cannot do it.
            let Some(done) = memory::populate(ram, at, BATCH.min(range.end - at), *written) else { return };
            METRICS.snapshot.working_set_bytes.add(done);
            at += done;
        }
    }
}
