//! Stories of guests, good and bad, and their drives.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;

use super::*;
use crate::config::{IoEngine, RateLimiterConfig};
use crate::devices::virtio::Device;
use crate::devices::virtio::testing::{BUFFERS, Buffer, Guest, readable, writable};

pub(super) const IN: u32 = 0;
pub(super) const OUT: u32 = 1;
pub(super) const FLUSH: u32 = 4;
pub(super) const GET_ID: u32 = 8;
pub(super) const DISCARD: u32 = 11;
pub(super) const WRITE_ZEROES: u32 = 13;

pub(super) const OK: u8 = 0;
pub(super) const IOERR: u8 = 1;
pub(super) const UNSUPP: u8 = 2;

/// Where the guest keeps what a request needs.
pub(super) const HEADER: u64 = BUFFERS;
pub(super) const STATUS: u64 = BUFFERS + 0x800;
pub(super) const DATA: u64 = BUFFERS + 0x1000;

/// Both engines; Sync alone, visibly, where the host has no io_uring.
pub(super) fn engines() -> Vec<IoEngine> {
    let mut engines = vec![IoEngine::Sync];
    match Engine::new(IoEngine::Async, &[tempfile::tempfile().unwrap().as_raw_fd()], 1) {
        Ok(_) => engines.push(IoEngine::Async),
        Err(error) => eprintln!("SKIPPED: the Async engine: {error}"),
    }
    engines
}

pub(super) fn drive(engine: IoEngine) -> DriveConfig {
    DriveConfig {
        drive_id: "scratch".to_owned(),
        is_root_device: false,
        path_on_host: "/scratch".into(),
        is_read_only: false,
        partuuid: None,
        cache_type: CacheType::Writeback,
        io_engine: engine,
        rate_limiter: RateLimiterConfig::default(),
        discard: true,
        overlay: None,
    }
}

pub(super) struct Drive {
    pub(super) file: File,
    pub(super) metrics: Arc<metrics::Block>,
    pub(super) guest: Guest,
}

impl Drive {
    pub(super) fn new(config: &DriveConfig, file: File) -> Self {
        let metrics = Arc::new(metrics::Block::default());
        let block = Block::new(config, file.try_clone().unwrap(), Arc::clone(&metrics)).unwrap();
        Self { file, metrics, guest: Guest::booted(Device::Block(Box::new(block))) }
    }

    pub(super) fn of_size(config: &DriveConfig, size: u64) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        Self::new(config, file)
    }

    pub(super) fn update<R>(&self, change: impl FnOnce(&mut Block) -> R) -> R {
        self.guest.mmio.update(|device| match device {
            Device::Block(block) => change(block),
            _ => unreachable!(),
        })
    }

    pub(super) fn update_rate_limiter(&self, update: &RateLimiterUpdate) {
        self.guest.mmio.adjust(|device| match device {
            Device::Block(block) => block.update_rate_limiter(update),
            _ => unreachable!(),
        });
    }

    pub(super) fn header(&self, kind: u32, sector: u64) {
        self.guest.put(HEADER, &kind.to_le_bytes());
        self.guest.put(HEADER + 4, &[0; 4]);
        self.guest.put(HEADER + 8, &sector.to_le_bytes());
    }

    /// Writes segment `index` of a discard or write-zeroes.
    pub(super) fn segment(&self, index: u64, sector: u64, count: u32, flags: u32) {
        let at = DATA + 16 * index;
        self.guest.put(at, &sector.to_le_bytes());
        self.guest.put(at + 8, &count.to_le_bytes());
        self.guest.put(at + 12, &flags.to_le_bytes());
    }

    /// Makes one ordinary request and returns its status and the bytes written to the chain.
    pub(super) fn request(&self, kind: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
        self.header(kind, sector);
        let mut buffers = vec![readable(HEADER, 16)];
        buffers.extend(data);
        buffers.push(writable(STATUS, 1));
        self.submit(&buffers)
    }

    pub(super) fn submit(&self, buffers: &[Buffer]) -> (u8, u32) {
        self.guest.put(STATUS, &[0xee]);
        let head = self.guest.chain(buffers);
        self.guest.offer(head);
        self.guest.notify();
        let used = self.guest.await_used(1);
        assert_eq!(used.len(), 1);
        assert_eq!(used[0].0, head);
        (self.guest.get(STATUS, 1)[0], used[0].1)
    }
}

pub(super) fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i * 7 + i / 251) as u8).collect()
}

pub(super) fn on_disk(drive: &Drive, offset: u64, length: usize) -> Vec<u8> {
    let mut data = vec![0; length];
    drive.file.read_exact_at(&mut data, offset).unwrap();
    data
}

