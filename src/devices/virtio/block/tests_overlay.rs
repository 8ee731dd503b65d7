//! Stories of guests whose writes go to a layer, and of hosts with odd layers.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use super::tests::*;
use super::tests_host::file_on_a_small_file_system;
use super::*;
use crate::devices::virtio::Device;
use crate::devices::virtio::testing::{BUFFERS, Guest, readable, writable};

const SIZE: usize = 1 << 20;

fn temporary() -> OverlayFiles {
    OverlayFiles { upper: tempfile::tempfile().unwrap(), lasting: None, fresh: false, lower: None }
}

fn lasting(path: &Path) -> OverlayFiles {
    let upper = File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap();
    OverlayFiles { upper, lasting: Some(File::open(path).unwrap()), fresh: false, lower: None }
}

fn over(lower: &File, id: LayerId) -> OverlayFiles {
    OverlayFiles { lower: Some((lower.try_clone().unwrap(), id)), ..temporary() }
}

/// A base full of a pattern.
fn base() -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&pattern(SIZE), 0).unwrap();
    file
}

fn content(file: &File) -> Vec<u8> {
    let mut data = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut data, 0).unwrap();
    data
}

fn try_new(engine: IoEngine, base: &File, overlay: OverlayFiles) -> Result<Drive, Error> {
    configured(&drive(engine), base, overlay)
}

fn configured(config: &DriveConfig, base: &File, overlay: OverlayFiles) -> Result<Drive, Error> {
    // As it is opened for a drive with an overlay.
    let file = File::open(format!("/proc/self/fd/{}", base.as_raw_fd())).unwrap();
    let metrics = Arc::new(metrics::Block::default());
    let block = Block::new(config, Backend { file, overlay: Some(overlay) }, Arc::clone(&metrics))?;
    Ok(Drive { file: base.try_clone().unwrap(), metrics, guest: Guest::booted(Device::Block(Box::new(block))) })
}

fn new(engine: IoEngine, base: &File, overlay: OverlayFiles) -> Drive {
    try_new(engine, base, overlay).unwrap()
}

fn write(drive: &Drive, sector: u64, data: &[u8]) -> u8 {
    drive.guest.put(DATA, data);
    drive.request(OUT, sector, &[readable(DATA, data.len() as u32)]).0
}

fn read(drive: &Drive, sector: u64, length: usize) -> Vec<u8> {
    drive.guest.put(DATA, &vec![0xee; length]);
    assert_eq!(drive.request(IN, sector, &[writable(DATA, length as u32)]), (OK, length as u32 + 1));
    drive.guest.get(DATA, length)
}

/// Numbers in no order that anyone could see.
fn numbers(mut state: u64) -> impl FnMut(u64) -> u64 {
    move |below| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    }
}

/// Writes, frees and zeroes here and there, as the drive in `expected` is to become.
fn scribble(drive: &Drive, expected: &mut [u8], seed: u64) {
    let mut number = numbers(seed);
    for _ in 0..60 {
        let count = [1, 1, 3, 8, 8, 17, 64][number(7) as usize];
        let sector = number(SIZE as u64 / 512 - count);
        let range = &mut expected[sector as usize * 512..][..count as usize * 512];
        match number(8) {
            0 => {
                drive.segment(0, sector, count as u32, 0);
                assert_eq!(drive.request(DISCARD, 0, &[readable(DATA, 16)]), (OK, 1));
                range.fill(0);
            }
            1 => {
                drive.segment(0, sector, count as u32, number(2) as u32);
                assert_eq!(drive.request(WRITE_ZEROES, 0, &[readable(DATA, 16)]), (OK, 1));
                range.fill(0);
            }
            _ => {
                range.iter_mut().for_each(|byte| *byte = number(256) as u8);
                assert_eq!(write(drive, sector, range), OK);
            }
        }
    }
}

fn change(drive: &Drive, change: impl FnOnce(&mut Block) -> Result<(), Error>) -> Result<(), Error> {
    drive.update(change)
}

/// What a snapshot of `drive` would hold.
fn snapshot(drive: &Drive, id: LayerId) -> File {
    let file = tempfile::tempfile().unwrap();
    change(drive, |block| block.copy_overlay(&file, id)).unwrap();
    file
}

