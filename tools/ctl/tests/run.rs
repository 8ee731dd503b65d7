//! `vesiclectl run` as its users see it.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use common::{artefact, vesicle};

/// The arguments of a run in the tuned guest, whose initramfs needs no modules.
fn arguments(more: &[&str]) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = vec!["run".into(), "--memory".into(), "64".into()];
    for (option, path) in
        [("--vesicle", vesicle()), ("--kernel", artefact("kernel-tuned")), ("--initramfs", artefact("initramfs-tuned"))]
    {
        arguments.extend([option.into(), path.into()]);
    }
    arguments.extend(more.iter().map(OsString::from));
    arguments
}

fn vesiclectl(more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vesiclectl"));
    command.args(arguments(more)).stdin(Stdio::null());
    command
}

/// Output, standard error and exit status of a run.
fn run(more: &[&str]) -> (String, String, i32) {
    told(vesiclectl(more).output().unwrap())
}

fn told(output: Output) -> (String, String, i32) {
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr), output.status.code().unwrap())
}

#[test]
fn a_command_hands_back_its_output_and_status_and_nothing_else() {
    let (output, errors, status) = run(&["--", "sh", "-c", "uname -m; echo hi; exit 7"]);
    assert_eq!((output.as_str(), errors.as_str(), status), ("x86_64\nhi\n", "", 7));
    let (_, _, status) = run(&["--", "sh", "-c", "kill -9 $$"]);
    assert_eq!(status, 137);
    let (output, _, status) = run(&["--", "no-such-command"]);
    assert!(status == 127 && output.contains("no-such-command"), "{status}: {output}");
}

