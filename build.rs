//! Lays what runs at the start of the program together (tools/startup-order).

use std::env::var;

fn main() {
    let script = format!("{}/resources/startup.ld", var("CARGO_MANIFEST_DIR").unwrap_or_default());
    println!("cargo:rerun-if-changed={script}");
    println!("cargo:rustc-link-arg-bins=-Wl,-T,{script}");
}
