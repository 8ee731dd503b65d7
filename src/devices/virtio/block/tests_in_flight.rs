//! Stories of requests that take their time, and of what happens meanwhile.
//!
//! The host's disk is a pipe here: a read is in flight until somebody writes to it.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::tests::*;
use super::*;
use crate::config::{RateLimiterConfig, TokenBucketConfig};
use crate::devices::virtio::Device;
use crate::devices::virtio::testing::{Guest, readable, writable};

/// A drive whose reads wait for the pipe; `None`, visibly, where the host has no io_uring.
fn slow_drive() -> Option<(Drive, File)> {
    if !engines().contains(&IoEngine::Async) {
        return None;
    }
    let drive = Drive::of_size(&drive(IoEngine::Async), 1 << 20);
    let (reader, writer) = std::io::pipe().unwrap();
    let reader = File::from(OwnedFd::from(reader));
    drive.update(|block| block.engine.set_file(&reader)).unwrap();
    Some((drive, File::from(OwnedFd::from(writer))))
}

fn offer_read(drive: &Drive) -> u16 {
    drive.header(IN, 0);
    drive.guest.put(STATUS, &[0xee]);
    let head = drive.guest.chain(&[readable(HEADER, 16), writable(DATA, 512), writable(STATUS, 1)]);
    drive.guest.offer(head);
    head
}

/// A moment in which nothing must happen.
fn a_while() -> Duration {
    Duration::from_millis(50)
}

#[test]
fn a_reset_waits_for_what_is_in_flight_and_leaves_memory_alone_afterwards() {
    let Some((drive, mut disk)) = slow_drive() else { return };
    offer_read(&drive);
    drive.guest.kick();
    let mmio = Arc::clone(&drive.guest.mmio);
    let vcpu = thread::spawn(move || mmio.write(0x70, &[0; 4]));
    let start = Instant::now();
    while start.elapsed() < a_while() {
        drive.guest.turn(Duration::from_millis(10));
        assert!(!vcpu.is_finished(), "the read may still write to guest memory");
    }
    assert_ne!(drive.guest.status(), 0);
    // The device is deaf to everything but another reset.
    drive.guest.set_status(0xff);
    offer_read(&drive);
    drive.guest.kick();
    let mmio = Arc::clone(&drive.guest.mmio);
    let another_vcpu = thread::spawn(move || mmio.write(0x70, &[0; 4]));

    disk.write_all(&[0xab; 512]).unwrap();
    while !vcpu.is_finished() || !another_vcpu.is_finished() {
        assert!(start.elapsed() < Duration::from_secs(60));
        drive.guest.turn(Duration::from_millis(10));
    }
    vcpu.join().unwrap();
    another_vcpu.join().unwrap();
    assert_eq!(drive.guest.status(), 0);
    assert!(drive.guest.used().is_empty(), "a driver that resets is told nothing more");
    assert_eq!(drive.guest.get(STATUS, 1), [0xee]);
    assert_eq!(drive.guest.interrupt(), 0);

    drive.guest.boot(drive.guest.offered());
    let head = offer_read(&drive);
    drive.guest.notify();
    disk.write_all(&[0xcd; 512]).unwrap();
    assert_eq!(drive.guest.await_used(1), [(head, 513)]);
    assert_eq!(drive.guest.get(DATA, 512), [0xcd; 512]);
}

#[test]
fn a_reset_that_finds_nothing_in_flight_returns_at_once() {
    let Some((drive, _disk)) = slow_drive() else { return };
    drive.guest.set_status(0);
    assert_eq!(drive.guest.status(), 0);
}