#[test]
fn a_vmm_writes_to_no_file_that_later_runs_start_from() {
    let jailer = vesicle().with_file_name("vesicle-jailer");
    let command = ["--jailer", jailer.to_str().unwrap(), "--", "sh", "-c", "echo up; sleep 1000"];
    let mut run = vesiclectl(&command).stdout(Stdio::piped()).spawn().unwrap();
    let mut output = BufReader::new(run.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert!(output.any(|line| line == "up"));
    let children = format!("/proc/{0}/task/{0}/children", run.id());
    let vmm = fs::read_to_string(children).unwrap().trim().to_owned();
    let mounts = fs::read_to_string(format!("/proc/{vmm}/mountinfo")).unwrap();
    for image in ["kernel-tuned", "initramfs-tuned"].map(artefact) {
        let image = image.canonicalize().unwrap();
        let mount = mounts.lines().find(|mount| mount.split(' ').nth(4).is_some_and(|at| Path::new(at) == image));
        let options = mount.and_then(|mount| mount.split(' ').nth(5)).unwrap_or_default();
        assert!(options.split(',').any(|option| option == "ro"), "{image:?}: {mounts}");
    }
    Command::new("kill").arg(run.id().to_string()).status().unwrap();
    run.wait().unwrap();
}

#[test]
fn a_run_is_confined_as_strictly_as_the_host_allows_and_says_how() {
    let jailer = vesicle().with_file_name("vesicle-jailer");
    let jailer = jailer.to_str().unwrap();
    let command = ["--jailer", jailer, "--", "sh", "-c", "echo hi; exit 7"];
    let confined = |errors: &str| errors.strip_prefix("vesiclectl: the VMM is confined ").unwrap().to_owned();
    // Whoever starts it may share no new file with anybody.
    let mut launcher = Command::new("sh");
    launcher.args(["-c", "umask 077; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_vesiclectl")]).args(arguments(&command));
    let (output, errors, status) = told(launcher.stdin(Stdio::null()).output().unwrap());
    assert_eq!((output.as_str(), status), ("hi\n", 7), "{errors}");
    assert_eq!(
        confined(&errors),
        "in a jail (user, root directory and mounts of its own), by Landlock and system-call filters\n"
    );

    // Root's files are for root alone to write, and then the VMM is root, which is said.
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("rootfs.ext4");
    fs::copy(artefact("rootfs"), &image).unwrap();
    let (output, errors, status) = run(&[&["--rootfs", image.to_str().unwrap(), "--writable"], &command[..]].concat());
    assert_eq!((output.as_str(), status), ("hi\n", 7), "{errors}");
    let user = format!("as user 0, the only one who may use {} as asked, in a jail (root directory", image.display());
    assert!(confined(&errors).starts_with(&user), "{errors}");

    // Where a file system of the host's has no devices, the jail is the same.
    let tmp = tempfile::tempdir().unwrap();
    let mut launcher = Command::new("unshare");
    launcher.args(["-m", "sh", "-c", "mount -t tmpfs -o nodev tmpfs \"$TMPDIR\" && exec \"$@\"", "sh"]);
    launcher.arg(env!("CARGO_BIN_EXE_vesiclectl")).args(arguments(&command)).env("TMPDIR", tmp.path());
    let (output, errors, status) = told(launcher.stdin(Stdio::null()).output().unwrap());
    assert_eq!((output.as_str(), status), ("hi\n", 7), "{errors}");
    assert!(confined(&errors).starts_with("in a jail (user, "), "{errors}");

    // Somebody else, who may go where the programs are and use KVM.
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
    let copy = |file: &Path| {
        let copy = dir.path().join(file.file_name().unwrap());
        fs::copy(file, &copy).unwrap();
        fs::set_permissions(&copy, Permissions::from_mode(0o755)).unwrap();
        copy.to_str().unwrap().to_owned()
    };
    let files = [
        Path::new(env!("CARGO_BIN_EXE_vesiclectl")),
        &vesicle(),
        &vesicle().with_file_name("vesicle-jailer"),
        &artefact("kernel-tuned"),
        &artefact("initramfs-tuned"),
    ];
    let [vesiclectl, vesicle, jailer, kernel, initramfs] = files.map(copy);
    let run = |jailer: &str| {
        let mut command = Command::new(&vesiclectl);
        command.args(["run", "--memory", "64", "--vesicle", &vesicle, "--kernel", &kernel, "--initramfs", &initramfs]);
        command.args(["--jailer", jailer, "--", "sh", "-c", "echo hi; exit 7"]).stdin(Stdio::null());
        told(command.uid(1000).gid(1000).output().unwrap())
    };
    let (output, errors, status) = run(&jailer);
    assert_eq!((output.as_str(), status), ("hi\n", 7), "{errors}");
    assert!(confined(&errors).starts_with("in a jail without root (user namespace, "), "{errors}");
    // Where no jail can be made, the reason is said.
    let (output, errors, status) = run("/bin/false");
    assert_eq!((output.as_str(), status), ("hi\n", 7), "{errors}");
    assert!(confined(&errors).starts_with("without a jail, by Landlock and system-call filters"), "{errors}");
}

#[test]
fn no_shell_looks_at_the_commands_words() {
    let (output, _, status) =
        run(&["--vcpus", "2", "--", "printf", "%s|", "it's", "", "$HOME `id`", "a  b", "*", "\\n"]);
    assert_eq!((output.as_str(), status), ("it's||$HOME `id`|a  b|*|\\n|", 0));
}

