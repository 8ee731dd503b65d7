//! Stories of drivers that follow the protocol, and of those that do not.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_mmio as reg;
use vm_memory::{Bytes, GuestAddress};

use super::block::Block;
use super::testing::*;
use super::{Device, INTERRUPT_CONFIG_CHANGE, INTERRUPT_USED_BUFFER};
use crate::config::{CacheType, DriveConfig, IoEngine, RateLimiterConfig};
use crate::metrics;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;
const FAILED: u32 = 128;
const RUNNING: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;

/// The simplest device there is: a drive of 1 MiB.
pub(super) fn device() -> (Device, Arc<metrics::Block>) {
    let config = DriveConfig {
        drive_id: "d".to_owned(),
        is_root_device: false,
        path_on_host: "/d".into(),
        is_read_only: false,
        partuuid: None,
        cache_type: CacheType::Unsafe,
        io_engine: IoEngine::Sync,
        rate_limiter: RateLimiterConfig::default(),
        discard: false,
        overlay: None,
    };
    let metrics = Arc::new(metrics::Block::default());
    (Device::Block(Box::new(Block::new(&config, file(1 << 20), Arc::clone(&metrics)).unwrap())), metrics)
}

fn guest() -> Guest {
    Guest::new(device().0)
}

/// Reads a sector and says whether the device answered.
fn works(guest: &Guest) -> bool {
    guest.put(BUFFERS, &[0; 16]);
    let head = guest.chain(&[readable(BUFFERS, 16), writable(BUFFERS + 0x1000, 512), writable(BUFFERS + 0x2000, 1)]);
    guest.offer(head);
    guest.kick();
    guest.used() == [(head, 513)]
}

/// The device gave up, said so once, and stays quiet until it is reset.
fn assert_broken(guest: &Guest) {
    assert_eq!(guest.status() & NEEDS_RESET, NEEDS_RESET);
    assert_eq!(guest.interrupt() & INTERRUPT_CONFIG_CHANGE, INTERRUPT_CONFIG_CHANGE);
    assert!(guest.used().is_empty());
    guest.kick();
    assert!(!works(guest));
    assert_eq!(guest.interrupt(), 0);
    guest.boot(guest.offered());
    assert_eq!(guest.status(), RUNNING);
    assert!(works(guest));
}

#[test]
fn registers_say_what_the_device_is() {
    let guest = guest();
    assert_eq!(guest.read(reg::VIRTIO_MMIO_MAGIC_VALUE), 0x7472_6976);
    assert_eq!(guest.read(reg::VIRTIO_MMIO_VERSION), 2);
    assert_eq!(guest.read(reg::VIRTIO_MMIO_DEVICE_ID), 2);
    assert_eq!(guest.status(), 0);
    assert_eq!(guest.offered() & (VERSION_1 | EVENT_IDX | INDIRECT_DESC), VERSION_1 | EVENT_IDX | INDIRECT_DESC);
    assert_eq!(guest.read(reg::VIRTIO_MMIO_QUEUE_NUM_MAX), 256);
    guest.write(reg::VIRTIO_MMIO_QUEUE_SEL, 1);
    assert_eq!(guest.read(reg::VIRTIO_MMIO_QUEUE_NUM_MAX), 0);
    for register in [reg::VIRTIO_MMIO_SHM_LEN_LOW, reg::VIRTIO_MMIO_SHM_LEN_HIGH] {
        assert_eq!(guest.read(register), u32::MAX);
    }
}

#[test]
fn a_driver_that_follows_the_order_gets_a_running_device() {
    let guest = guest();
    guest.boot(guest.offered());
    assert_eq!(guest.status(), RUNNING);
    assert!(works(&guest));
    assert_eq!(guest.interrupt(), INTERRUPT_USED_BUFFER);
    assert_eq!(guest.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS), 0);
}

