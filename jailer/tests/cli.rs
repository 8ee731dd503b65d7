//! The command line; what a jail is, `tests/jail.rs` of the VMM shows.
#![allow(missing_docs, clippy::unwrap_used)]

use std::process::{Command, Output};

fn jailer(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vesicle-jailer")).args(arguments).output().unwrap()
}

#[test]
fn the_jailer_says_who_it_is_and_how_it_is_used() {
    let version = jailer(&["--version"]);
    assert!(version.status.success() && version.stdout.starts_with(b"Vesicle jailer v"));
    let help = String::from_utf8(jailer(&["--help"]).stdout).unwrap();
    for flag in ["--id", "--exec-file", "--uid", "--chroot-base-dir", "--rootless", "--no-mount-ns"] {
        assert!(help.contains(flag), "{flag}");
    }
    assert!(help.lines().all(|line| line.len() <= 120));
}

#[test]
fn bad_arguments_of_the_jailer_have_a_status_of_their_own() {
    let refused = jailer(&["--id", "a"]);
    assert_eq!(refused.status.code(), Some(153));
    assert_eq!(refused.stderr, b"vesicle-jailer: --exec-file is missing\n");
    let refused = jailer(&["--id", "a", "--exec-file", "/", "--uid", "1", "--gid", "1"]);
    assert_eq!(refused.status.code(), Some(153));
    let refused = jailer(&["--id", "a", "--exec-file", "/no/such/file", "--uid", "1", "--gid", "1"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(String::from_utf8(refused.stderr).unwrap().contains("cannot open /no/such/file"));
}