#[test]
fn standard_input_is_empty_unless_it_is_asked_for() {
    // An input that never ends must not keep the command from starting.
    let mut child = vesiclectl(&["--", "sh", "-c", "cat; echo end"]);
    let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let input = child.stdin.take();
    let (output, _, status) = told(child.wait_with_output().unwrap());
    assert_eq!((output.as_str(), status), ("end\n", 0));
    drop(input);

    let bytes: Vec<u8> = (0..2_000_003u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut child = vesiclectl(&["--stdin", "--", "sh", "-c", "sha256sum; exit 3"]);
    let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(&bytes).unwrap();
    let (output, _, status) = told(child.wait_with_output().unwrap());
    let mut sum = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    sum.stdin.take().unwrap().write_all(&bytes).unwrap();
    assert_eq!((output, status), (told(sum.wait_with_output().unwrap()).0, 3));
}

#[test]
fn a_root_file_system_is_left_alone_unless_it_is_writable() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("rootfs.ext4");
    fs::copy(artefact("rootfs"), &image).unwrap();
    let image = image.to_str().unwrap();
    let (_, _, status) = run(&["--rootfs", image, "--", "touch", "/mark"]);
    assert_eq!(status, 1);
    let (output, _, status) = run(&["--rootfs", image, "--writable", "--", "sh", "-c", "echo was here >/mark"]);
    assert_eq!(status, 0, "{output}");
    let (output, _, status) = run(&["--rootfs", image, "--", "cat", "/mark"]);
    assert_eq!((output.as_str(), status), ("was here\n", 0));
}

#[test]
fn a_run_that_fails_before_its_command_says_why() {
    let (_, errors, status) = run(&["--kernel", "/etc/passwd", "--", "true"]);
    assert!(status == 125 && errors.contains("/boot-source") && errors.contains("kernel"), "{status}: {errors}");
    let (_, errors, status) = run(&["--vesicle", "/nonexistent", "--", "true"]);
    assert!(status == 125 && errors.contains("/nonexistent"), "{status}: {errors}");
    let (_, errors, status) = run(&["--vesicle", "/bin/false", "--", "true"]);
    assert!(status == 125 && errors.contains("does not answer (exit status: 1)"), "{status}: {errors}");
    let (output, errors, status) = run(&["--boot-args", "rdinit=/nonexistent", "--", "true"]);
    assert!(status == 125 && errors.contains("before the command did"), "{status}: {errors}");
    assert!(output.contains("Kernel panic"), "{output}");
    let (_, errors, status) = run(&[]);
    assert!(status == 125 && errors.contains("COMMAND"), "{status}: {errors}");
}

#[test]
fn a_signal_ends_the_launcher_the_vmm_and_what_they_left_in_tmp() {
    let tmp = tempfile::tempdir().unwrap();
    let mut child = vesiclectl(&["--", "sh", "-c", "echo started; sleep 1000"]);
    let mut child = child.env("TMPDIR", tmp.path()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "started\n");
    assert_ne!(fs::read_dir(tmp.path()).unwrap().count(), 0);
    Command::new("kill").arg(child.id().to_string()).status().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(128 + 15));
    // The VMM held the other end.
    assert_eq!(output.read_line(&mut line).unwrap(), 0);
    assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 0);
}

#[test]
fn a_signal_while_the_input_is_read_leaves_nothing_in_tmp() {
    let tmp = tempfile::tempdir().unwrap();
    let mut reading = Command::new(env!("CARGO_BIN_EXE_vesiclectl"));
    reading.args(["run", "--vesicle=/bin/false", "--kernel=/bin/false", "--stdin", "--", "cat"]);
    let mut child = reading.env("TMPDIR", tmp.path()).stdin(Stdio::piped()).spawn().unwrap();
    while fs::read_dir(tmp.path()).unwrap().count() == 0 {
        std::thread::yield_now();
    }
    Command::new("kill").arg(child.id().to_string()).status().unwrap();
    // Its input is open to the end.
    let _input = child.stdin.take();
    assert_eq!(child.wait().unwrap().code(), Some(128 + 15));
    assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 0);
}

