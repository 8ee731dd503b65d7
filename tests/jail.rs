//! Stories of confinement: what a process gives up by itself, and what a jail takes from it.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Instant;

use common::snapshot::Snapshot;
use common::{Guest, JAILER, MicroVm, Mode, PATIENCE, artefact, wait_until};
use seccompiler::sock_filter;
use serde_json::{Value, json};

const FILTERS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/resources/seccomp/x86_64.json");

fn filters() -> Value {
    serde_json::from_slice(&fs::read(FILTERS).unwrap()).unwrap()
}

fn metric(vm: &MicroVm, name: &str) -> u64 {
    let text = vm.api().get("/metrics").unwrap().body;
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("vesicle_sandbox_{name} ")));
    line.unwrap_or_else(|| panic!("no {name} in {text}")).parse().unwrap()
}

#[test]
fn the_confinement_in_force_is_logged_and_in_the_metrics() {
    let vm = Guest::tuned().vcpus(2).start();
    assert!(vm.log().contains("Confined: Landlock ABI "), "{}", vm.log());
    assert!(metric(&vm, "landlock_abi") >= 1);
    // The process, the API thread, the vmm thread, which the vCPUs inherit.
    assert_eq!(metric(&vm, "landlock_layers_total"), 3);
    // The API thread, the vmm thread, two vCPUs.
    assert_eq!(metric(&vm, "seccomp_filters_total"), 4);
    let bare = Guest::tuned().argument("--no-seccomp").argument("--no-landlock").mode(Mode::Plain).start();
    assert!(bare.log().contains("Confined: no Landlock, no system-call filters"), "{}", bare.log());
    assert_eq!((metric(&bare, "landlock_abi"), metric(&bare, "seccomp_filters_total")), (0, 0));
}

#[test]
fn every_thread_of_a_running_microvm_is_under_a_filter() {
    let mut vm = Guest::tuned().vcpus(2).boot();
    let mut threads = BTreeSet::new();
    for task in fs::read_dir(format!("/proc/{}/task", vm.pid())).unwrap() {
        let task = task.unwrap().path();
        let name = fs::read_to_string(task.join("comm")).unwrap().trim().to_owned();
        let status = fs::read_to_string(task.join("status")).unwrap();
        assert!(status.contains("\nSeccomp:\t2\n") && status.contains("\nNoNewPrivs:\t1\n"), "{name}: {status}");
        threads.insert(name);
    }
    assert!(["api", "vcpu0", "vcpu1"].iter().all(|name| threads.contains(*name)), "{threads:?}");
}

const CONFINEMENT: &str = "trace=seccomp,landlock_restrict_self,ioctl,prctl";

/// How often traced calls put a thread under a filter, and under a layer of Landlock.
fn filters_and_layers(calls: &[String]) -> (usize, usize) {
    let count = |what: &str| calls.iter().filter(|call| call.contains(what)).count();
    (count("seccomp(SECCOMP_SET_MODE_FILTER"), count("landlock_restrict_self("))
}