pub(super) fn needs_reset(drive: &Drive) -> bool {
    drive.guest.status() & 64 != 0
}

#[test]
fn a_guest_reads_back_what_it_wrote() {
    for engine in engines() {
        let drive = Drive::of_size(&drive(engine), 1 << 20);
        drive.guest.put(DATA, &pattern(4096));
        assert_eq!(drive.request(OUT, 8, &[readable(DATA, 4096)]), (OK, 1));
        assert_eq!(drive.guest.interrupt(), 1);
        assert_eq!(on_disk(&drive, 4096, 4096), pattern(4096));

        assert_eq!(drive.request(IN, 8, &[writable(DATA + 0x2000, 4096)]), (OK, 4097));
        assert_eq!(drive.guest.get(DATA + 0x2000, 4096), pattern(4096));
        assert_eq!(drive.request(FLUSH, 0, &[]), (OK, 1));
        assert_eq!(drive.metrics.read_count.get(), 1);
        assert_eq!(drive.metrics.read_bytes.get(), 4096);
        assert_eq!(drive.metrics.write_count.get(), 1);
        assert_eq!(drive.metrics.write_bytes.get(), 4096);
        assert_eq!(drive.metrics.flush_count.get(), 1);
        assert_eq!(drive.metrics.execute_fails.get(), 0);
    }
}

#[test]
fn what_a_whole_ring_of_guests_wrote_is_all_there() {
    for engine in engines() {
        let drive = Drive::of_size(&drive(engine), 4 << 20);
        // Each request has a header, 512 bytes and a status of its own.
        for round in 0..8u64 {
            for i in 0..85u64 {
                let at = BUFFERS + i * 1024;
                drive.guest.put(at, &OUT.to_le_bytes());
                drive.guest.put(at + 4, &[0; 4]);
                drive.guest.put(at + 8, &(round * 85 + i).to_le_bytes());
                drive.guest.put(at + 16, &[(round * 85 + i) as u8; 512]);
                let chain = [readable(at, 16), readable(at + 16, 512), writable(at + 1000, 1)];
                drive.guest.offer(drive.guest.chain(&chain));
            }
            drive.guest.notify();
            assert_eq!(drive.guest.await_used(85).len(), 85);
            for i in 0..85 {
                assert_eq!(drive.guest.get(BUFFERS + i * 1024 + 1000, 1), [OK]);
            }
        }
        for sector in 0..680 {
            assert_eq!(on_disk(&drive, sector * 512, 512), [sector as u8; 512]);
        }
    }
}

#[test]
fn the_id_is_made_of_the_files_identity() {
    let drive = Drive::of_size(&drive(IoEngine::Sync), 512);
    assert_eq!(drive.request(GET_ID, 0, &[writable(DATA, 20)]), (OK, 21));
    let metadata = drive.file.metadata().unwrap();
    let mut expected = format!("{}{}{}", metadata.dev(), metadata.rdev(), metadata.ino()).into_bytes();
    expected.resize(20, 0);
    assert_eq!(drive.guest.get(DATA, 20), expected);
    // A driver that has room for less gets less.
    assert_eq!(drive.request(GET_ID, 0, &[writable(DATA, 5)]), (OK, 6));
    assert_eq!(drive.request(GET_ID, 0, &[]), (OK, 1));
}

#[test]
fn the_configuration_space_and_the_features_say_what_the_drive_can_do() {
    let read = |guest: &Guest, offset: u32| guest.read(0x100 + offset);
    let full = Drive::of_size(&drive(IoEngine::Sync), (1 << 20) + 100);
    assert_eq!(read(&full.guest, 0), 2048, "whole sectors only");
    assert_eq!(read(&full.guest, 12), 254);
    assert_eq!(read(&full.guest, 36), MAX_DISCARD_SECTORS);
    assert_eq!(read(&full.guest, 52), 1);
    assert_eq!(full.guest.offered() & 0xff_ffff, 1 << 2 | 1 << 9 | 1 << 13 | 1 << 14);

    let bare =
        DriveConfig { is_read_only: true, cache_type: CacheType::Unsafe, discard: false, ..drive(IoEngine::Sync) };
    let bare = Drive::of_size(&bare, 1 << 20);
    assert_eq!(bare.guest.offered() & 0xff_ffff, 1 << 2 | 1 << 5);
    assert_eq!(read(&bare.guest, 36), 0);
    assert_eq!(bare.request(FLUSH, 0, &[]), (UNSUPP, 1));
    assert_eq!(bare.request(DISCARD, 0, &[readable(DATA, 16)]), (UNSUPP, 1));
}

