//! From the TAP to the guest (virtio 1.2 §5.1.6.3).
//!
//! ```text
//!  receive queue ──reserve──▶ chains ──readv──▶ frame ──limits, room──▶ used ring
//! ```
//!
//! Buffers are reserved before the TAP is read, and the TAP reads into them. What does not fit goes
//! to a spill behind them, so that no frame is ever cut: it waits there for the guest's next
//! buffers, or is dropped if there can be none.

use std::collections::VecDeque;
use std::io;

use super::{Budget, HEADER_SIZE, MAX_FRAME, Service, Tap};
use crate::devices::virtio::{Buffers, IoVecs, Position, Progress, RateLimiter, Violation, Virtqueue};
use crate::{metrics, warn_limited};

/// Most buffers in one call of readv(2), the spill among them (`UIO_MAXIOV`).
const MAX_BUFFERS: usize = 1024;
/// Offset of num_buffers in the header.
const NUM_BUFFERS: u64 = 10;

/// What there is to put a frame into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Room {
    /// Enough.
    Enough,
    /// Too little; the guest notifies when it offers more.
    Short,
    /// Too little, and there cannot be more.
    Never,
}

/// A chain of the guest that waits for data.
#[derive(Debug)]
struct Chain {
    head: u16,
    length: usize,
}

/// The receive queue.
pub struct Receiver {
    queue: Virtqueue,
    /// A frame may go over several chains (VIRTIO_NET_F_MRG_RXBUF).
    merge: bool,
    /// Taken from the queue, and not used yet.
    chains: VecDeque<Chain>,
    /// Their buffers, one behind the other.
    room: IoVecs,
    /// A frame that was read, and its length with the header. It lies in `room` and then `spill`.
    frame: Option<usize>,
    spill: Vec<u8>,
    /// The TAP may have a frame.
    readable: bool,
    /// The chain at hand. Kept, so that the steady state allocates nothing.
    buffers: Buffers,
}

impl Receiver {
    /// Receives into `queue`.
    pub fn new(queue: Virtqueue, merge: bool) -> Self {
        Self {
            queue,
            merge,
            chains: VecDeque::new(),
            room: IoVecs::default(),
            frame: None,
            spill: Vec::new(),
            // What came before the driver was there announced itself to nobody.
            readable: true,
            buffers: Buffers::default(),
        }
    }

    /// How far the queue has got, without the chains that are reserved.
    pub fn position(&self) -> Position {
        // No more than the queue is long.
        self.queue.position(self.chains.len() as u16)
    }

    /// The TAP has something to read.
    pub fn tap_is_readable(&mut self) {
        self.readable = true;
    }

    /// Receives until there is nothing left, the guest has no buffers, which its next notification
    /// ends, the limits are reached, which the timer ends, or the budget is spent.
    pub fn run(
        &mut self,
        tap: &Tap,
        mut service: Option<&mut Service>,
        limiter: &mut RateLimiter,
        metrics: &metrics::Net,
        budget: &mut Budget,
    ) -> Result<Progress, Violation> {
        while !limiter.is_throttled() {
            if budget.is_spent() {
                return Ok(Progress::More);
            }
            let Some(length) = self.next_frame(tap, service.as_deref_mut(), metrics)? else { break };
            match self.reserve(length)? {
                Room::Enough => {}
                Room::Short => {
                    metrics.no_rx_avail_buffer.inc();
                    break;
                }
                Room::Never => {
                    metrics.rx_fails.inc();
                    self.frame = None;
                    budget.spend(0);
                    continue;
                }
            }
            if !limiter.take((length - HEADER_SIZE) as u64) {
                metrics.rx_rate_limiter_throttled.inc();
                break;
            }
            self.deliver(length);
            metrics.rx_packets_count.inc();
            metrics.rx_bytes_count.add((length - HEADER_SIZE) as u64);
            budget.spend(length);
        }
        Ok(Progress::Idle)
    }

    /// Interrupts the guest if it wants to know what was received.
    pub fn announce(&mut self) {
        self.queue.announce();
    }

