//! What the shell tools share, tools/lib.sh.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::process::Command;

#[test]
fn a_package_that_is_being_unpacked_is_not_one_that_was() {
    let cache = tempfile::tempdir().unwrap();
    // In the middle of the first look for a package there is a second one, which says what it finds but waits for nothing.
    let script = r#"
        . tools/lib.sh
        apt-get() { echo "'pool/thing_1.2.3_amd64.deb' thing_1.2.3_amd64.deb 1"; }
        newest_package() { echo thing; }
        fetch_package() { (once() { :; }; unpacked thing); }
        unpacked thing"#;
    let output = Command::new("bash")
        .args(["-c", script])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env("VESICLE_CACHE", cache.path())
        .output()
        .unwrap();
    let package = format!("{}\n", cache.path().join("packages/thing_1.2.3").display());
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    assert_eq!(said, [package.clone(), package]);
}
