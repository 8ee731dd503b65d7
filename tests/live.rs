//! Live snapshots: a guest is saved while it works, and hardly notices.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::path::Path;

use common::snapshot::{Snapshot, told};
use common::{Guest, MicroVm, wait_until};
use serde_json::{Value, json};

/// Writes over the same memory for ever, and notices when it is not what was written.
const WORKER: &str = "(n=0; while n=$((n+1)); do dd if=/dev/urandom of=/run/x bs=64k count=1 conv=notrunc 2>/dev/null; \
     dd if=/run/x of=/run/y bs=64k conv=notrunc 2>/dev/null; cmp /run/x /run/y || break; echo $n >/run/n; \
     done; echo $n >/run/bad) >/dev/null 2>&1 &";

/// A guest whose writes are noted, with much in memory and little that changes.
fn worker() -> MicroVm {
    let vm = Guest::tuned().vcpus(2).argument("--allow-path=/").configure();
    vm.patch("/machine-config", &json!({ "track_dirty_pages": true }));
    vm.start();
    let mut vm = vm;
    vm.wait_until_ready();
    vm.ok("head -c 20000000 /dev/urandom >/run/data; sha256sum /run/data >/run/sum");
    vm.ok(WORKER);
    works(&mut vm);
    vm
}

/// The worker goes on, and found nothing wrong.
fn works(vm: &mut MicroVm) {
    vm.ok(
        "n=$(cat /run/n); until [ \"$(cat /run/n)\" -gt $((n + 3)) ]; do [ -e /run/bad ] && exit 1; sleep 0.05; done",
    );
    vm.ok("sha256sum -c /run/sum && ! [ -e /run/bad ]");
}

fn live(snapshot: &Snapshot, kind: &str) -> Value {
    let mut body = snapshot.create(kind);
    body["live"] = json!(true);
    body
}

#[test]
fn a_guest_works_on_while_a_live_snapshot_is_made_and_so_does_its_clone() {
    let mut vm = worker();
    let full = Snapshot::new();
    vm.put("/snapshot/create", &live(&full, "Full"));
    assert_eq!(vm.get("/")["state"], "Running");
    let [running, paused] = ["running", "paused"].map(|when| format!("vesicle_snapshot_live_{when}_bytes_total"));
    let (copied, rest) = (vm.metric(&running), vm.metric(&paused));
    assert!(
        copied > 20_000_000 && rest > 0 && rest * 4 < copied,
        "{copied} bytes while it ran, {rest} while it was paused"
    );
    println!("{copied} bytes copied while the guest ran, {rest} while it was paused");
    works(&mut vm);

    // What is written from then on is the next Diff's, which may be live as well.
    vm.ok("head -c 1000000 /dev/urandom >/run/more; sha256sum /run/data /run/more >/run/sum");
    let diff = Snapshot::new();
    vm.put("/snapshot/create", &live(&diff, "Diff"));
    assert!(vm.metric(&running) - copied < copied / 2, "a Diff holds what changed");
    works(&mut vm);
    vm.kill();

    let mut vm = vm.successor();
    vm.put("/snapshot/load", &full.load());
    works(&mut vm);
    assert_ne!(vm.run("cat /run/more").1, 0);
    vm.kill();
    told(&["merge"], &[&full.memory, &diff.memory]);
    common::snapshot::copied(&diff.state, &full.state);
    let mut vm = vm.successor();
    vm.put("/snapshot/load", &full.load());
    works(&mut vm);
    vm.shut_down();
}

/// Names in a directory.
fn names(dir: &Path) -> Vec<String> {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn a_live_snapshot_needs_a_record_of_what_is_written_and_leaves_nothing_half_done() {
    let mut vm = Guest::tuned().argument("--allow-path=/").boot();
    let snapshot = Snapshot::new();
    let refusal = vm.refused_put("/snapshot/create", &live(&snapshot, "Full"));
    assert!(refusal.contains("track_dirty_pages"), "{refusal}");
    assert!(names(snapshot.dir.path()).is_empty());
    vm.ok("true");
    // Of a paused microVM it is a snapshot like any other.
    vm.pause();
    vm.put("/snapshot/create", &live(&snapshot, "Full"));
    assert_eq!(vm.get("/")["state"], "Paused");
    vm.kill();

    // Whoever asks for something else meanwhile gets it afterwards.
    let mut vm = worker();
    let during = Snapshot::new();
    let (api, body) = (vm.api().clone(), live(&during, "Full"));
    let asked = std::thread::spawn(move || api.put("/snapshot/create", &body).unwrap());
    vm.pause();
    vm.resume();
    assert_eq!(asked.join().unwrap().status, 204);
    told(&["verify"], &[&during.state, &during.memory]);
    works(&mut vm);

    // The guest ends in the middle, or before it, or after it.
    let snapshot = Snapshot::new();
    let (api, body) = (vm.api().clone(), live(&snapshot, "Full"));
    vm.begin("reboot -f");
    let _ = api.put("/snapshot/create", &body);
    assert_eq!(vm.wait_exit().code(), Some(0));
    let left = names(snapshot.dir.path());
    assert!(left.is_empty() || left.len() == 2 && !left.iter().any(|name| name.starts_with('.')), "{left:?}");
    wait_until(|| vm.log().contains("ended"));
}
