//! Snapshots: a guest is saved, its VMM killed, and it goes on in another.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use common::snapshot::{Snapshot, allocated, copied, share, told, told_by, vesicle};
use common::{Guest, MicroVm};
use serde_json::{Value, json};

// Snapshots are put into directories that nothing was configured in.
fn tuned() -> Guest {
    Guest::tuned().argument("--allow-path=/")
}

fn debian(series: &str) -> Guest {
    Guest::debian(series).argument("--allow-path=/")
}

#[test]
fn a_guest_goes_on_in_another_process() {
    for guest in [tuned(), debian("6.12").vcpus(2)] {
        let mut vm = guest.boot();
        vm.ok("echo remembered >/run/note; sleep 1000 & echo $! >/run/pid");
        let began = Instant::now();
        let then = uptime(&mut vm);
        let snapshot = Snapshot::of(&vm);
        let mut ran = began.elapsed();
        let size = fs::metadata(&snapshot.memory).unwrap().len();
        assert!(allocated(&snapshot.memory) < size * 3 / 4, "untouched pages are holes");
        vm.kill();
        std::thread::sleep(Duration::from_secs(3));
        let mut vm = vm.successor();
        let began = Instant::now();
        vm.put("/snapshot/load", &snapshot.load());
        let passed = uptime(&mut vm) - then;
        ran += began.elapsed();
        assert!(passed <= ran.as_secs_f64() + 0.1, "{passed} s passed in {ran:?}");
        assert_eq!(vm.ok("cat /run/note; kill -0 $(cat /run/pid) && echo alive"), "remembered\nalive");
        // Timers go on, on every vCPU.
        vm.ok("for cpu in $(seq 0 $(($(nproc) - 1))); do taskset $((1 << cpu)) sleep 0.1 || exit; done");
        assert_eq!(vm.get("/machine-config")["vcpu_count"], vm.guest().machine_config()["vcpu_count"]);
        vm.shut_down();
    }
}

#[test]
fn a_guest_with_8_vcpus_goes_on_with_all_of_them() {
    let works = |vm: &mut MicroVm| {
        assert_eq!(vm.ok("nproc"), "8");
        vm.ok("for cpu in 0 1 2 3 4 5 6 7; do taskset $((1 << cpu)) sleep 0.1 || exit; done");
    };
    let mut vm = tuned().vcpus(8).boot();
    works(&mut vm);
    let snapshot = Snapshot::of(&vm);
    vm.kill();
    let mut vm = vm.successor();
    vm.put("/snapshot/load", &snapshot.load());
    works(&mut vm);
    vm.shut_down();
}

/// The guest's monotonic clock in seconds.
fn uptime(vm: &mut MicroVm) -> f64 {
    vm.ok("read seconds rest </proc/uptime; echo $seconds").parse().unwrap()
}

/// By how many seconds the guest's clock is behind the host's.
fn behind(vm: &mut MicroVm) -> f64 {
    let date: f64 = vm.ok("date +%s").parse().unwrap();
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64() - date
}

#[test]
fn a_guest_on_kvmclock_catches_up_if_its_load_says_so() {
    for (source, arguments) in [("kvm-clock", "clocksource=kvm-clock"), ("tsc", "clocksource=tsc tsc=reliable")] {
        let mut vm = tuned().boot_args(arguments).boot();
        assert_eq!(vm.ok("cat /sys/devices/system/clocksource/clocksource0/current_clocksource"), source);
        let before = behind(&mut vm);
        let snapshot = Snapshot::of(&vm);
        vm.kill();
        std::thread::sleep(Duration::from_secs(10));
        for clock_realtime in [false, true] {
            vm = vm.successor();
            let mut load = snapshot.load();
            load["clock_realtime"] = json!(clock_realtime);
            vm.put("/snapshot/load", &load);
            let lost = behind(&mut vm) - before;
            assert_eq!(lost < 5.0, clock_realtime && source == "kvm-clock", "{source}, {clock_realtime}: {lost} s");
            vm.kill();
        }
    }
}

/// Random bytes that a guest draws.
fn draws(vm: &mut MicroVm) -> String {
    vm.ok("head -c 16 /dev/urandom | od -An -tx1")
}

