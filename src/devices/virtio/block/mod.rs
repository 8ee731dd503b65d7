//! virtio-block (virtio 1.2 §5.2): a raw host file or block device.
//!
//! The Sync engine does its I/O on the vmm thread: while the host's disk is slow, so is every
//! device of this microVM. It stops after a bounded batch to let others run. The Async engine
//! never blocks.

mod disk;
mod engine;
mod request;

use std::fs::File;
use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_queue::{Queue, QueueOwnedT, QueueT};

use self::disk::Disk;
use self::request::{
    Kind as RequestKind, MAX_DISCARD_SECTORS, MAX_DISCARD_SEGMENTS, MAX_ZEROES_SECTORS, MAX_ZEROES_SEGMENTS, Request,
    Rules, Status, Step,
};
use super::{
    Activation, INTERRUPT_USED_BUFFER, Interrupt, Kind, Progress, RateLimiter, Source, Violation, VirtioDevice,
};
use crate::config::{CacheType, DriveConfig, RateLimiterUpdate};
use crate::memory::GuestMemory;
use crate::{metrics, warn_limited};

/// Size of the request queue.
const QUEUE_SIZE: u16 = 256;
/// Most data buffers in a request: the queue less header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Host file systems free blocks of this many sectors.
const DISCARD_ALIGNMENT: u32 = 8;
/// What one wake does before it lets other devices run.
const MAX_REQUESTS_PER_WAKE: usize = 64;
/// See [`MAX_REQUESTS_PER_WAKE`].
const MAX_BYTES_PER_WAKE: u64 = 16 << 20;

/// Source tags.
const RATE_LIMITER: u8 = 1;

/// Why a drive cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its file's size or identity cannot be had.
    #[error("drive {drive}: cannot read size and identity of its file")]
    Identify {
        /// Resource id.
        drive: String,
        /// From the host.
        source: io::Error,
    },
    /// Its file is a directory, a character device, a FIFO or a socket.
    #[error("drive {drive}: path_on_host is neither a regular file nor a block device")]
    NotADisk {
        /// Resource id.
        drive: String,
    },
    /// No descriptor for the rate limiter's timer.
    #[error("drive {drive}: cannot create the timer of its rate limiter")]
    Timer {
        /// Resource id.
        drive: String,
        /// From the host.
        source: io::Error,
    },
}

/// A drive.
pub struct Block {
    drive_id: String,
    rules: Rules,
    features: u64,
    disk: Disk,
    request: Request,
    limiter: RateLimiter,
    active: Option<Active>,
    metrics: Arc<metrics::Block>,
}

/// What the driver handed over.
struct Active {
    queue: Queue,
    memory: GuestMemory,
    interrupt: Arc<Interrupt>,
    /// Buffers were used and the guest was not told.
    unannounced: bool,
}

impl Block {
    /// A drive on `backend`, opened for reading and, unless it is read-only, writing.
    ///
    /// # Errors
    ///
    /// [`Error`] if `backend` is no disk, or the host lacks what the configuration needs.
    pub fn new(config: &DriveConfig, backend: File, metrics: Arc<metrics::Block>) -> Result<Self, Error> {
        let drive = config.drive_id.clone();
        let limiter = RateLimiter::new(&config.rate_limiter).map_err(|source| Error::Timer { drive, source })?;
        let rules = Rules {
            read_only: config.is_read_only,
            flush: config.cache_type == CacheType::Writeback,
            discard: config.discard,
            queue_size: QUEUE_SIZE,
        };
        let mut features = 1 << VIRTIO_BLK_F_SEG_MAX;
        for (offered, bit) in [
            (rules.read_only, VIRTIO_BLK_F_RO),
            (rules.flush, VIRTIO_BLK_F_FLUSH),
            (rules.discard, VIRTIO_BLK_F_DISCARD),
            (rules.discard, VIRTIO_BLK_F_WRITE_ZEROES),
        ] {
            features |= u64::from(offered) << bit;
        }
        Ok(Self {
            disk: Disk::new(backend, &config.drive_id)?,
            drive_id: config.drive_id.clone(),
            rules,
            features,
            request: Request::default(),
            limiter,
            active: None,
            metrics,
        })
    }

    /// The drive's resource id.
    pub fn drive_id(&self) -> &str {
        &self.drive_id
    }

    /// Continues on another file, opened as the first was. The guest is to be told that the
    /// configuration changed.
    ///
    /// # Errors
    ///
    /// As [`Self::new`]; the drive then stays as it was.
    pub fn update_backend(&mut self, backend: File) -> Result<(), Error> {
        self.disk = Disk::new(backend, &self.drive_id)?;
        self.metrics.update_count.inc();
        Ok(())
    }

    /// Changes the limits.
    pub fn update_rate_limiter(&mut self, update: &RateLimiterUpdate) {
        self.limiter.update(update);
    }