#[test]
fn status_bits_come_in_order_and_only_a_reset_clears_them() {
    let guest = guest();
    for early in [DRIVER, FEATURES_OK, DRIVER_OK, NEEDS_RESET] {
        guest.set_status(early);
        assert_eq!(guest.status(), 0);
    }
    guest.set_status(ACKNOWLEDGE);
    guest.set_status(ACKNOWLEDGE | FEATURES_OK);
    assert_eq!(guest.status(), ACKNOWLEDGE);
    guest.prepare(guest.offered());
    for fewer in [DRIVER_OK, FEATURES_OK | DRIVER_OK, RUNNING & !DRIVER] {
        guest.set_status(fewer);
        assert_eq!(guest.status(), RUNNING & !DRIVER_OK);
    }
    guest.set_status(RUNNING);
    for fewer in [ACKNOWLEDGE, RUNNING & !DRIVER_OK, RUNNING & !FEATURES_OK, DRIVER_OK] {
        guest.set_status(fewer);
        assert_eq!(guest.status(), RUNNING);
    }
    assert!(works(&guest));
    guest.set_status(RUNNING | FAILED);
    assert_eq!(guest.status(), RUNNING | FAILED);
    assert!(!works(&guest));
    guest.set_status(0);
    assert_eq!(guest.status(), 0);
}

#[test]
fn features_are_kept_only_if_all_were_offered_and_version_1_is_among_them() {
    let guest = guest();
    let offered = guest.offered();
    for (features, kept) in [
        (offered, true),
        (VERSION_1, true),
        (0, false),
        (offered & !VERSION_1, false),
        (offered | 1 << 63, false),
        (offered | 1 << 5, false), // VIRTIO_BLK_F_RO: this drive is not
    ] {
        guest.prepare(features);
        assert_eq!(guest.status() & FEATURES_OK != 0, kept, "{features:#x}");
        guest.set_status(RUNNING);
        assert_eq!(guest.status() & DRIVER_OK != 0, kept, "{features:#x}");
    }
    guest.set_status(0);
    guest.set_status(ACKNOWLEDGE | DRIVER);
    guest.accept(offered);
    guest.write(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 2);
    guest.write(reg::VIRTIO_MMIO_DRIVER_FEATURES, 1);
    guest.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
    assert_eq!(guest.status(), ACKNOWLEDGE | DRIVER);
}

#[test]
fn features_are_frozen_by_features_ok_and_not_taken_before_driver() {
    let guest = guest();
    guest.set_status(ACKNOWLEDGE);
    guest.accept(guest.offered());
    guest.set_status(ACKNOWLEDGE | DRIVER);
    guest.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
    assert_eq!(guest.status(), ACKNOWLEDGE | DRIVER, "the features were accepted too early");

    guest.prepare(VERSION_1 | EVENT_IDX);
    guest.accept(VERSION_1);
    guest.set_status(RUNNING);
    guest.set_used_event(7);
    assert!(works(&guest));
    assert_eq!(guest.interrupt(), 0, "EVENT_IDX stays accepted: no interrupt before the eighth buffer");
}

#[test]
fn queue_registers_are_deaf_before_features_ok_and_after_driver_ok() {
    let guest = guest();
    guest.set_status(ACKNOWLEDGE);
    guest.set_status(ACKNOWLEDGE | DRIVER);
    guest.set_up_queue(0, 256, DESCRIPTORS, AVAILABLE, USED);
    assert_eq!(guest.read(reg::VIRTIO_MMIO_QUEUE_READY), 0);

    guest.boot(guest.offered());
    assert!(works(&guest));
    for register in (reg::VIRTIO_MMIO_QUEUE_NUM..=reg::VIRTIO_MMIO_QUEUE_USED_HIGH).step_by(4) {
        if ![reg::VIRTIO_MMIO_QUEUE_NOTIFY, reg::VIRTIO_MMIO_STATUS].contains(&register) {
            for value in [0, 1, 3, 0xffff_ffff] {
                guest.write(register, value);
            }
        }
    }
    assert_eq!(guest.read(reg::VIRTIO_MMIO_QUEUE_READY), 1);
    assert_eq!(guest.status(), RUNNING);
    assert!(works(&guest));
}

#[test]
fn a_ready_queue_does_not_move() {
    let guest = guest();
    guest.prepare(guest.offered());
    guest.set_up_queue(0, 3, 1, 1, 1);
    guest.set_status(RUNNING);
    assert_eq!(guest.status(), RUNNING);
    assert!(works(&guest));
}

