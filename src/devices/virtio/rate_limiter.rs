//! Token buckets that hold a device to a bandwidth and a rate of operations.
//!
//! Without a bucket nothing is done: no clock is read. A device that runs out of tokens arms a
//! timer and sleeps; while it sleeps, notifications cost one comparison.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

use crate::config::{RateLimiterConfig, RateLimiterUpdate, TokenBucketConfig};

/// Longest refill time in ns (292 years): keeps `size × refill time` within 127 bits.
const MAX_REFILL_NS: u64 = i64::MAX as u64;

/// Tokens that come back at a steady rate. Exact: the level is kept in units of which one token
/// has as many as the refill time has nanoseconds, so a nanosecond brings `size` of them and
/// nothing is ever rounded.
///
/// A cost greater than the bucket can ever hold is granted when the bucket is full and leaves it
/// in debt: it passes at the configured rate instead of never.
#[derive(Debug)]
pub struct TokenBucket {
    size: u64,
    refill_ns: u64,
    /// Units; negative while in debt.
    level: i128,
    /// Tokens spent first and never refilled.
    burst: u64,
    /// When the level was true, in ns of the caller's clock.
    updated: u64,
}

impl TokenBucket {
    /// A full bucket at `now`, in nanoseconds from any origin.
    pub fn new(config: &TokenBucketConfig, now: u64) -> Self {
        let refill_ns = config.refill_time_ms.saturating_mul(1_000_000).clamp(1, MAX_REFILL_NS);
        let size = config.size;
        let level = i128::from(size) * i128::from(refill_ns);
        Self { size, refill_ns, level, burst: config.one_time_burst, updated: now }
    }

    /// Takes `cost` tokens if they are there at `now`, in nanoseconds.
    pub fn admit(&mut self, cost: u64, now: u64) -> bool {
        self.refill(now);
        let admitted = self.wait(cost) == 0;
        if admitted {
            self.take(cost);
        }
        admitted
    }

    fn full(&self) -> i128 {
        i128::from(self.size) * i128::from(self.refill_ns)
    }

    fn refill(&mut self, now: u64) {
        let elapsed = now.saturating_sub(self.updated);
        self.updated = self.updated.max(now);
        // Both factors fit 64 bits, but their product may use the sign bit.
        let gain = i128::try_from(u128::from(elapsed) * u128::from(self.size)).unwrap_or(i128::MAX);
        self.level = self.level.saturating_add(gain).min(self.full());
    }

    /// Nanoseconds until `cost` tokens can be taken; 0 if now.
    fn wait(&self, cost: u64) -> u64 {
        let beyond_burst = cost.saturating_sub(self.burst).min(self.size);
        let needed = i128::from(beyond_burst) * i128::from(self.refill_ns);
        let missing = needed.saturating_sub(self.level);
        if missing <= 0 {
            return 0;
        }
        let ns = missing.unsigned_abs().div_ceil(u128::from(self.size.max(1)));
        u64::try_from(ns).unwrap_or(u64::MAX)
    }

    /// Takes `cost` tokens, the burst first.
    fn take(&mut self, cost: u64) {
        let from_burst = cost.min(self.burst);
        self.burst -= from_burst;
        let units = i128::from(cost - from_burst) * i128::from(self.refill_ns);
        self.level = self.level.saturating_sub(units);
    }
}

/// The two buckets of one direction of one device; all time comes from the caller.
#[derive(Debug, Default)]
struct Buckets {
    bandwidth: Option<TokenBucket>,
    ops: Option<TokenBucket>,
}

impl Buckets {
    fn any(&self) -> bool {
        self.bandwidth.is_some() || self.ops.is_some()
    }

    /// Takes one operation of `bytes`, or nothing at all and says how many ns to wait.
    fn take(&mut self, bytes: u64, now: u64) -> Result<(), u64> {
        let mut wait = 0;
        for (bucket, cost) in [(&mut self.bandwidth, bytes), (&mut self.ops, 1)] {
            if let Some(bucket) = bucket {
                bucket.refill(now);
                wait = wait.max(bucket.wait(cost));
            }
        }
        if wait > 0 {
            return Err(wait);
        }
        for (bucket, cost) in [(&mut self.bandwidth, bytes), (&mut self.ops, 1)] {
            if let Some(bucket) = bucket {
                bucket.take(cost);
            }
        }
        Ok(())
    }