    /// The configuration space (§5.2.4), up to and including the write-zeroes fields.
    fn config_space(&self) -> [u8; 60] {
        let mut space = [0; 60];
        let mut put = |offset: usize, bytes: &[u8]| space[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(0, &self.disk.sectors.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        if self.rules.discard {
            put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
            put(40, &MAX_DISCARD_SEGMENTS.to_le_bytes());
            put(44, &DISCARD_ALIGNMENT.to_le_bytes());
            put(48, &MAX_ZEROES_SECTORS.to_le_bytes());
            put(52, &MAX_ZEROES_SEGMENTS.to_le_bytes());
            put(56, &[1]); // write_zeroes_may_unmap
        }
        space
    }

    /// Takes requests until the queue is empty, the limits are reached, or the batch is full.
    fn process_queue(&mut self) -> Result<Progress, Violation> {
        let Some(active) = &mut self.active else { return Ok(Progress::Idle) };
        let mut bytes = 0;
        let mut requests = 0;
        loop {
            while let Some(chain) = active.queue.iter(&active.memory).map_err(broken)?.next() {
                if requests == MAX_REQUESTS_PER_WAKE || bytes >= MAX_BYTES_PER_WAKE {
                    active.queue.go_to_previous_position();
                    return Ok(Progress::More);
                }
                let mut step = self.request.parse(chain, &active.memory, &self.disk, self.rules)?;
                if !self.limiter.take(self.request.length()) {
                    active.queue.go_to_previous_position();
                    self.metrics.rate_limiter_throttled_events.inc();
                    return Ok(Progress::Idle);
                }
                requests += 1;
                bytes += self.request.length();
                let status = loop {
                    match step {
                        Step::Operate => {
                            let result = engine::run(&self.disk.file, &self.request.operation());
                            step = self.request.advance(result);
                        }
                        Step::Done(status) => break status,
                        Step::Failed(error) => {
                            warn_limited!("drive {}: {:?} failed: {error}", self.drive_id, self.request.kind());
                            break Status::IoError;
                        }
                    }
                };
                count(&self.metrics, &self.request, status);
                // SAFETY: the request was parsed with this memory, which `active` keeps.
                let (head, written) = unsafe { self.request.finish(status) };
                active.queue.add_used(&active.memory, head, written).map_err(broken)?;
                active.unannounced = true;
            }
            if !active.queue.enable_notification(&active.memory).map_err(broken)? {
                return Ok(Progress::Idle);
            }
        }
    }

    /// Interrupts the guest if it wants to know about what was used since the last time.
    fn announce(&mut self) -> Result<(), Violation> {
        let Some(active) = self.active.as_mut().filter(|active| active.unannounced) else { return Ok(()) };
        active.unannounced = false;
        if active.queue.needs_notification(&active.memory).map_err(broken)? {
            active.interrupt.raise(INTERRUPT_USED_BUFFER);
        }
        Ok(())
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> Kind {
        Kind::Block
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let space = self.config_space();
        let tail = usize::try_from(offset).ok().and_then(|offset| space.get(offset..)).unwrap_or_default();
        data.fill(0);
        for (to, from) in data.iter_mut().zip(tail) {
            *to = *from;
        }
    }

    fn activate(&mut self, activation: Activation) {
        let Activation { memory, queues, interrupt, .. } = activation;
        self.active = queues.into_iter().next().map(|queue| Active { queue, memory, interrupt, unannounced: false });
    }

    fn reset(&mut self) -> bool {
        self.active = None;
        true
    }

    fn on_event(&mut self, tag: u8) -> Result<Progress, Violation> {
        if tag == RATE_LIMITER {
            self.limiter.on_timer();
        } else {
            self.metrics.queue_event_count.inc();
        }
        if self.limiter.is_throttled() {
            return Ok(Progress::Idle);
        }
        let progress = self.process_queue()?;
        self.announce()?;
        Ok(progress)
    }

    fn sources(&self) -> Vec<Source> {
        vec![Source { tag: RATE_LIMITER, fd: self.limiter.timer_fd() }]
    }

    fn quiesce(&mut self) -> Result<(), Violation> {
        Ok(())
    }

    fn count_violation(&self) {
        self.metrics.needs_reset.inc();
    }
}

fn broken(error: virtio_queue::Error) -> Violation {
    Violation::Queue(0, error)
}

fn count(metrics: &metrics::Block, request: &Request, status: Status) {
    if status != Status::Ok {
        metrics.execute_fails.inc();
        return;
    }
    match request.kind() {
        RequestKind::Read => {
            metrics.read_count.inc();
            metrics.read_bytes.add(request.length());
        }
        RequestKind::Write => {
            metrics.write_count.inc();
            metrics.write_bytes.add(request.length());
        }
        RequestKind::Flush => metrics.flush_count.inc(),
        RequestKind::Discard | RequestKind::WriteZeroes => metrics.discard_count.inc(),
        RequestKind::GetId | RequestKind::Other(_) => {}
    }
}

#[cfg(test)]
mod tests;
