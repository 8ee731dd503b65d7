//! Working sets: what a first run touched is there when a clone touches it.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs::{self, File};
use std::path::Path;

use common::snapshot::{Snapshot, share, told, vesicle};
use common::{Guest, MicroVm, wait_until};
use serde_json::{Value, json};
use vesicle::snapshot::memory;
use vesicle::snapshot::working_set::{self, Run};

/// Work that reads what was there before, and writes as much.
const WORK: &str = "cat /run/before >/run/after && sha256sum -c /run/sum";

/// A guest that has something to read, and its snapshot.
fn guest() -> (MicroVm, Snapshot) {
    let mut vm = Guest::tuned().argument("--allow-path=/").boot();
    vm.ok("head -c 6000000 /dev/urandom >/run/before; echo \"$(sha256sum </run/before | cut -d' ' -f1)  /run/after\" >/run/sum");
    vm.run(WORK);
    vm.ok("rm /run/after");
    let snapshot = Snapshot::of(&vm);
    vm.kill();
    (vm, snapshot)
}

fn read(path: &Path, snapshot: &Snapshot) -> Vec<Run> {
    let (size, id) = memory::identify(&File::open(&snapshot.memory).unwrap()).unwrap();
    working_set::read(&File::open(path).unwrap(), id, size).unwrap()
}

fn bytes(runs: &[Run], wanted: impl Fn(&Run) -> bool) -> u64 {
    runs.iter().filter(|run| wanted(run)).map(|run| run.range.end - run.range.start).sum()
}

/// A load that populates a working set.
fn load(snapshot: &Snapshot, working_set: &Path) -> Value {
    let mut load = snapshot.load();
    load["working_set_path"] = json!(working_set);
    load
}

/// Page faults that the guest's vCPU had to wait for.
fn faults(vm: &mut MicroVm) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{}/task", vm.pid())).unwrap().map(|task| task.unwrap().path());
    let mut vcpus = tasks.filter(|task| fs::read_to_string(task.join("comm")).unwrap().trim() == "vcpu0");
    let stat = fs::read_to_string(vcpus.next().unwrap().join("stat")).unwrap();
    // Field 10, minflt (proc_pid_stat(5)); the second is the name, in parentheses.
    stat.rsplit_once(") ").unwrap().1.split(' ').nth(7).unwrap().parse().unwrap()
}

#[test]
fn a_working_set_that_was_recorded_is_populated_beside_the_guest() {
    let (vm, snapshot) = guest();
    let mut vm = vm.successor();
    vm.put("/snapshot/load", &snapshot.load());
    vm.ok(WORK);
    let without = faults(&mut vm);
    vm.pause();
    let file = snapshot.dir.path().join("working-set");
    let (output, pid) = (format!("--output={}", file.display()), format!("--pid={}", vm.pid()));
    told(&["record", &output, &pid], &[&snapshot.state, &snapshot.memory]);
    share(&file);
    vm.kill();
    let runs = read(&file, &snapshot);
    let (all, written) = (bytes(&runs, |_| true), bytes(&runs, |run| run.written));
    assert!(written > 6_000_000 && all > 12_000_000, "{all} bytes touched, {written} written");

    // The guest waits, so that it is known who touches what.
    let mut vm = vm.successor();
    let mut paused = load(&snapshot, &file);
    paused["resume_vm"] = json!(false);
    vm.put("/snapshot/load", &paused);
    wait_until(|| vm.metric("vesicle_snapshot_working_set_bytes_total") == all);
    // It is resident as the first run left it: the same is recorded again.
    let (again, pid) = (snapshot.dir.path().join("again"), format!("--pid={}", vm.pid()));
    told(&["record", &format!("--output={}", again.display()), &pid], &[&snapshot.state, &snapshot.memory]);
    let resident = read(&again, &snapshot);
    assert!(bytes(&resident, |run| run.written) >= written, "{resident:?}");
    let holds =
        |run: &Run| resident.iter().map(|other| overlap(run, other)).sum::<u64>() == run.range.end - run.range.start;
    assert!(runs.iter().all(holds), "{runs:?} of {resident:?}");
    vm.resume();
    vm.ok(WORK);
    let with = faults(&mut vm);
    assert!(with * 4 < without, "{with} page faults with the working set, {without} without");
    println!("{without} page faults of the vCPU without the working set, {with} with it");
    vm.put("/snapshot/reset", &json!({ "keep_drive_writes": true }));
    vm.ok(WORK);
    vm.kill();

    // A prepared shell has it in advance of the load.
    let [state, file] = [&snapshot.state, &file].map(|path| path.to_str().unwrap());
    let mut vm = vm.successor_with(&["--prepare", state, "--working-set-path", file]);
    vm.put("/snapshot/load", &snapshot.load());
    vm.ok(WORK);
    let prepared = faults(&mut vm);
    assert!(prepared * 4 < without, "{prepared} page faults in a prepared shell, {without} without");
    vm.put("/snapshot/reset", &json!({ "keep_drive_writes": true }));
    vm.ok(WORK);
    vm.shut_down();

    // The guest runs meanwhile, and is taken back, paused and ended in the middle.
    for ending in [MicroVm::shut_down, |mut vm: MicroVm| vm.kill()] {
        let (vm, snapshot) = guest();
        told_record(&snapshot, &[]);
        let mut vm = vm.successor();
        vm.put("/snapshot/load", &load(&snapshot, &snapshot.dir.path().join("working-set")));
        vm.put("/snapshot/reset", &json!({ "keep_drive_writes": true }));
        vm.pause();
        vm.resume();
        vm.ok(WORK);
        ending(vm);
    }
}

