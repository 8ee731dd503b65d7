//! Links the jailer so that its start costs little: a jail is made for every microVM.

fn main() {
    let startup = concat!(env!("CARGO_MANIFEST_DIR"), "/../resources/startup.ld");
    println!("cargo:rerun-if-changed={startup}");
    for argument in [
        // What runs at the start lies together; it is nearly the same as at the VMM's.
        format!("-Wl,-T,{startup}"),
        // At a fixed address nothing is relocated. The jailer reads nothing that an attacker writes: its command line is
        // the operator's, and what lies in a jail it only opens.
        "-no-pie".to_owned(),
        "-static".to_owned(),
        // Fewer mappings.
        "-Wl,--no-rosegment".to_owned(),
        "-Wl,-z,noseparate-code".to_owned(),
    ] {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
}
