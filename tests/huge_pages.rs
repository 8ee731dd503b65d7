//! Guests whose RAM is huge pages of the host's.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;

use common::snapshot::Snapshot;
use common::{Guest, MicroVm};
use serde_json::json;

const SETTING: &str = "/proc/sys/vm/nr_hugepages";
const MEMORY_MIB: u64 = 128;
/// What the guest writes to. Its tmpfs takes no more than half of all.
const WRITTEN_MIB: u64 = 32;
/// Pages of 2 MiB that hold it.
const PAGES: u64 = MEMORY_MIB / 2;

/// Huge pages that were added to the host's. They go when this is dropped.
struct Pool(u64);

impl Pool {
    fn add(count: u64) -> Self {
        let before = fs::read_to_string(SETTING).unwrap().trim().parse().unwrap();
        let pool = Self(before);
        fs::write(SETTING, (before + count).to_string()).unwrap();
        let now: u64 = fs::read_to_string(SETTING).unwrap().trim().parse().unwrap();
        assert_eq!(now, before + count, "this host has not enough memory in pieces of 2 MiB");
        pool
    }

    fn set(&self, more: u64) {
        fs::write(SETTING, (self.0 + more).to_string()).unwrap();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let _ = fs::write(SETTING, self.0.to_string());
    }
}

/// KiB of the VMM's memory that are `what` in /proc/PID/smaps.
fn mapped(vm: &mut MicroVm, what: &str) -> u64 {
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", vm.pid())).unwrap();
    let of = |line: &str| line.strip_prefix(what)?.split_ascii_whitespace().nth(1)?.parse::<u64>().ok();
    smaps.lines().filter_map(of).sum()
}

fn configured(huge_pages: &str) -> MicroVm {
    let vm = Guest::tuned().argument("--allow-path=/").configure();
    let config = json!({ "vcpu_count": 1, "mem_size_mib": MEMORY_MIB, "huge_pages": huge_pages });
    vm.put("/machine-config", &config);
    vm
}

/// The guest writes to so much of its memory, and reads it again.
fn fill(vm: &mut MicroVm) {
    vm.ok(&format!("dd if=/dev/zero bs=1M count={WRITTEN_MIB} 2>/dev/null | tr '\\0' x >/run/data"));
    assert_eq!(vm.ok("tr -d x </run/data | wc -c; wc -c </run/data"), format!("0\n{}", WRITTEN_MIB << 20));
}

#[test]
fn huge_pages_of_2_mib_are_set_aside_for_a_guest_and_go_back() {
    // One guest at a time, and none more.
    let pool = Pool::add(PAGES);
    let mut vm = configured("2M");
    vm.start();
    vm.wait_until_ready();
    fill(&mut vm);
    let private = mapped(&mut vm, "Private_Hugetlb");
    assert!((WRITTEN_MIB << 10..=MEMORY_MIB << 10).contains(&private), "{private} KiB");

    let other = configured("2M");
    let refusal = other.refused_put("/actions", &json!({ "action_type": "InstanceStart" }));
    assert!(refusal.contains("cannot reserve 134217728 bytes"), "{refusal}");

    // What it was it is again in another process, in huge pages as well.
    vm.ok("echo before >/run/note");
    let snapshot = Snapshot::of(&vm);
    vm.kill();
    let mut vm = vm.successor_with(&["--allow-path=/"]);
    vm.put("/snapshot/load", &snapshot.load());
    assert_eq!(vm.ok("cat /run/note; tr -d x </run/data | wc -c"), "before\n0");
    assert_eq!(mapped(&mut vm, "Private_Hugetlb"), MEMORY_MIB << 10);
    let refusal = vm.refused_put("/snapshot/reset", &json!({}));
    assert!(refusal.contains("huge_pages 2M cannot be reset"), "{refusal}");
    vm.shut_down();

    // None is left over: without the pool there is nothing to start with.
    pool.set(0);
    assert!(other.refused_put("/actions", &json!({ "action_type": "InstanceStart" })).contains("cannot reserve"));
}

#[test]
fn transparent_huge_pages_back_a_guest_that_asks_for_them() {
    let mut vm = configured("Transparent");
    vm.start();
    vm.wait_until_ready();
    fill(&mut vm);
    let huge = mapped(&mut vm, "AnonHugePages");
    assert!(huge >= (WRITTEN_MIB / 2) << 10, "{huge} KiB");
    vm.shut_down();
}
