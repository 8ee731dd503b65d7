//! Rate limits: who waits, for what, and who does not.

use super::*;
use crate::config::{BucketUpdate, RateLimiterUpdate, TokenBucketConfig};

fn limit(size: u64, refill_time_ms: u64) -> RateLimiterConfig {
    RateLimiterConfig { bandwidth: TokenBucketConfig::new(size, refill_time_ms, 0), ops: None }
}

/// Three frames wait in each direction, of which one may pass and the next not before an hour is over.
fn throttled() -> Option<Cable> {
    let limits = NetConfig { rx_rate_limiter: limit(1, 3_600_000), tx_rate_limiter: limit(1, 3_600_000), ..config() };
    let cable = Cable::with(&limits, all)?;
    cable.post(16, 2048);
    for seed in 0..3 {
        cable.transmit(&frame(100, seed));
        cable.host.send(&frame(100, seed));
    }
    cable.guest.kick();
    Some(cable)
}

#[test]
fn throttled_directions_wait_for_their_timers_and_lose_nothing() {
    let limits = NetConfig { rx_rate_limiter: limit(1000, 100), tx_rate_limiter: limit(1000, 100), ..config() };
    let Some(cable) = Cable::with(&limits, all) else { return };
    cable.post(16, 2048);
    for seed in 0..4 {
        cable.transmit(&frame(1000, seed));
        cable.guest.notify();
        cable.host.send(&frame(1000, seed));
    }
    // One of each at once, the others not before their time, and then in order.
    cable.guest.kick();
    assert_eq!(cable.guest.select(TX).used().len(), 1);
    assert_eq!(cable.guest.select(RX).used().len(), 1);
    assert!(cable.metrics.tx_rate_limiter_throttled.get() > 0 && cable.metrics.rx_rate_limiter_throttled.get() > 0);
    assert_eq!(cable.guest.select(TX).await_used(3).len(), 3);
    assert_eq!(cable.guest.select(RX).await_used(3).len(), 3);
    assert!(cable.host.received() == (0..4).map(|seed| frame(1000, seed)).collect::<Vec<_>>());
    for index in 0..4 {
        assert!(cable.guest.get(slot(index) + 12, 1000) == frame(1000, index as u8));
    }
}

#[test]
fn limits_are_lifted_one_by_one_while_frames_wait() {
    let Some(cable) = throttled() else { return };
    let used = || (cable.guest.select(RX).used().len(), cable.guest.select(TX).used().len());
    assert_eq!(used(), (1, 1));
    let off = RateLimiterUpdate { bandwidth: BucketUpdate::Off, ops: BucketUpdate::Keep };
    let keep = RateLimiterUpdate::default();
    cable.update(&NetUpdate { iface_id: "eth0".into(), rx_rate_limiter: keep, tx_rate_limiter: off });
    assert_eq!(used(), (0, 2));
    cable.update(&NetUpdate { iface_id: "eth0".into(), rx_rate_limiter: off, tx_rate_limiter: keep });
    assert_eq!(used(), (2, 0));
}

/// Neither a kick nor a frame is looked at before there are tokens.
#[test]
fn a_throttled_direction_does_not_wake() {
    let Some(cable) = throttled() else { return };
    assert_eq!(cable.guest.turn(Duration::from_millis(100)), 0);
}
