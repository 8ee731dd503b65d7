//! virtio-block as Linux guests use it.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::{Guest, MicroVm, PATIENCE, Place};
use serde_json::{Value, json};

const MIB: usize = 1 << 20;
const BLOCK: usize = 4096;

/// Images, and the directory they live in.
struct Images(Place);

impl Images {
    fn new() -> Self {
        Self(common::tempdir())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// An image of holes.
    fn empty(&self, name: &str, mib: usize) -> PathBuf {
        let path = self.path(name);
        File::create_new(&path).unwrap().set_len((mib * MIB) as u64).unwrap();
        path
    }

    /// An image without two blocks alike: noise, with the number of each block in front. `seed` makes it another one.
    fn pattern(&self, name: &str, mib: usize, seed: u64) -> PathBuf {
        let mut state = seed | 1;
        let mut chunk: Vec<u8> = (0..MIB / 8)
            .flat_map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.to_le_bytes()
            })
            .collect();
        let path = self.path(name);
        let mut file = File::create_new(&path).unwrap();
        for number in 0..mib {
            for (index, block) in chunk.chunks_mut(BLOCK).enumerate() {
                block[..8].copy_from_slice(&((number * MIB / BLOCK + index) as u64).to_le_bytes());
            }
            file.write_all(&chunk).unwrap();
        }
        path
    }
}

/// The first difference of two files, by offset.
fn difference(left: &Path, right: &Path) -> Option<usize> {
    let (mut left, mut right) = (File::open(left).unwrap(), File::open(right).unwrap());
    let (mut a, mut b) = (vec![0; MIB], vec![0; MIB]);
    for offset in (0..).step_by(MIB) {
        let count = left.read(&mut a).unwrap();
        assert_eq!(right.read(&mut b[..count.max(1)]).unwrap(), count, "one file is longer, at {offset}");
        if a[..count] != b[..count] {
            return a.iter().zip(&b).position(|(a, b)| a != b).map(|at| offset + at);
        }
        if count == 0 {
            return None;
        }
    }
    None
}

/// How much of a file is on the disk, in bytes.
fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

/// What is written over a drive and flushed is there after the VMM was killed, for the host and for the next guest.
fn keeps_what_was_flushed(engine: &str) {
    let images = Images::new();
    let source = images.pattern("source", 256, 1);
    let target = images.empty("target", 256);
    let guest = || {
        Guest::tuned().drive("source", &source, json!({ "is_read_only": true, "io_engine": engine })).drive(
            "target",
            &target,
            json!({ "io_engine": engine, "cache_type": "Writeback" }),
        )
    };

    let mut vm = guest().boot();
    // Four writers at once, each with requests of its own size, and each over a quarter of the drive.
    let writers =
        [(16, 4), (64, 8), (256, 2), (1024, 1)].iter().enumerate().map(|(quarter, (kib, jobs))| {
            let count = 64 * 1024 / kib;
            let start = quarter * count;
            // The part of a quarter that each of its jobs writes.
            let part = count / jobs;
            (0..*jobs).map(|job| {
            let at = start + job * part;
            format!("dd if=/dev/vda of=/dev/vdb bs={kib}k skip={at} seek={at} count={part} oflag=direct 2>/dev/null & ")
        }).collect::<String>()
        });
    vm.ok(&format!("{} wait; sync; blockdev --flushbufs /dev/vdb", writers.collect::<String>()));
    vm.kill();
    assert_eq!(difference(&source, &target), None);

    // The next guest sees the same. Where everything is emulated it is too slow to compare all of it.
    let mut vm = guest().boot();
    let sums = |drive| {
        format!(
            "for at in $(seq 0 31 255); do dd if={drive} bs=1M count=1 skip=$at iflag=direct 2>/dev/null | md5sum; done"
        )
    };
    assert_eq!(vm.ok(&sums("/dev/vdb")), vm.ok(&sums("/dev/vda")));
    vm.shut_down();
}

#[test]
fn the_sync_engine_keeps_what_was_flushed() {
    keeps_what_was_flushed("Sync");
}

#[test]
fn the_async_engine_keeps_what_was_flushed() {
    keeps_what_was_flushed("Async");
}