#[test]
fn a_queue_that_cannot_be_used_fails_activation() {
    let last = LOW_RAM - 0x1000;
    for (size, descriptors, available, used) in [
        (0, DESCRIPTORS, AVAILABLE, USED),
        (3, DESCRIPTORS, AVAILABLE, USED),
        (512, DESCRIPTORS, AVAILABLE, USED),
        (0x1_0100, DESCRIPTORS, AVAILABLE, USED),
        (256, 0, AVAILABLE, USED),
        (256, DESCRIPTORS, 0, USED),
        (256, DESCRIPTORS, AVAILABLE, 0),
        (256, DESCRIPTORS + 8, AVAILABLE, USED),
        (256, DESCRIPTORS, AVAILABLE + 1, USED),
        (256, DESCRIPTORS, AVAILABLE, USED + 2),
        (256, last + 0x10, AVAILABLE, USED),           // ends 16 bytes into the gap
        (256, DESCRIPTORS, LOW_RAM - 516, USED),       // 6 + 2 * 256 = 518
        (256, DESCRIPTORS, AVAILABLE, LOW_RAM - 2052), // 6 + 8 * 256 = 2054
        (256, LOW_RAM, AVAILABLE, USED),
        (256, DESCRIPTORS, HIGH_RAM_START - 0x100, USED),
        (256, DESCRIPTORS, AVAILABLE, HIGH_RAM_START + HIGH_RAM - 4),
        (256, u64::MAX - 15, AVAILABLE, USED),
        (256, DESCRIPTORS, u64::MAX - 1, USED),
    ] {
        let (device, metrics) = device();
        let guest = Guest::new(device);
        guest.prepare(guest.offered());
        guest.write(reg::VIRTIO_MMIO_QUEUE_READY, 0);
        guest.set_up_queue(0, size, descriptors, available, used);
        guest.set_status(RUNNING);
        assert_eq!(metrics.needs_reset.get(), 1, "{size} {descriptors:#x} {available:#x} {used:#x}");
        assert_broken(&guest);
    }
}

#[test]
fn a_queue_that_is_not_ready_fails_activation() {
    let guest = guest();
    guest.prepare(guest.offered());
    guest.write(reg::VIRTIO_MMIO_QUEUE_READY, 0);
    guest.set_status(RUNNING);
    assert_broken(&guest);
}

#[test]
fn a_queue_at_the_very_end_of_memory_works() {
    let guest = guest();
    guest.prepare(guest.offered());
    guest.write(reg::VIRTIO_MMIO_QUEUE_READY, 0);
    guest.set_up_queue(0, 256, HIGH_RAM_START + HIGH_RAM - 0x1000, LOW_RAM - 518, USED);
    guest.set_status(RUNNING);
    assert_eq!(guest.status(), RUNNING);
}

#[test]
fn a_second_driver_ok_changes_nothing() {
    let guest = guest();
    guest.boot(guest.offered());
    assert!(works(&guest));
    guest.set_status(RUNNING);
    assert_eq!(guest.status(), RUNNING);
    assert!(works(&guest), "a queue that started again would see the first request twice");
}

#[test]
fn a_kick_before_activation_is_ignored() {
    let guest = guest();
    guest.kick();
    guest.prepare(guest.offered());
    guest.kick();
    guest.write(reg::VIRTIO_MMIO_QUEUE_NOTIFY, 0);
    guest.kick();
    assert_eq!(guest.interrupt(), 0);
    guest.set_status(RUNNING);
    assert!(works(&guest));
}

#[test]
fn a_reset_device_starts_from_the_beginning() {
    let guest = guest();
    for _ in 0..3 {
        guest.boot(guest.offered());
        for _ in 0..5 {
            assert!(works(&guest));
        }
        guest.set_status(0);
        assert_eq!(guest.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS), 0);
        assert_eq!(guest.read(reg::VIRTIO_MMIO_QUEUE_READY), 0);
        assert!(!works(&guest));
    }
}

#[test]
fn registers_read_as_memory_and_are_written_as_aligned_words() {
    let guest = guest();
    guest.boot(guest.offered());
    let window: Vec<u8> = (0..0x40).flat_map(|register| guest.read(register * 4).to_le_bytes()).collect();
    assert_eq!(window[..8], *b"virt\x02\0\0\0");
    for (offset, width) in [(0, 1), (0, 2), (0, 8), (1, 4), (2, 4), (0xfc, 2), (0x60, 2), (0x60, 8)] {
        let mut data = vec![0xff; width];
        guest.mmio.read(offset as u64, &mut data);
        assert_eq!(data, window[offset..offset + width], "{width} bytes at {offset:#x}");
    }
    for (offset, width) in [(0x70, 1), (0x70, 2), (0x70, 8), (0x71, 4), (0x6e, 4), (0x64, 1)] {
        guest.mmio.write(offset, &vec![0; width]);
        assert_eq!(guest.status(), RUNNING);
    }
    guest.mmio.read(0, &mut []);
    guest.mmio.write(0x70, &[]);
}

