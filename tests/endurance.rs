//! A guest under load is saved and loaded, and taken back, again and again: nothing it relies on gives way.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::snapshot::{Snapshot, told};
use common::tap::{Tap, mac};
use common::{Guest, MicroVm};
use serde_json::json;
use vesicle::snapshot::memory;

/// The work of each vCPU, `$1`: it sleeps, which takes a timer's interrupt, and its clock never goes back. (`read -t` on what
/// never says anything sleeps without another process.)
const TICK: &str = r#"before=0
while read -r up rest </proc/uptime; do
  up=${up%.*}${up#*.}
  [ "$up" -ge "$before" ] || echo "the clock of vCPU $1 went from $before back to $up" >>/run/bad
  before=$up
  read -t 0.02 none <>/run/never
  echo "$up" >"/run/tick$1"
done"#;

/// Writes to the drive and reads back, past the page cache; a byte that is lost is noticed.
const DISK: &str = r#"n=0
while n=$((n + 1)); do
  head -c 65536 /dev/urandom >/run/block
  dd if=/run/block of=/dev/vda bs=64k seek=$((n % 64)) oflag=direct conv=notrunc 2>/dev/null || echo "write $n" >>/run/bad
  dd if=/dev/vda of=/run/back bs=64k skip=$((n % 64)) count=1 iflag=direct 2>/dev/null || echo "read $n" >>/run/bad
  cmp /run/block /run/back || echo "block $n" >>/run/bad
  echo $n >/run/tickdisk
  read -t 0.1 none <>/run/never
done"#;

/// Fetches the same data from the host, `$1`, over and over. A connection that a restore cut off is tried again.
const NET: &str = r#"n=0
read -r expected </run/expected
while n=$((n + 1)); do
  [ -e /run/hold ] && echo held >/run/ticknet
  while [ -e /run/hold ]; do read -t 0.02 none <>/run/never; done
  timeout 10 nc "$1" 6001 </dev/null >/run/fetched 2>/dev/null
  if [ "$(sha256sum </run/fetched)" = "$expected" ]; then
    echo $n >/run/ticknet
  else
    [ "$(wc -c </run/fetched)" = 100000 ] && echo "transfer $n" >>/run/bad
  fi
  read -t 0.1 none <>/run/never
done"#;

/// Waits until all that works has moved on, with nothing wrong; says what time it is.
const MOVES_ON: &str = "rm -f /run/hold; set --; for tick in /run/tick*; do \
     while read -r was <$tick; [ ! \"$was\" ]; do :; done; set -- $@ $was; done; \
     for tick in /run/tick*; do while read -r now <$tick; [ ! \"$now\" ] || [ \"$now\" = $1 ]; \
     do read -t 0.02 none <>/run/never; done; shift; done; [ -e /run/bad ] && cat /run/bad && exit 1; date +%s";

/// Waits until no transfer is under way: one that a reset finds cut off, every time, would be waited for, every time.
const HOLD: &str = "touch /run/hold; until read -r now </run/ticknet; [ \"$now\" = held ]; do \
     read -t 0.02 none <>/run/never; done; true";

/// How often, by default and in full (`VESICLE_CYCLES`, `VESICLE_RESETS`).
fn times(name: &str, default: u32) -> u32 {
    std::env::var(name).map_or(default, |times| times.parse().unwrap())
}

/// Not captured: in full it takes long.
fn report(what: &str, count: u32) {
    if count.is_multiple_of(10) {
        let _ = writeln!(std::io::stderr(), "{count} {what}");
    }
}

/// Sends the same 100,000 bytes to whoever connects, for ever.
fn serve(tap: &Tap) -> Vec<u8> {
    let data: Vec<u8> = (0..100_000).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let (listener, ours) = (TcpListener::bind((tap.host(), 6001)).unwrap(), data.clone());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, data) = (stream.unwrap(), ours.clone());
            std::thread::spawn(move || {
                stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
                stream.set_write_timeout(Some(Duration::from_secs(10))).unwrap();
                // The guest may be gone, or another than the one that asked.
                let _ = stream.write_all(&data).and_then(|()| stream.shutdown(std::net::Shutdown::Write));
                let _ = stream.read(&mut [0]);
            });
        }
    });
    data
}

/// A guest with four vCPUs, all of them, its drive and its network at work.
fn busy(tap: &Tap, image: &Path, overlay: bool) -> MicroVm {
    File::create(image).unwrap().set_len(4 << 20).unwrap();
    let drive = if overlay { json!({ "overlay": {} }) } else { json!({ "io_engine": "Async" }) };
    let guest = Guest::tuned().vcpus(4).memory(96).drive("data", image, drive).argument("--allow-path=/");
    let mut vm = guest.interface("net0", &tap.name, mac(tap.net)).boot();
    tap.set_up(&mut vm, "eth0");
    let path = image.with_file_name("expected");
    fs::write(&path, serve(tap)).unwrap();
    let sum = common::tap::host(&format!("sha256sum <{}", path.display()));
    vm.ok(&format!("echo '{}' >/run/expected", sum.trim()));
    for (name, script) in [("tick", TICK), ("disk", DISK), ("net", NET)] {
        vm.ok(&format!("printf '%b' '{}' >/run/do-{name}", script.replace('\n', "\\n")));
    }
    vm.ok("mkfifo /run/never");
    vm.ok("for cpu in 0 1 2 3; do taskset $((1 << cpu)) sh /run/do-tick $cpu & done >/dev/null 2>&1");
    vm.ok(&format!("sh /run/do-disk >/dev/null 2>&1 & sh /run/do-net {} >/dev/null 2>&1 &", tap.host()));
    vm.ok("for work in 0 1 2 3 disk net; do until [ -e /run/tick$work ]; do sleep 0.05; done; done");
    vm
}

