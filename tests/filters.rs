//! That every rule of the system-call filters is needed: the kernel's tracepoint notes what a microVM with all devices
//! busy does, and what it never does must be marked in `resources/seccomp/x86_64.json` as rare, with the path that needs
//! it. And that a vCPU makes its calls in the right order.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use common::snapshot::Snapshot;
use common::tap::{Tap, mac};
use common::{Guest, MicroVm, artefact};
use serde_json::{Value, json};
use vesicle::sandbox::syscalls;

const FILTERS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/resources/seccomp/x86_64.json");

/// A system call: its name and its arguments.
#[derive(Debug, PartialEq)]
struct Call {
    name: String,
    arguments: Vec<u64>,
}

/// Takes a line of the trace such as `vcpu0-12 [000] ..... 1.2: sys_enter: NR 16 (14, ae80, 0, 0, 0, 0)` apart: the kind
/// of thread, the call.
fn parse(line: &str) -> Option<(&'static str, Call)> {
    let (thread, rest) = line.split_once(" [")?;
    let thread = match thread.trim().rsplit_once('-')?.0 {
        "api" => "api",
        vcpu if vcpu.starts_with("vcpu") => "vcpu",
        "memory" => "memory",
        _ => "vmm",
    };
    let (number, arguments) = rest.split_once("sys_enter: NR ")?.1.split_once(" (")?;
    let name = syscalls::name(number.parse().ok()?).map_or_else(|| number.to_owned(), str::to_owned);
    let arguments = arguments.trim_end_matches(')').split(", ");
    Some((thread, Call { name, arguments: arguments.map_while(|a| u64::from_str_radix(a, 16).ok()).collect() }))
}

/// Whether a rule allows a call.
fn allows(rule: &Value, call: &Call) -> bool {
    let holds = |condition: &Value| {
        let index = condition["index"].as_u64().unwrap() as usize;
        let wanted = condition["val"].as_u64().unwrap();
        // The mask of masked_eq, or all of the lower half.
        let mask = condition["op"]["masked_eq"].as_u64().unwrap_or(u32::MAX.into());
        // What stands for the id of the process (src/sandbox/seccomp.rs) is another number each time.
        wanted == i32::MAX as u64 || call.arguments[index] & mask == wanted
    };
    rule["syscall"] == call.name.as_str()
        && rule["args"].as_array().is_none_or(|conditions| conditions.iter().all(holds))
}

#[test]
fn a_line_of_the_trace_is_understood() {
    let call = |name: &str, arguments: &[u64]| Call { name: name.to_owned(), arguments: arguments.to_vec() };
    let line = |thread: &str, rest: &str| parse(&format!("  {thread}-12  [000] .....  1.25: sys_enter: NR {rest}"));
    assert_eq!(line("vcpu0", "16 (14, ae80, 0)"), Some(("vcpu", call("ioctl", &[0x14, 0xae80, 0]))));
    assert_eq!(line("vesicle", "202 (7f, 89)"), Some(("vmm", call("futex", &[0x7f, 0x89]))));
    assert_eq!(parse("# entries-in-buffer/entries-written: 3/3   #P:2"), None);
    let rule = json!({"syscall": "mmap", "args": [{"index": 2, "op": {"masked_eq": 4}, "val": 0}]});
    assert!(allows(&rule, &call("mmap", &[0, 4096, 3])) && !allows(&rule, &call("mmap", &[0, 4096, 5])));
    let rule = json!({"syscall": "ioctl", "args": [{"index": 1, "op": "eq", "val": 0xae80}]});
    assert!(allows(&rule, &call("ioctl", &[3, 0xae80, 0])) && !allows(&rule, &call("ioctl", &[3, 0xae81, 0])));
}

/// The kernel's notes of the system calls of processes. They go when this is dropped.
struct Trace(PathBuf);

impl Trace {
    fn new(name: &str) -> Self {
        let tracing = Path::new("/sys/kernel/tracing");
        if !tracing.join("instances").exists() {
            common::tap::host("mount -t tracefs tracefs /sys/kernel/tracing");
        }
        let trace = Self(tracing.join("instances").join(name));
        fs::create_dir(&trace.0).unwrap();
        trace.set("buffer_size_kb", "65536");
        trace
    }

    fn set(&self, file: &str, value: &str) {
        fs::OpenOptions::new()
            .append(true)
            .open(self.0.join(file))
            .and_then(|mut f| f.write_all(value.as_bytes()))
            .unwrap();
    }

