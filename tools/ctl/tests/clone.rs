//! `vesiclectl clone` and `vesiclectl snapshot` as their users see them.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::process::{Command, Stdio};

use common::{artefact, vesicle};

#[test]
fn clones_answer_draw_their_own_random_numbers_and_outlive_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let plot = dir.path().join("plot.svg");
    let vesiclectl = env!("CARGO_BIN_EXE_vesiclectl");
    let mut command = Command::new(vesiclectl);
    command.args(["clone", "8", "--memory", "64"]).arg("--plot").arg(&plot).stdin(Stdio::null());
    command.arg("--vesicle").arg(vesicle());
    for (option, name) in [("--kernel", "kernel-tuned"), ("--initramfs", "initramfs-tuned"), ("--program", "vsock")] {
        command.arg(option).arg(artefact(name));
    }
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    println!("{said}");
    assert!(said.contains("8 clones") && said.contains("p99") && said.contains("7 others answered again"), "{said}");
    let own = said.split("memory per clone: ").nth(1).unwrap().split(' ').next().unwrap();
    assert!(own.parse::<f64>().unwrap() < 4.0, "clones share what they do not write: {said}");
    assert!(fs::read_to_string(&plot).unwrap().starts_with("<svg"));
}
