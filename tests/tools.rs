//! What the shell tools do on hosts that lack something: commands of the host's are replaced by those of a test.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

/// A host with an empty cache and nothing to fetch, where nobody is asked for a password.
struct Host(TempDir);

impl Host {
    fn new() -> Self {
        let host = Self(tempfile::tempdir().unwrap());
        host.command("apt-get", "exit 100");
        host.command("apt-cache", "true");
        host.command("sudo", r#"shift; exec "$@""#);
        host
    }

    /// Replaces a command; to the script the host is $HOST.
    fn command(&self, name: &str, script: &str) {
        let path = self.0.path().join("bin").join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    }

    /// Runs a bash script on it, in which $tools is their directory. Returns what it said, and its status.
    fn run(&self, script: &str) -> (String, i32) {
        let path = format!("{}/bin:{}", self.0.path().display(), std::env::var("PATH").unwrap());
        let mut bash = Command::new("bash");
        bash.args(["-c", script]).env("PATH", path).env("HOST", self.0.path()).current_dir(self.0.path());
        bash.env("tools", Path::new(env!("CARGO_MANIFEST_DIR")).join("tools"));
        bash.env("VESICLE_CACHE", self.0.path().join("cache")).env("CARGO_TARGET_DIR", self.0.path().join("target"));
        let output = bash.output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        (String::from_utf8_lossy(&said).into_owned(), output.status.code().unwrap())
    }

    /// What a package that apt-get can fetch has in it.
    fn package(&self, files: &[&str]) {
        for file in files {
            let path = self.0.path().join("package").join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        let control = self.0.path().join("package/DEBIAN/control");
        fs::create_dir_all(control.parent().unwrap()).unwrap();
        let fields = "Package: busybox-static\nVersion: 1\nArchitecture: all\nMaintainer: a\nDescription: a\n";
        fs::write(control, fields).unwrap();
        let (said, status) = self.run("dpkg-deb -b package");
        assert_eq!(status, 0, "{said}");
        self.command("apt-cache", "echo busybox-static");
        self.command(
            "apt-get",
            r#"case "$*" in
                *--print-uris*) echo "'http://a' busybox-static_1_all.deb 1" ;;
                *download*) cp "$HOST/package.deb" . ;;
                *) exit 100 ;;
            esac"#,
        );
        self.command("depmod", "true");
    }
}

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

#[test]
fn a_package_has_bin_and_lib_whether_or_not_its_debian_has_them_in_usr() {
    for usr in ["", "usr/"] {
        let host = Host::new();
        host.package(&[&format!("{usr}bin/busybox"), &format!("{usr}lib/modules/6.12/modules.order")]);
        let (said, status) = host.run(r#". "$tools/lib.sh"; ls "$(busybox)" "$(unpacked busybox-static)"/lib/modules"#);
        assert!(status == 0 && said.contains("cache/packages/busybox-static_1/bin/busybox"), "{status}: {said}");
        assert!(said.contains("/lib/modules:\n6.12\n"), "{said}");
    }
}

#[test]
fn a_package_that_cannot_be_had_is_an_error_wherever_it_is_asked_for() {
    let host = Host::new();
    for script in [
        r#". "$tools/lib.sh"; found=$(busybox); echo "found $found""#,
        r#""$tools/guest" initramfs-tuned"#,
        r#""$tools/guest" vmlinux-6.12"#,
        r#""$tools/guest" kernel-6.1"#,
    ] {
        let (said, status) = host.run(script);
        assert!(status == 3 && said.contains("the package lists know no "), "{script}: {status}: {said}");
        assert!(!said.contains("found") && !host.0.path().join("cache/guest").exists(), "{script}: {said}");
    }
}

#[test]
fn package_lists_that_somebody_else_refreshes_are_waited_for() {
    let host = Host::new();
    let busy = "E: Could not get lock /var/lib/apt/lists/lock. It is held by process 1 (apt-get)";
    host.command("apt-get", &format!("[ -e $HOST/ended ] || {{ touch $HOST/ended; echo '{busy}' >&2; exit 100; }}"));
    let refresh = r#". "$tools/lib.sh"; refresh_lists; echo fresh"#;
    let (said, status) = host.run(refresh);
    assert!(status == 0 && said.contains("fresh\n"), "{status}: {said}");
    host.command("apt-get", "echo 'E: no network' >&2; exit 100");
    let (said, status) = host.run(refresh);
    assert!(status == 1 && said.contains("no network"), "{status}: {said}");
}

#[test]
fn a_status_of_a_command_is_never_one_of_setting_up() {
    let host = Host::new();
    host.command("cargo", "true");
    for tool in ["run -- true", "lab setup", "lab run --lab -- true"] {
        let (said, status) = host.run(&format!("env -u VESICLE_IN_LAB \"$tools\"/{tool}"));
        assert_eq!(status, 125, "{tool}: {said}");
    }
    for (command, expected) in [("sh -c 'exit 7'", 7), ("/no/such/command", 127)] {
        let (said, status) = host.run(&format!("\"$tools/lab\" run --native -- {command}"));
        assert_eq!(status, expected, "{command}: {said}");
    }
}

#[test]
fn a_fuzzer_says_what_it_skipped_and_counts_in_every_language() {
    let host = Host::new();
    host.command("cargo", r#"echo "{\"kind\":[\"lib\"],\"executable\":\"$HOST/bin/properties\"}""#);
    host.command(
        "properties",
        r#"case "$*" in *--show-output*) echo 'SKIPPED: a TAP' ;; esac; echo 'test result: ok. 1 passed'"#,
    );
    let (said, status) = host.run(r#""$tools/fuzz" --seconds 1 net"#);
    assert!(status == 0 && said.contains(" s, SKIPPED: a TAP\n"), "{status}: {said}");
    // Nor do counts and times depend on how the user's language writes numbers.
    host.command("properties", "echo 'test result: ok. 1 passed'");
    let comma = r#"localedef -i de_DE -f UTF-8 "$HOST/de_DE.UTF-8"; export LOCPATH=$HOST LC_ALL=de_DE.UTF-8"#;
    let (said, status) = host.run(&format!(r#"{comma}; "$tools/fuzz" --seconds 1 net"#));
    assert!(status == 0 && said.contains(" inputs in "), "{status}: {said}");
}