#[test]
fn what_a_guest_writes_is_in_its_layer_and_the_base_stays_as_it_was() {
    for engine in engines() {
        let base = base();
        let drive = new(engine, &base, temporary());
        assert_eq!(drive.guest.read(0x100), 2048, "the capacity is the base's");
        let mut expected = pattern(SIZE);
        scribble(&drive, &mut expected, 42);
        assert!(read(&drive, 0, SIZE) == expected);
        // In pieces that end anywhere.
        let mut number = numbers(43);
        for _ in 0..50 {
            let count = 1 + number(40);
            let sector = number(2048 - count);
            let length = count * 512;
            let cut = 1 + number(length - 1);
            drive.guest.put(DATA, &vec![0xee; length as usize]);
            let pieces = [writable(DATA, cut as u32), writable(DATA + cut, (length - cut) as u32)];
            assert_eq!(drive.request(IN, sector, &pieces), (OK, length as u32 + 1));
            assert!(drive.guest.get(DATA, length as usize) == expected[sector as usize * 512..][..length as usize]);
        }
        assert_eq!(drive.request(FLUSH, 0, &[]), (OK, 1));
        assert!(content(&base) == pattern(SIZE), "the base was written");
        assert!(!needs_reset(&drive));
    }
}

#[test]
fn neighbouring_sectors_written_at_the_same_time_are_all_there() {
    for engine in engines() {
        let base = base();
        let drive = new(engine, &base, temporary());
        for i in 0..64u64 {
            let at = BUFFERS + i * 1024;
            drive.guest.put(at, &OUT.to_le_bytes());
            drive.guest.put(at + 4, &[0; 4]);
            // Every other sector: each block of the host is shared by four.
            drive.guest.put(at + 8, &(i * 2).to_le_bytes());
            drive.guest.put(at + 16, &[i as u8; 512]);
            let chain = [readable(at, 16), readable(at + 16, 512), writable(at + 1000, 1)];
            drive.guest.offer(drive.guest.chain(&chain));
        }
        drive.guest.notify();
        assert_eq!(drive.guest.await_used(64).len(), 64);
        let mut expected = pattern(64 << 10);
        for i in 0..64 {
            expected[i * 1024..][..512].fill(i as u8);
        }
        assert!(read(&drive, 0, 64 << 10) == expected);
        assert_eq!(drive.metrics.overlay_bytes.get(), 64 * 512);
        assert!(content(&base) == pattern(SIZE));
    }
}

#[test]
fn hostile_requests_reach_neither_base_nor_layer() {
    for engine in engines() {
        let base = base();
        let drive = new(engine, &base, temporary());
        for (sector, length) in [(2048, 512), (2047, 1024), (u64::MAX, 512), (1 << 55, 512), (0, 511), (2048, 1)] {
            assert_eq!(drive.request(IN, sector, &[writable(DATA, length)]), (IOERR, 1), "{sector} {length}");
            assert_eq!(drive.request(OUT, sector, &[readable(DATA, length)]), (IOERR, 1), "{sector} {length}");
        }
        for (kind, sector, count, flags, status) in [
            (DISCARD, 0, 8, 1, UNSUPP),
            (DISCARD, 2047, 2, 0, IOERR),
            (DISCARD, u64::MAX, u32::MAX, 0, IOERR),
            (WRITE_ZEROES, 0, MAX_ZEROES_SECTORS + 1, 0, IOERR),
            (WRITE_ZEROES, 2048, 1, 1, IOERR),
            (DISCARD, 0, 0, 0, OK),
        ] {
            drive.segment(0, sector, count, flags);
            assert_eq!(drive.request(kind, 0, &[readable(DATA, 16)]), (status, 1), "{kind} {sector} {count}");
        }
        drive.segment(0, 0, 8, 0);
        drive.segment(1, 2048, 8, 0);
        assert_eq!(drive.request(DISCARD, 0, &[readable(DATA, 32)]), (IOERR, 1), "the second is bad");
        assert_eq!(drive.metrics.overlay_bytes.get(), 0);
        assert!(read(&drive, 0, SIZE) == pattern(SIZE));
        assert!(content(&base) == pattern(SIZE));
        assert!(!needs_reset(&drive));
    }
}

#[test]
fn a_full_disk_below_the_layer_is_an_io_error_until_there_is_room() {
    for engine in engines() {
        let Some(upper) = file_on_a_small_file_system(64 << 10) else { return };
        let base = base();
        let drive = new(engine, &base, OverlayFiles { upper, ..temporary() });
        assert_eq!(write(&drive, 0, &[0xff; 128 << 10]), IOERR);
        assert!(read(&drive, 0, 128 << 10) == pattern(128 << 10), "what could not be written is as it was");
        drive.segment(0, 0, 256, 0);
        assert_eq!(drive.request(DISCARD, 0, &[readable(DATA, 16)]), (OK, 1));
        assert_eq!(write(&drive, 0, &[0xff; 32 << 10]), OK);
        assert!(read(&drive, 0, 32 << 10) == [0xff; 32 << 10]);
        assert!(content(&base) == pattern(SIZE));
        assert!(!needs_reset(&drive));
    }
}

