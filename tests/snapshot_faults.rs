//! Snapshots that are forged, and snapshots that are not completed.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::snapshot::{Snapshot, copied, told, vesicle};
use common::tap::host;
use common::{Guest, MicroVm, Mode};
use serde_json::json;
use vesicle::machine::read_state;
use vesicle::snapshot::{format, memory};

/// The same numbers in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        // Xorshift.
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

/// What comes before the body of a state file.
const HEADER: usize = 44;

/// A state file some of whose body was changed by somebody who knows about the checksum.
fn forge(state: &[u8], random: &mut Random) -> Vec<u8> {
    let mut forged = state[HEADER..].to_vec();
    for _ in 0..=random.below(4) {
        let at = random.below(forged.len());
        match random.below(4) {
            0 => forged[at] ^= 1 << random.below(8),
            1 => forged[at] = 0xff,
            2 => forged.truncate(at + 1),
            _ => forged.insert(at, random.below(256) as u8),
        }
    }
    seal(state, &forged)
}

/// The state file that `state` would be with another body.
fn seal(state: &[u8], body: &[u8]) -> Vec<u8> {
    format::seal(format::check(state).unwrap().id, body)
}

fn times(name: &str, default: u32) -> u32 {
    std::env::var(name).map_or(default, |times| times.parse().unwrap())
}

/// `VESICLE_FORGERIES` says how many are loaded; a hundred times as many are only read.
#[test]
fn a_forged_state_file_is_refused_or_loaded_but_ends_nothing_in_a_panic() {
    let mut vm = Guest::tuned().vcpus(2).argument("--allow-path=/").boot();
    let snapshot = Snapshot::of(&vm);
    vm.kill();
    let state = fs::read(&snapshot.state).unwrap();
    let mut random = Random(0x5eed);
    let (mut read, forgeries) = (0, times("VESICLE_FORGERIES", 30));
    for _ in 0..100 * forgeries {
        fs::write(&snapshot.state, forge(&state, &mut random)).unwrap();
        read += u32::from(read_state(&snapshot.state).is_ok());
    }
    assert!(read > 0 && read < 100 * forgeries, "{read} of {} were read", 100 * forgeries);
    let mut load = snapshot.load();
    load["resume_vm"] = json!(false);
    for number in 0..forgeries {
        fs::write(&snapshot.state, forge(&state, &mut random)).unwrap();
        let mut vm = Guest::tuned().no_job().launch();
        let reply = vm.api().put("/snapshot/load", &load).unwrap();
        assert!(reply.status == 204 || reply.status == 400 && !reply.fault().is_empty(), "{number}: {reply:?}");
        vm.terminate();
        let expected = if reply.status == 204 { 0 } else { 1 };
        assert_eq!(vm.wait_exit().code(), Some(expected), "{number}: {}", vm.log());
        assert!(!vm.log().contains("panicked"), "{number}: {}", vm.log());
    }
}

#[test]
fn a_snapshot_of_another_cpu_or_with_the_state_of_another_device_is_refused_and_says_so() {
    let mut vm = Guest::tuned().argument("--allow-path=/").boot();
    let snapshot = Snapshot::of(&vm);
    vm.kill();
    let content = fs::read(&snapshot.state).unwrap();
    let (_, state) = read_state(&snapshot.state).unwrap();
    // The body begins with the maker of the CPU; it ends with the last device, which begins with its kind.
    let drive = postcard::to_allocvec(state.devices().last().unwrap()).unwrap();
    assert!(content.ends_with(&drive));
    for (at, to, says) in [
        (HEADER, content[HEADER] ^ 1, "from a host whose CPU is of another maker"),
        (content.len() - drive.len(), 1, "virtio device 0 does not fit: it is of device kind 1, not 2"),
    ] {
        let mut forged = content.clone();
        forged[at] = to;
        fs::write(&snapshot.state, seal(&content, &forged[HEADER..])).unwrap();
        vm = vm.successor();
        let refusal = vm.refused_put("/snapshot/load", &snapshot.load());
        assert!(refusal.contains(says), "{refusal}");
        assert_eq!(vm.wait_exit().code(), Some(1));
    }
}