#[test]
fn two_clones_of_one_snapshot_draw_different_random_numbers() {
    for guest in [tuned(), debian("6.12")] {
        let mut vm = guest.boot();
        draws(&mut vm);
        let snapshot = Snapshot::of(&vm);
        vm.kill();
        let mut first = vm.successor();
        first.put("/snapshot/load", &snapshot.load());
        let drawn = draws(&mut first);
        first.kill();
        let mut second = first.successor();
        // As older clients say it.
        let load = json!({ "snapshot_path": snapshot.state, "mem_file_path": snapshot.memory, "resume_vm": true });
        second.put("/snapshot/load", &load);
        assert_ne!(draws(&mut second), drawn);
        assert_ne!(second.run("dmesg | grep -i 'crng reseeded'").0, "");
        second.shut_down();
    }
}

#[test]
fn a_guest_without_acpi_is_cloned_and_hears_nothing_of_it() {
    let mut vm = tuned().boot_args("acpi=off").boot();
    let snapshot = Snapshot::of(&vm);
    vm.kill();
    for _ in 0..2 {
        vm = vm.successor();
        vm.put("/snapshot/load", &snapshot.load());
        draws(&mut vm);
        assert_eq!(vm.run("dmesg | grep -i 'crng reseeded'").0, "");
        vm.kill();
    }
}

#[test]
fn what_cannot_be_loaded_is_refused_with_a_reason_and_ends_the_process() {
    let mut vm = tuned().boot();
    let snapshot = Snapshot::of(&vm);
    // A running microVM's memory is not saved, and a snapshot is loaded into a fresh process only.
    assert!(vm.refused_put("/snapshot/load", &snapshot.load()).contains("after starting"));
    vm.resume();
    assert!(vm.refused_put("/snapshot/create", &snapshot.create("Full")).contains("pause it"));
    vm.kill();
    let state = fs::read(&snapshot.state).unwrap();
    let damaged = |at: usize| {
        let mut state = state.clone();
        state[at] ^= 1;
        state
    };
    let loads = [
        (damaged(0), "not a snapshot's state file"),
        (damaged(8), "format version"),
        (damaged(state.len() / 2), "damaged"),
        (state[..state.len() / 2].to_vec(), "bytes long"),
        (state.clone(), "belongs to another snapshot"),
    ];
    for (content, reason) in loads {
        fs::write(&snapshot.state, &content).unwrap();
        if content == state {
            let memory = File::options().write(true).open(&snapshot.memory).unwrap();
            let size = memory.metadata().unwrap().len();
            memory.write_all_at(&[0xee; 16], size - 16).unwrap();
        }
        let mut next = tuned().no_job().launch();
        let refusal = next.refused_put("/snapshot/load", &snapshot.load());
        assert!(refusal.contains(reason), "{refusal}");
        assert_eq!(next.wait_exit().code(), Some(1));
    }
    let configured = tuned().no_job().configure();
    assert!(configured.refused_put("/snapshot/load", &snapshot.load()).contains("start another process"));
}

#[test]
fn a_snapshot_is_put_where_a_drive_is_written_or_where_it_was_allowed() {
    let vm = Guest::tuned().boot();
    vm.pause();
    let refusal = vm.refused_put("/snapshot/create", &Snapshot::new().create("Full"));
    assert!(refusal.contains("--allow-path"), "{refusal}");
    let (state, memory) = (vm.dir().join("state"), vm.dir().join("memory"));
    vm.put("/snapshot/create", &json!({ "snapshot_path": state, "mem_file_path": memory }));
}

#[test]
fn relative_paths_are_relative_to_where_the_process_was_started() {
    let mut vm = tuned().boot();
    vm.pause();
    let snapshot = Snapshot::new();
    // There is nothing above the root directory: this leads there from anywhere.
    let relative = |path: &Path| format!("{}{}", "./../".repeat(40), path.strip_prefix("/").unwrap().display());
    let (state, memory) = (relative(&snapshot.state), relative(&snapshot.memory));
    vm.put("/snapshot/create", &json!({ "snapshot_path": state, "mem_file_path": memory }));
    vm.kill();
    // Prepared for it, a process finds the memory where it was written, wherever it is started.
    let prepare = format!("--prepare={}", snapshot.state.display());
    let mut vm = vm.successor_with(&["--allow-path=/", &prepare]);
    vm.put("/snapshot/load", &json!({ "snapshot_path": state, "mem_file_path": memory, "resume_vm": true }));
    vm.ok("true");
    vm.shut_down();
}