/// A change waits for the read that the first reset waits for; the second finds nothing in flight.
#[test]
fn two_resets_during_a_change_of_the_drive_both_return() {
    let Some((drive, mut disk)) = slow_drive() else { return };
    let reset = || {
        let mmio = Arc::clone(&drive.guest.mmio);
        thread::spawn(move || mmio.write(0x70, &[0; 4]))
    };
    // Which of the two threads has the device first after the change is chance.
    for _ in 0..200 {
        drive.guest.boot(drive.guest.offered());
        offer_read(&drive);
        drive.guest.kick();
        let first = reset();
        while drive.guest.turn(a_while()) == 0 {}
        disk.write_all(&[0xab; 512]).unwrap();
        let mut second = Vec::new();
        drive.update(|_| {
            second = (0..4).map(|_| reset()).collect();
            thread::sleep(Duration::from_micros(300));
        });
        let start = Instant::now();
        while !first.is_finished() || second.iter().any(|vcpu| !vcpu.is_finished()) {
            assert!(start.elapsed() < Duration::from_secs(10), "a vCPU sleeps for ever");
            drive.guest.turn(Duration::from_millis(1));
        }
    }
}

#[test]
fn a_device_that_broke_with_requests_in_flight_resets_like_any_other() {
    let Some((drive, mut disk)) = slow_drive() else { return };
    offer_read(&drive);
    drive.guest.offer(300);
    drive.guest.kick();
    assert_eq!(drive.guest.status() & 64, 64);
    let mmio = Arc::clone(&drive.guest.mmio);
    let vcpu = thread::spawn(move || mmio.write(0x70, &[0; 4]));
    disk.write_all(&[0xab; 512]).unwrap();
    let start = Instant::now();
    while !vcpu.is_finished() {
        assert!(start.elapsed() < Duration::from_secs(60));
        drive.guest.turn(Duration::from_millis(10));
    }
    assert!(drive.guest.used().is_empty());
}

#[test]
fn a_pause_waits_for_what_is_in_flight_and_starts_nothing() {
    let Some((drive, mut disk)) = slow_drive() else { return };
    let head = offer_read(&drive);
    drive.guest.kick();
    let host = thread::spawn(move || {
        thread::sleep(a_while());
        disk.write_all(&[0xab; 512]).unwrap();
        disk
    });
    drive.guest.mmio.quiesce();
    let mut disk = host.join().unwrap();
    assert_eq!(drive.guest.used(), [(head, 513)]);
    assert_eq!(drive.guest.interrupt(), 1, "the guest is told, though it does not run");

    let head = offer_read(&drive);
    drive.guest.kick();
    disk.write_all(&[0xcd; 512]).unwrap();
    drive.guest.turn(a_while());
    assert!(drive.guest.used().is_empty(), "a paused device works");
    drive.guest.mmio.resume();
    assert_eq!(drive.guest.await_used(1), [(head, 513)]);
}

#[test]
fn a_new_file_waits_for_what_is_in_flight_on_the_old_one() {
    let Some((drive, mut disk)) = slow_drive() else { return };
    offer_read(&drive);
    drive.guest.kick();
    let host = thread::spawn(move || {
        thread::sleep(a_while());
        disk.write_all(&[0xab; 512]).unwrap();
    });
    let file = tempfile::tempfile().unwrap();
    drive.update(|block| block.update_backend(file)).unwrap();
    host.join().unwrap();
    assert_eq!(drive.guest.used().len(), 1);
    assert_eq!(drive.guest.get(DATA, 512), [0xab; 512]);
}

#[test]
fn new_limits_wait_for_nothing() {
    let Some((drive, mut disk)) = slow_drive() else { return };
    let head = offer_read(&drive);
    drive.guest.kick();
    let (now, time_for_it) = std::sync::mpsc::channel();
    let host = thread::spawn(move || {
        let _ = time_for_it.recv_timeout(Duration::from_secs(1));
        disk.write_all(&[0xab; 512]).unwrap();
    });
    drive.update_rate_limiter(&RateLimiterUpdate::default());
    assert!(drive.guest.used().is_empty(), "the disk had to answer first");
    now.send(()).unwrap();
    assert_eq!(drive.guest.await_used(1), [(head, 513)]);
    host.join().unwrap();
}