    fn update(&mut self, update: &RateLimiterUpdate, now: u64) {
        update.bandwidth.apply(&mut self.bandwidth, |config| TokenBucket::new(&config, now));
        update.ops.apply(&mut self.ops, |config| TokenBucket::new(&config, now));
    }
}

/// The limits of one direction of one device, with the timer that ends a throttling.
#[derive(Debug)]
pub struct RateLimiter {
    buckets: Buckets,
    timer: TimerFd,
    throttled: bool,
    /// Zero of the clock the buckets see.
    epoch: Instant,
}

impl RateLimiter {
    /// Full buckets as `config` says.
    ///
    /// # Errors
    ///
    /// When the process has no descriptor left for the timer.
    pub fn new(config: &RateLimiterConfig) -> io::Result<Self> {
        let buckets = Buckets {
            bandwidth: config.bandwidth.as_ref().map(|bucket| TokenBucket::new(bucket, 0)),
            ops: config.ops.as_ref().map(|bucket| TokenBucket::new(bucket, 0)),
        };
        Ok(Self { buckets, timer: TimerFd::new()?, throttled: false, epoch: Instant::now() })
    }

    /// The timer: when it fires, edge-triggered, call [`Self::on_timer`].
    pub fn timer_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Whether the device waits for the timer.
    pub fn is_throttled(&self) -> bool {
        self.throttled
    }

    /// Takes one operation of `bytes` out of the buckets. If it cannot, takes nothing, arms the
    /// timer, and the device is throttled until it fires.
    pub fn take(&mut self, bytes: u64) -> bool {
        if !self.buckets.any() {
            return true;
        }
        let Err(wait) = self.buckets.take(bytes, self.now()) else { return true };
        // A timer that cannot be set must not leave the device asleep for ever.
        self.throttled = self.timer.reset(Duration::from_nanos(wait), None).is_ok();
        !self.throttled
    }

    /// The timer fired: the device may try again.
    pub fn on_timer(&mut self) {
        self.throttled = false;
    }

    /// Changes the buckets; what is replaced starts full. The device may try again.
    pub fn update(&mut self, update: &RateLimiterUpdate) {
        let now = self.now();
        self.buckets.update(update, now);
        self.throttled = false;
    }