#[test]
fn only_files_and_block_devices_are_disks() {
    let metrics = Arc::new(metrics::Block::default());
    for path in ["/", "/dev/null", "/dev/zero"] {
        let refused = Block::new(&drive(IoEngine::Sync), File::open(path).unwrap(), Arc::clone(&metrics));
        assert!(matches!(refused.err(), Some(Error::NotADisk)), "{path}");
    }
}

#[test]
fn a_read_only_drive_is_not_written_whatever_the_driver_believes() {
    for engine in engines() {
        // The file is writable, so that only the device stands in the way.
        let config = DriveConfig { is_read_only: true, ..drive(engine) };
        let drive = Drive::of_size(&config, 1 << 20);
        let features = drive.guest.offered() & !(1 << 5);
        drive.guest.boot(features);
        drive.guest.put(DATA, &[0xff; 512]);
        assert_eq!(drive.request(OUT, 0, &[readable(DATA, 512)]), (IOERR, 1));
        drive.segment(0, 0, 8, 0);
        assert_eq!(drive.request(DISCARD, 0, &[readable(DATA, 16)]), (IOERR, 1));
        assert_eq!(drive.request(WRITE_ZEROES, 0, &[readable(DATA, 16)]), (IOERR, 1));
        assert_eq!(drive.request(FLUSH, 0, &[]), (OK, 1));
        assert_eq!(drive.request(IN, 0, &[writable(DATA, 512)]), (OK, 513));
        assert_eq!(on_disk(&drive, 0, 512), [0; 512]);
        assert_eq!(drive.metrics.execute_fails.get(), 3);
    }
}

#[test]
fn requests_past_the_end_and_crooked_ones_fail_alone() {
    for engine in engines() {
        let drive = Drive::of_size(&drive(engine), 1 << 20);
        for (sector, length) in [
            (2048, 512),
            (2047, 1024),
            (0, (1 << 20) + 512),
            (u64::MAX, 512),
            (u64::MAX / 512, 512),
            (1 << 55, 512),
            ((1 << 55) - 1, 1024),
            (0, 511),
            (0, 1),
            (2048, 1),
            (2049, 0),
        ] {
            assert_eq!(drive.request(IN, sector, &[writable(DATA, length)]), (IOERR, 1), "{sector} {length}");
            assert_eq!(drive.request(OUT, sector, &[readable(DATA, length)]), (IOERR, 1), "{sector} {length}");
        }
        assert_eq!(drive.request(IN, 2047, &[writable(DATA, 512)]), (OK, 513));
        assert_eq!(drive.request(IN, 0, &[writable(DATA, 1 << 20)]), (OK, (1 << 20) + 1));
        assert_eq!(drive.request(IN, 2048, &[]), (OK, 1), "nothing can be read anywhere");
        assert_eq!(drive.request(77, 0, &[]), (UNSUPP, 1));
        assert_eq!(drive.request(0x8000_0000, 0, &[]), (UNSUPP, 1));
        assert_eq!(drive.file.metadata().unwrap().len(), 1 << 20);
        assert!(!needs_reset(&drive));
    }
}

#[test]
fn a_request_may_be_cut_into_buffers_anywhere() {
    for engine in engines() {
        let drive = Drive::of_size(&drive(engine), 1 << 20);
        let empty = |address| readable(address, 0);
        drive.guest.put(DATA, &pattern(1024));
        drive.header(OUT, 4);
        // The header byte by byte, with nothing in between; the data in crooked pieces.
        let mut buffers: Vec<Buffer> = (0..16).flat_map(|i| [readable(HEADER + i, 1), empty(HEADER)]).collect();
        buffers.extend([readable(DATA, 3), readable(DATA + 3, 1000), empty(DATA), readable(DATA + 1003, 21)]);
        buffers.extend([writable(STATUS, 0), writable(STATUS, 1), writable(STATUS, 0)]);
        assert_eq!(drive.submit(&buffers), (OK, 1));
        assert_eq!(on_disk(&drive, 2048, 1024), pattern(1024));

        // Header and data in one buffer; the status behind a data byte.
        drive.guest.put(HEADER + 16, &pattern(512));
        drive.header(OUT, 8);
        assert_eq!(drive.submit(&[readable(HEADER, 16 + 512), writable(STATUS, 1)]), (OK, 1));
        assert_eq!(on_disk(&drive, 4096, 512), pattern(512));
        drive.header(IN, 8);
        assert_eq!(drive.submit(&[readable(HEADER, 16), writable(STATUS - 512, 513)]), (OK, 513));
        assert_eq!(drive.guest.get(STATUS - 512, 512), pattern(512));

        // More of the other kind of buffer than the request needs.
        drive.header(IN, 8);
        assert_eq!(drive.submit(&[readable(HEADER, 1000), writable(DATA, 512), writable(STATUS, 1)]), (OK, 513));
        assert!(!needs_reset(&drive));
    }
}