/// Bytes of `run` that are in `other`.
fn overlap(run: &Run, other: &Run) -> u64 {
    run.range.end.min(other.range.end).saturating_sub(run.range.start.max(other.range.start))
}

/// Records what a microVM of its own does until `command` has ended.
fn told_record(snapshot: &Snapshot, command: &[&str]) -> String {
    let output = format!("--output={}", snapshot.dir.path().join("working-set").display());
    let vmm = format!("--vesicle={}", vesicle().display());
    let command: Vec<_> = command.iter().map(Path::new).collect();
    let said = told(&["record", &output, &vmm], &[&[&*snapshot.state, &*snapshot.memory], &*command].concat());
    share(&snapshot.dir.path().join("working-set"));
    said
}

#[test]
fn a_working_set_is_recorded_of_a_microvm_that_runs_only_for_it() {
    let (vm, snapshot) = guest();
    let drive = fs::read(vm.dir().join("job")).unwrap();
    let said = told_record(&snapshot, &["--", "sh", "-c", "test -S $VESICLE_API && test $VESICLE_VSOCK"]);
    let runs = read(&snapshot.dir.path().join("working-set"), &snapshot);
    assert!(said.contains(&bytes(&runs, |_| true).to_string()), "{said}");
    assert!(bytes(&runs, |run| run.written) > 0);
    assert!(fs::read(vm.dir().join("job")).unwrap() == drive, "it wrote to the drive");
}

#[test]
fn a_working_set_that_is_none_is_refused_and_named() {
    let (vm, snapshot) = guest();
    told_record(&snapshot, &[]);
    let file = snapshot.dir.path().join("working-set");
    let good = fs::read(&file).unwrap();
    let (_, id) = memory::identify(&File::open(&snapshot.memory).unwrap()).unwrap();
    let damaged = |at: usize| {
        let mut content = good.clone();
        content[at] ^= 1;
        content
    };
    let beyond = working_set::encode(id, &[Run { range: 1 << 40..1 << 41, written: true }]);
    let mut vm = Some(vm);
    for (content, reason) in [
        (damaged(0), "it is not a working set"),
        (damaged(8), "it has format version 0"),
        (damaged(40), "it is damaged"),
        (good[..good.len() - 16].to_vec(), "it is damaged"),
        (beyond, "is not among the"),
        (working_set::encode([0; 16], &[]), "it belongs to another snapshot"),
    ] {
        fs::write(&file, content).unwrap();
        let mut next = vm.take().unwrap().successor();
        let refusal = next.refused_put("/snapshot/load", &load(&snapshot, &file));
        assert!(refusal.contains("working_set_path") && refusal.contains(reason), "{refusal}");
        assert_eq!(next.wait_exit().code(), Some(1));
        let [state, file] = [&snapshot.state, &file].map(|path| path.to_str().unwrap());
        let mut shell = next.successor_with(&["--prepare", state, "--working-set-path", file]);
        assert_eq!(shell.wait_exit().code(), Some(152));
        assert!(shell.log().contains(reason), "{}", shell.log());
        vm = Some(shell);
    }
}