/// A microVM that runs from a copy of `snapshot`, over which it may be saved.
fn from_copy(vm: MicroVm, snapshot: &Snapshot, copy: &Snapshot) -> MicroVm {
    told(&["verify"], &[&snapshot.state, &snapshot.memory]);
    let memory = [memory::previous(&snapshot.memory), snapshot.memory.clone()].into_iter();
    let id = read_state(&snapshot.state).unwrap().0;
    let its =
        |path: &Path| fs::File::open(path).is_ok_and(|file| memory::identify(&file).is_ok_and(|(_, own)| own == id));
    copied(&snapshot.state, &copy.state);
    copied(&memory.into_iter().find(|path| its(path)).unwrap(), &copy.memory);
    let vm = vm.successor_with(&["--allow-path=/"]);
    vm.put("/snapshot/load", &copy.load());
    vm
}

#[test]
fn a_vmm_that_is_killed_while_it_saves_leaves_the_snapshot_before() {
    let mut vm = Guest::tuned().argument("--allow-path=/").boot();
    vm.ok("echo 0 >/run/saved");
    let (snapshot, copy) = (Snapshot::of(&vm), Snapshot::new());
    vm.kill();
    let (mut saved, kills) = (0, times("VESICLE_KILLS", 8));
    for kill in 0..kills {
        vm = from_copy(vm, &snapshot, &copy);
        let found: u32 = vm.ok("cat /run/saved").parse().unwrap();
        assert!([saved, kill].contains(&found), "{found} is neither {saved} nor {kill}");
        saved = found;
        vm.ok(&format!("echo {} >/run/saved; head -c 5000000 /dev/urandom >/run/data", kill + 1));
        vm.pause();
        let (api, body) = (vm.api().clone(), snapshot.create("Full"));
        let asked = std::thread::spawn(move || api.put("/snapshot/create", &body));
        // Sooner or later; whenever it comes, there is one or the other.
        std::thread::sleep(Duration::from_millis(u64::from(kill) * 1500 / u64::from(kills)));
        vm.kill();
        let _ = asked.join().unwrap();
    }
    told(&["verify"], &[&snapshot.state, &snapshot.memory]);

    // Between the two steps that put it in place.
    copied(&snapshot.state, &copy.state);
    fs::rename(&snapshot.memory, memory::previous(&snapshot.memory)).unwrap();
    for next in [None, Some(b"of the next".as_slice())] {
        if let Some(content) = next {
            fs::write(&snapshot.memory, content).unwrap();
        }
        told(&["verify"], &[&snapshot.state, &snapshot.memory]);
        vm = vm.successor();
        vm.put("/snapshot/load", &snapshot.load());
        vm.ok("cat /run/saved");
        vm.kill();
    }
}

#[test]
fn a_full_disk_leaves_the_snapshot_before_and_the_guest_goes_on() {
    // What is mounted later is in no jail.
    let mut vm = Guest::tuned().mode(Mode::Plain).argument("--allow-path=/").boot();
    vm.ok("echo first >/run/note");
    let small = tempfile::tempdir().unwrap();
    let mount = |options: &str| host(&format!("mount -t tmpfs -o {options} none {}", small.path().display()));
    mount("size=100m");
    let snapshot =
        Snapshot { state: small.path().join("state"), memory: small.path().join("memory"), ..Snapshot::new() };
    vm.pause();
    vm.put("/snapshot/create", &snapshot.create("Full"));
    vm.resume();
    let used = host(&format!("du -sk {} | cut -f1", small.path().display()));
    // Room for half of another one.
    mount(&format!("remount,size={}k", used.trim().parse::<u64>().unwrap() * 3 / 2));
    vm.ok("echo second >/run/note");
    vm.pause();
    for kind in ["Full", "Diff"] {
        // A Diff with a name of its own is as large, since nothing is known of what was written.
        let mut body = snapshot.create(kind);
        if kind == "Diff" {
            body["mem_file_path"] = json!(small.path().join("diff"));
        }
        let refusal = vm.refused_put("/snapshot/create", &body);
        assert!(refusal.contains("No space left"), "{refusal}");
    }
    let mut left: Vec<_> = fs::read_dir(small.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["memory", "state"]);
    vm.resume();
    assert_eq!(vm.ok("cat /run/note"), "second");
    told(&["verify"], &[&snapshot.state, &snapshot.memory]);
    // With room again it takes the other's place.
    mount("remount,size=200m");
    vm.pause();
    vm.put("/snapshot/create", &snapshot.create("Full"));
    vm.kill();
    assert_eq!(fs::read_dir(small.path()).unwrap().count(), 2);
    let mut vm = vm.successor();
    vm.put("/snapshot/load", &snapshot.load());
    assert_eq!(vm.ok("cat /run/note"), "second");
    vm.shut_down();
    host(&format!("umount {}", small.path().display()));
}