#[test]
fn a_chain_of_many_small_buffers_is_processed_whole() {
    for engine in engines() {
        let drive = Drive::of_size(&drive(engine), 1 << 20);
        let data = pattern(254 * 512);
        drive.guest.put(DATA, &data);
        // Backwards in guest memory, so that nothing can be merged by accident.
        let pieces: Vec<u64> = (0..254).map(|i| DATA + (253 - i) * 512).collect();
        let out: Vec<Buffer> = pieces.iter().map(|&at| readable(at, 512)).collect();
        assert_eq!(drive.request(OUT, 0, &out), (OK, 1));
        for (i, expected) in data.chunks(512).rev().enumerate() {
            assert_eq!(on_disk(&drive, 512 * i as u64, 512), expected);
        }
        drive.guest.put(DATA, &vec![0; data.len()]);
        let back: Vec<Buffer> = pieces.iter().map(|&at| writable(at, 512)).collect();
        assert_eq!(drive.request(IN, 0, &back), (OK, 254 * 512 + 1));
        assert_eq!(drive.guest.get(DATA, data.len()), data);
    }
}

#[test]
fn a_request_in_an_indirect_table_is_a_request() {
    for engine in engines() {
        let drive = Drive::of_size(&drive(engine), 1 << 20);
        let table = DATA + 0x10_0000;
        drive.file.write_all_at(&pattern(1024), 0).unwrap();
        drive.header(IN, 0);
        drive.guest.descriptor_at(table, 0, HEADER, 16, 1, 2);
        drive.guest.descriptor_at(table, 2, DATA, 1024, 1 | 2, 1);
        drive.guest.descriptor_at(table, 1, STATUS, 1, 2, 77);
        drive.guest.descriptor(5, table, 48, 4, 0);
        drive.guest.offer(5);
        drive.guest.notify();
        assert_eq!(drive.guest.await_used(1), [(5, 1025)]);
        assert_eq!(drive.guest.get(DATA, 1024), pattern(1024));
    }
}

#[test]
fn a_new_file_has_its_own_capacity_content_and_id() {
    for engine in engines() {
        let drive = Drive::of_size(&drive(engine), 1 << 20);
        assert_eq!(drive.request(IN, 0, &[writable(DATA, 512)]), (OK, 513));
        assert_eq!(drive.guest.interrupt(), 1);
        let mut other = tempfile::tempfile().unwrap();
        other.write_all(&[0x5a; 4096]).unwrap();
        let backend = other.try_clone().unwrap();
        drive.update(|block| block.update_backend(backend)).unwrap();
        drive.guest.mmio.config_changed();
        assert_eq!(drive.guest.interrupt(), 2);
        assert_eq!(drive.guest.read(0x100), 8);
        assert_eq!(drive.guest.read(0xfc), 1, "the configuration's generation");
        assert_eq!(drive.request(IN, 0, &[writable(DATA, 4096)]), (OK, 4097));
        assert_eq!(drive.guest.get(DATA, 4096), [0x5a; 4096]);
        assert_eq!(drive.request(IN, 8, &[writable(DATA, 512)]), (IOERR, 1));
        drive.guest.put(DATA, &[1; 512]);
        assert_eq!(drive.request(OUT, 0, &[readable(DATA, 512)]), (OK, 1));
        assert_eq!(on_disk(&drive, 0, 512), [0; 512], "the old file is left alone");

        let refused = drive.update(|block| block.update_backend(File::open("/dev/null").unwrap()));
        assert!(matches!(refused, Err(Error::NotADisk)));
        assert_eq!(drive.guest.read(0x100), 8);
        assert_eq!(drive.metrics.update_count.get(), 1);
    }
}

#[test]
fn a_disk_is_raw_whatever_it_begins_with() {
    for magic in [b"QFI\xfb\0\0\0\x03", b"conectix", b"KDMV\x01\0\0\0", b"<<< Orac"] {
        let drive = Drive::of_size(&drive(IoEngine::Sync), 1 << 20);
        drive.guest.put(DATA, &[0; 512]);
        drive.guest.put(DATA, magic);
        assert_eq!(drive.request(OUT, 0, &[readable(DATA, 512)]), (OK, 1));
        let copy = drive.file.try_clone().unwrap();
        drive.update(|block| block.update_backend(copy)).unwrap();
        assert_eq!(drive.guest.read(0x100), 2048);
        assert_eq!(drive.request(IN, 0, &[writable(DATA + 512, 512)]), (OK, 513));
        assert_eq!(drive.guest.get(DATA + 512, 8), magic);
    }
}
