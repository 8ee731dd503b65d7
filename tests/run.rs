//! `vesiclectl run`: one command, one microVM.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use common::artefact;
use common::snapshot::vesicle;

/// What a run came to: its status, its output, and what it said.
type Outcome = (i32, String, String);

fn run(snapshots: &Path, options: &[&str], stdin: impl Into<Stdio>, command: &[&str]) -> Outcome {
    let output = Command::new(vesicle().with_file_name("vesiclectl"))
        .arg("run")
        .args([Path::new("--vesicle"), vesicle()])
        .args([Path::new("--kernel"), &artefact("kernel-tuned")])
        .args([Path::new("--initramfs"), &artefact("initramfs-tuned")])
        .args([Path::new("--snapshots"), snapshots])
        .args(["--memory", "128"])
        .args(options)
        .arg("--")
        .args(command)
        .stdin(stdin)
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

/// The snapshots that are kept.
fn kept(snapshots: &Path) -> Vec<PathBuf> {
    fs::read_dir(snapshots).map_or_else(|_| Vec::new(), |found| found.map(|entry| entry.unwrap().path()).collect())
}

#[test]
fn a_run_starts_from_the_snapshot_that_the_first_one_made() {
    let dir = tempfile::tempdir().unwrap();
    let snapshots = dir.path().join("snapshots");
    let command = ["sh", "-c", "cat /proc/sys/kernel/random/uuid; exit 7"];
    let run = |options: &[&str], command: &[&str]| run(&snapshots, options, Stdio::null(), command);

    // Who wants to see a kernel boot sees it.
    let (status, output, _) = run(&["--boot-args", "loglevel=7"], &["true"]);
    assert!(status == 0 && output.contains("Linux version"), "{output}");
    assert!(kept(&snapshots).is_empty());

    let (status, first, said) = run(&[], &command);
    assert_eq!((status, first.len()), (7, 37), "{first} {said}");
    assert!(said.contains("booting the guest once"), "{said}");
    let snapshot = kept(&snapshots);
    assert_eq!(snapshot.len(), 1);
    let (status, second, said) = run(&[], &command);
    assert_eq!((status, second.len(), said.as_str()), (7, 37, ""));
    assert_ne!(first, second, "two guests drew the same random numbers");

    // The clock is the host's, and a job that is longer than what the guest waited with arrives whole.
    let input = File::open(artefact("kernel-tuned")).unwrap();
    let length = input.metadata().unwrap().len();
    let (status, output, said) = self::run(&snapshots, &["--stdin"], input, &["sh", "-c", "date +%s; wc -c"]);
    let numbers: Vec<u64> = output.lines().map(|line| line.trim().parse().unwrap()).collect();
    assert_eq!((status, said.as_str(), numbers[1]), (0, "", length));
    assert!(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs().abs_diff(numbers[0]) < 60, "{numbers:?}");
    assert_eq!(kept(&snapshots), snapshot);

    // One that is damaged is not used again.
    OpenOptions::new().write(true).open(snapshot[0].join("memory")).unwrap().set_len(1 << 20).unwrap();
    let (status, _, said) = run(&[], &command);
    assert!(status == 125 && said.contains("memory") && said.contains("the next run makes another"), "{said}");
    let (status, _, said) = run(&[], &command);
    assert!(status == 7 && said.contains("booting the guest once"), "{said}");
}

#[test]
fn a_guest_that_cannot_be_kept_is_booted_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "not a directory").unwrap();
    let (status, output, said) = run(&file, &[], Stdio::null(), &["sh", "-c", "echo hi; exit 7"]);
    assert_eq!((status, output.as_str()), (7, "hi\n"));
    assert!(said.contains("no snapshot of the guest is kept in"), "{said}");
}
