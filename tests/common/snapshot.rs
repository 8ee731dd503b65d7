//! Snapshots of guests.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::{MicroVm, Place};

/// Where a snapshot's files are.
pub struct Snapshot {
    pub state: PathBuf,
    pub memory: PathBuf,
    pub dir: Place,
}

impl Snapshot {
    /// Files to be, in a directory of their own.
    pub fn new() -> Self {
        let dir = super::tempdir();
        Self { state: dir.path().join("state"), memory: dir.path().join("memory"), dir }
    }

    /// The body of PUT /snapshot/create.
    pub fn create(&self, kind: &str) -> Value {
        json!({ "snapshot_path": self.state, "mem_file_path": self.memory, "snapshot_type": kind })
    }

    /// The body of PUT /snapshot/load.
    pub fn load(&self) -> Value {
        json!({
            "snapshot_path": self.state,
            "mem_backend": { "backend_type": "File", "backend_path": self.memory },
            "resume_vm": true
        })
    }

    /// Of a microVM, which is paused by it.
    pub fn of(vm: &MicroVm) -> Self {
        let snapshot = Self::new();
        vm.pause();
        vm.put("/snapshot/create", &snapshot.create("Full"));
        snapshot
    }
}

/// Allocated bytes of a file.
pub fn allocated(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

/// The VMM.
pub fn vesicle() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_vesicle"))
}

/// What `vesiclectl snapshot`, which must succeed, says.
pub fn told(arguments: &[&str], files: &[&Path]) -> String {
    told_by(&vesicle().with_file_name("vesiclectl"), &[&["snapshot"], arguments].concat(), files)
}

/// What a tool that must succeed says.
pub fn told_by(program: &Path, arguments: &[&str], files: &[&Path]) -> String {
    let output = Command::new(program).args(arguments).args(files).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Copies a file for the VMM, whoever it is.
pub fn copied(file: &Path, copy: &Path) {
    fs::copy(file, copy).unwrap();
    share(copy);
}

/// Lets the VMM use a file of ours, whoever it is.
pub fn share(file: &Path) {
    fs::set_permissions(file, PermissionsExt::from_mode(0o666)).unwrap();
}