    fn now(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::BucketUpdate;

    const MS: u64 = 1_000_000;
    const DAY_MS: u64 = 86_400_000;

    fn bucket(size: u64, refill_time_ms: u64, one_time_burst: u64) -> TokenBucket {
        TokenBucket::new(&TokenBucketConfig { size, refill_time_ms, one_time_burst }, 0)
    }

    /// Takes `cost` as soon as may be, at `now` or later; returns when that was.
    fn take(bucket: &mut TokenBucket, cost: u64, now: u64) -> u64 {
        bucket.refill(now);
        let at = now.saturating_add(bucket.wait(cost));
        bucket.refill(at);
        assert_eq!(bucket.wait(cost), 0, "the wait was long enough");
        bucket.take(cost);
        at
    }

    #[test]
    fn tokens_come_back_at_the_configured_rate() {
        let mut bucket = bucket(100, 1000, 0);
        assert_eq!(take(&mut bucket, 100, 0), 0);
        assert_eq!(take(&mut bucket, 1, 0), 10 * MS);
        assert_eq!(take(&mut bucket, 50, 10 * MS), 510 * MS);
        // A long rest fills the bucket, and no more than that.
        assert_eq!(take(&mut bucket, 100, 10_000 * MS), 10_000 * MS);
        assert_eq!(take(&mut bucket, 1, 10_000 * MS), 10_010 * MS);
    }

    #[test]
    fn the_burst_is_spent_first_and_never_comes_back() {
        let mut bucket = bucket(10, 10, 5);
        assert_eq!(take(&mut bucket, 15, 0), 0);
        assert_eq!(take(&mut bucket, 1, 0), MS);
        assert_eq!(take(&mut bucket, 10, 1000 * MS), 1000 * MS);
        assert_eq!(take(&mut bucket, 5, 1000 * MS), 1005 * MS);
    }

    #[test]
    fn a_cost_larger_than_the_bucket_leaves_a_debt() {
        let mut bucket = bucket(10, 10, 0);
        assert_eq!(take(&mut bucket, 100, 0), 0);
        assert_eq!(take(&mut bucket, 1, 0), 91 * MS);
        // Not full now: it has to wait until it is.
        assert_eq!(take(&mut bucket, 100, 91 * MS), 101 * MS);
    }

    #[test]
    fn a_clock_that_stands_still_or_goes_back_gives_nothing_away() {
        let mut bucket = bucket(10, 10, 0);
        assert_eq!(take(&mut bucket, 10, 500 * MS), 500 * MS);
        bucket.refill(100 * MS);
        bucket.refill(500 * MS);
        assert_eq!(bucket.wait(1), MS);
    }

    #[test]
    fn extremes_neither_overflow_nor_hang() {
        for size in [1, 2, 1 << 32, 1 << 63, u64::MAX] {
            for refill in [0, 1, DAY_MS, u64::MAX / MS, u64::MAX] {
                let mut bucket = bucket(size, refill, u64::MAX);
                let mut now = 0u64;
                for cost in [0, 1, u32::MAX.into(), size, u64::MAX, u64::MAX] {
                    bucket.refill(now);
                    now = now.saturating_add(bucket.wait(cost));
                    bucket.refill(now);
                    assert!(bucket.wait(cost) == 0 || now == u64::MAX, "{size} {refill} {cost}");
                    bucket.take(cost);
                }
            }
        }
    }

    #[test]
    fn both_buckets_are_charged_or_neither() {
        let config = |size| Some(TokenBucketConfig { size, refill_time_ms: 100, one_time_burst: 0 });
        let limits = RateLimiterConfig { bandwidth: config(1000), ops: config(1) };
        let new = |bucket: &TokenBucketConfig| TokenBucket::new(bucket, 0);
        let mut buckets = Buckets { bandwidth: limits.bandwidth.as_ref().map(new), ops: limits.ops.as_ref().map(new) };
        assert_eq!(buckets.take(400, 0), Ok(()));
        assert_eq!(buckets.take(400, 0), Err(100 * MS), "out of operations");
        assert_eq!(buckets.take(1000, 40 * MS), Err(60 * MS), "the refused one cost no bytes");
        assert_eq!(buckets.take(1000, 100 * MS), Ok(()));
        buckets.update(&RateLimiterUpdate { ops: BucketUpdate::Off, ..RateLimiterUpdate::default() }, 100 * MS);
        assert_eq!(buckets.take(10, 100 * MS), Err(MS), "the other bucket stays as it was");
        let again = BucketUpdate::Set(TokenBucketConfig { size: 5, refill_time_ms: 1, one_time_burst: 0 });
        buckets.update(&RateLimiterUpdate { bandwidth: again, ..RateLimiterUpdate::default() }, 100 * MS);
        assert_eq!(buckets.take(5, 100 * MS), Ok(()), "a new bucket is full");
    }

    proptest! {
        /// Whatever is asked when, what was granted by any time is at most the burst, a full
        /// bucket, what came back since, and the part of one request that is larger than a bucket.
        #[test]
        fn no_more_is_granted_than_was_configured(
            size in 1u64..=1 << 63,
            refill in 1u64..=DAY_MS,
            burst in 0u64..1 << 40,
            requests in prop::collection::vec((1u64..1 << 40, 0u64..1 << 50), 1..40),
        ) {
            let mut bucket = bucket(size, refill, burst);
            let (mut now, mut granted, mut largest) = (0u64, 0u128, 0u64);
            for (cost, pause) in requests {
                now = take(&mut bucket, cost, now + pause);
                granted += u128::from(cost);
                largest = largest.max(cost);
                let refilled = u128::from(now).saturating_mul(u128::from(size)) / u128::from(refill * MS);
                let debt = u128::from(largest.saturating_sub(size));
                prop_assert!(granted <= u128::from(burst) + u128::from(size) + refilled + debt);
            }
        }

        /// A device that always asks gets all of the rate.
        #[test]
        fn all_that_was_configured_is_granted(size in 1u64..1 << 40, refill in 1u64..=DAY_MS, cost in 1u64..1 << 32) {
            let mut bucket = bucket(size, refill, 0);
            let mut now = 0;
            for _ in 0..50 {
                now = take(&mut bucket, cost, now);
            }
            // 50 costs, less the full bucket at the start; a debt is on the clock already.
            let paid = u128::from(cost) * 50 - u128::from(cost.max(size).min(cost * 50));
            let at_most = paid * u128::from(refill * MS) / u128::from(size) + 50;
            prop_assert!(u128::from(now) <= at_most + u128::from(cost) * u128::from(refill * MS) / u128::from(size));
        }
    }
}