    /// Notes what the threads that a process has now do from now on.
    fn watch(&self, pid: u32) {
        for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
            self.set("set_event_pid", task.unwrap().file_name().to_str().unwrap());
        }
        self.set("events/raw_syscalls/sys_enter/enable", "1");
    }

    /// By kind of thread.
    fn calls(&self) -> BTreeMap<&'static str, Vec<Call>> {
        self.set("tracing_on", "0");
        let text = fs::read_to_string(self.0.join("trace")).unwrap();
        let counts = text.split_once("entries-written: ").unwrap().1.split_whitespace().next().unwrap();
        let (kept, written) = counts.split_once('/').unwrap();
        assert_eq!(kept, written, "the buffer is too small");
        let mut calls: BTreeMap<&str, Vec<Call>> = BTreeMap::new();
        for (thread, call) in text.lines().filter_map(parse) {
            calls.entry(thread).or_default().push(call);
        }
        calls
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// Uses every device and every command there is.
fn keep_busy(vm: &mut MicroVm, tap: &Tap) {
    let dir = vm.dir().to_owned();
    vm.ok("cat /dev/vdc >/run/vsock && chmod +x /run/vsock");
    for drive in ["vda", "vdb"] {
        vm.ok(&format!("dd if=/dev/zero of=/dev/{drive} bs=64k count=4 conv=fsync 2>/dev/null"));
        vm.ok(&format!("dd if=/dev/{drive} of=/dev/null bs=64k count=4 iflag=direct 2>/dev/null"));
        vm.ok(&format!("blkdiscard -o 65536 -l 65536 /dev/{drive}"));
    }
    for drive in ["sync", "async"] {
        vm.patch(&format!("/drives/{drive}"), &json!({ "drive_id": drive, "path_on_host": dir.join("next") }));
    }
    let limit = json!({ "drive_id": "sync", "rate_limiter": { "bandwidth": { "size": 65536, "refill_time": 100 } } });
    vm.patch("/drives/sync", &limit);
    vm.ok("dd if=/dev/vda of=/dev/null bs=64k count=4 iflag=direct 2>/dev/null");
    // From the host to the guest, with the end in one direction first, and back.
    vm.ok("/run/vsock serve 5000 echo >/run/5000 2>&1 & until grep -q listening /run/5000; do sleep 0.05; done");
    let mut stream = UnixStream::connect(dir.join("v.sock")).unwrap();
    stream.set_read_timeout(Some(common::PATIENCE)).unwrap();
    stream.write_all(b"CONNECT 5000\n").unwrap();
    stream.write_all(&[7; 10_000]).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    stream.read_to_end(&mut Vec::new()).unwrap();
    let listener = UnixListener::bind(dir.join("v.sock_6000")).unwrap();
    vm.begin("echo hello | /run/vsock pipe 6000");
    let mut stream = listener.accept().unwrap().0;
    stream.set_read_timeout(Some(common::PATIENCE)).unwrap();
    stream.read_to_end(&mut Vec::new()).unwrap();
    stream.write_all(b"world").unwrap();
    drop(stream);
    vm.finish(common::PATIENCE);
    // The driver takes its device anew.
    vm.ok("cd /sys/bus/virtio/drivers/virtio_net && device=$(ls -d virtio*) && echo $device >unbind && echo $device >bind");
    tap.set_up(vm, "eth0");
    vm.ok(&format!("ping -c 2 {}", tap.host()));
    for _ in 0..3 {
        vm.get("/vm/config");
    }
    vm.api().get("/nothing").unwrap();
}

#[test]
fn every_rule_of_the_filters_is_used_or_rare() {
    let drive = |engine: &str| json!({ "discard": true, "io_engine": engine, "cache_type": "Writeback" });
    let images = common::tempdir();
    let image = |name: &str| {
        let path = images.path().join(name);
        fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
        path
    };
    let (trace, tap) = (Trace::new("rules"), Tap::new());
    let mut vm = Guest::tuned()
        .argument("--allow-path=/")
        .drive("sync", &image("one"), drive("Sync"))
        .drive("async", &image("two"), drive("Async"))
        .drive("tool", &artefact("vsock"), json!({ "is_read_only": true }))
        .interface("net", &tap.name, mac(tap.net))
        .configure();
    fs::File::create(vm.dir().join("next")).unwrap().set_len(1 << 20).unwrap();
    vm.put("/vsock", &json!({ "guest_cid": 3, "uds_path": vm.dir().join("v.sock") }));
    vm.start();
    vm.wait_until_ready();
    // From here on: every thread is under its filter now.
    trace.watch(vm.pid());
    keep_busy(&mut vm, &tap);
    let snapshot = Snapshot::of(&vm);
    vm.resume();
    vm.begin("sync; reboot -f");
    assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.log());

    let mut vm = vm.successor_with(&["--allow-path=/"]);
    vm.put("/snapshot/load", &snapshot.load());
    vm.ok("true");
    trace.watch(vm.pid());
    vm.put("/snapshot/reset", &json!({ "keep_drive_writes": true }));
    vm.ok("true");
    vm.terminate();
    assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.log());

    let calls = trace.calls();
    let filters: Value = serde_json::from_slice(&fs::read(FILTERS).unwrap()).unwrap();
    let other = if cfg!(target_env = "musl") { "(glibc)" } else { "(musl)" };
    let mut unused = Vec::new();
    for (thread, filter) in filters.as_object().unwrap() {
        for rule in filter["filter"].as_array().unwrap() {
            let used = calls.get(thread.as_str()).is_some_and(|calls| calls.iter().any(|call| allows(rule, call)));
            let reason = rule["comment"].as_str().unwrap();
            if !used && !reason.starts_with("rare: ") && !reason.ends_with(other) {
                unused.push(format!("{thread}: {rule}"));
            }
        }
    }
    assert!(unused.is_empty(), "never used and not marked as rare: {unused:#?}");
}

#[test]
fn a_guest_is_told_that_it_stood_still_before_it_runs_again() {
    const KVM_RUN: u64 = 0xae80;
    const KVM_KVMCLOCK_CTRL: u64 = 0xaead;
    let mut vm = Guest::tuned().boot();
    vm.pause();
    let trace = Trace::new("resume");
    trace.watch(vm.pid());
    vm.resume();
    vm.ok("true");
    let calls = trace.calls();
    let mut calls = calls["vcpu"].iter().filter(|call| call.name == "ioctl").map(|call| call.arguments[1]);
    assert_eq!([calls.next(), calls.next()], [Some(KVM_KVMCLOCK_CTRL), Some(KVM_RUN)]);
}