#[test]
fn a_diff_merged_into_its_base_is_what_the_guest_is() {
    let mut vm = tuned().boot();
    let snapshot = Snapshot::of(&vm);
    vm.kill();
    let mut vm = vm.successor_with(&["--allow-path=/"]);
    vm.put("/snapshot/load", &snapshot.load());
    vm.ok("dd if=/dev/urandom of=/run/changed bs=1M count=4 2>/dev/null; sha256sum /run/changed >/run/sum");
    vm.pause();
    // Not over the file that the guest's memory still is.
    let refusal = vm.refused_put("/snapshot/create", &snapshot.create("Diff"));
    assert!(refusal.contains("in use by this microVM"), "{refusal}");
    assert!(vm.refused_put("/snapshot/create", &snapshot.create("Full")).contains("in use"));
    let merged = Snapshot::new();
    copied(&snapshot.memory, &merged.memory);
    vm.put("/snapshot/create", &merged.create("Diff"));
    let alone = Snapshot::new();
    vm.put("/snapshot/create", &alone.create("Diff"));
    assert!(allocated(&alone.memory) < allocated(&snapshot.memory), "a diff holds what changed");
    vm.kill();
    let mut vm = vm.successor();
    vm.put("/snapshot/load", &merged.load());
    vm.ok("sha256sum -c /run/sum");
    vm.shut_down();
}

#[test]
fn a_memory_file_that_a_microvm_runs_from_is_changed_by_nobody() {
    let vm = tuned().argument("--allow-path=/").boot();
    let (snapshot, diff) = (Snapshot::of(&vm), Snapshot::new());
    vm.put("/snapshot/create", &diff.create("Diff"));
    let origin = vm.api().clone();
    let merge = || {
        let mut merge = Command::new(vesicle().with_file_name("vesiclectl"));
        let output = merge.args(["snapshot", "merge"]).args([&snapshot.memory, &diff.memory]).output().unwrap();
        (output.status.success(), String::from_utf8(output.stderr).unwrap())
    };
    let mut clone = vm.successor();
    clone.put("/snapshot/load", &snapshot.load());
    let refusal = origin.put("/snapshot/create", &snapshot.create("Diff")).unwrap();
    assert!(refusal.status == 400 && refusal.fault().contains("in use"), "{refusal:?}");
    let (merged, said) = merge();
    assert!(!merged && said.contains("in use"), "{said}");
    clone.ok("true");
    clone.kill();
    assert_eq!(clone.wait_exit().code(), None);
    assert_eq!(origin.put("/snapshot/create", &snapshot.create("Diff")).unwrap().status, 204);
    assert!(merge().0);
}

#[test]
fn the_tools_look_at_a_snapshot_and_merge_a_diff_into_it() {
    let mut vm = tuned().vcpus(2).boot();
    let base = Snapshot::of(&vm);
    assert_eq!(
        told_by(vesicle(), &["--describe-snapshot"], &[&base.state]),
        told_by(vesicle(), &["--snapshot-version"], &[])
    );
    let shown: Value = serde_json::from_str(&told(&["inspect"], &[&base.state])).unwrap();
    assert_eq!((&shown["vcpus"], &shown["mem_size_mib"]), (&json!(2), &json!(64)));
    assert_eq!(shown["devices"][0]["kind"], "block");
    assert_eq!(shown["config"]["drives"], vm.get("/vm/config")["drives"]);
    told(&["verify"], &[&base.state, &base.memory]);
    vm.kill();

    let mut vm = vm.successor_with(&["--allow-path=/"]);
    vm.put("/snapshot/load", &base.load());
    vm.ok("dd if=/dev/urandom of=/run/changed bs=1M count=4 2>/dev/null; sha256sum /run/changed >/run/sum");
    vm.pause();
    let diff = Snapshot::new();
    vm.put("/snapshot/create", &diff.create("Diff"));
    vm.kill();
    let merged = Snapshot { memory: diff.state.with_file_name("merged"), ..diff };
    let diff_memory = merged.state.with_file_name("memory");
    let output = format!("--output={}", merged.memory.display());
    told(&["merge", &output], &[&base.memory, &diff_memory]);
    share(&merged.memory);
    told(&["verify"], &[&merged.state, &merged.memory]);
    let output = Command::new(vesicle().with_file_name("vesiclectl"))
        .args(["snapshot", "verify"])
        .args([&merged.state, &base.memory])
        .output();
    let refusal = String::from_utf8(output.unwrap().stderr).unwrap();
    assert!(refusal.contains("belongs to another snapshot"), "{refusal}");
    let mut vm = vm.successor();
    vm.put("/snapshot/load", &merged.load());
    vm.ok("sha256sum -c /run/sum");
    vm.shut_down();
}