#[test]
fn on_a_terminal_the_command_has_one_and_ours_is_left_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let words: Vec<_> = arguments(&["--", "sh", "-c", "tty; stty size; echo $TERM"])
        .iter()
        .flat_map(|word| [vec![b' '], vesiclectl::quote(word)].concat())
        .collect();
    let script = format!(
        "cd {}; stty rows 33 cols 77; stty -g >before; {}{}; echo $? >status; stty -g >after",
        dir.path().display(),
        env!("CARGO_BIN_EXE_vesiclectl"),
        String::from_utf8(words).unwrap()
    );
    // script(1) makes a terminal and runs the command on it.
    let mut terminal = Command::new("script");
    terminal.args(["-q", "-c", &script, "/dev/null"]).env("TERM", "vt102").stdin(Stdio::null());
    let (output, _, _) = told(terminal.output().unwrap());
    let lines: Vec<_> = output.lines().map(|line| line.trim_end_matches('\r')).collect();
    assert_eq!(lines, ["/dev/ttyS0", "33 77", "vt102"]);
    let file = |name| fs::read_to_string(dir.path().join(name)).unwrap();
    assert_eq!((file("status").as_str(), file("before")), ("0\n", file("after")));
}

/// The snapshots that are kept.
fn kept(snapshots: &Path) -> Vec<PathBuf> {
    fs::read_dir(snapshots).map_or_else(|_| Vec::new(), |found| found.map(|entry| entry.unwrap().path()).collect())
}

#[test]
fn a_run_starts_from_the_snapshot_that_the_first_one_made() {
    let dir = tempfile::tempdir().unwrap();
    let snapshots = dir.path().join("snapshots");
    let option = format!("--snapshots={}", snapshots.display());
    let command = [option.as_str(), "--", "sh", "-c", "cat /proc/sys/kernel/random/uuid; exit 7"];

    // Who wants to see a kernel boot sees it.
    let (output, _, status) = run(&[&option, "--boot-args", "loglevel=7", "--", "true"]);
    assert!(status == 0 && output.contains("Linux version"), "{output}");
    assert!(kept(&snapshots).is_empty());

    let (first, said, status) = run(&command);
    assert_eq!((status, first.len()), (7, 37), "{first} {said}");
    assert!(said.contains("booting the guest once"), "{said}");
    let snapshot = kept(&snapshots);
    assert_eq!(snapshot.len(), 1);
    let (second, said, status) = run(&command);
    assert_eq!((status, second.len(), said.as_str()), (7, 37, ""));
    assert_ne!(first, second, "two guests drew the same random numbers");

    // The clock is the host's, and a job that is longer than what the guest waited with arrives whole.
    let input = File::open(artefact("kernel-tuned")).unwrap();
    let length = input.metadata().unwrap().len();
    let mut counting = vesiclectl(&[&option, "--stdin", "--", "sh", "-c", "date +%s; wc -c"]);
    let (output, said, status) = told(counting.stdin(input).output().unwrap());
    let numbers: Vec<u64> = output.lines().map(|line| line.trim().parse().unwrap()).collect();
    assert_eq!((status, said.as_str(), numbers[1]), (0, "", length));
    assert!(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs().abs_diff(numbers[0]) < 60, "{numbers:?}");
    assert_eq!(kept(&snapshots), snapshot);

    // Of one that was tidied up nothing is used.
    fs::remove_file(snapshot[0].join("memory")).unwrap();
    let (_, said, status) = run(&command);
    assert!(status == 7 && said.contains("booting the guest once"), "{said}");

    // One that is damaged is not used again.
    OpenOptions::new().write(true).open(snapshot[0].join("memory")).unwrap().set_len(1 << 20).unwrap();
    let (_, said, status) = run(&command);
    assert!(status == 125 && said.contains("memory") && said.contains("the next run makes another"), "{said}");
    let (_, said, status) = run(&command);
    assert!(status == 7 && said.contains("booting the guest once"), "{said}");
}

#[test]
fn a_guest_that_cannot_be_kept_is_booted_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "not a directory").unwrap();
    let option = format!("--snapshots={}", file.display());
    let (output, said, status) = run(&[&option, "--", "sh", "-c", "echo hi; exit 7"]);
    assert_eq!((output.as_str(), status), ("hi\n", 7));
    assert!(said.contains("no snapshot of the guest is kept in"), "{said}");
}
