//! What is counted. Counters only grow; a reader takes differences.

use std::sync::atomic::{AtomicU64, Ordering};

/// A monotonic counter.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// A counter at zero.
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The count.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// One drive.
#[derive(Debug, Default)]
pub struct Block {
    /// Completed reads.
    pub read_count: Counter,
    /// Bytes read.
    pub read_bytes: Counter,
    /// Completed writes.
    pub write_count: Counter,
    /// Bytes written.
    pub write_bytes: Counter,
    /// Completed flushes.
    pub flush_count: Counter,
    /// Completed discards and write-zeroes.
    pub discard_count: Counter,
    /// Requests that ended in an error status.
    pub execute_fails: Counter,
    /// Times the guest broke the protocol and the device asked for a reset.
    pub needs_reset: Counter,
    /// Wakes by the guest's notification.
    pub queue_event_count: Counter,
    /// Times the rate limiter stopped the queue.
    pub rate_limiter_throttled_events: Counter,
    /// Times the drive's file was replaced.
    pub update_count: Counter,
}