#[test]
fn a_diff_that_is_half_merged_is_no_snapshot_until_it_is_merged_whole() {
    let mut vm = Guest::tuned().mode(Mode::Plain).argument("--allow-path=/").boot();
    let small = tempfile::tempdir().unwrap();
    let mount = |options: &str| host(&format!("mount -t tmpfs -o {options} none {}", small.path().display()));
    mount("size=200m");
    let path = |name: &str| small.path().join(name);
    let first = Snapshot { state: path("first"), memory: path("memory"), ..Snapshot::new() };
    let second = Snapshot { state: path("second"), memory: path("memory"), ..Snapshot::new() };
    vm.pause();
    vm.put("/snapshot/create", &first.create("Full"));
    vm.resume();
    vm.ok("echo second >/run/note; head -c 16000000 /dev/urandom >/run/much");
    let used: u64 = host(&format!("du -sk {} | cut -f1", small.path().display())).trim().parse().unwrap();
    mount(&format!("remount,size={}k", used + 4096));
    vm.pause();
    let refusal = vm.refused_put("/snapshot/create", &second.create("Diff"));
    assert!(refusal.contains("No space left"), "{refusal}");

    let mut verify = Command::new(vesicle().with_file_name("vesiclectl"));
    let verified = verify.args(["snapshot", "verify"]).args([&first.state, &first.memory]).output().unwrap();
    assert!(String::from_utf8_lossy(&verified.stderr).contains("belongs to another snapshot"), "{verified:?}");
    mount("remount,size=200m");
    vm.put("/snapshot/create", &second.create("Diff"));
    vm.kill();
    let mut vm = vm.successor();
    vm.put("/snapshot/load", &second.load());
    assert_eq!(vm.ok("cat /run/note; wc -c </run/much"), "second\n16000000");
    vm.shut_down();
    host(&format!("umount {}", small.path().display()));
}

#[test]
fn a_diff_is_merged_into_the_memory_that_it_follows_and_into_no_other() {
    for tracked in [false, true] {
        let mut vm = Guest::tuned().argument("--allow-path=/").configure();
        let config = json!({ "vcpu_count": 1, "mem_size_mib": 64, "track_dirty_pages": tracked });
        vm.put("/machine-config", &config);
        vm.start();
        vm.wait_until_ready();
        let first = Snapshot::of(&vm);
        vm.resume();
        vm.ok("echo second >/run/note");
        let second = Snapshot::of(&vm);
        // Without a record a Diff has all that was written since the start, and could be merged into this as well.
        if tracked {
            let refusal = vm.refused_put("/snapshot/create", &first.create("Diff"));
            assert!(refusal.contains("another snapshot than this Diff follows"), "{refusal}");
        }
        vm.resume();
        vm.ok("echo third >/run/note");
        vm.pause();
        vm.put("/snapshot/create", &second.create("Diff"));
        vm.kill();

        // As if a VMM had died when the memory was in its place and the state was not.
        let previous = memory::previous(&first.memory);
        fs::rename(&first.memory, &previous).unwrap();
        copied(&second.memory, &first.memory);
        let mut vm = vm.successor_with(&["--allow-path=/"]);
        let mut load = first.load();
        load["track_dirty_pages"] = json!(tracked);
        vm.put("/snapshot/load", &load);
        assert_ne!(vm.run("cat /run/note").1, 0);
        vm.ok("echo fourth >/run/note");
        vm.pause();
        let refusal = vm.refused_put("/snapshot/create", &first.create("Diff"));
        assert!(refusal.contains("another snapshot than this Diff follows"), "{refusal}");
        assert!(previous.exists());
        vm.put("/snapshot/create", &first.create("Full"));
        assert!(!previous.exists());
        vm.kill();
        for (snapshot, note) in [(&first, "fourth"), (&second, "third")] {
            vm = vm.successor();
            vm.put("/snapshot/load", &snapshot.load());
            assert_eq!(vm.ok("cat /run/note"), note);
            vm.kill();
        }
    }
}