#[test]
fn a_drive_that_goes_away_waits_for_the_kernel() {
    let Some((drive, mut disk)) = slow_drive() else { return };
    offer_read(&drive);
    drive.guest.kick();
    let memory = drive.guest.memory.clone();
    let start = Instant::now();
    let host = thread::spawn(move || {
        thread::sleep(a_while());
        disk.write_all(&[0xab; 512]).unwrap();
    });
    drop(drive);
    assert!(start.elapsed() >= a_while(), "guest memory was let go while the kernel writes to it");
    host.join().unwrap();
    drop(memory);
}

#[test]
fn a_slow_disk_does_not_hold_up_another() {
    let Some((slow, _disk)) = slow_drive() else { return };
    let quick = Drive::of_size(&drive(IoEngine::Async), 1 << 20);
    offer_read(&slow);
    slow.guest.kick();
    assert!(slow.guest.used().is_empty());
    assert_eq!(quick.request(IN, 0, &[writable(DATA, 512)]), (OK, 513));
    drop(_disk); // end of file: the read fails
    assert_eq!(slow.guest.await_used(1).len(), 1);
    assert_eq!(slow.guest.get(STATUS, 1), [IOERR]);
}

#[test]
fn more_requests_than_the_ring_holds_wait_in_the_queue() {
    let Some((drive, mut disk)) = slow_drive() else { return };
    // One descriptor chain, offered over and over: the guest does not wait for it to be used.
    let head = offer_read(&drive);
    for _ in 1..200 {
        drive.guest.offer(head);
    }
    drive.guest.kick();
    for _ in 0..100 {
        drive.guest.offer(head);
    }
    drive.guest.kick();
    assert!(drive.guest.used().is_empty());
    let host = thread::spawn(move || {
        for _ in 0..300 {
            disk.write_all(&[0xab; 512]).unwrap();
        }
    });
    assert_eq!(drive.guest.await_used(300), vec![(head, 513); 300]);
    host.join().unwrap();
}

#[test]
fn one_wake_does_a_bounded_number_of_requests_and_the_rest_follow() {
    let drive = Drive::of_size(&drive(IoEngine::Sync), 1 << 20);
    let head = offer_read(&drive);
    for _ in 1..150 {
        drive.guest.offer(head);
    }
    drive.guest.notify();
    let mut wakes = Vec::new();
    while drive.guest.turn(Duration::ZERO) > 0 {
        wakes.push(drive.guest.used().len());
    }
    assert_eq!(wakes, [64, 64, 22]);
}

#[test]
fn one_wake_does_a_bounded_number_of_bytes() {
    let drive = Drive::of_size(&drive(IoEngine::Sync), 4 << 20);
    drive.header(IN, 0);
    let head = drive.guest.chain(&[readable(HEADER, 16), writable(DATA, 4 << 20), writable(STATUS, 1)]);
    for _ in 0..6 {
        drive.guest.offer(head);
    }
    drive.guest.notify();
    drive.guest.turn(Duration::ZERO);
    assert_eq!(drive.guest.used().len(), 4);
    drive.guest.kick();
    assert_eq!(drive.guest.used().len(), 2);
}

#[test]
fn one_wake_does_a_bounded_part_of_a_request_that_is_in_many_pieces() {
    for engine in engines().into_iter().filter(|engine| *engine == IoEngine::Async) {
        let upper = tempfile::tempfile().unwrap();
        let overlay = OverlayFiles { upper, lasting: None, fresh: false, lower: None };
        let base = tempfile::tempfile().unwrap();
        base.set_len(1 << 20).unwrap();
        let backend = Backend { file: base, overlay: Some(overlay) };
        let metrics = Arc::new(metrics::Block::default());
        let mut block = Block::new(&drive(engine), backend, metrics).unwrap();
        (0..2048).step_by(2).for_each(|sector| block.disk.wrote(sector * 512, 512));
        let guest = Guest::booted(Device::Block(Box::new(block)));
        guest.put(HEADER, &[0; 16]);
        let head = guest.chain(&[readable(HEADER, 16), writable(DATA, 1 << 20), writable(STATUS, 1)]);
        guest.offer(head);
        guest.notify();
        guest.turn(Duration::ZERO);
        assert!(guest.used().is_empty(), "2048 reads in one wake");
        assert_eq!(guest.await_used(1), [(head, (1 << 20) + 1)]);
        assert_eq!(guest.get(STATUS, 1), [OK]);
    }
}