#[test]
fn a_reset_takes_the_guest_back_in_the_same_process() {
    let mut vm = tuned().vcpus(2).boot();
    vm.ok("echo before >/run/note");
    let refusal = vm.refused_put("/snapshot/reset", &json!({}));
    assert!(refusal.contains("not loaded from a snapshot"), "{refusal}");
    let snapshot = Snapshot::of(&vm);
    vm.kill();
    let mut vm = vm.successor();
    vm.put("/snapshot/load", &snapshot.load());
    // Its job drive is one that it could have written to.
    let refusal = vm.refused_put("/snapshot/reset", &json!({}));
    assert!(refusal.contains("\"job\" is writable"), "{refusal}");
    let mut drawn = Vec::new();
    for _ in 0..3 {
        assert_eq!(vm.ok("cat /run/note; ls /run/dirty 2>&1 | grep -c 'No such'"), "before\n1");
        drawn.push(draws(&mut vm));
        vm.ok("dd if=/dev/zero of=/run/dirty bs=1M count=8 2>/dev/null; rm /run/note; sleep 0.1");
        vm.put("/snapshot/reset", &json!({ "keep_drive_writes": true }));
    }
    assert!(drawn[0] != drawn[1] && drawn[1] != drawn[2], "{drawn:?}");
    vm.pause();
    vm.put("/snapshot/reset", &json!({ "keep_drive_writes": true, "resume_vm": false }));
    assert_eq!(vm.get("/")["state"], "Paused");
    vm.resume();
    assert_eq!(vm.ok("cat /run/note"), "before");
    vm.shut_down();
}

/// What a snapshot had of pages that a reset took back would stay in the file that the next Diff is merged into.
#[test]
fn a_diff_after_a_reset_is_refused_where_nobody_noted_what_was_taken_back() {
    let mut vm = tuned().argument("--allow-path=/").boot();
    let snapshot = Snapshot::of(&vm);
    vm.kill();
    let mut vm = vm.successor_with(&["--allow-path=/"]);
    vm.put("/snapshot/load", &snapshot.load());
    let reset = json!({ "keep_drive_writes": true, "resume_vm": false });
    let (first, next) = (Snapshot::new(), Snapshot::new());
    vm.pause();
    vm.put("/snapshot/reset", &reset);
    vm.put("/snapshot/create", &first.create("Diff"));
    vm.put("/snapshot/create", &next.create("Diff"));
    vm.resume();
    vm.ok("echo before >/run/note");
    vm.pause();
    vm.put("/snapshot/reset", &reset);
    let refusal = vm.refused_put("/snapshot/create", &next.create("Diff"));
    assert!(refusal.contains("track_dirty_pages"), "{refusal}");
    vm.put("/snapshot/create", &first.create("Full"));
    // Over the one before the reset it would be a mixture.
    let refusal = vm.refused_put("/snapshot/create", &next.create("Diff"));
    assert!(refusal.contains("another snapshot"), "{refusal}");
    vm.put("/snapshot/create", &Snapshot::new().create("Diff"));
    vm.kill();

    // With a record it follows, and one that is refused before it begins takes nothing with it.
    let vm = vm.successor_with(&["--allow-path=/"]);
    let mut load = snapshot.load();
    load["track_dirty_pages"] = json!(true);
    vm.put("/snapshot/load", &load);
    vm.pause();
    let (first, next) = (Snapshot::new(), Snapshot::new());
    vm.put("/snapshot/create", &first.create("Diff"));
    vm.put("/snapshot/reset", &reset);
    let missing = json!({ "snapshot_path": "/dev/full/state", "mem_file_path": next.memory, "snapshot_type": "Diff" });
    vm.refused_put("/snapshot/create", &missing);
    vm.put("/snapshot/create", &next.create("Diff"));
    vm.resume();
    vm.shut_down();
}