#[test]
fn a_busy_guest_goes_through_cycles_of_snapshot_and_restore() {
    let (tap, dir) = (Tap::new(), tempfile::tempdir().unwrap());
    let mut vm = busy(&tap, &dir.path().join("image"), false);
    let mut clock = 0;
    for cycle in 0..times("VESICLE_CYCLES", 3) {
        let snapshot = Snapshot::of(&vm);
        vm.kill();
        vm = vm.successor_with(&["--allow-path=/"]);
        vm.put("/snapshot/load", &snapshot.load());
        let now: u64 = vm.ok(MOVES_ON).parse().unwrap();
        assert!(now >= clock, "cycle {cycle}: the clock went from {clock} back to {now}");
        clock = now;
        report("cycles", cycle + 1);
    }
    vm.shut_down();
}

#[test]
fn a_busy_guest_is_taken_back_again_and_again() {
    let (tap, dir) = (Tap::new(), tempfile::tempdir().unwrap());
    let mut vm = busy(&tap, &dir.path().join("image"), true);
    vm.ok(HOLD);
    let snapshot = Snapshot::of(&vm);
    vm.kill();
    let mut vm = vm.successor();
    vm.put("/snapshot/load", &snapshot.load());
    for reset in 0..times("VESICLE_RESETS", 40) {
        // In between it is taken back in the middle of whatever it does.
        if reset.is_multiple_of(20) {
            vm.ok(MOVES_ON);
        } else {
            std::thread::sleep(Duration::from_millis(50));
        }
        vm.put("/snapshot/reset", &json!({ "keep_drive_writes": true }));
        report("resets", reset + 1);
    }
    vm.ok(MOVES_ON);
    vm.shut_down();
}

/// Names of the memory files, in the order of their making.
fn chain(vm: &mut MicroVm, dir: &Path, length: u32) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for link in 0..length {
        vm.ok(&format!("head -c 3000000 /dev/urandom >/run/random{}; echo {link} >/run/link", link % 4));
        vm.ok("sha256sum /run/random* /run/link >/run/sum");
        let (state, file) = (dir.join("state"), dir.join(format!("diff{link}")));
        vm.pause();
        let body = json!({ "snapshot_path": state, "mem_file_path": file, "snapshot_type": "Diff" });
        vm.put("/snapshot/create", &body);
        files.push(file);
        if link + 1 < length {
            vm.resume();
        }
    }
    files
}

#[test]
fn a_chain_of_diffs_over_five_gib_restores_bit_for_bit() {
    let vm = Guest::tuned().vcpus(2).memory(5 << 10).argument("--allow-path=/").configure();
    vm.patch("/machine-config", &json!({ "track_dirty_pages": true }));
    vm.start();
    let mut vm = vm;
    vm.wait_until_ready();
    // Memory on both sides of the gap below 4 GiB.
    vm.ok("head -c 20000000 /dev/urandom >/run/high");
    let base = Snapshot::of(&vm);
    vm.resume();
    let dir = common::tempdir();
    let diffs = chain(&mut vm, dir.path(), times("VESICLE_DIFFS", 10));
    // What the guest is, all of it, at the last of them.
    let full = Snapshot::new();
    vm.put("/snapshot/create", &full.create("Full"));
    vm.kill();
    for diff in &diffs {
        told(&["merge"], &[&base.memory, diff]);
    }
    assert_same(&base.memory, &full.memory);
    let mut load = base.load();
    load["snapshot_path"] = json!(dir.path().join("state"));
    let mut vm = vm.successor();
    vm.put("/snapshot/load", &load);
    vm.ok("sha256sum -c /run/sum");
    vm.shut_down();
}

/// Compares the memory in two files, wherever one of them has any.
fn assert_same(one: &Path, other: &Path) {
    let [one, other] = [one, other].map(|path| File::open(path).unwrap());
    let (size, _) = memory::identify(&one).unwrap();
    let (mut ours, mut theirs) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut compared = 0;
    for file in [&one, &other] {
        for extent in memory::data_of(file, size).unwrap() {
            for at in (extent.start..extent.end).step_by(ours.len()) {
                let length = ((extent.end - at) as usize).min(ours.len());
                one.read_exact_at(&mut ours[..length], at).unwrap();
                other.read_exact_at(&mut theirs[..length], at).unwrap();
                assert!(ours[..length] == theirs[..length], "they differ within {length:#x} bytes at {at:#x}");
                compared += length;
            }
        }
    }
    assert!(compared > 50 << 20, "{compared} bytes compared");
}
