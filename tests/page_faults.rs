//! Guest memory from a page fault handler: `examples/page_faults.rs` is one.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Mutex, PoisonError};

use common::snapshot::{Snapshot, told, vesicle};
use common::{Guest, MicroVm, Mode, wait_until};
use serde_json::{Value, json};

/// A handler for one microVM.
struct Handler {
    process: Child,
    said: BufReader<ChildStdout>,
    socket: PathBuf,
    _permission: Option<Permission>,
}

const SETTING: &str = "/proc/sys/vm/unprivileged_userfaultfd";
static PERMISSIONS: Mutex<u32> = Mutex::new(0);

/// Lets users without root have page faults handled, as long as one of these lives.
struct Permission;

impl Permission {
    fn take() -> Self {
        let mut held = PERMISSIONS.lock().unwrap();
        *held += 1;
        fs::write(SETTING, "1").unwrap();
        Self
    }
}

impl Drop for Permission {
    fn drop(&mut self) {
        let mut held = PERMISSIONS.lock().unwrap_or_else(PoisonError::into_inner);
        *held -= 1;
        if *held == 0 {
            let _ = fs::write(SETTING, "0");
        }
    }
}

impl Handler {
    fn of(snapshot: &Snapshot) -> Self {
        let socket = snapshot.dir.path().join("handler.sock");
        let _ = fs::remove_file(&socket);
        let mut command = Command::new(vesicle().with_file_name("examples").join("page_faults"));
        let mut process = command.arg(&socket).arg(&snapshot.memory).stdout(Stdio::piped()).spawn().unwrap();
        let said = BufReader::new(process.stdout.take().unwrap());
        let permission = (Mode::chosen() == Mode::Rootless).then(Permission::take);
        let mut handler = Self { said, process, socket, _permission: permission };
        assert_eq!(handler.line(), "listening\n");
        handler
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.said.read_line(&mut line).unwrap();
        line
    }

    fn load(&self, snapshot: &Snapshot) -> Value {
        let mut load = snapshot.load();
        load["mem_backend"] = json!({ "backend_type": "Uffd", "backend_path": self.socket });
        load
    }

    fn signal(&self, signal: i32) {
        // SAFETY: the process is our child, and was not waited for.
        assert_eq!(unsafe { libc::kill(self.process.id() as i32, signal) }, 0);
    }

    /// How many pages it has served when its microVM ended.
    fn served(mut self) -> u64 {
        let line = self.line();
        assert!(self.process.wait().unwrap().success());
        line.split(' ').next().unwrap().parse().unwrap()
    }
}

/// Whether all threads of a process stand still.
fn stopped(pid: u32) -> bool {
    let stopped = |task: std::io::Result<fs::DirEntry>| {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap_or_default();
        status.contains("State:\tT")
    };
    fs::read_dir(format!("/proc/{pid}/task")).unwrap().all(stopped)
}

fn guest() -> (MicroVm, Snapshot) {
    let mut vm = Guest::tuned().vcpus(2).argument("--allow-path=/").boot();
    vm.ok("head -c 10000000 /dev/urandom >/run/data; sha256sum /run/data >/run/sum");
    let snapshot = Snapshot::of(&vm);
    vm.kill();
    (vm, snapshot)
}

#[test]
fn a_handler_serves_the_memory_of_a_guest_that_can_be_saved_but_not_reset() {
    let (vm, snapshot) = guest();
    let handler = Handler::of(&snapshot);
    let mut vm = vm.successor_with(&["--allow-path=/"]);
    vm.put("/snapshot/load", &handler.load(&snapshot));
    // Stopped and continued, as a debugger or a freezer does: waits go on.
    for signal in [libc::SIGSTOP, libc::SIGCONT] {
        // SAFETY: the process is our child, and was not waited for.
        assert_eq!(unsafe { libc::kill(vm.pid() as i32, signal) }, 0);
        wait_until(|| stopped(vm.pid()) == (signal == libc::SIGSTOP));
    }
    vm.ok("sha256sum -c /run/sum");
    let refusal = vm.refused_put("/snapshot/reset", &json!({ "keep_drive_writes": true }));
    assert!(refusal.contains("page fault handler"), "{refusal}");
    vm.ok("head -c 1000000 /dev/urandom >/run/more; sha256sum /run/data /run/more >/run/sum");
    let again = Snapshot::of(&vm);
    told(&["verify"], &[&again.state, &again.memory]);
    // What was touched, with what was changed: over the base it is the guest.
    let diff = Snapshot::new();
    vm.put("/snapshot/create", &diff.create("Diff"));
    vm.kill();
    // All of it was read for the snapshot.
    assert!(handler.served() == 64 << 20 >> 12);
    told(&["merge"], &[&snapshot.memory, &diff.memory]);
    for (state, memory) in [(&again.state, &again.memory), (&diff.state, &snapshot.memory)] {
        let mut load = again.load();
        load["snapshot_path"] = json!(state);
        load["mem_backend"]["backend_path"] = json!(memory);
        vm = vm.successor();
        vm.put("/snapshot/load", &load);
        vm.ok("sha256sum -c /run/sum");
        vm.kill();
    }
}

#[test]
fn without_its_handler_a_microvm_ends_with_a_reason() {
    let (vm, snapshot) = guest();
    // Nobody listens.
    let handler = Handler::of(&snapshot);
    let mut load = handler.load(&snapshot);
    load["mem_backend"]["backend_path"] = json!(snapshot.dir.path().join("nobody"));
    let mut vm = vm.successor();
    let refusal = vm.refused_put("/snapshot/load", &load);
    assert!(refusal.contains("page fault handler") && refusal.contains("connect"), "{refusal}");
    assert_eq!(vm.wait_exit().code(), Some(1));
    handler.signal(libc::SIGKILL);

    // The guest waits for a page.
    let handler = Handler::of(&snapshot);
    let mut vm = vm.successor();
    vm.put("/snapshot/load", &handler.load(&snapshot));
    vm.ok("true");
    handler.signal(libc::SIGKILL);
    vm.begin("sha256sum -c /run/sum");
    assert_eq!(vm.wait_exit().code(), Some(1));
    assert!(vm.log().contains("the page fault handler is gone"), "{}", vm.log());

    // The VMM itself waits for one: it reads all of them for a snapshot.
    let handler = Handler::of(&snapshot);
    let mut vm = vm.successor_with(&["--allow-path=/"]);
    vm.put("/snapshot/load", &handler.load(&snapshot));
    vm.ok("true");
    vm.pause();
    handler.signal(libc::SIGSTOP);
    let (api, body) = (vm.api().clone(), Snapshot::new());
    let asked = {
        let body = body.create("Full");
        std::thread::spawn(move || api.put("/snapshot/create", &body).is_err())
    };
    wait_until(|| body.dir.path().read_dir().unwrap().count() > 1);
    handler.signal(libc::SIGKILL);
    assert_eq!(vm.wait_exit().code(), Some(1));
    assert!(vm.log().contains("the page fault handler is gone"), "{}", vm.log());
    assert!(asked.join().unwrap(), "there is no snapshot");
}