    /// The length of the frame to be delivered next: the one that waits, the service's, or one read
    /// from the TAP.
    fn next_frame(
        &mut self,
        tap: &Tap,
        service: Option<&mut Service>,
        metrics: &metrics::Net,
    ) -> Result<Option<usize>, Violation> {
        let service = service.filter(|service| service.may_speak());
        if self.frame.is_some() || !self.readable && service.is_none() {
            return Ok(self.frame);
        }
        self.reserve(MAX_FRAME)?;
        if self.chains.is_empty() {
            metrics.no_rx_avail_buffer.inc();
            return Ok(None);
        }
        if let Some(frame) = service.and_then(Service::next) {
            self.place(frame);
            return Ok(self.frame);
        }
        if !self.readable {
            return Ok(None);
        }
        match self.read(tap) {
            Ok(length) => self.frame = Some(length),
            Err(error) => {
                // Its next frame, or its end, is another event.
                self.readable = false;
                if error.kind() != io::ErrorKind::WouldBlock {
                    warn_limited!("the TAP cannot be read: {error}");
                    metrics.tap_read_fails.inc();
                }
            }
        }
        Ok(self.frame)
    }

    /// Takes chains from the queue until they hold `bytes`. Without merging a frame has one chain.
    fn reserve(&mut self, bytes: usize) -> Result<Room, Violation> {
        while self.room.len() < bytes as u64 {
            let limit = if self.merge { usize::from(self.queue.size()) } else { 1 };
            if self.chains.len() >= limit {
                return Ok(Room::Never);
            }
            let Some(head) = self.queue.pop(&mut self.buffers)? else { return Ok(Room::Short) };
            let Buffers { readable, writable } = &self.buffers;
            if !readable.is_empty() || writable.len() < HEADER_SIZE as u64 {
                return Err(Violation::Framing(head));
            }
            if self.room.as_slice().len() + writable.as_slice().len() >= MAX_BUFFERS {
                self.queue.undo_pop();
                return Ok(Room::Never);
            }
            self.chains.push_back(Chain { head, length: writable.len() as usize });
            self.room.append(writable);
        }
        Ok(Room::Enough)
    }

    /// Puts `frame` into what is reserved, and the spill as far as that is too little.
    fn place(&mut self, frame: &[u8]) {
        let room = usize::try_from(self.room.len()).unwrap_or(usize::MAX);
        let (fits, rest) = frame.split_at(frame.len().min(room));
        // SAFETY: the queue keeps guest RAM mapped.
        unsafe { self.room.write_at(0, fits) };
        self.spill.clear();
        self.spill.extend_from_slice(rest);
        self.frame = Some(frame.len());
    }

    /// Reads a frame into what is reserved, and the spill if that could be too little.
    fn read(&mut self, tap: &Tap) -> io::Result<usize> {
        let room = self.room.len();
        let spills = room < MAX_FRAME as u64;
        self.spill.clear();
        if spills {
            self.spill.reserve_exact(MAX_FRAME);
            self.room.push(self.spill.as_mut_ptr(), MAX_FRAME);
        }
        // SAFETY: the buffers are guest RAM, which the queue keeps mapped, and the spill's
        // allocation, which nobody looks at before it is filled.
        let read = unsafe { tap.read(self.room.as_slice()) };
        if spills {
            self.room.pop();
        }
        let length = read?;
        if length < HEADER_SIZE {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let spilled = length.saturating_sub(usize::try_from(room).unwrap_or(usize::MAX));
        // SAFETY: so many bytes, at most `MAX_FRAME`, were written there by the kernel just now.
        unsafe { self.spill.set_len(spilled) };
        Ok(length)
    }

    /// Gives the frame of `length` bytes, which fits, to the guest. All of its buffers become
    /// visible at once: a driver that has seen the first expects the others to be there.
    fn deliver(&mut self, length: usize) {
        let mut count: u16 = 0;
        let mut left = length;
        for chain in &self.chains {
            count += 1;
            left = left.saturating_sub(chain.length);
            if left == 0 {
                break;
            }
        }
        // SAFETY: the queue keeps guest RAM mapped.
        unsafe {
            self.room.write_at((length - self.spill.len()) as u64, &self.spill);
            self.room.write_at(NUM_BUFFERS, &count.to_le_bytes());
        }
        left = length;
        for chain in self.chains.drain(..usize::from(count)) {
            let used = left.min(chain.length);
            // No longer than a frame.
            self.queue.put_used(chain.head, used as u32);
            self.room.advance(chain.length as u64);
            left -= used;
        }
        self.queue.publish_used();
        self.spill.clear();
        self.frame = None;
    }
}
