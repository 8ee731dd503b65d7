//! Snapshots: a guest is saved, its VMM killed, and it goes on in another.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use common::{Guest, MicroVm};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Where a snapshot's files are.
struct Snapshot {
    _dir: TempDir,
    state: PathBuf,
    memory: PathBuf,
}

impl Snapshot {
    /// Files to be, in a directory of their own.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { state: dir.path().join("state"), memory: dir.path().join("memory"), _dir: dir }
    }

    fn create(&self, kind: &str) -> Value {
        json!({ "snapshot_path": self.state, "mem_file_path": self.memory, "snapshot_type": kind })
    }

    fn load(&self) -> Value {
        json!({
            "snapshot_path": self.state,
            "mem_backend": { "backend_type": "File", "backend_path": self.memory },
            "resume_vm": true
        })
    }

    /// Of a microVM, which is paused by it.
    fn of(vm: &MicroVm) -> Self {
        let snapshot = Self::new();
        vm.pause();
        vm.put("/snapshot/create", &snapshot.create("Full"));
        snapshot
    }
}

/// Allocated bytes of a file.
fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

#[test]
fn a_guest_goes_on_in_another_process() {
    for guest in [Guest::tuned(), Guest::debian("6.12").vcpus(2)] {
        let mut vm = guest.boot();
        vm.ok("echo remembered >/run/note; sleep 1000 & echo $! >/run/pid");
        let snapshot = Snapshot::of(&vm);
        let size = fs::metadata(&snapshot.memory).unwrap().len();
        assert!(allocated(&snapshot.memory) < size * 3 / 4, "untouched pages are holes");
        vm.kill();
        let mut vm = vm.successor();
        vm.put("/snapshot/load", &snapshot.load());
        assert_eq!(vm.ok("cat /run/note; kill -0 $(cat /run/pid) && echo alive"), "remembered\nalive");
        // Timers go on, on every vCPU.
        vm.ok("for cpu in $(seq 0 $(($(nproc) - 1))); do taskset $((1 << cpu)) sleep 0.1 || exit; done");
        assert_eq!(vm.get("/machine-config")["vcpu_count"], vm.guest().machine_config()["vcpu_count"]);
        vm.shut_down();
    }
}