#[test]
fn no_vcpu_enters_the_guest_before_every_thread_is_confined() {
    let vcpus = 4;
    let mut vm = Guest::tuned().vcpus(vcpus).no_job().configure();
    // A vCPU's thread is late to take its name, which it does first.
    let mut strace = Command::new("strace")
        .args(["-f", "-e", CONFINEMENT, "-e", "inject=prctl:delay_enter=500000:when=1"])
        .args(["-p", &vm.pid().to_string()])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut calls = BufReader::new(strace.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert!(calls.any(|line| line.contains("attached")));
    vm.start();
    let before: Vec<_> = calls.take_while(|call| !call.contains("KVM_RUN")).collect();
    strace.kill().unwrap();
    strace.wait().unwrap();
    assert_eq!(filters_and_layers(&before), (1 + usize::from(vcpus), 1), "{before:#?}");
}

#[test]
fn a_guest_that_a_file_describes_waits_for_the_api_thread_to_be_confined() {
    let dir = tempfile::tempdir().unwrap();
    let (config, trace) = (dir.path().join("config"), dir.path().join("trace"));
    let guest = Guest::tuned().mode(Mode::Plain);
    let content = json!({ "machine-config": guest.machine_config(), "boot-source": guest.boot_source() });
    fs::write(&config, content.to_string()).unwrap();
    let mut strace = Command::new("strace")
        // The API thread is late as well.
        .args(["-f", "-e", CONFINEMENT, "-e", "inject=prctl:delay_enter=500000:when=1", "-o"])
        .arg(&trace)
        .arg(env!("CARGO_BIN_EXE_vesicle"))
        .arg("--config-file")
        .arg(&config)
        .arg("--api-sock")
        .arg(dir.path().join("api"))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    wait_until(|| fs::read_to_string(&trace).is_ok_and(|trace| trace.contains("KVM_RUN")));
    strace.kill().unwrap();
    strace.wait().unwrap();
    let trace = fs::read_to_string(&trace).unwrap();
    let before: Vec<_> = trace.lines().take_while(|call| !call.contains("KVM_RUN")).map(str::to_owned).collect();
    // Filters of three threads; layers of the process, the API thread and the one that has the paths of the machine.
    assert_eq!(filters_and_layers(&before), (3, 3), "{before:#?}");
}

#[test]
fn a_process_that_cannot_be_confined_runs_no_guest_whoever_asks() {
    let mut vm = Guest::tuned().mode(Mode::Plain).argument("--allow-path=/").boot();
    let snapshot = Snapshot::of(&vm);
    vm.kill();
    // Filters that allow everything, inherited by what this thread starts. With them the filters of a thread may have
    // 110 statements more, as the kernel counts: room for all but the vmm thread's.
    for statements in [4096, 4096, 4096, 4096, 4096, 4096, 4096, 3922] {
        let mut filter = vec![sock_filter { code: 0x20, jt: 0, jf: 0, k: 0 }; statements];
        filter[statements - 1] = sock_filter { code: 0x06, jt: 0, jf: 0, k: 0x7fff_0000 };
        seccompiler::apply_filter(&filter).unwrap();
    }
    let mut vm = vm.successor();
    let mut load = snapshot.load();
    load["resume_vm"] = json!(false);
    let api = vm.api();
    let resumed = std::thread::scope(|scope| {
        scope.spawn(|| api.put("/snapshot/load", &load));
        // Refused as long as there is no microVM; the one that is not waits behind the load.
        let end = Instant::now() + PATIENCE;
        loop {
            assert!(Instant::now() < end, "nothing was loaded");
            match api.patch("/vm", &json!({ "state": "Resumed" })) {
                Ok(reply) if reply.status == 400 => {}
                reply => break reply,
            }
        }
    });
    assert!(!matches!(&resumed, Ok(reply) if reply.status == 204), "{resumed:?}");
    assert_eq!(vm.wait_exit().code(), Some(1));
    let log = vm.log();
    assert!(log.contains("cannot run confined"), "{log}");
    assert_eq!(log.matches("Out of memory").count(), 1, "{log}");
}

/// InstanceStart is answered before they begin: a launcher knows it from the end of the process.
#[test]
fn a_host_without_room_for_a_thread_ends_the_microvm_and_says_so() {
    let group = Path::new("/sys/fs/cgroup/vesicle-threads");
    fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+pids").unwrap();
    fs::create_dir_all(group).unwrap();
    let mut vm = Guest::tuned().mode(Mode::Plain).vcpus(4).configure();
    fs::write(group.join("cgroup.procs"), vm.pid().to_string()).unwrap();
    // Those of the API and the machine, and two vCPUs.
    fs::write(group.join("pids.max"), "4").unwrap();
    vm.start();
    assert_eq!(vm.wait_exit().code(), Some(1));
    assert!(vm.log().contains("cannot start the thread of vCPU 2: Resource temporarily unavailable"), "{}", vm.log());
    assert_eq!(vm.output(), "", "the guest ran");
    fs::remove_dir(group).unwrap();
}

#[test]
fn a_refused_system_call_is_named_and_ends_the_process_with_its_own_status() {
    let dir = tempfile::tempdir().unwrap();
    let mut less = filters();
    let rules = less["api"]["filter"].as_array_mut().unwrap();
    rules.retain(|rule| rule["syscall"] != "writev");
    let file = dir.path().join("filters.json");
    fs::write(&file, less.to_string()).unwrap();
    let mut vm =
        Guest::tuned().mode(Mode::Plain).argument("--seccomp-filter").argument(file.to_str().unwrap()).launch();
    assert!(vm.api().get("/").is_err());
    assert_eq!(vm.wait_exit().code(), Some(148));
    assert!(vm.log().contains("refuses the system call writev (20, "), "{}", vm.log());
}

#[test]
fn a_later_path_is_in_reach_if_its_directory_was() {
    let elsewhere = tempfile::tempdir().unwrap();
    let image = |path: &Path| fs::File::create(path).unwrap().set_len(1 << 20).unwrap();
    let outside = elsewhere.path().join("other");
    image(&outside);
    let allow = format!("{}:ro", elsewhere.path().display());
    for (allowed, arguments) in [(false, &[][..]), (true, &["--allow-path", &allow][..])] {
        let dir = tempfile::tempdir().unwrap();
        image(&dir.path().join("disk"));
        image(&dir.path().join("next"));
        let disk = dir.path().join("disk");
        // Where paths are allowed, all that are to be used have to be.
        let mut guest = Guest::tuned().mode(Mode::Plain).drive("d", &disk, json!({ "is_read_only": true })).no_job();
        if allowed {
            let kernel = artefact("kernel-tuned").parent().unwrap().display().to_string();
            let initramfs = artefact("initramfs-tuned").parent().unwrap().display().to_string();
            for path in [dir.path().display().to_string(), kernel, initramfs] {
                guest = guest.argument("--allow-path").argument(path);
            }
        }
        let vm = arguments.iter().fold(guest, |guest, argument| guest.argument(*argument)).start();
        let next = |path: &Path| json!({ "drive_id": "d", "path_on_host": path });
        vm.patch("/drives/d", &next(&dir.path().join("next")));
        let reply = vm.api().patch("/drives/d", &next(&outside)).unwrap();
        if allowed {
            assert_eq!(reply.status, 204, "{}", reply.body);
        } else {
            assert_eq!(reply.status, 400, "{}", reply.body);
            assert!(reply.fault().contains("path_on_host") && reply.fault().contains("--allow-path"), "{}", reply.body);
        }
    }
}

#[test]
fn with_allowed_paths_everything_else_is_out_of_reach_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    let vm = Guest::tuned().mode(Mode::Plain).argument("--allow-path").argument(path).launch();
    let refused = vm.refused_put("/boot-source", &json!({ "kernel_image_path": artefact("kernel-tuned") }));
    assert!(refused.contains("kernel_image_path") && refused.contains("--allow-path"), "{refused}");
}

