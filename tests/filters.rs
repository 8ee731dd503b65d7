//! That every rule of the system-call filters is needed: a microVM with all devices busy is watched by strace, and what
//! it never does must be marked in `resources/seccomp/x86_64.json` as rare, with the path that needs it.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use common::{Guest, MicroVm, artefact, wait_until};
use serde_json::{Value, json};

const FILTERS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/resources/seccomp/x86_64.json");

/// A system call as strace saw it: its name and its arguments, as far as they were printed.
#[derive(Debug, PartialEq)]
struct Call {
    name: String,
    arguments: Vec<u64>,
}

/// Takes a line such as `12<vcpu0> ioctl(0x14, 0xae80, 0) = 0` apart: the kind of thread, the call.
fn parse(line: &str) -> Option<(&'static str, Call)> {
    let (thread, rest) = line.split_once("> ")?;
    let thread = match thread.split_once('<')?.1 {
        "api" => "api",
        "memory" => "memory",
        vcpu if vcpu.starts_with("vcpu") => "vcpu",
        _ => "vmm",
    };
    let (name, rest) = rest.trim_start().split_once('(')?;
    let arguments = rest.split([')', '<']).next()?;
    let number = |text: &str| match text.trim().strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.trim().parse().ok(),
    };
    Some((thread, Call { name: name.to_owned(), arguments: arguments.split(',').map_while(number).collect() }))
}

/// Whether a rule allows a call. What was not printed may be anything.
fn allows(rule: &Value, call: &Call) -> bool {
    let holds = |condition: &Value| {
        let index = condition["index"].as_u64().unwrap() as usize;
        let wanted = condition["val"].as_u64().unwrap();
        // The mask of masked_eq, or all of the lower half.
        let mask = condition["op"]["masked_eq"].as_u64().unwrap_or(u32::MAX.into());
        call.arguments.get(index).is_none_or(|value| value & mask == wanted)
    };
    rule["syscall"] == call.name.as_str()
        && rule["args"].as_array().is_none_or(|conditions| conditions.iter().all(holds))
}

#[test]
fn a_line_of_strace_is_understood() {
    let call = |name: &str, arguments: &[u64]| Call { name: name.to_owned(), arguments: arguments.to_vec() };
    assert_eq!(parse("12<vcpu0> ioctl(0x14, 0xae80, 0)   = 0"), Some(("vcpu", call("ioctl", &[0x14, 0xae80, 0]))));
    assert_eq!(parse("7<vesicle> futex(0x7f, 0x89 <unfinished ...>"), Some(("vmm", call("futex", &[0x7f, 0x89]))));
    assert_eq!(parse("9<api> <... read resumed>) = 0x8"), None);
    let rule = json!({"syscall": "mmap", "args": [{"index": 2, "op": {"masked_eq": 4}, "val": 0}]});
    assert!(allows(&rule, &call("mmap", &[0, 4096, 3])) && !allows(&rule, &call("mmap", &[0, 4096, 5])));
    let rule = json!({"syscall": "ioctl", "args": [{"index": 1, "op": "eq", "val": 0xae80}]});
    assert!(allows(&rule, &call("ioctl", &[3, 0xae80, 0])) && !allows(&rule, &call("ioctl", &[3, 0xae81, 0])));
}

/// Watches a process until it ends.
fn watch(pid: u32, output: &Path) -> Child {
    let mut strace = Command::new("strace");
    strace.args(["-f", "-q", "--decode-pids=comm", "-e", "raw=all", "-o"]).arg(output);
    let mut strace = strace.args(["-p", &pid.to_string()]).stderr(Stdio::piped()).spawn().unwrap();
    let traced =
        || fs::read_to_string(format!("/proc/{pid}/status")).unwrap().contains(&format!("TracerPid:\t{}", strace.id()));
    wait_until(traced);
    drop(strace.stderr.take());
    strace
}

/// Uses every device and every command there is.
fn keep_busy(vm: &mut MicroVm) {
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
    stream.write_all(b"world").unwrap();
    drop(stream);
    vm.finish(common::PATIENCE);
    // The driver takes its device anew.
    vm.ok("cd /sys/bus/virtio/drivers/virtio_net && device=$(ls -d virtio*) && echo $device >unbind && echo $device >bind");
    vm.ok("ip link set eth0 up && ip addr add 172.31.77.2/24 dev eth0 && ping -c 2 172.31.77.1");
    vm.pause();
    let snapshot = json!({ "snapshot_path": dir.join("state"), "mem_file_path": dir.join("memory") });
    vm.put("/snapshot/create", &snapshot);
    vm.resume();
    for _ in 0..3 {
        vm.get("/vm/config");
    }
    vm.api().get("/nothing").unwrap();
}

#[test]
#[ignore = "a watched microVM takes very long where the processor is emulated: run it on a host with KVM"]
fn every_rule_of_the_filters_is_used_or_rare() {
    let run = |line: &str| assert!(Command::new("sh").args(["-c", line]).status().unwrap().success(), "{line}");
    run("ip tuntap add vesicle-strace mode tap vnet_hdr && ip addr add 172.31.77.1/24 dev vesicle-strace");
    run("ip link set vesicle-strace up");
    let drive = |engine: &str| json!({ "discard": true, "io_engine": engine, "cache_type": "Writeback" });
    let images = tempfile::tempdir().unwrap();
    let image = |name: &str| {
        let path = images.path().join(name);
        fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
        path
    };
    let mut vm = Guest::tuned()
        .drive("sync", &image("one"), drive("Sync"))
        .drive("async", &image("two"), drive("Async"))
        .drive("tool", &artefact("vsock"), json!({ "is_read_only": true }))
        .configure();
    fs::File::create(vm.dir().join("next")).unwrap().set_len(1 << 20).unwrap();
    vm.put("/vsock", &json!({ "guest_cid": 3, "uds_path": vm.dir().join("v.sock") }));
    vm.put("/network-interfaces/net", &json!({ "iface_id": "net", "host_dev_name": "vesicle-strace" }));
    vm.start();
    vm.wait_until_ready();
    // From here on: a guest that is watched while it boots takes minutes, and every thread is under its filter now.
    let trace = vm.dir().join("strace");
    let mut strace = watch(vm.pid(), &trace);
    keep_busy(&mut vm);
    vm.begin("sync; reboot -f");
    assert_eq!(vm.wait_exit().code(), Some(0), "{}", vm.log());
    strace.wait().unwrap();
    run("ip link del vesicle-strace");

    let mut calls: BTreeMap<&str, Vec<Call>> = BTreeMap::new();
    for (thread, call) in fs::read_to_string(&trace).unwrap().lines().filter_map(parse) {
        calls.entry(thread).or_default().push(call);
    }
    let filters: Value = serde_json::from_slice(&fs::read(FILTERS).unwrap()).unwrap();
    let mut unused = Vec::new();
    for (thread, filter) in filters.as_object().unwrap() {
        for rule in filter["filter"].as_array().unwrap() {
            let used = calls.get(thread.as_str()).is_some_and(|calls| calls.iter().any(|call| allows(rule, call)));
            if !used && !rule["comment"].as_str().unwrap().starts_with("rare: ") {
                unused.push(format!("{thread}: {rule}"));
            }
        }
    }
    assert!(unused.is_empty(), "never used and not marked as rare: {unused:#?}");
}