/// Whatever the status is, in and out of order (§2.5.3: a driver may read before FEATURES_OK).
#[test]
fn the_configuration_space_is_read_in_any_width_and_cannot_be_written_in_any_state() {
    let guest = guest();
    let break_it = || {
        guest.set_available_index(1000);
        guest.kick();
    };
    let (driver, ready) = (ACKNOWLEDGE | DRIVER, RUNNING & !DRIVER_OK);
    let steps: [(u32, &dyn Fn()); 7] = [
        (0, &|| guest.set_status(0)),
        (ACKNOWLEDGE, &|| guest.set_status(ACKNOWLEDGE)),
        (driver, &|| guest.set_status(driver)),
        (ready, &|| guest.prepare(guest.offered())),
        (RUNNING, &|| guest.set_status(RUNNING)),
        (RUNNING | NEEDS_RESET, &break_it),
        (RUNNING | NEEDS_RESET | FAILED, &|| guest.set_status(RUNNING | NEEDS_RESET | FAILED)),
    ];
    for (state, step) in steps {
        step();
        assert_eq!(guest.status(), state);
        for offset in 0..80 {
            for bytes in [&[0xff][..], &[0xff; 2], &[0xff; 4], &[0xff; 8]] {
                guest.mmio.write(0x100 + offset, bytes);
            }
        }
        let capacity = 2048u64.to_le_bytes();
        for width in [1, 2, 4, 8] {
            for offset in (0..8).step_by(width) {
                let mut data = vec![0; width];
                guest.mmio.read(0x100 + offset as u64, &mut data);
                assert_eq!(data, capacity[offset..offset + width], "{state}");
            }
        }
        for offset in [0x100 + 60, 0xff8] {
            let mut data = [0xff; 8];
            guest.mmio.read(offset, &mut data);
            assert_eq!(data, [0; 8]);
        }
        assert_eq!(guest.status(), state);
    }
}

#[test]
fn interrupts_come_when_the_driver_wants_them() {
    let guest = guest();
    guest.boot(VERSION_1 | EVENT_IDX);
    guest.set_used_event(2);
    assert!(works(&guest) && works(&guest));
    assert_eq!(guest.interrupt(), 0);
    assert!(works(&guest));
    assert_eq!(guest.interrupt(), INTERRUPT_USED_BUFFER);
    assert_eq!(guest.available_event(), 3, "the device wants to know of the fourth request");

    guest.boot(VERSION_1);
    for _ in 0..3 {
        assert!(works(&guest));
        assert_eq!(guest.interrupt(), INTERRUPT_USED_BUFFER);
    }
}

#[test]
fn a_batch_is_announced_once() {
    let guest = guest();
    guest.boot(guest.offered());
    guest.put(BUFFERS, &[0; 16]);
    for _ in 0..20 {
        guest.offer(guest.chain(&[readable(BUFFERS, 16), writable(BUFFERS + 0x1000, 513)]));
    }
    guest.kick();
    assert_eq!(guest.used().len(), 20);
    assert_eq!(guest.interrupts.load(Ordering::SeqCst), 1);
}

#[test]
fn an_available_index_too_far_ahead_breaks_the_device() {
    for ahead in [257, 300, 0x7fff, 0xffff] {
        let guest = guest();
        guest.boot(guest.offered());
        // Every entry of the ring names a good request.
        guest.put(BUFFERS, &[0; 16]);
        assert_eq!(guest.chain(&[readable(BUFFERS, 16), writable(BUFFERS + 0x1000, 513)]), 0);
        guest.set_available_index(ahead);
        guest.kick();
        assert_broken(&guest);
    }
}

