//! Lays what runs at the start of the program together (tools/startup-order), and compiles the system-call filters.

mod seccomp;
#[allow(dead_code)]
#[path = "../src/sandbox/syscalls.rs"]
mod syscalls;

use std::env::var;
use std::error::Error;
use std::fmt::Write;
use std::fs;

fn main() -> Result<(), Box<dyn Error>> {
    let root = var("CARGO_MANIFEST_DIR")?;
    let script = format!("{root}/resources/startup.ld");
    println!("cargo:rerun-if-changed={script}");
    println!("cargo:rustc-link-arg-bins=-Wl,-T,{script}");

    let filters = format!("{root}/resources/seccomp/x86_64.json");
    println!("cargo:rerun-if-changed={filters}");
    println!("cargo:rerun-if-changed={root}/build");
    let filters: serde_json::Value = serde_json::from_slice(&fs::read(filters)?)?;
    let other = if var("CARGO_CFG_TARGET_ENV")? == "musl" { "(glibc)" } else { "(musl)" };
    let mut source = String::new();
    for name in ["api", "vmm", "vcpu", "memory"] {
        let program =
            seccomp::compile(&filters[name], other).map_err(|error| format!("the filter of {name}: {error}"))?;
        writeln!(source, "static {}: [sock_filter; {}] = [", name.to_uppercase(), program.len())?;
        for seccomp::Statement { code, jt, jf, k } in program {
            writeln!(source, "    sock_filter {{ code: {code}, jt: {jt}, jf: {jf}, k: {k} }},")?;
        }
        writeln!(source, "];")?;
    }
    fs::write(format!("{}/seccomp.rs", var("OUT_DIR")?), source)?;
    Ok(())
}