/// A guest is paused and resumed again and again while it writes, and never notices.
fn survives_pauses(engine: &str) {
    let images = Images::new();
    let (source, target) = (images.pattern("source", 32, 2), images.empty("target", 32));
    let mut vm = Guest::debian("6.12")
        .vcpus(2)
        .drive("source", &source, json!({ "is_read_only": true, "io_engine": engine }))
        .drive("target", &target, json!({ "io_engine": engine }))
        .boot();
    vm.begin("for i in 1 2; do dd if=/dev/vda of=/dev/vdb bs=64k oflag=direct 2>/dev/null || exit; done; echo done");
    let mut pauses = 0;
    while !vm.output().contains("done\n") {
        vm.pause();
        let written = || fs::metadata(&target).unwrap().modified().unwrap();
        let before = written();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(written(), before, "a paused guest writes nothing");
        vm.resume();
        pauses += 1;
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(vm.finish(PATIENCE), ("done\n".to_owned(), 0));
    assert!(pauses > 3, "only {pauses} pauses: nothing was shown");
    assert_eq!(difference(&source, &target), None);
    vm.shut_down();
}

#[test]
fn pauses_do_not_disturb_the_sync_engine() {
    survives_pauses("Sync");
}

#[test]
fn pauses_do_not_disturb_the_async_engine() {
    survives_pauses("Async");
}

#[test]
fn discarded_blocks_go_back_to_the_host() {
    for engine in ["Sync", "Async"] {
        let images = Images::new();
        let image = images.pattern("image", 64, 3);
        let mut vm = Guest::tuned().drive("data", &image, json!({ "discard": true, "io_engine": engine })).boot();
        let full = allocated(&image);
        assert!(full >= 64 * MIB as u64, "{full}");
        vm.ok(&format!("blkdiscard -o {} -l {} /dev/vda", 16 * MIB, 32 * MIB));
        let left = allocated(&image);
        assert!((31 * MIB as u64..=33 * MIB as u64).contains(&left), "{left} bytes left of {full}");

        // What is around it is still there, and what was discarded reads as zeroes.
        let file = File::open(&image).unwrap();
        let mut block = [0; BLOCK];
        for (block_number, number) in [(0, Some(0)), (16 * MIB / BLOCK - 1, Some(4095)), (16 * MIB / BLOCK, None)] {
            file.read_exact_at(&mut block, (block_number * BLOCK) as u64).unwrap();
            assert_eq!(block[..8], number.unwrap_or(0u64).to_le_bytes());
        }
        assert_eq!(vm.ok("dd if=/dev/vda bs=1M skip=20 count=1 2>/dev/null | tr -d '\\0' | wc -c"), "0");
        vm.shut_down();
    }
}

#[test]
fn a_drive_offers_no_discard_unless_asked_to() {
    let images = Images::new();
    let image = images.empty("image", 8);
    let mut vm = Guest::tuned().drive("data", &image, json!({})).boot();
    assert_eq!(vm.ok("cat /sys/block/vda/queue/discard_max_bytes"), "0");
    let (_, status) = vm.run("blkdiscard /dev/vda");
    assert_ne!(status, 0);
    vm.shut_down();
}

#[test]
fn a_drive_gets_another_file_and_the_guest_sees_its_size_and_content() {
    let images = Images::new();
    let (first, second) = (images.pattern("first", 16, 4), images.pattern("second", 24, 5));
    for guest in [Guest::tuned(), Guest::debian("6.12")] {
        let mut vm = guest.drive("data", &first, json!({ "is_read_only": true })).boot();
        assert_eq!(vm.ok("blockdev --getsize64 /dev/vda"), (16 * MIB).to_string());

        let refused = vm.api().patch("/drives/data", &json!({ "drive_id": "data", "path_on_host": "/nonexistent" }));
        assert_eq!(refused.unwrap().status, 400);
        assert_eq!(vm.ok("blockdev --getsize64 /dev/vda"), (16 * MIB).to_string());

        vm.patch("/drives/data", &json!({ "drive_id": "data", "path_on_host": second }));
        // The size arrives with an interrupt.
        vm.ok(&format!("until [ $(blockdev --getsize64 /dev/vda) = {} ]; do usleep 10000; done", 24 * MIB));
        let sum = vm.ok("dd if=/dev/vda iflag=direct bs=1M 2>/dev/null | sha256sum").replace('-', "");
        let expected = std::process::Command::new("sha256sum").arg(&second).output().unwrap().stdout;
        assert!(String::from_utf8(expected).unwrap().starts_with(sum.trim()), "{sum}");
        assert_eq!(vm.get("/vm/config")["drives"][0]["path_on_host"], json!(second));
        vm.shut_down();
    }
}

#[test]
fn a_patch_of_which_one_part_is_bad_changes_nothing_of_the_drive() {
    let images = Images::new();
    let (first, second) = (images.pattern("first", 8, 7), images.pattern("second", 12, 8));
    let mut vm = Guest::tuned().drive("data", &first, json!({ "is_read_only": true })).boot();
    let sees = |vm: &mut MicroVm| {
        let sum = vm.ok("dd if=/dev/vda iflag=direct bs=1M count=1 2>/dev/null | sha256sum");
        (vm.get("/vm/config"), vm.ok("blockdev --getsize64 /dev/vda"), sum)
    };
    let before = sees(&mut vm);
    let slow = || json!({ "ops": { "size": 16, "refill_time": 400 } });
    let patch = |path: &Path, limit| json!({ "drive_id": "data", "path_on_host": path, "rate_limiter": limit });
    for (bad, reason) in [
        (patch(&images.path("nothing"), slow()), "path_on_host"),
        (patch(images.0.path(), slow()), "path_on_host"),
        (patch(&second, json!({ "ops": { "size": 16 } })), "refill_time"),
        (patch(&second, json!({ "bandwidth": { "size": -1, "refill_time": 400 } })), "-1"),
        (patch(&second, json!({ "ops": { "size": 16, "refill_time": 400 }, "more": 1 })), "more"),
    ] {
        let reply = vm.api().patch("/drives/data", &bad).unwrap();
        assert!(reply.status == 400 && reply.fault().contains(reason), "{bad}: {}", reply.body);
        assert_eq!(sees(&mut vm), before, "{bad}");
        assert_eq!(read(&mut vm).1, 0, "{bad}: nothing is limited");
    }
    vm.patch("/drives/data", &patch(&second, slow()));
    vm.ok(&format!("until [ $(blockdev --getsize64 /dev/vda) = {} ]; do usleep 10000; done", 12 * MIB));
    assert_ne!(sees(&mut vm).2, before.2);
    assert_ne!(read(&mut vm).1, 0, "both parts hold");
    vm.shut_down();
}

#[test]
fn a_read_only_drive_cannot_be_written_by_the_guest() {
    let images = Images::new();
    let (image, copy) = (images.pattern("image", 8, 6), images.path("copy"));
    fs::copy(&image, &copy).unwrap();
    let mut vm = Guest::tuned().drive("data", &image, json!({ "is_read_only": true })).boot();
    assert_eq!(vm.ok("cat /sys/block/vda/ro"), "1");
    let (output, status) = vm.run("dd if=/dev/zero of=/dev/vda bs=4k count=1 oflag=direct");
    assert_ne!(status, 0, "{output}");
    vm.ok("dd if=/dev/vda of=/dev/null bs=1M 2>/dev/null");
    vm.shut_down();
    assert_eq!(difference(&image, &copy), None);
}

#[test]
fn a_drive_tells_its_identity_and_whether_it_caches() {
    let images = Images::new();
    let mut vm = Guest::tuned()
        .drive("unsafe", &images.empty("a", 1), json!({}))
        .drive("writeback", &images.empty("b", 1), json!({ "cache_type": "Writeback" }))
        .boot();
    // Without FLUSH there is no cache to write back.
    assert_eq!(vm.ok("cat /sys/block/vda/queue/write_cache"), "write through");
    assert_eq!(vm.ok("cat /sys/block/vdb/queue/write_cache"), "write back");
    let serials = vm.ok("cat /sys/block/vda/serial; echo; cat /sys/block/vdb/serial");
    assert_ne!(serials.lines().next(), serials.lines().last(), "two files, two identities");
    vm.shut_down();
}

/// How long the guest takes to read 6 MiB, and how often it had to wait for its limits.
fn read(vm: &mut MicroVm) -> (Duration, u64) {
    let throttled = |vm: &MicroVm| vm.metric("vesicle_block_rate_limiter_throttled_events_total{drive_id=\"data\"}");
    let (start, before) = (Instant::now(), throttled(vm));
    vm.ok("dd if=/dev/vda of=/dev/null bs=64k count=96 iflag=direct 2>/dev/null");
    (start.elapsed(), throttled(vm) - before)
}

fn limit(bucket: &Value) -> Value {
    json!({ "drive_id": "data", "rate_limiter": bucket })
}

#[test]
fn a_rate_limit_holds_and_is_changed_while_the_guest_runs() {
    for engine in ["Sync", "Async"] {
        let images = Images::new();
        let image = images.empty("image", 8);
        let mut vm = Guest::tuned().drive("data", &image, json!({ "io_engine": engine })).boot();
        assert_eq!(read(&mut vm).1, 0, "{engine}: nothing is limited");

        // 1 MiB at once and 2 MiB a second: the other five take two and a half.
        vm.patch("/drives/data", &limit(&json!({ "bandwidth": { "size": MIB, "refill_time": 500 } })));
        let (took, _) = read(&mut vm);
        assert!(took >= Duration::from_millis(2300), "{engine}: {took:?}");

        // 96 requests, 16 at once and 40 a second: two seconds. The bandwidth is not limited any more.
        let ops = json!({ "bandwidth": { "size": 0, "refill_time": 0 }, "ops": { "size": 16, "refill_time": 400 } });
        vm.patch("/drives/data", &limit(&ops));
        let (took, _) = read(&mut vm);
        assert!(took >= Duration::from_millis(1800), "{engine}: {took:?}");

        vm.patch("/drives/data", &limit(&json!({ "ops": { "size": 0, "refill_time": 0 } })));
        assert_eq!(read(&mut vm).1, 0, "{engine}: nothing is limited any more");
        vm.shut_down();
    }
}

#[test]
fn an_ext4_root_is_written_read_and_consistent_afterwards() {
    let mut vm = Guest::debian("6.12").rootfs().boot();
    vm.ok("mkdir /data && for i in $(seq 50); do seq $i 2000 >/data/$i || exit; done; sync");
    vm.ok("cd /data && sha256sum * >/sums && echo 3 >/proc/sys/vm/drop_caches && sha256sum -c /sums >/dev/null");
    let image = vm.dir().join("rootfs.ext4");
    vm.ok("mount -o remount,ro /");
    vm.kill();
    let check = std::process::Command::new("e2fsck").args(["-fn"]).arg(&image).output().unwrap();
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
}
