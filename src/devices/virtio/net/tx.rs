//! From the guest to the TAP (virtio 1.2 §5.1.6.2).

use super::{Budget, HEADER_SIZE, MAX_FRAME, Service, Tap};
use crate::devices::virtio::{Buffers, Position, Progress, RateLimiter, Violation, Virtqueue};
use crate::{metrics, warn_limited};

/// The transmit queue.
pub struct Transmitter {
    queue: Virtqueue,
    /// The frame at hand. Kept, so that the steady state allocates nothing.
    frame: Buffers,
}

impl Transmitter {
    /// Sends from `queue`.
    pub fn new(queue: Virtqueue) -> Self {
        Self { queue, frame: Buffers::default() }
    }

    /// How far the queue has got.
    pub fn position(&self) -> Position {
        self.queue.position(0)
    }

    /// Sends until there is nothing left, the limits are reached, which the timer ends, or the
    /// budget is spent.
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
            let Some(head) = self.queue.pop(&mut self.frame)? else { break };
            let Some(length) = self.check(head)? else {
                metrics.tx_malformed_frames.inc();
                metrics.tx_fails.inc();
                self.queue.add_used(head, 0);
                budget.spend(0);
                continue;
            };
            if !limiter.take(length as u64) {
                self.queue.undo_pop();
                metrics.tx_rate_limiter_throttled.inc();
                break;
            }
            self.send(tap, service.as_deref_mut(), length, metrics);
            self.queue.add_used(head, 0);
            budget.spend(length);
        }
        Ok(Progress::Idle)
    }

    /// Interrupts the guest if it wants to know what was sent.
    pub fn announce(&mut self) {
        self.queue.announce();
    }

    /// The length of the frame at hand without its header; `None` if no frame has such a length.
    /// What is in the header is left for the host's kernel to check, which copies it once.
    fn check(&self, head: u16) -> Result<Option<usize>, Violation> {
        // The limit is far below what a chain can add up to: 4 GiB.
        match usize::try_from(self.frame.readable.len()) {
            Ok(length) if length < HEADER_SIZE => Err(Violation::Framing(head)),
            Ok(length) if (HEADER_SIZE + 1..=MAX_FRAME).contains(&length) => Ok(Some(length - HEADER_SIZE)),
            _ => Ok(None),
        }
    }

    fn send(&mut self, tap: &Tap, service: Option<&mut Service>, length: usize, metrics: &metrics::Net) {
        // SAFETY: the buffers are fresh from the queue, which keeps guest RAM mapped.
        let sent = unsafe {
            match service {
                None => tap.write(self.frame.readable.as_slice()).map(drop),
                Some(service) => service.send(tap, &mut self.frame.readable),
            }
        };
        match sent {
            Ok(_) => {
                metrics.tx_packets_count.inc();
                metrics.tx_bytes_count.add(length as u64);
            }
            // It is lost, as on a wire: the interface is down or full, or the header makes no sense.
            Err(error) => {
                warn_limited!("a frame of {length} bytes was not taken by the TAP: {error}");
                metrics.tap_write_fails.inc();
                metrics.tx_fails.inc();
            }
        }
    }
}
