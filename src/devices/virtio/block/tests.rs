//! Stories of guests, good and bad, and their drives.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::*;
use crate::config::{IoEngine, RateLimiterConfig};
use crate::devices::virtio::Device;
use crate::devices::virtio::testing::{BUFFERS, Buffer, Guest, readable, writable};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// Where the guest keeps what a request needs.
const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x800;
const DATA: u64 = BUFFERS + 0x1000;

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
    }
}

pub(super) struct Drive {
    file: File,
    metrics: Arc<metrics::Block>,
    guest: Guest,
}

impl Drive {
    pub(super) fn new(config: &DriveConfig, file: File) -> Self {
        let metrics = Arc::new(metrics::Block::default());
        let block = Block::new(config, file.try_clone().unwrap(), Arc::clone(&metrics)).unwrap();
        Self { file, metrics, guest: Guest::booted(Device::Block(block)) }
    }

    pub(super) fn of_size(config: &DriveConfig, size: u64) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        Self::new(config, file)
    }

    fn header(&self, kind: u32, sector: u64) {
        self.guest.put(HEADER, &kind.to_le_bytes());
        self.guest.put(HEADER + 4, &[0; 4]);
        self.guest.put(HEADER + 8, &sector.to_le_bytes());
    }

    /// Makes one ordinary request and returns its status and the bytes written to the chain.
    fn request(&self, kind: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
        self.header(kind, sector);
        let mut buffers = vec![readable(HEADER, 16)];
        buffers.extend(data);
        buffers.push(writable(STATUS, 1));
        self.submit(&buffers)
    }

    fn submit(&self, buffers: &[Buffer]) -> (u8, u32) {
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

#[test]
fn a_guest_reads_back_what_it_wrote() {
    let drive = Drive::of_size(&drive(IoEngine::Sync), 1 << 20);
    let pattern: Vec<u8> = (0..4096u32).map(|i| (i * 7) as u8).collect();
    drive.guest.put(DATA, &pattern);
    assert_eq!(drive.request(OUT, 8, &[readable(DATA, 4096)]), (OK, 1));
    assert_eq!(drive.guest.interrupt(), 1);

    let mut on_disk = vec![0; 4096];
    drive.file.read_exact_at(&mut on_disk, 4096).unwrap();
    assert_eq!(on_disk, pattern);

    assert_eq!(drive.request(IN, 8, &[writable(DATA + 0x2000, 4096)]), (OK, 4097));
    assert_eq!(drive.guest.get(DATA + 0x2000, 4096), pattern);
    assert_eq!(drive.request(FLUSH, 0, &[]), (OK, 1));
    assert_eq!(drive.request(77, 0, &[]), (UNSUPP, 1));
    assert_eq!(drive.request(IN, 2047, &[writable(DATA, 1024)]), (IOERR, 1));
    assert_eq!(drive.metrics.read_count.get(), 1);
    assert_eq!(drive.metrics.write_bytes.get(), 4096);
    assert_eq!(drive.metrics.execute_fails.get(), 2);
}

#[test]
fn the_id_is_made_of_the_files_identity() {
    use std::os::unix::fs::MetadataExt;
    let drive = Drive::of_size(&drive(IoEngine::Sync), 512);
    assert_eq!(drive.request(GET_ID, 0, &[writable(DATA, 20)]), (OK, 21));
    let metadata = drive.file.metadata().unwrap();
    let mut expected = format!("{}{}{}", metadata.dev(), metadata.rdev(), metadata.ino()).into_bytes();
    expected.resize(20, 0);
    assert_eq!(drive.guest.get(DATA, 20), expected);
}