#[test]
fn a_host_that_has_less_than_asked_for_is_refused() {
    let run = |arguments: &[&str]| Command::new(env!("CARGO_BIN_EXE_vesicle")).args(arguments).output().unwrap();
    let refused = run(&["--landlock-abi", "200"]);
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(said.contains("Landlock ABI") && said.contains("--landlock-abi asks for 200"), "{said}");
    let refused = run(&["--seccomp-filter", "/no/such/file"]);
    assert_eq!(refused.status.code(), Some(1));
}

/// Directories of a jail, and how to make one.
struct Jail {
    base: tempfile::TempDir,
}

impl Jail {
    fn new() -> Self {
        Self { base: tempfile::tempdir().unwrap() }
    }

    fn dir(&self) -> PathBuf {
        self.base.path().join("vesicle/story")
    }

    fn root(&self) -> PathBuf {
        self.dir().join("root")
    }

    fn command(&self) -> Command {
        let mut command = Command::new(JAILER.as_path());
        command.args([
            "--id",
            "story",
            "--exec-file",
            env!("CARGO_BIN_EXE_vesicle"),
            "--uid",
            "20000",
            "--gid",
            "20001",
        ]);
        command.arg("--chroot-base-dir").arg(self.base.path());
        command
    }

    /// Runs the VMM for as long as it takes to print its version.
    fn visit(&self, arguments: &[&str]) -> Output {
        self.command().args(arguments).args(["--", "--version"]).output().unwrap()
    }

    fn refused(&self, arguments: &[&str], what: &str) {
        let output = self.visit(arguments);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(what), "{said}");
    }
}

fn admitted(output: &Output) {
    assert!(output.status.success() && output.stdout.starts_with(b"Vesicle v"), "{output:?}");
}

const MODES: [&[&str]; 2] = [&[], &["--no-mount-ns"]];