#[test]
fn a_request_for_more_than_a_wake_should_do_fails() {
    for engine in engines() {
        let drive = Drive::of_size(&drive(engine), 64 << 20);
        let mut buffers = vec![writable(DATA, 4 << 20); 8];
        assert_eq!(drive.request(IN, 0, &buffers), (OK, (32 << 20) + 1));
        buffers.push(writable(DATA, 512));
        assert_eq!(drive.request(IN, 0, &buffers), (IOERR, 1));
        let buffers: Vec<_> = buffers.iter().map(|buffer| readable(buffer.address, buffer.length)).collect();
        assert_eq!(drive.request(OUT, 0, &buffers), (IOERR, 1));
    }
}

fn cpu_time() -> Duration {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the structure is the size the kernel expects.
    let usage = unsafe {
        assert_eq!(libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr()), 0);
        usage.assume_init()
    };
    let time = |t: libc::timeval| Duration::new(t.tv_sec as u64, t.tv_usec as u32 * 1000);
    time(usage.ru_utime) + time(usage.ru_stime)
}

#[test]
fn a_rate_limited_drive_takes_its_time_and_sleeps_meanwhile() {
    for engine in engines() {
        let ops = TokenBucketConfig { size: 4, refill_time_ms: 80, one_time_burst: 2 };
        let limits = RateLimiterConfig { ops: Some(ops), bandwidth: None };
        let drive = Drive::of_size(&DriveConfig { rate_limiter: limits, ..drive(engine) }, 1 << 20);
        let head = offer_read(&drive);
        for _ in 1..16 {
            drive.guest.offer(head);
        }
        let start = Instant::now();
        drive.guest.notify();
        let mut used = 0;
        while used < 16 {
            assert!(start.elapsed() < Duration::from_secs(60));
            drive.guest.turn(Duration::from_secs(1));
            used += drive.guest.used().len();
            // A guest that keeps knocking is not heard before the time has come.
            drive.guest.notify();
        }
        // 2 burst and 4 at once, then 10 more at 20 ms each.
        assert!(start.elapsed() >= Duration::from_millis(195), "{:?}", start.elapsed());
        // A late wake finds up to four tokens: ten requests are at least three waits.
        assert!(drive.metrics.rate_limiter_throttled_events.get() >= 3);
    }
}

#[test]
fn a_throttled_drive_uses_no_processor() {
    let ops = TokenBucketConfig { size: 1, refill_time_ms: 300, one_time_burst: 0 };
    let limits = RateLimiterConfig { ops: Some(ops), bandwidth: None };
    let drive = Drive::of_size(&DriveConfig { rate_limiter: limits, ..drive(IoEngine::Sync) }, 1 << 20);
    let head = offer_read(&drive);
    drive.guest.offer(head);
    let start = Instant::now();
    drive.guest.kick();
    assert_eq!(drive.guest.used().len(), 1);
    let cpu = cpu_time();
    assert_eq!(drive.guest.turn(Duration::from_secs(60)), 1, "the timer");
    assert!(start.elapsed() >= Duration::from_millis(250));
    assert_eq!(drive.guest.used().len(), 1);
    assert!(cpu_time() - cpu < start.elapsed() / 3);
}

