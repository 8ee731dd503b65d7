//! virtio-block (virtio 1.2 §5.2): a raw host file or block device, with layers over it that take the
//! writes if it has an overlay.
//!
//! The Sync engine does its I/O on the vmm thread: while the host's disk is slow, so is every
//! device of this microVM. It stops after a bounded batch to let others run. The Async engine
//! never blocks.

mod bitmap;
mod disk;
mod engine;
mod layer;
mod overlay;
mod request;
mod uring;

use std::fs::File;
use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};

pub use self::disk::Backend;
use self::disk::Disk;
use self::engine::Engine;
pub use self::layer::{LayerError, LayerId};
use self::overlay::Overlay;
pub use self::overlay::OverlayFiles;
#[cfg(fuzzing)]
pub(crate) use self::overlay::tests_random;
use self::request::{
    Kind as RequestKind, MAX_DISCARD_SECTORS, MAX_DISCARD_SEGMENTS, MAX_ZEROES_SECTORS, MAX_ZEROES_SEGMENTS, Request,
    Rules, Status, Step,
};
use super::{
    Activation, CONFIG_SPACE_SIZE, Kind, Position, Progress, RateLimiter, Source, Violation, VirtioDevice, Virtqueue,
};
use crate::config::{CacheType, DriveConfig, IoEngine, RateLimiterUpdate};
use crate::{metrics, warn_limited};

/// Size of the request queue.
const QUEUE_SIZE: u16 = 256;
/// Most data buffers in a request: the queue less header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Host file systems free blocks of this many sectors.
const DISCARD_ALIGNMENT: u32 = 8;
/// Most operations the Async engine has in flight. More requests wait in the queue.
const ASYNC_DEPTH: u16 = 128;
/// What one wake does before it lets other devices run.
const MAX_REQUESTS_PER_WAKE: usize = 64;
/// See [`MAX_REQUESTS_PER_WAKE`].
const MAX_BYTES_PER_WAKE: u64 = 16 << 20;
/// See [`MAX_REQUESTS_PER_WAKE`]. A request has a completion for each piece that is in another layer.
const MAX_COMPLETIONS_AT_ONCE: usize = 256;

/// Source tags.
const RATE_LIMITER: u8 = 1;
const COMPLETION: u8 = 2;