#[test]
fn a_jail_is_made_or_taken_over() {
    for mode in MODES {
        let jail = Jail::new();
        // The second time everything is there already.
        admitted(&jail.visit(mode));
        admitted(&jail.visit(mode));
        let mut found: Vec<_> = fs::read_dir(jail.root()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        found.sort();
        assert_eq!(found, ["dev", "run", "vesicle.pid"], "nothing is copied");
        // Launchers look for the name of the file, whatever the link to it is called.
        let link = jail.base.path().join("link");
        symlink(env!("CARGO_BIN_EXE_vesicle"), &link).unwrap();
        admitted(&jail.visit(&["--exec-file", link.to_str().unwrap()]));
        assert_eq!(fs::read_dir(jail.base.path()).unwrap().count(), 2, "the jail is the same");
    }
}

/// Puts something at a path, made from a file that must stay as it is.
type Plant = fn(&Path, &Path);

#[test]
fn what_was_planted_in_the_jail_is_refused_or_harmless() {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let host = tempfile::tempdir().unwrap();
    let precious = host.path().join("precious");
    fs::write(&precious, "precious").unwrap();
    let owner = |path: &Path| fs::symlink_metadata(path).map(|found| (found.uid(), found.gid())).unwrap();

    // Symbolic links in place of directories.
    for (place, name) in [("vesicle", "vesicle"), ("vesicle/story", "story"), ("vesicle/story/root", "root")] {
        let jail = Jail::new();
        let place = jail.base.path().join(place);
        fs::create_dir_all(place.parent().unwrap()).unwrap();
        symlink(host.path(), &place).unwrap();
        jail.refused(&[], &format!("{name} in the jail's directory exists and is no directory"));
    }
    for name in ["dev", "run"] {
        let jail = Jail::new();
        fs::create_dir_all(jail.root()).unwrap();
        symlink(host.path(), jail.root().join(name)).unwrap();
        jail.refused(&[], name);
        fs::remove_file(jail.root().join(name)).unwrap();
        fs::write(jail.root().join(name), "").unwrap();
        jail.refused(&[], name);
    }
    assert_eq!(owner(host.path()), (0, 0));

    // Anything in place of a device.
    let plant: [(&str, Plant); 5] = [
        ("a symbolic link", |at, precious| symlink(precious, at).unwrap()),
        ("a hard link", |at, precious| fs::hard_link(precious, at).unwrap()),
        ("a fifo", |at, _| assert!(Command::new("mkfifo").arg(at).status().unwrap().success())),
        ("a directory", |at, _| fs::create_dir(at).unwrap()),
        ("another device", |at, _| {
            assert!(Command::new("mknod").arg(at).args(["c", "1", "3"]).status().unwrap().success());
        }),
    ];
    for (what, plant) in plant {
        let jail = Jail { base: tempfile::tempdir_in(host.path()).unwrap() };
        fs::create_dir_all(jail.root().join("dev")).unwrap();
        plant(&jail.root().join("dev/kvm"), &precious);
        jail.refused(&[], "dev/kvm in the jail");
        assert_eq!((owner(&precious), fs::read_to_string(&precious).unwrap()), ((0, 0), "precious".into()), "{what}");
    }
    // The right device, with a second name that somebody else uses.
    let jail = Jail { base: tempfile::tempdir_in(host.path()).unwrap() };
    let node = host.path().join("kvm");
    assert!(Command::new("mknod").arg(&node).args(["c", "10", "232"]).status().unwrap().success());
    fs::create_dir_all(jail.root().join("dev")).unwrap();
    fs::hard_link(&node, jail.root().join("dev/kvm")).unwrap();
    jail.refused(&[], "dev/kvm in the jail exists and is not the device 10:232 with one name");
    assert!(owner(&node) == (0, 0) && fs::metadata(&node).unwrap().file_type().is_char_device());

    // The file of the process id: what had the name is gone, and what it led to is as it was.
    let jail = Jail::new();
    fs::create_dir_all(jail.root()).unwrap();
    symlink(&precious, jail.root().join("vesicle.pid")).unwrap();
    admitted(&jail.visit(&[]));
    assert!(fs::symlink_metadata(jail.root().join("vesicle.pid")).unwrap().is_file());
    assert_eq!(fs::read_to_string(&precious).unwrap(), "precious");
    fs::remove_file(jail.root().join("vesicle.pid")).unwrap();
    fs::create_dir(jail.root().join("vesicle.pid")).unwrap();
    jail.refused(&[], "vesicle.pid");
}

#[test]
fn no_vmm_is_executed_whose_process_id_could_not_be_written_down() {
    for flag in ["--new-pid-ns", "--daemonize"] {
        let jail = Jail::new();
        let mut command = jail.command();
        command.args([flag, "--", "--version"]);
        // It waits for all processes that come of the jailer, and ends as that does.
        let traced = || {
            let mut strace = Command::new("strace");
            strace.args(["-f", "-e", "trace=execveat"]).arg(command.get_program()).args(command.get_args());
            let output = strace.output().unwrap();
            (output.status.code(), String::from_utf8(output.stderr).unwrap())
        };
        let (status, said) = traced();
        assert!(status == Some(0) && said.contains("execveat("), "{flag}: {status:?} {said}");
        fs::remove_file(jail.root().join("vesicle.pid")).unwrap();
        fs::create_dir(jail.root().join("vesicle.pid")).unwrap();
        let (status, said) = traced();
        assert!(
            status == Some(1) && said.contains("cannot replace vesicle.pid in the jail"),
            "{flag}: {status:?} {said}"
        );
        assert!(!said.contains("execveat("), "{flag}: {said}");
    }
}

/// Its launcher sees only the first of up to three processes.
#[test]
fn a_daemon_that_did_not_come_about_is_a_failure() {
    let (daemon, first, both) = (&["--daemonize"][..], &["--new-pid-ns"][..], &["--daemonize", "--new-pid-ns"][..]);
    for (arguments, tampering, reason) in [
        (both, "setsid:error=EPERM", "begin a session"),
        (daemon, "setsid:signal=KILL", "signal 9 "),
        (daemon, "capset:signal=SYS", "signal 31 "),
        (daemon, "execveat:signal=KILL", "signal 9 "),
        (first, "execveat:signal=KILL", "signal 9 "),
        (both, "execveat:signal=KILL", "signal 9 "),
    ] {
        let jail = Jail::new();
        let mut command = jail.command();
        command.args(arguments).args(["--", "--version"]);
        let (mut strace, inject) = (Command::new("strace"), format!("inject={tampering}"));
        strace.args(["-f", "-qq", "-o", "/dev/null", "-e", &inject]).arg(command.get_program());
        let output = strace.args(command.get_args()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(1) && said.contains(reason), "{arguments:?}, {tampering}: {output:?}");
    }
}

/// The fields of /proc/PID/status.
fn status(pid: u32) -> BTreeMap<String, String> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    text.lines().filter_map(|l| l.split_once(":\t")).map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

#[test]
fn a_crowd_of_jails_is_made_at_once() {
    for mode in MODES {
        let jail = Jail::new();
        let visit = |number: u32| {
            let mut command = jail.command();
            command.args(["--id", &format!("story-{number}")]).args(mode).args(["--", "--version"]);
            command.stdout(Stdio::null()).spawn().unwrap()
        };
        let crowd: Vec<_> = (0..200).map(visit).collect();
        for mut visitor in crowd {
            assert!(visitor.wait().unwrap().success());
        }
        assert_eq!(fs::read_dir(jail.base.path().join("vesicle")).unwrap().count(), 200);
    }
}

#[test]
fn a_jailed_process_holds_nothing_worth_taking() {
    // What the launcher forgot to close.
    let secret = fs::File::open("/etc/passwd").unwrap();
    rustix::io::fcntl_setfd(&secret, rustix::io::FdFlags::empty()).unwrap();
    for mode in [Mode::Jailed, Mode::JailedWithoutMounts, Mode::Rootless] {
        let mut vm = Guest::tuned().mode(mode).boot();
        let pid = vm.pid();
        let status = status(pid);
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(status[set], "0000000000000000", "{mode:?}: {set}");
        }
        assert_eq!((status["NoNewPrivs"].as_str(), status["Seccomp"].as_str()), ("1", "2"), "{mode:?}");
        assert_eq!(status["Groups"].trim(), "", "{mode:?}");
        let user = mode.user();
        assert_eq!(status["Uid"], format!("{user}\t{user}\t{user}\t{user}"), "{mode:?}");
        assert_eq!(fs::read(format!("/proc/{pid}/environ")).unwrap(), b"", "{mode:?}");
        let held =
            fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(|fd| fs::read_link(fd.unwrap().path()).unwrap());
        let held: Vec<_> = held.collect();
        assert!(!held.iter().any(|path| path == "/etc/passwd"), "{mode:?}: {held:?}");
        let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let limit = |name: &str| limits.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
        assert!(limit("Max core file size").split_whitespace().nth(4) == Some("0"), "{limits}");
        assert!(limit("Max open files").contains("2048"), "{limits}");
        let mut root: Vec<_> =
            fs::read_dir(format!("/proc/{pid}/root/")).unwrap().map(|e| e.unwrap().file_name()).collect();
        root.retain(|name| name != "tmp" && name != "root" && name != "var");
        root.sort();
        assert_eq!(root, ["dev", "run", "vesicle.pid"], "{mode:?}");
        let namespace = |process: &str| fs::read_link(format!("/proc/{process}/ns/mnt")).unwrap();
        let own = namespace(&pid.to_string()) != namespace("self");
        assert_eq!(own, mode != Mode::JailedWithoutMounts, "{mode:?}");
        if own {
            let mounts = fs::read_to_string(format!("/proc/{pid}/mounts")).unwrap();
            assert!(mounts.lines().count() == 1 && mounts.contains("nosuid") && mounts.contains("noexec"), "{mounts}");
        }
        assert_eq!(vm.ok("echo alive"), "alive");
        vm.shut_down();
    }
}

