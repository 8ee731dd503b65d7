//! Links the jailer so that its start costs little: a jail is made for every microVM.

fn main() {
    let startup = concat!(env!("CARGO_MANIFEST_DIR"), "/../resources/startup.ld");
    println!("cargo:rerun-if-changed={startup}");
    for argument in [
        // What runs at the start lies together; it is nearly the same as at the VMM's.
        format!("-Wl,-T,{startup}"),
        // Fewer mappings.
        "-Wl,-z,noseparate-code".to_owned(),
    ] {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
}
