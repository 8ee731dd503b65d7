//! `vesiclectl clone` and `vesiclectl snapshot` as their users see them.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// The path of a guest artefact that `tools/test` prepared, by the name `tools/guest` gives it.
fn artefact(name: &str) -> PathBuf {
    let variable = format!("VESICLE_GUEST_{}", name.to_uppercase().replace(['-', '.'], "_"));
    let path = std::env::var_os(&variable);
    path.unwrap_or_else(|| panic!("{variable} is not set; ./tools/test sets it to what ./tools/guest {name} prints"))
        .into()
}

#[test]
fn clones_answer_draw_their_own_random_numbers_and_outlive_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let plot = dir.path().join("plot.svg");
    let vesiclectl = env!("CARGO_BIN_EXE_vesiclectl");
    let mut command = Command::new(vesiclectl);
    command.args(["clone", "8", "--memory", "64"]).arg("--plot").arg(&plot).stdin(Stdio::null());
    command.arg("--vesicle").arg(PathBuf::from(vesiclectl).with_file_name("vesicle"));
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
