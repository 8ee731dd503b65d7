//! Drives whose writes go to a layer, as Linux guests use them.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{Guest, MicroVm, Place};
use serde_json::{Value, json};

const MIB: usize = 1 << 20;

/// An image, and the directory it lives in.
struct Image {
    dir: Place,
    path: PathBuf,
    content: Vec<u8>,
}

impl Image {
    /// 8 MiB without two blocks alike.
    fn new() -> Self {
        let dir = common::tempdir();
        let path = dir.path().join("base");
        let content: Vec<u8> = (0..(8 * MIB / 8) as u64).flat_map(|i| ((i * i) ^ 0x5a5a).to_le_bytes()).collect();
        fs::write(&path, &content).unwrap();
        // Whoever opens it for writing is no friend.
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o444)).unwrap();
        Self { dir, path, content }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn is_unchanged(&self) -> bool {
        fs::read(&self.path).unwrap() == self.content
    }

    fn guest(&self, mut more: Value) -> Guest {
        if more["overlay"].is_null() {
            more["overlay"] = json!({});
        }
        Guest::tuned().drive("data", &self.path, more)
    }

    fn create(&self, name: &str) -> Value {
        json!({ "snapshot_path": self.path(name), "mem_file_path": self.path(&format!("{name}.memory")) })
    }

    fn load(&self, name: &str) -> Value {
        let memory = json!({ "backend_type": "File", "backend_path": self.path(&format!("{name}.memory")) });
        json!({ "snapshot_path": self.path(name), "mem_backend": memory, "resume_vm": true })
    }

    /// A microVM of a snapshot.
    fn clone_of(&self, vm: MicroVm, name: &str) -> MicroVm {
        let vm = vm.successor();
        vm.put("/snapshot/load", &self.load(name));
        vm
    }
}

/// Writes `word` to block `at` of the drive, past the guest's cache.
fn put(vm: &mut MicroVm, at: u32, word: &str) {
    vm.ok(&format!("echo {word} | dd of=/dev/vda bs=4k seek={at} conv=sync,notrunc oflag=direct 2>/dev/null"));
}

/// The word in block `at`, past the guest's cache.
fn get(vm: &mut MicroVm, at: u32) -> String {
    vm.ok(&format!("dd if=/dev/vda bs=4k skip={at} count=1 iflag=direct 2>/dev/null | head -n 1 | tr -cd a-z"))
}

fn sum(vm: &mut MicroVm) -> String {
    vm.ok("dd if=/dev/vda bs=64k iflag=direct 2>/dev/null | md5sum")
}

fn sum_of(path: &Path) -> String {
    let output = std::process::Command::new("md5sum").stdin(fs::File::open(path).unwrap()).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
}

fn metric(vm: &MicroVm) -> u64 {
    vm.metric("vesicle_block_overlay_bytes{drive_id=\"data\"}")
}

#[test]
fn a_guest_with_an_overlay_writes_and_its_image_stays_as_it_was() {
    for engine in ["Sync", "Async"] {
        let image = Image::new();
        let mut vm = image.guest(json!({ "io_engine": engine, "cache_type": "Writeback", "discard": true })).boot();
        assert_eq!(sum(&mut vm), sum_of(&image.path));
        assert_eq!(vm.ok("blockdev --getro /dev/vda"), "0");
        vm.ok("dd if=/dev/zero of=/dev/vda bs=1M count=4 2>/dev/null");
        put(&mut vm, 1, "mine");
        vm.ok("sync");
        assert_eq!(get(&mut vm, 1), "mine");
        assert_ne!(sum(&mut vm), sum_of(&image.path));
        assert!(metric(&vm) > 0);
        assert!(image.is_unchanged());
        // It cannot get another image under what it wrote.
        let reply = vm.api().patch("/drives/data", &json!({ "drive_id": "data", "path_on_host": image.path })).unwrap();
        assert!(reply.status == 400 && reply.fault().contains("has an overlay"), "{}", reply.body);
        assert_eq!(vm.get("/vm/config")["drives"][0]["overlay"], json!({}));
        vm.shut_down();
        let mut vm = image.guest(json!({})).boot();
        assert_eq!(sum(&mut vm), sum_of(&image.path), "the layer was not to last");
        vm.shut_down();
    }
}

