//! Programs that others wrote for this API run guests: one on a published client, as it is, and one on a client that a
//! standard generator made of the contract. `tools/client` makes them.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use common::tap::{Tap, mac};
use common::{Guest, MicroVm, artefact};
use serde_json::{Value, json};
use vesiclectl::Job;

/// What `tools/test` says the path of a client is.
fn client(name: &str) -> PathBuf {
    let variable = format!("VESICLE_CLIENT_{name}");
    let path = std::env::var_os(&variable);
    path.unwrap_or_else(|| panic!("{variable} is not set; ./tools/test sets it")).into()
}

#[test]
fn a_published_client_runs_saves_and_loads_a_guest_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    let script = "cp /dev/vda /run/vsock; chmod +x /run/vsock\n/run/vsock serve 5000 echo >/run/serving & \
        until grep -q listening /run/serving; do usleep 20000; done\n/run/vsock pipe 1234 </dev/null\nwait\n";
    let job = Job::create(dir.path().join("job"), script.into()).unwrap();
    let output = Command::new(client("PUBLISHED"))
        .args([Path::new(env!("CARGO_BIN_EXE_vesicle")), dir.path()])
        .args([artefact("kernel-tuned"), artefact("initramfs-tuned"), artefact("vsock"), job.path().to_owned()])
        .output()
        .unwrap();
    let read = |name| String::from_utf8_lossy(&std::fs::read(dir.path().join(name)).unwrap_or_default()).into_owned();
    assert!(
        output.status.success(),
        "{}{}\n--- the VMM's log\n{}--- serial output\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
        read("log"),
        read("serial-first") + &read("serial-second")
    );
}

/// The program on the generated client; see tests/compat/generated.
struct Generated {
    child: Child,
    answers: BufReader<ChildStdout>,
}

impl Generated {
    fn start() -> Self {
        let program = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/compat/generated/client.py");
        let mut command = Command::new(client("GENERATED"));
        let mut child = command.arg(program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap());
        Self { child, answers }
    }

    /// Has it make a step with this microVM; what came of it.
    fn step(&mut self, vm: &MicroVm, step: &str, mut more: Value) -> Value {
        more["step"] = json!(step);
        more["socket"] = json!(vm.api().socket());
        writeln!(self.child.stdin.as_mut().unwrap(), "{more}").unwrap();
        let mut line = String::new();
        assert_ne!(self.answers.read_line(&mut line).unwrap(), 0, "step {step} failed");
        serde_json::from_str(&line).unwrap()
    }
}

impl Drop for Generated {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_client_generated_from_the_contract_runs_saves_and_loads_a_guest() {
    let tap = Tap::new();
    // Described for its successor: the client configures it.
    let guest = Guest::tuned().vcpus(2).memory(80).interface("net0", &tap.name, mac(tap.net));
    let mut vm = guest.launch();
    let mut client = Generated::start();
    let boot_source = vm.guest().boot_source();
    let path = |name: &str| vm.dir().join(name);
    let (vsock, log, metrics) = (path("v.sock"), path("vmm.log"), path("metrics"));
    let saved = json!({ "state": path("state"), "memory": path("memory") });
    let configuration = json!({
        "log": log,
        "metrics": metrics,
        "kernel": boot_source["kernel_image_path"],
        "initramfs": boot_source["initrd_path"],
        "boot_args": boot_source["boot_args"],
        "job": vm.drives()[0]["path_on_host"],
        "tap": vm.guest().interface_name("net0"),
        "mac": mac(tap.net)["guest_mac"],
        "vsock": vsock,
    });
    assert_eq!(client.step(&vm, "state", json!({})), "Not started");
    let version = client.step(&vm, "configure", configuration);
    assert!(version["firecracker_version"].is_string(), "{version}");
    client.step(&vm, "start", json!({}));
    vm.wait_until_ready();
    assert_eq!(vm.ok("nproc"), "2");
    tap.set_up(&mut vm, "eth0");
    vm.ok(&format!("ping -c 2 -W 10 {}", tap.host()));
    let fault = client.step(&vm, "start_again", json!({}));
    assert!(fault.as_str().unwrap().contains("not supported after starting"), "{fault}");
    client.step(&vm, "limit", json!({}));
    assert!(vm.get("/vm/config")["network-interfaces"][0]["rx_rate_limiter"].is_object());

    // Nobody listens there; that the VMM accepts and the guest answers is what there is to see.
    let mut stream = UnixStream::connect(&vsock).unwrap();
    stream.write_all(b"CONNECT 77\n").unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0);

    client.step(&vm, "pause", json!({}));
    assert_eq!(client.step(&vm, "state", json!({})), "Paused");
    client.step(&vm, "resume", json!({}));
    client.step(&vm, "flush", json!({}));
    for file in [log, metrics] {
        assert!(std::fs::metadata(&file).unwrap().len() > 0, "{} is empty", file.display());
    }
    vm.ok("echo remembered >/run/note");
    client.step(&vm, "pause", json!({}));
    client.step(&vm, "save", saved.clone());
    let text = client.step(&vm, "metrics", json!({}));
    assert!(text.as_str().unwrap().contains("vesicle_vsock_conns_added"), "{text}");
    vm.terminate();
    assert!(vm.wait_exit().success());

    let mut vm = vm.successor();
    client.step(&vm, "load", saved);
    assert_eq!(client.step(&vm, "state", json!({})), "Running");
    assert_eq!(vm.ok("cat /run/note"), "remembered");
    vm.ok(&format!("ping -c 2 -W 10 {}", tap.host()));
    vm.shut_down();
}