/// Why a drive cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Its file's size or identity cannot be had.
    #[error("cannot read size and identity of its file")]
    Identify(#[source] io::Error),
    /// Its file is a directory, a character device, a FIFO or a socket.
    #[error("path_on_host is neither a regular file nor a block device")]
    NotADisk,
    /// Its layers cannot be had, emptied or copied.
    #[error("the layer of its overlay cannot be used")]
    Overlay(#[source] LayerError),
    /// What the guest wrote would be over another base.
    #[error("it has an overlay: its file cannot be replaced under it")]
    HasOverlay,
    /// The Async engine cannot be had.
    #[error("io_engine Async needs io_uring, which the host refuses; use Sync")]
    Async(#[source] io::Error),
    /// No descriptor for the rate limiter's timer.
    #[error("cannot create the timer of its rate limiter")]
    Timer(#[source] io::Error),
}

/// A drive. The engine is dropped first: it waits until the kernel is done with the rest.
pub struct Block {
    drive_id: String,
    rules: Rules,
    features: u64,
    engine: Engine,
    requests: Requests,
    disk: Disk,
    limiter: RateLimiter,
    active: Option<Active>,
    metrics: Arc<metrics::Block>,
}

/// What the driver handed over.
struct Active {
    queue: Virtqueue,
    /// The driver wants no more: what is in flight is only waited for.
    stopped: bool,
}

/// The requests being worked on, by token. Made as they are needed, then used again.
struct Requests {
    slots: Vec<Request>,
    free: Vec<u16>,
    /// Most at a time.
    depth: u16,
}

impl Requests {
    /// The token of a request that is not in use, if one may still be started.
    fn vacant(&mut self) -> Option<u16> {
        if self.free.is_empty() && self.slots.len() < usize::from(self.depth) {
            self.free.push(self.slots.len() as u16);
            self.slots.push(Request::default());
        }
        self.free.last().copied()
    }

    /// Takes `token`, which [`Self::vacant`] has just named, into use.
    fn claim(&mut self, token: u16) {
        debug_assert_eq!(self.free.last(), Some(&token));
        self.free.pop();
    }

    fn release(&mut self, token: u16) {
        self.free.push(token);
    }

    fn in_use(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// A flush is under way that announces what was written. Another waits for it: each has a bitmap of the drive.
    fn announcing(&self) -> bool {
        self.slots.iter().any(Request::announces)
    }
}

impl Block {
    /// A drive on `backend`.
    ///
    /// # Errors
    ///
    /// [`Error`] if `backend` is no disk, or the host lacks what the configuration needs.
    pub fn new(config: &DriveConfig, backend: impl Into<Backend>, metrics: Arc<metrics::Block>) -> Result<Self, Error> {
        let limiter = RateLimiter::new(&config.rate_limiter).map_err(Error::Timer)?;
        let rules = Rules {
            read_only: config.is_read_only,
            flush: config.cache_type == CacheType::Writeback,
            discard: config.discard,
        };
        let disk = Disk::new(backend.into(), &config.drive_id)?;
        let depth = match config.io_engine {
            IoEngine::Sync => 1,
            IoEngine::Async => ASYNC_DEPTH,
        };
        let engine = Engine::new(config.io_engine, &disk.descriptors(), depth).map_err(Error::Async)?;
        let mut features = 1 << VIRTIO_BLK_F_SEG_MAX;
        for (offered, bit) in [
            (rules.read_only, VIRTIO_BLK_F_RO),
            (rules.flush, VIRTIO_BLK_F_FLUSH),
            (rules.discard, VIRTIO_BLK_F_DISCARD),
            (rules.discard, VIRTIO_BLK_F_WRITE_ZEROES),
        ] {
            features |= u64::from(offered) << bit;
        }
        metrics.overlay_bytes.set(disk.overlay.as_ref().map_or(0, Overlay::bytes));
        Ok(Self {
            drive_id: config.drive_id.clone(),
            rules,
            features,
            engine,
            requests: Requests { slots: Vec::new(), free: Vec::new(), depth },
            disk,
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
        if self.disk.overlay.is_some() {
            return Err(Error::HasOverlay);
        }
        let disk = Disk::new(backend.into(), &self.drive_id)?;
        self.engine.set_file(&disk.file).map_err(Error::Async)?;
        self.disk = disk;
        self.metrics.update_count.inc();
        Ok(())
    }

    /// Forgets what the guest wrote to the overlay, if there is one. Nothing is in flight.
    ///
    /// # Errors
    ///
    /// The host refuses; the drive is then in no state to be used.
    pub fn clear_overlay(&mut self) -> Result<(), Error> {
        let Some(overlay) = &mut self.disk.overlay else { return Ok(()) };
        overlay.clear().map_err(Error::Overlay)?;
        self.metrics.overlay_bytes.set(0);
        Ok(())
    }

    /// Whether its writes go to a layer.
    pub fn has_overlay(&self) -> bool {
        self.disk.overlay.is_some()
    }

    /// Writes what is not in the base to `file`, which is empty, as the layer of snapshot `id`.
    ///
    /// # Errors
    ///
    /// The host refuses: the disk is full, say.
    pub fn copy_overlay(&self, file: &File, id: LayerId) -> Result<(), Error> {
        let Some(overlay) = &self.disk.overlay else { return Ok(()) };
        overlay.copy_to(file, id).map_err(Error::Overlay)
    }

    /// At the end, when nothing is in flight: the next process finds what the guest wrote, whether it
    /// flushed that or not.
    pub fn finish(&mut self) {
        if let Some(Err(error)) = self.disk.overlay.as_mut().map(Overlay::flush) {
            log::error!("drive {}: what was not flushed is lost: {error}", self.drive_id);
        }
    }

    /// Changes the limits.
    pub fn update_rate_limiter(&mut self, update: &RateLimiterUpdate) {
        self.limiter.update(update);
    }

    /// Takes requests until there is none to take, or the batch is full.
    fn take_requests(&mut self) -> Result<Progress, Violation> {
        let mut requests = 0;
        let mut bytes = 0;
        while requests < MAX_REQUESTS_PER_WAKE && bytes < MAX_BYTES_PER_WAKE {
            let Some(weight) = self.take_request()? else { return Ok(Progress::Idle) };
            requests += 1;
            bytes += weight;
        }
        Ok(Progress::More)
    }

    /// Takes one request and starts it; returns its weight. `None` if the queue is empty,
    /// which the driver's next notification ends, the engine is full or a flush has to wait for
    /// another, which a completion ends, or the limits are reached, which the timer ends.
    fn take_request(&mut self) -> Result<Option<u64>, Violation> {
        let Some(active) = self.active.as_mut().filter(|active| !active.stopped) else { return Ok(None) };
        let Some(token) = self.requests.vacant() else { return Ok(None) };
        let request = &mut self.requests.slots[usize::from(token)];
        let Some(head) = active.queue.pop(&mut request.buffers)? else { return Ok(None) };
        // SAFETY: the buffers are fresh from the queue, and `active` keeps it.
        let step = unsafe { request.parse(head, &self.disk, self.rules)? };
        let (kind, weight) = (request.kind(), request.weight());
        // The host may have to write zeroes as if they were data; what a discard touches it only forgets.
        let bytes = if kind == RequestKind::WriteZeroes { weight } else { request.length() };
        if kind == RequestKind::Flush && self.requests.announcing() {
            active.queue.undo_pop();
            return Ok(None);
        }
        if !self.limiter.take(bytes) {
            active.queue.undo_pop();
            self.metrics.rate_limiter_throttled_events.inc();
            return Ok(None);
        }
        self.requests.claim(token);
        if matches!(step, Step::Operate) {
            self.requests.slots[usize::from(token)].start(&self.disk);
        }
        self.proceed(token, step);
        Ok(Some(weight))
    }

    /// Takes a request from `step` to its end, or to where it waits for the host.
    fn proceed(&mut self, token: u16, mut step: Step) {
        let request = &mut self.requests.slots[usize::from(token)];
        let Some(active) = self.active.as_mut().filter(|active| !active.stopped) else {
            self.requests.release(token);
            return;
        };
        let status = loop {
            match step {
                Step::Operate => {
                    let (place, operation) = request.operation(&self.disk);
                    let file = (place, self.disk.file_at(place));
                    // SAFETY: the vector belongs to the request, which is not touched before its
                    // result is there; the buffers lie in guest RAM, which `active` keeps until
                    // no request is in use. Both outlive the engine: fields drop in order.
                    let result = unsafe { self.engine.start(file, token, &operation) };
                    let Some(result) = result else { return };
                    step = request.advance(result, &mut self.disk);
                }
                Step::Done(status) => break status,
                Step::Failed(error) => {
                    warn_limited!("drive {}: {:?} failed: {error}", self.drive_id, request.kind());
                    break Status::IoError;
                }
            }
        };
        count(&self.metrics, request, status);
        if let Some(overlay) = &self.disk.overlay {
            self.metrics.overlay_bytes.set(overlay.bytes());
        }
        // SAFETY: the request was parsed with this memory, which `active` keeps.
        let (head, written) = unsafe { request.finish(status) };
        self.requests.release(token);
        active.queue.add_used(head, written);
    }

    /// Exchanges with the host what was started for what is completed. Returns whether there is more: it was much, or
    /// the host refused to take something and must be asked again.
    fn exchange(&mut self) -> bool {
        let mut completions = 0;
        while self.requests.in_use() > 0 {
            if let Err(error) = self.engine.submit() {
                warn_limited!("drive {}: io_uring takes no requests: {error}", self.drive_id);
                return true;
            }
            let before = completions;
            while completions < MAX_COMPLETIONS_AT_ONCE
                && let Some((token, result)) = self.engine.completed()
            {
                self.complete(token, result);
                completions += 1;
            }
            if completions == MAX_COMPLETIONS_AT_ONCE {
                return true;
            }
            if completions == before {
                break;
            }
        }
        false
    }

    fn complete(&mut self, token: u16, result: io::Result<usize>) {
        let step = self.requests.slots[usize::from(token)].advance(result, &mut self.disk);
        self.proceed(token, step);
    }

    fn announce(&mut self) {
        if let Some(active) = &mut self.active {
            active.queue.announce();
        }
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

    /// Up to and including the write-zeroes fields (§5.2.4).
    fn config_space(&self) -> [u8; CONFIG_SPACE_SIZE] {
        let mut space = [0; CONFIG_SPACE_SIZE];
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

    fn activate(&mut self, activation: Activation) {
        self.active = activation.queues.into_iter().next().map(|queue| Active { queue, stopped: false });
    }

    fn reset(&mut self) -> bool {
        if self.requests.in_use() == 0 {
            self.active = None;
            return true;
        }
        if let Some(active) = &mut self.active {
            active.stopped = true;
        }
        false
    }

    fn on_event(&mut self, tag: u8) -> Result<Progress, Violation> {
        match tag {
            RATE_LIMITER => self.limiter.on_timer(),
            COMPLETION => {}
            _ => self.metrics.queue_event_count.inc(),
        }
        let mut more = self.exchange();
        let mut progress = Progress::Idle;
        if !self.limiter.is_throttled() {
            progress = self.take_requests()?;
            more |= self.exchange();
        }
        self.announce();
        Ok(if more { Progress::More } else { progress })
    }

    fn sources(&self) -> Vec<Source> {
        let mut sources = vec![Source { tag: RATE_LIMITER, fd: self.limiter.timer_fd() }];
        sources.extend(self.engine.completion_fd().map(|fd| Source { tag: COMPLETION, fd }));
        sources
    }

    fn quiesce(&mut self) {
        while self.requests.in_use() > 0 {
            if let Err(error) = self.engine.wait() {
                log::error!("drive {}: cannot wait for io_uring: {error}", self.drive_id);
                break;
            }
            self.exchange();
        }
        self.announce();
    }

    fn positions(&self) -> Vec<Position> {
        self.active.iter().map(|active| active.queue.position(0)).collect()
    }

    /// The disk is all there is, and it is the same or the guest hears of its new size.
    fn on_restored(&mut self) {}

    fn count_violation(&self) {
        self.metrics.needs_reset.inc();
    }
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
#[cfg(test)]
mod tests_host;
#[cfg(test)]
mod tests_in_flight;
#[cfg(test)]
mod tests_overlay;