#[test]
fn a_prepared_process_only_waits_for_the_load() {
    let mut vm = tuned().vcpus(2).boot();
    let began = Instant::now();
    let then = uptime(&mut vm);
    vm.ok("echo before >/run/note");
    let snapshot = Snapshot::of(&vm);
    let mut ran = began.elapsed();
    let other = Snapshot::of(&vm);
    vm.kill();
    let mut vm = vm.successor_with(&["--prepare", snapshot.state.to_str().unwrap()]);
    assert_eq!(vm.get("/")["state"], "Not started");
    std::thread::sleep(Duration::from_secs(3));
    let began = Instant::now();
    vm.put("/snapshot/load", &snapshot.load());
    // The guest's clock has not run while it waited.
    let passed = uptime(&mut vm) - then;
    ran += began.elapsed();
    assert!(passed <= ran.as_secs_f64() + 0.1, "{passed} s passed in {ran:?}");
    assert_eq!(vm.ok("cat /run/note; sleep 0.1"), "before");
    vm.put("/snapshot/reset", &json!({ "keep_drive_writes": true }));
    assert_eq!(vm.ok("cat /run/note"), "before");
    vm.kill();
    let mut vm = vm.successor_with(&["--prepare", snapshot.state.to_str().unwrap()]);
    let refusal = vm.refused_put("/snapshot/load", &other.load());
    assert!(refusal.contains("prepared for another snapshot"), "{refusal}");
    assert_eq!(vm.wait_exit().code(), Some(1));
}

#[test]
fn with_track_dirty_pages_a_diff_holds_what_was_written_since_the_last_snapshot() {
    let vm = tuned().configure();
    vm.patch("/machine-config", &json!({ "track_dirty_pages": true }));
    vm.start();
    let mut vm = vm;
    vm.wait_until_ready();
    let snapshot = Snapshot::new();
    vm.pause();
    // Nothing was saved yet: a Diff is everything.
    vm.put("/snapshot/create", &snapshot.create("Diff"));
    let whole = allocated(&snapshot.memory);
    for round in 0..2 {
        vm.resume();
        // Through the page cache from a drive: pages that the VMM writes, not the guest's CPU.
        vm.ok(&format!(
            "dd if=/dev/vda of=/run/read{round} bs=64k count=4 2>/dev/null; sha256sum /run/read* >/run/sum"
        ));
        vm.ok("head -c 300000 /dev/urandom >/run/random; sha256sum /run/random >>/run/sum");
        vm.pause();
        let alone = Snapshot::new();
        let merged = fs::read(&snapshot.memory).unwrap();
        vm.put("/snapshot/create", &alone.create("Diff"));
        assert!(allocated(&alone.memory) < whole / 4, "{} of {whole}", allocated(&alone.memory));
        merge(&alone.memory, &snapshot.memory);
        assert_ne!(fs::read(&snapshot.memory).unwrap(), merged);
        copied(&alone.state, &snapshot.state);
    }
    vm.kill();
    let mut vm = vm.successor();
    vm.put("/snapshot/load", &snapshot.load());
    vm.ok("sha256sum -c /run/sum");
    vm.shut_down();
}

/// Writes the data of one sparse file over another. Zeroes that are data are data.
fn merge(from: &Path, to: &Path) {
    let (from, to) = (File::open(from).unwrap(), File::options().write(true).open(to).unwrap());
    // SAFETY: the call has no memory of ours in it.
    let seek = |offset: u64, whence| unsafe { libc::lseek(from.as_raw_fd(), offset as i64, whence) };
    let mut end = 0;
    while let Ok(start) = u64::try_from(seek(end, libc::SEEK_DATA)) {
        end = seek(start, libc::SEEK_HOLE) as u64;
        let mut data = vec![0; (end - start) as usize];
        from.read_exact_at(&mut data, start).unwrap();
        to.write_all_at(&data, start).unwrap();
    }
}