#[test]
fn a_request_larger_than_its_bucket_passes_and_is_paid_for() {
    let bandwidth = TokenBucketConfig { size: 4096, refill_time_ms: 20, one_time_burst: 0 };
    let limits = RateLimiterConfig { bandwidth: Some(bandwidth), ops: None };
    let drive = Drive::of_size(&DriveConfig { rate_limiter: limits, ..drive(IoEngine::Sync) }, 1 << 20);
    let start = Instant::now();
    assert_eq!(drive.request(IN, 0, &[writable(DATA, 8 * 4096)]), (OK, 8 * 4096 + 1));
    assert_eq!(drive.metrics.rate_limiter_throttled_events.get(), 0, "a full bucket lets it through");
    assert_eq!(drive.request(IN, 0, &[writable(DATA, 512)]), (OK, 513));
    assert!(start.elapsed() >= Duration::from_millis(140), "seven buckets of debt: {:?}", start.elapsed());
}

#[test]
fn zeroes_are_paid_for_like_data_and_discards_are_free() {
    let bandwidth = TokenBucketConfig { size: 4096, refill_time_ms: 20, one_time_burst: 0 };
    let limits = RateLimiterConfig { bandwidth: Some(bandwidth), ops: None };
    let drive = Drive::of_size(&DriveConfig { rate_limiter: limits, ..drive(IoEngine::Sync) }, 1 << 20);
    drive.segment(0, 0, 64, 0);
    for _ in 0..3 {
        assert_eq!(drive.request(DISCARD, 0, &[readable(DATA, 16)]), (OK, 1));
    }
    let start = Instant::now();
    assert_eq!(drive.request(WRITE_ZEROES, 0, &[readable(DATA, 16)]), (OK, 1));
    assert_eq!(drive.metrics.rate_limiter_throttled_events.get(), 0, "a full bucket lets it through");
    assert_eq!(drive.request(IN, 0, &[writable(DATA, 512)]), (OK, 513));
    assert!(start.elapsed() >= Duration::from_millis(140), "seven buckets of debt: {:?}", start.elapsed());
}

#[test]
fn lifting_the_limits_wakes_a_throttled_drive() {
    use crate::config::BucketUpdate;
    let ops = TokenBucketConfig { size: 1, refill_time_ms: 86_400_000, one_time_burst: 0 };
    let limits = RateLimiterConfig { ops: Some(ops), bandwidth: None };
    let drive = Drive::of_size(&DriveConfig { rate_limiter: limits, ..drive(IoEngine::Sync) }, 1 << 20);
    let head = offer_read(&drive);
    drive.guest.offer(head);
    drive.guest.kick();
    assert_eq!(drive.guest.used().len(), 1);
    let lift = RateLimiterUpdate { bandwidth: BucketUpdate::Keep, ops: BucketUpdate::Off };
    drive.update_rate_limiter(&lift);
    assert_eq!(drive.guest.used().len(), 1);
}

#[test]
fn a_drive_paused_while_throttled_goes_on_after_the_pause() {
    let ops = TokenBucketConfig { size: 1, refill_time_ms: 20, one_time_burst: 0 };
    let limits = RateLimiterConfig { ops: Some(ops), bandwidth: None };
    let drive = Drive::of_size(&DriveConfig { rate_limiter: limits, ..drive(IoEngine::Sync) }, 1 << 20);
    let head = offer_read(&drive);
    drive.guest.offer(head);
    drive.guest.kick();
    drive.guest.mmio.quiesce();
    assert_eq!(drive.guest.turn(Duration::from_secs(60)), 1, "the timer fires during the pause");
    assert_eq!(drive.guest.used().len(), 1);
    drive.guest.mmio.resume();
    assert_eq!(drive.guest.await_used(1).len(), 1);
}

#[test]
fn a_large_write_zeroes_ends_a_wake() {
    let drive = Drive::of_size(&drive(IoEngine::Sync), 32 << 20);
    drive.header(WRITE_ZEROES, 0);
    drive.segment(0, 0, MAX_ZEROES_SECTORS, 1);
    let head = drive.guest.chain(&[readable(HEADER, 16), readable(DATA, 16), writable(STATUS, 1)]);
    for _ in 0..3 {
        drive.guest.offer(head);
    }
    drive.guest.notify();
    for _ in 0..3 {
        drive.guest.turn(Duration::ZERO);
        assert_eq!(drive.guest.used().len(), 1);
    }
}