/// Whatever was saved, taken back and not completed before it.
#[test]
fn a_diff_after_a_reset_and_a_full_disk_is_whole_or_refused() {
    // What is mounted later is in no jail.
    let mut vm = Guest::tuned().mode(Mode::Plain).argument("--allow-path=/").boot();
    let origin = Snapshot::of(&vm);
    let small = tempfile::tempdir().unwrap();
    host(&format!("mount -t tmpfs -o size=1m none {}", small.path().display()));
    let lost = Snapshot { state: small.path().join("state"), memory: small.path().join("memory"), ..Snapshot::new() };
    for (tracked, steps, whole) in [
        (true, &["save", "reset"][..], true),
        (true, &["reset", "fail"], true),
        (false, &["reset", "fail"], true),
        (true, &["save", "reset", "fail"], false),
        (true, &["save", "fail", "reset"], false),
        (false, &["live", "reset"], true),
    ] {
        vm.kill();
        vm = vm.successor_with(&["--allow-path=/"]);
        let mut load = origin.load();
        load["track_dirty_pages"] = json!(tracked);
        vm.put("/snapshot/load", &load);
        let (saved, diff, full, merged) = (Snapshot::new(), Snapshot::new(), Snapshot::new(), Snapshot::new());
        let mut base = &origin.memory;
        for step in steps {
            // More than a reset copies back.
            vm.ok("dd if=/dev/urandom of=/run/much bs=1M count=4 2>/dev/null");
            vm.pause();
            match *step {
                "reset" => vm.put("/snapshot/reset", &json!({ "keep_drive_writes": true, "resume_vm": false })),
                "save" => {
                    vm.put("/snapshot/create", &saved.create("Full"));
                    base = &saved.memory;
                }
                // Refused for lack of a record: nothing was begun.
                "live" => {
                    vm.resume();
                    let mut body = lost.create("Full");
                    body["live"] = json!(true);
                    assert!(vm.refused_put("/snapshot/create", &body).contains("track_dirty_pages"));
                    vm.pause();
                }
                _ => assert!(vm.refused_put("/snapshot/create", &lost.create("Diff")).contains("No space left")),
            }
            vm.resume();
        }
        vm.ok("echo more >/run/more");
        vm.pause();
        let reply = vm.api().put("/snapshot/create", &diff.create("Diff")).unwrap();
        assert_eq!(reply.status, if whole { 204 } else { 400 }, "{tracked} {steps:?}: {}", reply.body);
        if whole {
            vm.put("/snapshot/create", &full.create("Full"));
            told(&["merge", &format!("--output={}", merged.memory.display())], &[base, &diff.memory]);
            let [full, merged] = [&full, &merged].map(|snapshot| fs::read(&snapshot.memory).unwrap());
            // All but the ids at their ends.
            assert!(full.len() == merged.len() && full[..64 << 20] == merged[..64 << 20], "{tracked} {steps:?}");
        } else {
            assert!(reply.fault().contains("make a Full"), "{tracked} {steps:?}: {}", reply.body);
        }
    }
    vm.kill();
    host(&format!("umount {}", small.path().display()));
}
