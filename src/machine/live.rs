//! Live snapshots: memory is copied while the guest runs, which is paused for what it wrote meanwhile.
//!
//! ```text
//!  running ──▶ a slice of memory for each wake of the event loop ──▶ vCPUs park
//!          ──▶ what was written since, the state ──▶ running ──▶ files are on disk and in place
//! ```

use std::time::Instant;

use tokio::sync::oneshot;

use super::Error;
use super::lifecycle::{Parking, Purpose, Vmm, refuse};
use super::running::Machine;
use super::snapshot::SnapshotError;
use super::snapshot::files::{Files, MemoryFile, check_request, new_id, pages_of};
use crate::config::SnapshotCreate;
use crate::control::{Answer, Event, Refusal, Reply};
use crate::memory::is_tracked;
use crate::metrics::METRICS;
use crate::snapshot::Id;
use crate::snapshot::memory::{self, Copy, Pages};

/// Bytes of RAM that one wake of the event loop looks at: devices wait no longer than it takes to copy these.
const SLICE: u64 = 1 << 20;

/// A live snapshot whose first pass is under way, or done.
#[derive(Debug)]
pub struct Live {
    request: SnapshotCreate,
    id: Id,
    file: MemoryFile,
    copy: Copy,
    /// When the vCPUs were asked to park.
    parked: Option<Instant>,
}

impl Live {
    /// Begins it; from now on what is written is noted.
    fn new(machine: &mut Machine, request: SnapshotCreate) -> Result<Self, Error> {
        if !is_tracked(machine.ram.memory()) {
            return Err(SnapshotError::NotTracked.into());
        }
        let file = MemoryFile::open(&request, machine)?;
        let has_base = machine.begin_saving();
        let written = machine.take_written()?.ok_or(SnapshotError::NotTracked)?;
        let pages = pages_of(request.kind, Some(written).filter(|_| has_base));
        file.begin(machine)?;
        let copy = Copy::new(&machine.ram, pages, file.file()).map_err(|source| file.error(source))?;
        Ok(Self { id: new_id()?, request, file, copy, parked: None })
    }

    /// Copies a slice; whether it was the last.
    fn go_on(&mut self, machine: &Machine) -> Result<bool, Error> {
        let done = self.copy.go_on(&machine.ram, machine.pagemap()?, self.file.file(), SLICE);
        Ok(done.map_err(|source| self.file.error(source))?)
    }

    /// Copies what was written since the beginning; the machine is paused.
    fn catch_up(&mut self, machine: &Machine) -> Result<(), Error> {
        METRICS.snapshot.live_running_bytes.add(self.copy.copied());
        let written = machine.take_written()?.ok_or(SnapshotError::NotTracked)?;
        let (rest, file) = (Pages::Noted(written), self.file.file());
        let copied = memory::write(&machine.ram, rest, machine.pagemap()?, self.id, file);
        METRICS.snapshot.live_paused_bytes.add(copied.map_err(|source| self.file.error(source))?);
        Ok(())
    }
}

impl Vmm {
    /// Begins a snapshot of the running machine. Its reply comes when it is on disk.
    pub(super) fn begin_live(&mut self, request: SnapshotCreate, reply: oneshot::Sender<Answer>) {
        let Some(machine) = &mut self.machine else { return };
        let live = check_request(&request, machine, &self.config)
            .map_err(Error::from)
            .and_then(|()| Live::new(machine, request));
        match live {
            Ok(live) => self.live = Some((live, reply)),
            Err(error) => _ = reply.send(Err(refuse(error))),
        }
    }

    /// Copies a slice of a live snapshot; after the last the vCPUs park.
    pub(super) fn go_on_live(&mut self) {
        let (Some(machine), Some((live, _))) = (&self.machine, &mut self.live) else { return };
        let went = live.go_on(machine);
        if matches!(went, Ok(false)) {
            return;
        }
        let Some((mut live, reply)) = self.live.take() else { return };
        match went {
            Err(error) => {
                let _ = reply.send(Err(refuse(error)));
                self.serve_deferred();
            }
            Ok(_) => {
                live.parked = Some(Instant::now());
                self.park(Parking { purpose: Purpose::Snapshot(Box::new(live)), reply });
            }
        }
    }

    /// The vCPUs are parked: takes what they wrote meanwhile and the state, runs them again, and completes the files.
    pub(super) fn finish_live(&mut self, mut live: Live) -> Result<Reply, Refusal> {
        let Some(machine) = &mut self.machine else { return Ok(Reply::Done) };
        machine.console.write_output(&machine.bus.serial, &self.events);
        let files = live.catch_up(machine).and_then(|()| Files::draft(machine, &self.config, &live.request, live.id));
        // Nobody waits for the disk but the client and the devices.
        self.resume(Event::Resumed);
        if let Some(parked) = live.parked {
            METRICS.latencies_us.live_snapshot_pause.set(parked.elapsed().as_micros() as u64);
        }
        let id = live.id;
        files.and_then(|files| files.publish(live.file)).map_err(refuse)?;
        if let Some(machine) = &mut self.machine {
            machine.has_been_saved(id);
        }
        Ok(Reply::Done)
    }
}
