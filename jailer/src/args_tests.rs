//! The command line, as launchers write it.

use super::*;

fn jail(line: &str) -> Arguments {
    match parse(line.split_whitespace().map(OsString::from), 1000, 1001).unwrap() {
        Request::Jail(arguments) => *arguments,
        Request::Print(text) => panic!("{text}"),
    }
}

fn refusal(line: &str) -> String {
    parse(line.split_whitespace().map(OsString::from), 0, 0).unwrap_err()
}

#[test]
fn the_usual_command_line_is_understood() {
    let all = jail(
        "--id vm-1 --exec-file /usr/bin/vesicle --uid 123 --gid=100 --chroot-base-dir /j --netns /run/netns/a \
         --new-pid-ns --daemonize --cgroup cpu.weight=10 --cgroup memory.max=1=2 --parent-cgroup a/b \
         --cgroup-version 2 --resource-limit fsize=5 --resource-limit no-file=64 --pass-fd 5 --pass-fd 6 \
         --kvm-fd 7 --no-mount-ns -- --api-sock fd:5 --id x",
    );
    assert_eq!((all.id.as_str(), all.exec_name.as_str(), all.uid, all.gid), ("vm-1", "vesicle", 123, 100));
    assert_eq!(all.base, Path::new("/j"));
    assert!(all.new_pid_ns && all.daemonize && !all.mount_ns && !all.rootless);
    let cgroups = [("cpu.weight", "10"), ("memory.max", "1=2")];
    assert_eq!(all.cgroups, cgroups.map(|(file, value)| (file.to_owned(), value.to_owned())));
    assert_eq!((all.fsize, all.no_file), (Some(5), 64));
    assert_eq!(all.rest, ["--api-sock", "fd:5", "--id", "x"]);
    // The socket is not told twice.
    assert_eq!(all.descriptor_flags(), ["--pass-fd=6", "--kvm-fd=7"]);
    assert_eq!(all.descriptors(), [5, 6, 7, 5]);
    assert_eq!(jail("--id a --exec-file v --uid 1 --gid 1 -- --api-sock=fd:9").descriptors(), [9]);
    assert_eq!(jail("--id a --exec-file v --uid 1 --gid 1 -- --api-sock /a").descriptors(), []);
}

#[test]
fn without_root_one_stays_who_one_is() {
    let own = jail("--rootless --id a --exec-file v");
    assert_eq!((own.uid, own.gid, own.rootless), (1000, 1001, true));
    assert_eq!(jail("--rootless --id a --exec-file v --uid 0").uid, 0);
}

#[test]
fn what_is_wrong_is_named() {
    for (line, expected) in [
        ("", "--id is missing"),
        ("--id a", "--exec-file is missing"),
        ("--id a --exec-file v --gid 1", "--uid is missing"),
        ("--id a --exec-file v --uid 1", "--gid is missing"),
        ("--id a/b --exec-file v --uid 1 --gid 1", "--id a/b: must be 1 to 64 letters, digits and hyphens"),
        ("--id a --exec-file .. --uid 1 --gid 1", "--exec-file ..: names no file"),
        ("--uid x", "--uid x: must be a number"),
        ("--uid 4294967295", "--uid 4294967295: must be a number below 4294967295"),
        ("--gid 4294967295", "--gid 4294967295: must be a number below 4294967295"),
        ("--pass-fd 2", "--pass-fd 2: must be the number of a descriptor above 2"),
        ("--cgroup cpu", "--cgroup cpu: must be FILE=VALUE"),
        ("--cgroup ../x.y=1", "--cgroup ../x.y=1: must be a file such as cpu.weight, =, and one line"),
        ("--parent-cgroup ../x", "--parent-cgroup ../x: must be a relative path without .."),
        ("--parent-cgroup /x", "--parent-cgroup /x: must be a relative path without .."),
        (
            "--cgroup-version 1",
            "--cgroup-version 1: only 2 is supported: version 1 cannot confine a process as a whole",
        ),
        ("--resource-limit nproc=1", "--resource-limit nproc=1: must be fsize=BYTES or no-file=NUMBER"),
        ("--nope 1", "unknown flag --nope; --help lists them"),
    ] {
        assert_eq!(refusal(line), expected);
    }
    assert!(refusal("stray").contains("stray"));
    assert!(refusal("--id").contains("--id"));
}
