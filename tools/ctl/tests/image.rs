//! Images that `vesiclectl image build` makes, as guests see them.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;
use std::process::Command;

use common::{artefact, told, vesicle};

/// Runs a command in the image, in a guest of Debian's whose initramfs brings the modules.
fn run(image: &Path, command: &[&str]) -> (String, i32) {
    let mut run = Command::new(env!("CARGO_BIN_EXE_vesiclectl"));
    run.arg("run").arg("--vesicle").arg(vesicle());
    run.arg("--kernel").arg(artefact("kernel-tuned")).arg("--initramfs").arg(artefact("initramfs-tuned"));
    run.args(["--memory", "64"]).arg("--rootfs").arg(image).arg("--").args(command);
    told(run.output().unwrap())
}

/// Fills `root` with the busybox that the tests' own root file system is made of.
fn fill(root: &Path) {
    fs::create_dir_all(root.join("bin")).unwrap();
    let dump = format!("dump -p /bin/busybox {}", root.join("bin/busybox").display());
    let status = Command::new("debugfs").args(["-R", &dump]).arg(artefact("rootfs")).output().unwrap().status;
    assert!(status.success());
    fs::set_permissions(root.join("bin/busybox"), fs::Permissions::from_mode(0o755)).unwrap();
}

/// Packs `files` into a layer, and that into a layout, as a tar at `path`. Only its tools look at digests.
fn pack(files: &Path, path: &Path) {
    let script = r#"
        set -e
        umask 022
        cd "$1"
        mkdir -p layout/blobs/sha256
        echo '{"imageLayoutVersion": "1.0.0"}' >layout/oci-layout
        add() { sum=$(sha256sum <"$1"); sum=${sum%% *}; mv "$1" "layout/blobs/sha256/$sum"; }
        tar -czf layer -C "$2" .
        add layer
        echo "{\"layers\": [{\"digest\": \"sha256:$sum\"}]}" >manifest
        add manifest
        echo "{\"manifests\": [{\"digest\": \"sha256:$sum\"}]}" >layout/index.json
        tar -cf "$3" -C layout ."#;
    let work = tempfile::tempdir().unwrap();
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh"]).arg(work.path()).arg(files).arg(path);
    let (said, status) = told(command.output().unwrap());
    assert_eq!(status, 0, "{said}");
}

#[test]
fn a_directory_with_a_busybox_boots() {
    let dir = tempfile::tempdir().unwrap();
    let (root, image) = (dir.path().join("root"), dir.path().join("image"));
    fill(&root);
    symlink("busybox", root.join("bin/sh")).unwrap();
    fs::write(root.join("motd"), "from a directory\n").unwrap();
    let mut build = Command::new(env!("CARGO_BIN_EXE_vesiclectl"));
    build.args(["image", "build", "--output"]).arg(&image).arg(&root);
    assert_eq!(told(build.output().unwrap()), (String::new(), 0));
    let script =
        "busybox cat /motd; busybox cat /proc/sys/kernel/ostype; busybox touch /dev/null /tmp/x /run/x; exit 7";
    assert_eq!(run(&image, &["sh", "-c", script]), ("from a directory\nLinux\n".into(), 7));
}

#[test]
fn an_image_that_nobody_made_of_a_tar_without_a_shell_boots() {
    // The builder is a user who may neither read the files nor give them away; there is nothing but one program in it.
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let (root, tar, image) = (dir.path().join("root"), dir.path().join("layout.tar"), dir.path().join("image"));
    fill(&root);
    fs::write(root.join("secret"), "for its owner\n").unwrap();
    fs::set_permissions(root.join("secret"), fs::Permissions::from_mode(0o640)).unwrap();
    chown(root.join("secret"), Some(1234), Some(5678)).unwrap();
    pack(&root, &tar);

    let mut build = Command::new("setpriv");
    build.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", env!("CARGO_BIN_EXE_vesiclectl")]);
    build.args(["image", "build", "--output"]).arg(&image).arg(&tar);
    assert_eq!(told(build.output().unwrap()), (String::new(), 0));
    let stat =
        ["/bin/busybox", "stat", "-c", "%n %U:%G %u:%g %a", "/secret", "/bin/busybox", "/tmp", "/etc/resolv.conf"];
    let expected = "/secret UNKNOWN:UNKNOWN 1234:5678 640\n/bin/busybox UNKNOWN:UNKNOWN 0:0 755\n\
        /tmp UNKNOWN:UNKNOWN 0:0 1777\n/etc/resolv.conf UNKNOWN:UNKNOWN 0:0 644\n";
    assert_eq!(run(&image, &stat), (expected.into(), 0));
}

#[test]
fn a_signal_leaves_nothing_beside_the_image() {
    let dir = tempfile::tempdir().unwrap();
    let [bin, source, output] = ["bin", "source", "output"].map(|name| dir.path().join(name));
    [&bin, &source, &output].iter().for_each(|path| fs::create_dir(path).unwrap());
    // One that takes its time.
    fs::write(bin.join("mke2fs"), "#!/bin/sh\nexec sleep 5\n").unwrap();
    fs::set_permissions(bin.join("mke2fs"), fs::Permissions::from_mode(0o755)).unwrap();
    let mut build = Command::new(env!("CARGO_BIN_EXE_vesiclectl"));
    build.args(["image", "build", "--output"]).arg(output.join("image")).arg(&source);
    build.env("PATH", format!("{}:{}", bin.display(), std::env::var("PATH").unwrap()));
    let mut child = build.spawn().unwrap();
    while fs::read_dir(&output).unwrap().count() == 0 {
        std::thread::yield_now();
    }
    Command::new("kill").arg(child.id().to_string()).status().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(128 + 15));
    assert_eq!(fs::read_dir(&output).unwrap().count(), 0);
}