#[test]
fn a_flush_that_cannot_announce_what_it_wrote_is_an_io_error() {
    for engine in engines() {
        // Room for the header and fifteen blocks, so that none is left for the bitmap.
        let Some(upper) = file_on_a_small_file_system(64 << 10) else { return };
        let drive =
            new(engine, &base(), OverlayFiles { lasting: Some(upper.try_clone().unwrap()), upper, ..temporary() });
        assert_eq!(write(&drive, 0, &[0xff; 15 << 12]), OK);
        assert_eq!(drive.request(FLUSH, 0, &[]), (IOERR, 1));
        drive.segment(0, 0, 16, 0);
        assert_eq!(drive.request(DISCARD, 0, &[readable(DATA, 16)]), (OK, 1));
        assert_eq!(drive.request(FLUSH, 0, &[]), (OK, 1));
    }
}

#[test]
fn the_next_process_finds_what_was_flushed() {
    for engine in engines() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("layer");
        let base = base();
        let mut expected = pattern(SIZE);
        for seed in 1..4 {
            let drive = new(engine, &base, lasting(&path));
            assert!(read(&drive, 0, SIZE) == expected, "before round {seed}");
            scribble(&drive, &mut expected, seed);
            assert_eq!(drive.request(FLUSH, 0, &[]), (OK, 1));
            // A sector that only this round's process knows of: it is killed before the next flush.
            let sector = (0..2048).find(|at| expected[at * 512..][..512] == pattern(SIZE)[at * 512..][..512]).unwrap();
            assert_eq!(write(&drive, sector as u64, &[0xaa; 512]), OK);
        }
        // At an end in good order nothing is lost.
        let drive = new(engine, &base, lasting(&path));
        assert_eq!(write(&drive, 7, &[0xaa; 512]), OK);
        expected[7 * 512..8 * 512].fill(0xaa);
        change(&drive, |block| {
            block.finish();
            Ok(())
        })
        .unwrap();
        drop(drive);
        assert!(read(&new(engine, &base, lasting(&path)), 0, SIZE) == expected);
        assert!(content(&base) == pattern(SIZE));
    }
}

#[test]
fn a_guest_that_flushes_many_times_at_once_multiplies_nothing() {
    for engine in engines() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("layer");
        let base = base();
        let drive = new(engine, &base, lasting(&path));
        assert_eq!(write(&drive, 5, &[5; 512]), OK);
        drive.header(FLUSH, 0);
        let head = drive.guest.chain(&[readable(HEADER, 16), writable(STATUS, 1)]);
        for _ in 0..50 {
            drive.guest.offer(head);
        }
        let announcing = |block: &Block| block.requests.slots.iter().filter(|request| request.announces()).count();
        change(&drive, |block| {
            block.take_requests().unwrap();
            assert_eq!(announcing(block), usize::from(engine == IoEngine::Async));
            block.quiesce();
            assert_eq!(announcing(block), 0);
            Ok(())
        })
        .unwrap();
        assert_eq!(drive.guest.await_used(50), vec![(head, 1); 50]);
        assert_eq!(drive.guest.get(STATUS, 1), [OK]);
        drop(drive);
        assert!(read(&new(engine, &base, lasting(&path)), 5, 512) == [5; 512]);
    }
}

/// A drive that announces nothing answers every one.
#[test]
fn a_guest_that_flushes_though_it_was_not_offered_is_refused_each_time() {
    for engine in engines() {
        let directory = tempfile::tempdir().unwrap();
        let config = DriveConfig { cache_type: CacheType::Unsafe, ..drive(engine) };
        let drive = configured(&config, &base(), lasting(&directory.path().join("layer"))).unwrap();
        assert_eq!(write(&drive, 5, &[5; 512]), OK);
        for _ in 0..3 {
            assert_eq!(drive.request(FLUSH, 0, &[]), (UNSUPP, 1));
        }
    }
}