#[test]
fn clones_of_one_snapshot_have_overlays_of_their_own() {
    let image = Image::new();
    let mut vm = image.guest(json!({ "io_engine": "Async" })).argument("--allow-path=/").boot();
    put(&mut vm, 1, "before");
    vm.pause();
    vm.put("/snapshot/create", &image.create("one"));
    vm.kill();
    let layer = fs::read(image.path("one.data.layer")).unwrap();

    let mut first = image.clone_of(vm, "one");
    assert_eq!((get(&mut first, 1), metric(&first)), ("before".into(), 0));
    put(&mut first, 2, "first");
    // A snapshot of a clone stands alone, and is not written over the one it lives on.
    first.pause();
    assert!(first.refused_put("/snapshot/create", &image.create("one")).contains("in use by this microVM"));
    first.put("/snapshot/create", &image.create("two"));
    first.kill();
    let mut second = image.clone_of(first, "one");
    assert_eq!(get(&mut second, 1), "before");
    assert_ne!(get(&mut second, 2), "first");
    put(&mut second, 2, "second");
    put(&mut second, 1, "after");
    assert_eq!((get(&mut second, 1), get(&mut second, 2)), ("after".into(), "second".into()));
    second.kill();
    assert!(fs::read(image.path("one.data.layer")).unwrap() == layer);
    for file in ["one", "one.memory", "one.data.layer"] {
        fs::remove_file(image.path(file)).unwrap();
    }
    let mut third = image.clone_of(second, "two");
    assert_eq!((get(&mut third, 1), get(&mut third, 2)), ("before".into(), "first".into()));
    assert!(image.is_unchanged());
    third.shut_down();
    // Without its layer a snapshot is no snapshot.
    fs::remove_file(image.path("two.data.layer")).unwrap();
    let alone = Guest::tuned().no_job().argument("--allow-path=/").launch();
    let refusal = alone.refused_put("/snapshot/load", &image.load("two"));
    assert!(refusal.contains("two.data.layer"), "{refusal}");
}

#[test]
fn a_reset_drops_what_was_written_to_an_overlay() {
    let image = Image::new();
    let mut vm = image.guest(json!({})).argument("--allow-path=/").boot();
    put(&mut vm, 1, "before");
    vm.pause();
    vm.put("/snapshot/create", &image.create("one"));
    vm.kill();
    let mut vm = vm.successor();
    // The harness's own drive gets an overlay as well, and so nothing is in the way of a reset.
    let mut load = image.load("one");
    load["drive_overrides"] = json!([{ "drive_id": "job", "overlay": {} }]);
    vm.put("/snapshot/load", &load);
    for round in 0..3 {
        assert_eq!((get(&mut vm, 1), metric(&vm)), ("before".into(), 0), "round {round}");
        put(&mut vm, 1, "after");
        put(&mut vm, 2, "after");
        assert_eq!((get(&mut vm, 1), metric(&vm)), ("after".into(), 8192), "round {round}");
        vm.put("/snapshot/reset", &json!({}));
    }
    assert!(image.is_unchanged());
}

#[test]
fn an_overlay_with_a_path_is_found_by_the_next_boot() {
    for engine in ["Sync", "Async"] {
        let image = Image::new();
        let overlay = json!({ "layer_path": image.path("layer") });
        let guest = || image.guest(json!({ "overlay": overlay, "cache_type": "Writeback", "io_engine": engine }));
        let mut vm = guest().boot();
        put(&mut vm, 1, "flushed");
        vm.ok("dd if=/dev/zero of=/dev/vda bs=4k seek=3 count=1 conv=notrunc,fsync 2>/dev/null");
        assert!(vm.metric("vesicle_block_flush_count_total{drive_id=\"data\"}") > 0);
        let other = guest().no_job().configure();
        let refusal = other.refused_put("/actions", &json!({ "action_type": "InstanceStart" }));
        assert!(refusal.contains("in use by another drive"), "{refusal}");
        vm.kill();
        let mut vm = guest().boot();
        assert_eq!(get(&mut vm, 1), "flushed");
        put(&mut vm, 2, "unflushed");
        vm.shut_down();
        let mut vm = guest().boot();
        assert_eq!((get(&mut vm, 1), get(&mut vm, 2)), ("flushed".into(), "unflushed".into()));
        vm.shut_down();
        assert!(image.is_unchanged());
        // An image that is a byte longer is another image, and a file that is no layer is none.
        fs::copy(&image.path, image.path("other")).unwrap();
        let (other, no_layer) = (image.path("other"), image.path("no layer"));
        fs::write(&no_layer, &image.content).unwrap();
        let configured =
            Guest::tuned().no_job().drive("data", &other, json!({ "overlay": { "layer_path": no_layer } }));
        let refusal = configured.configure().refused_put("/actions", &json!({ "action_type": "InstanceStart" }));
        assert!(refusal.contains("not a drive's layer"), "{refusal}");
    }
}