#[test]
fn the_environment_descriptors_groups_and_limits_of_the_launcher_stay_outside() {
    use std::os::fd::AsRawFd;
    let secret = fs::File::open("/etc/passwd").unwrap();
    let inherited = rustix::io::fcntl_dupfd_cloexec(&secret, 40).unwrap();
    rustix::io::fcntl_setfd(&inherited, rustix::io::FdFlags::empty()).unwrap();
    let number = inherited.as_raw_fd().to_string();
    let jail = Jail::new();
    // The VMM says so when a descriptor that it is told of is not there.
    let output = jail.command().args(["--", "--pass-fd", &number]).output().unwrap();
    assert!(String::from_utf8(output.stderr).unwrap().contains("there is no such descriptor"));
    let output = jail.command().args(["--pass-fd", &number, "--", "--version"]).output().unwrap();
    admitted(&output);
    jail.refused(&["--pass-fd", "99"], "descriptor 99 is not open");
    jail.refused(&["--resource-limit", "no-file=99999999999"], "limit no-file");
}

#[test]
fn cgroups_and_network_namespaces_are_joined_through_whatever_leads_there() {
    let dir = tempfile::tempdir().unwrap();
    let group = Path::new("/sys/fs/cgroup/vesicle-story");
    let jail = Jail::new();
    let netns = "vesicle-story";
    assert!(Command::new("ip").args(["netns", "add", netns]).status().unwrap().success());
    let link = dir.path().join("netns");
    symlink(Path::new("/run/netns").join(netns), &link).unwrap();
    let listener = std::os::unix::net::UnixListener::bind(dir.path().join("api")).unwrap();
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).unwrap();
    let socket = format!("fd:{}", std::os::fd::AsRawFd::as_raw_fd(&listener));
    let mut command = jail.command();
    command.args(["--parent-cgroup", "vesicle-story", "--cgroup", "pids.max=50", "--netns"]).arg(&link);
    command.args(["--resource-limit", "fsize=1048576"]);
    // Should this fail, nobody waits for the end of what it says.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.args(["--", "--api-sock", &socket]).spawn().unwrap();
    let api = vesiclectl::Client::new(dir.path().join("api"));
    assert_eq!(api.get("/").unwrap().status, 200);
    // Older kernels have a process of KVM's own beside it.
    let members = fs::read_to_string(group.join("story/cgroup.procs")).unwrap();
    assert!(members.lines().any(|member| member == child.id().to_string()), "{members}");
    assert_eq!(fs::read_to_string(group.join("story/pids.max")).unwrap().trim(), "50");
    let limits = fs::read_to_string(format!("/proc/{}/limits", child.id())).unwrap();
    let fsize = limits.lines().find_map(|line| line.strip_prefix("Max file size")).unwrap();
    assert_eq!(fsize.split_whitespace().collect::<Vec<_>>(), ["1048576", "1048576", "bytes"]);
    let own = fs::read_link("/proc/self/ns/net").unwrap();
    assert_ne!(fs::read_link(format!("/proc/{}/ns/net", child.id())).unwrap(), own);
    assert_eq!(fs::read_to_string(jail.root().join("vesicle.pid")).unwrap(), child.id().to_string());
    child.kill().unwrap();
    child.wait().unwrap();
    jail.refused(&["--netns", "/no/such/file"], "open the network namespace");
    jail.refused(&["--cgroup", "no.such=1"], "subtree_control");
    let version = jail.visit(&["--cgroup-version", "1"]);
    assert!(version.status.code() == Some(153) && String::from_utf8(version.stderr).unwrap().contains("only 2"));
    let _ = fs::remove_dir(group.join("story"));
    let _ = fs::remove_dir(group);
    assert!(Command::new("ip").args(["netns", "del", netns]).status().unwrap().success());
}