#[test]
fn a_layer_that_is_none_or_not_this_drives_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("layer");
    let base = base();
    let drive = new(IoEngine::Sync, &base, lasting(&path));
    assert_eq!(write(&drive, 0, &[1; 512]), OK);
    let refusal = |overlay| match try_new(IoEngine::Sync, &base, overlay).err() {
        Some(Error::Overlay(source)) => source,
        other => panic!("{other:?}"),
    };
    assert!(matches!(refusal(lasting(&path)), LayerError::InUse));
    assert_eq!(drive.request(FLUSH, 0, &[]), (OK, 1));
    drop(drive);

    assert!(matches!(refusal(OverlayFiles { fresh: true, ..lasting(&path) }), LayerError::NotEmpty));
    let good = fs::read(&path).unwrap();
    let spoilt = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        fs::write(&path, bytes).unwrap();
        refusal(lasting(&path))
    };
    assert!(matches!(spoilt(0), LayerError::Magic));
    assert!(matches!(spoilt(8), LayerError::Version(0)));
    assert!(matches!(spoilt(17), LayerError::Size { found: 0x10_0100, expected: 0x10_0000 }));
    assert!(matches!(spoilt(30), LayerError::OtherSnapshot));
    fs::write(&path, &good[..20]).unwrap();
    assert!(matches!(refusal(lasting(&path)), LayerError::Magic));
    let file = File::open(&path).unwrap();
    assert!(matches!(refusal(over(&file, [1; 16])), LayerError::Magic));

    // One that was cut short reads as if its end had never been written, and a lower one is an I/O error there.
    fs::write(&path, &good[..4096]).unwrap();
    assert!(read(&new(IoEngine::Sync, &base, lasting(&path)), 0, SIZE) == pattern(SIZE));
    let layer = snapshot(&new(IoEngine::Sync, &base, temporary()), [1; 16]);
    layer.write_all_at(&[0xff; 4096], 4096).unwrap();
    layer.set_len(8192 + 512).unwrap();
    let drive = new(IoEngine::Sync, &base, over(&layer, [1; 16]));
    assert_eq!(drive.request(IN, 0, &[writable(DATA, 1024)]).0, IOERR);
    assert_eq!(drive.request(IN, 0, &[writable(DATA, 512)]).0, OK);
    assert!(change(&drive, |block| block.copy_overlay(&tempfile::tempfile().unwrap(), [2; 16])).is_err());
    assert!(matches!(refusal(over(&layer, [2; 16])), LayerError::OtherSnapshot));
}

#[test]
fn clones_share_what_their_snapshot_holds_and_nothing_else() {
    for engine in engines() {
        let base = base();
        let drive = new(engine, &base, temporary());
        let mut expected = pattern(SIZE);
        scribble(&drive, &mut expected, 5);
        let layer = snapshot(&drive, [5; 16]);
        assert_eq!(write(&drive, 100, &[0xbb; 512]), OK, "it goes on, and the snapshot does not");
        let saved = content(&layer);

        let clones = [6, 7].map(|seed| (new(engine, &base, over(&layer, [5; 16])), expected.clone(), seed));
        for (mut clone, mut expected, seed) in clones {
            assert!(read(&clone, 0, SIZE) == expected);
            scribble(&clone, &mut expected, seed);
            // A snapshot of a clone stands alone.
            let layer = snapshot(&clone, [seed as u8; 16]);
            assert!(layer.metadata().unwrap().blocks() * 512 < SIZE as u64, "it holds what differs from the base");
            clone = new(engine, &base, over(&layer, [seed as u8; 16]));
            assert!(read(&clone, 0, SIZE) == expected);
        }
        assert!(content(&layer) == saved, "what clones share was written");
        assert!(content(&base) == pattern(SIZE));
    }
}

#[test]
fn an_emptied_layer_shows_the_snapshot_again_and_frees_the_hosts_disk() {
    for engine in engines() {
        let base = base();
        let first = new(engine, &base, temporary());
        assert_eq!(write(&first, 9, &[9; 512]), OK);
        let layer = snapshot(&first, [1; 16]);
        let overlay = over(&layer, [1; 16]);
        let upper = overlay.upper.try_clone().unwrap();
        let drive = new(engine, &base, overlay);
        for seed in 1..4 {
            let mut expected = pattern(SIZE);
            expected[9 * 512..10 * 512].fill(9);
            assert!(read(&drive, 0, SIZE) == expected);
            scribble(&drive, &mut expected, seed);
            assert!(drive.metrics.overlay_bytes.get() > 0 && upper.metadata().unwrap().blocks() > 0);
            change(&drive, Block::clear_overlay).unwrap();
            assert_eq!((drive.metrics.overlay_bytes.get(), upper.metadata().unwrap().blocks()), (0, 0));
        }
    }
}

#[test]
fn the_file_under_an_overlay_is_not_replaced() {
    let base = base();
    let drive = new(IoEngine::Sync, &base, temporary());
    assert_eq!(write(&drive, 0, &[1; 512]), OK);
    let other = tempfile::tempfile().unwrap();
    assert!(matches!(change(&drive, |block| block.update_backend(other)), Err(Error::HasOverlay)));
    assert!(read(&drive, 0, 512) == [1; 512]);
}
