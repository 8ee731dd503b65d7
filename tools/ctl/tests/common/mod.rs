//! What the stories of vesiclectl share.

// Each test file uses its own part of this.
#![allow(dead_code)]

use std::path::PathBuf;
use std::process::Output;

/// The path of a guest artefact that `tools/test` prepared, by the name `tools/guest` gives it.
pub fn artefact(name: &str) -> PathBuf {
    let variable = format!("VESICLE_GUEST_{}", name.to_uppercase().replace(['-', '.'], "_"));
    let path = std::env::var_os(&variable);
    path.unwrap_or_else(|| panic!("{variable} is not set; ./tools/test sets it to what ./tools/guest {name} prints"))
        .into()
}

/// The VMM is built beside the launcher.
pub fn vesicle() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_vesiclectl")).with_file_name("vesicle")
}

/// Output, with standard error behind it, and exit status.
pub fn told(output: Output) -> (String, i32) {
    let text = [output.stdout, output.stderr].concat();
    (String::from_utf8_lossy(&text).into_owned(), output.status.code().unwrap())
}