#[test]
fn a_daemon_outlives_its_launcher_and_says_who_it_is() {
    for (arguments, first) in [
        (&["--daemonize"][..], false),
        (&["--new-pid-ns"][..], true),
        (&["--daemonize", "--new-pid-ns", "--no-mount-ns"][..], true),
    ] {
        let jail = Jail::new();
        let mut command = jail.command();
        command.args(arguments).args(["--", "--api-sock", "/run/api"]);
        let words = std::iter::once(command.get_program()).chain(command.get_args()).map(vesiclectl::quote);
        let words = String::from_utf8(words.collect::<Vec<_>>().join(&b' ')).unwrap();
        // A launcher that leads a session with a terminal, says who it is, and ends: SIGHUP is sent.
        let launched = Command::new("script")
            .env("SHELL", "/bin/sh")
            .args(["-qec", &format!("echo $$; exec {words}"), "/dev/null"])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(launched.status.success(), "{arguments:?}: {launched:?}");
        let said = String::from_utf8(launched.stdout).unwrap();
        let launcher: i32 = said.lines().next().unwrap().trim().parse().unwrap();
        let pid: u32 = fs::read_to_string(jail.root().join("vesicle.pid")).unwrap().parse().unwrap();
        let process = rustix::process::Pid::from_raw(pid.try_into().unwrap()).unwrap();
        let session = rustix::process::getsid(Some(process)).unwrap();
        assert_ne!(session.as_raw_pid(), launcher, "{arguments:?}");
        // Who leads no session never gets a terminal again.
        assert_eq!(session == process, !arguments.contains(&"--daemonize"), "{arguments:?}");
        let socket = jail.root().join("run/api");
        common::wait_until(|| socket.exists());
        let api = vesiclectl::Client::new(socket.clone());
        assert_eq!(api.get("/").unwrap().json()["id"], "story", "{arguments:?}");
        let status = status(pid);
        let inner = status["NSpid"].split_whitespace().last().unwrap().to_owned();
        assert_eq!(inner == "1", first, "{arguments:?}: {status:?}");
        if arguments.contains(&"--daemonize") {
            for stream in 0..3 {
                assert_eq!(fs::read_link(format!("/proc/{pid}/fd/{stream}")).unwrap(), Path::new("/dev/null"));
            }
        }
        rustix::process::kill_process(process, rustix::process::Signal::TERM).unwrap();
        common::wait_until(|| !socket.exists());
    }
}

#[test]
fn a_daemon_that_cannot_be_is_reported() {
    for arguments in [&["--daemonize"][..], &["--new-pid-ns"], &["--daemonize", "--new-pid-ns"]] {
        let jail = Jail::new();
        let elsewhere = tempfile::tempdir().unwrap();
        let program = elsewhere.path().join("no-program");
        fs::write(&program, "").unwrap();
        let mut command = Command::new(JAILER.as_path());
        command.args(["--id", "story", "--uid", "1", "--gid", "1", "--exec-file"]).arg(&program);
        let output = command.arg("--chroot-base-dir").arg(jail.base.path()).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(String::from_utf8(output.stderr).unwrap().contains("cannot execute the VMM"));
    }
}