#[test]
fn a_malformed_chain_breaks_the_device_and_is_not_tried_again() {
    type Story = (&'static str, fn(&Guest));
    let stories: [Story; 16] = [
        ("a loop of one", |g| g.descriptor(0, BUFFERS, 16, NEXT, 0)),
        ("a loop of two", |g| {
            g.descriptor(0, BUFFERS, 16, NEXT, 1);
            g.descriptor(1, BUFFERS, 16, NEXT, 0);
        }),
        ("a successor outside of the table", |g| g.descriptor(0, BUFFERS, 16, NEXT, 256)),
        ("no room for a status", |g| g.descriptor(0, BUFFERS, 16, 0, 0)),
        ("no room for a header", |g| g.descriptor(0, BUFFERS, 16, WRITE, 0)),
        ("a buffer in the gap", |g| g.descriptor(0, LOW_RAM, 16, 0, 0)),
        ("a buffer that ends in the gap", |g| g.descriptor(0, LOW_RAM - 8, 16, 0, 0)),
        ("a buffer at the end of the address space", |g| g.descriptor(0, u64::MAX - 7, 16, 0, 0)),
        ("a chain over 4 GiB", |g| {
            for i in 0..200 {
                g.descriptor(i, HIGH_RAM_START, HIGH_RAM as u32, NEXT | WRITE, i + 1);
            }
            g.descriptor(200, 0x10_0000, 0xffff_ffff, WRITE, 0);
        }),
        ("readable after writable", |g| {
            g.descriptor(0, BUFFERS + 0x1000, 1, WRITE | NEXT, 1);
            g.descriptor(1, BUFFERS, 16, 0, 0);
        }),
        ("an indirect table that is no multiple of 16", |g| g.descriptor(0, 0x2_0000, 24, INDIRECT, 0)),
        ("an indirect table of nothing", |g| g.descriptor(0, 0x2_0000, 0, INDIRECT, 0)),
        ("an indirect table in the gap", |g| g.descriptor(0, LOW_RAM, 32, INDIRECT, 0)),
        ("an indirect table in an indirect table", |g| {
            g.descriptor(0, 0x2_0000, 32, INDIRECT, 0);
            g.descriptor_at(0x2_0000, 0, BUFFERS, 16, NEXT, 1);
            g.descriptor_at(0x2_0000, 1, 0x3_0000, 16, INDIRECT, 0);
            g.descriptor_at(0x3_0000, 0, BUFFERS + 0x1000, 513, WRITE, 0);
        }),
        ("an indirect table in itself", |g| {
            g.descriptor(0, 0x2_0000, 32, INDIRECT, 0);
            g.descriptor_at(0x2_0000, 0, 0x2_0000, 32, INDIRECT, 0);
        }),
        ("an indirect table with a successor", |g| {
            g.descriptor(0, 0x2_0000, 32, INDIRECT | NEXT, 1);
            g.descriptor_at(0x2_0000, 0, BUFFERS, 16, NEXT, 1);
            g.descriptor_at(0x2_0000, 1, BUFFERS + 0x1000, 513, WRITE, 0);
        }),
    ];
    for (story, write) in stories {
        let (device, metrics) = device();
        let guest = Guest::new(device);
        guest.boot(guest.offered());
        write(&guest);
        guest.offer(0);
        guest.kick();
        assert_eq!(metrics.needs_reset.get(), 1, "{story}");
        assert_broken(&guest);
        assert_eq!(metrics.needs_reset.get(), 1, "{story}");
    }
}

#[test]
fn a_head_outside_of_the_table_breaks_the_device() {
    let guest = guest();
    guest.boot(guest.offered());
    guest.offer(256);
    guest.kick();
    assert_broken(&guest);
}

#[test]
fn an_indirect_table_longer_than_the_queue_breaks_the_device() {
    let guest = guest();
    for (length, legal) in [(256, true), (257, false)] {
        guest.boot(guest.offered());
        guest.put(BUFFERS, &[0; 16]);
        guest.descriptor(0, 0x2_0000, 16 * u32::from(length), INDIRECT, 0);
        guest.descriptor_at(0x2_0000, 0, BUFFERS, 16, NEXT, 1);
        for i in 1..length {
            let more = if i + 1 < length { NEXT } else { 0 };
            guest.descriptor_at(0x2_0000, i, BUFFERS + 0x1000, if more == 0 { 1 } else { 512 }, WRITE | more, i + 1);
        }
        guest.offer(0);
        guest.kick();
        assert_eq!(guest.used().len(), usize::from(legal));
        assert_eq!(guest.status() & NEEDS_RESET == 0, legal);
    }
}

#[test]
fn the_used_ring_may_overlap_what_it_likes() {
    // Rings on top of each other hurt nobody but the guest.
    let guest = guest();
    guest.prepare(guest.offered());
    guest.write(reg::VIRTIO_MMIO_QUEUE_READY, 0);
    guest.set_up_queue(0, 256, DESCRIPTORS, DESCRIPTORS, DESCRIPTORS);
    guest.set_status(RUNNING);
    guest.memory.write_slice(&[1; 4096], GuestAddress(DESCRIPTORS)).unwrap();
    guest.kick();
    assert_eq!(guest.status() & NEEDS_RESET, NEEDS_RESET);
}
