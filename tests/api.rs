//! The process and its API as a launcher sees them, with curl as a client that shares no code with the rest.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use common::{BOOT_ARGS, Guest, PATIENCE, artefact};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Asks again until there is an answer.
fn until<T>(what: &str, mut answer: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = answer() {
            return answer;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A VMM that serves its own socket, as a launcher in a script would start it.
struct Process {
    dir: TempDir,
    child: Child,
}

impl Process {
    /// Starts it with `--api-sock` in a new directory and waits until the socket is there.
    fn start(arguments: &[&str]) -> Self {
        let process = Self::start_in(tempfile::tempdir().unwrap(), arguments);
        until("the socket", || process.socket().exists().then_some(()));
        process
    }

    fn start_in(dir: TempDir, arguments: &[&str]) -> Self {
        Self::spawn(dir, Command::new(env!("CARGO_BIN_EXE_vesicle")), arguments)
    }

    fn spawn(dir: TempDir, mut command: Command, arguments: &[&str]) -> Self {
        command.arg("--api-sock").arg(dir.path().join("api.sock")).args(arguments);
        let log = File::create(dir.path().join("log")).unwrap();
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        Self { dir, child }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("api.sock")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    fn end(&mut self) -> ExitStatus {
        until("the process to end", || self.child.try_wait().unwrap())
    }

    fn signal(&self, signal: &str) {
        assert!(Command::new("kill").arg(signal).arg(self.child.id().to_string()).status().unwrap().success());
    }

    fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- the VMM's log\n{}---", self.log());
        }
    }
}

/// curl's status and body.
fn curl(socket: &Path, arguments: &[&str], path: &str) -> (u16, String) {
    let mut command = Command::new("curl");
    command.args(["-sS", "--max-time", "60", "-w", "\n%{http_code}", "--unix-socket"]).arg(socket);
    let output = command.args(arguments).arg(format!("http://localhost{path}")).output().expect("curl is needed");
    assert!(output.status.success(), "{path}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let (body, status) = text.rsplit_once('\n').unwrap();
    (status.parse().unwrap(), body.to_owned())
}

fn get(socket: &Path, path: &str) -> Value {
    let (status, body) = curl(socket, &[], path);
    assert_eq!(status, 200, "GET {path}: {body}");
    serde_json::from_str(&body).unwrap()
}

fn send(socket: &Path, method: &str, path: &str, body: &Value) -> (u16, String) {
    curl(socket, &["-X", method, "-H", "Content-Type: application/json", "-d", &body.to_string()], path)
}

fn done(socket: &Path, method: &str, path: &str, body: &Value) {
    assert_eq!(send(socket, method, path, body), (204, String::new()), "{method} {path} {body}");
}

/// The fault message of what must be refused.
fn refused(socket: &Path, method: &str, path: &str, body: &Value) -> String {
    let (status, body) = send(socket, method, path, body);
    assert_eq!(status, 400, "{method} {path}: {body}");
    let body: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(body.as_object().unwrap().len(), 1, "{body}");
    body["fault_message"].as_str().unwrap().to_owned()
}

#[test]
fn a_microvm_goes_through_its_phases_and_each_refuses_what_is_not_its() {
    let mut vm = Guest::tuned().launch();
    let socket = vm.api().socket().to_owned();
    let socket = socket.as_path();
    assert_eq!(get(socket, "/")["state"], "Not started");
    let start = json!({ "action_type": "InstanceStart" });
    assert!(refused(socket, "PUT", "/actions", &start).contains("kernel"), "there is none yet");
    for (method, path, body) in [
        ("PATCH", "/vm", json!({ "state": "Paused" })),
        ("PATCH", "/vm", json!({ "state": "Resumed" })),
        ("PUT", "/actions", json!({ "action_type": "SendCtrlAltDel" })),
        ("PATCH", "/drives/job", json!({ "drive_id": "job", "path_on_host": "/dev/null" })),
    ] {
        let fault = refused(socket, method, path, &body);
        assert!(fault.contains("not supported before starting the microVM"), "{fault}");
    }

    let machine = vm.guest().machine_config();
    let source = vm.guest().boot_source();
    let job = vm.drives().remove(0);
    done(socket, "PUT", "/machine-config", &machine);
    done(socket, "PATCH", "/machine-config", &json!({ "vcpu_count": 2 }));
    done(socket, "PUT", "/boot-source", &source);
    done(socket, "PUT", "/drives/job", &job);
    done(socket, "PUT", "/actions", &start);
    assert_eq!(get(socket, "/")["state"], "Running");
    vm.wait_until_ready();
    assert_eq!(vm.ok("nproc"), "2");

    for (method, path, body) in [
        ("PUT", "/machine-config", machine),
        ("PATCH", "/machine-config", json!({ "vcpu_count": 1 })),
        ("PUT", "/boot-source", source),
        ("PUT", "/drives/job", job),
        ("PUT", "/serial", json!({})),
        ("PUT", "/actions", start),
    ] {
        let fault = refused(socket, method, path, &body);
        assert!(fault.contains("not supported after starting the microVM"), "{fault}");
    }
    done(socket, "PATCH", "/vm", &json!({ "state": "Paused" }));
    assert_eq!(get(socket, "/")["state"], "Paused");
    done(socket, "PATCH", "/vm", &json!({ "state": "Resumed" }));
    assert_eq!(get(socket, "/")["state"], "Running");
    vm.shut_down();
}

#[test]
fn what_is_not_understood_is_refused_in_the_documented_shape_and_changes_nothing() {
    let process = Process::start(&["--id", "test-1"]);
    let socket = process.socket();
    let socket = socket.as_path();
    let before = get(socket, "/vm/config");
    for (method, path, body, says) in [
        ("PUT", "/machine-config", json!({ "vcpu_count": 0, "mem_size_mib": 128 }), "vcpu_count"),
        ("PUT", "/machine-config", json!({ "vcpu_count": 33, "mem_size_mib": 128 }), "vcpu_count"),
        ("PUT", "/machine-config", json!({ "vcpu_count": -1, "mem_size_mib": 128 }), "-1"),
        ("PUT", "/machine-config", json!({ "vcpu_count": 1 }), "mem_size_mib"),
        ("PUT", "/machine-config", json!({ "vcpu_count": 1, "mem_size_mib": 0 }), "mem_size_mib"),
        ("PUT", "/machine-config", json!({ "vcpu_count": "1", "mem_size_mib": 128 }), "string"),
        ("PUT", "/machine-config", json!({ "vcpu_count": 1, "mem_size_mib": 128, "cores": 1 }), "cores"),
        ("PATCH", "/machine-config", json!({ "vcpu_count": 2, "mem_size_mib": 0 }), "mem_size_mib"),
        ("PUT", "/machine-config", json!([1]), "invalid"),
        ("PUT", "/boot-source", json!({}), "kernel_image_path"),
        ("PUT", "/boot-source", json!({ "kernel_image_path": "/nonexistent" }), "/nonexistent"),
        (
            "PUT",
            "/drives/a",
            json!({ "drive_id": "b", "is_root_device": false, "path_on_host": "/dev/null" }),
            "drive_id",
        ),
        ("PUT", "/drives/a-b", json!({ "drive_id": "a-b", "is_root_device": false, "path_on_host": "x" }), "drive_id"),
        (
            "PUT",
            "/drives/a",
            json!({ "drive_id": "a", "is_root_device": false, "path_on_host": "/dev/null" }),
            "/dev/null",
        ),
        ("PUT", "/actions", json!({ "action_type": "InstanceStop" }), "InstanceStop"),
        ("PUT", "/balloon", json!({}), "/balloon"),
        ("PUT", "/nowhere", json!({}), "/nowhere"),
        ("POST", "/actions", json!({ "action_type": "InstanceStart" }), "POST"),
        ("DELETE", "/drives/a", json!({}), "DELETE"),
    ] {
        let fault = refused(socket, method, path, &body);
        assert!(fault.contains(says), "{method} {path} {body}: {fault}");
    }
    let (status, body) = curl(socket, &["-X", "PUT", "-d", "{\"vcpu_count\": 1,"], "/machine-config");
    assert!(status == 400 && body.contains("fault_message"), "{status} {body}");
    assert_eq!(get(socket, "/vm/config"), before);
    assert_eq!(get(socket, "/")["id"], "test-1");
    assert_eq!(get(socket, "/")["state"], "Not started");
}

#[test]
fn a_body_over_the_limit_is_refused_and_one_at_the_limit_is_read() {
    let process = Process::start(&["--http-api-max-payload-size", "2000"]);
    let body = |length| format!("{{\"vcpu_count\":{:>1$}}}", 1, length - "{\"vcpu_count\":}".len());
    let (status, fault) = curl(&process.socket(), &["-X", "PATCH", "-d", &body(2000)], "/machine-config");
    assert_eq!((status, fault.as_str()), (204, ""));
    let (status, fault) = curl(&process.socket(), &["-X", "PATCH", "-d", &body(2001)], "/machine-config");
    assert!(status == 400 && fault.contains("2000 bytes"), "{status} {fault}");
}

#[test]
fn the_published_document_and_the_versions_are_served() {
    let process = Process::start(&[]);
    let socket = process.socket();
    let published = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/resources/openapi.yaml")).unwrap();
    assert_eq!(curl(&socket, &[], "/openapi.yaml"), (200, published));
    assert_eq!(get(&socket, "/version")["vesicle_version"], env!("CARGO_PKG_VERSION"));
    let version = Command::new(env!("CARGO_BIN_EXE_vesicle")).arg("--version").output().unwrap();
    assert!(String::from_utf8(version.stdout).unwrap().contains(env!("CARGO_PKG_VERSION")));
}

#[test]
fn the_configuration_that_is_shown_configures_the_next_one() {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let vm = Guest::tuned()
        .rootfs()
        .drive(
            "data",
            image.path(),
            json!({
                "io_engine": "Async",
                "cache_type": "Writeback",
                "rate_limiter": { "bandwidth": { "size": 1 << 30, "refill_time": 100, "one_time_burst": 5 } }
            }),
        )
        .no_job()
        .configure();
    vm.put("/serial", &json!({ "serial_out_path": vm.dir().join("serial") }));
    let mut config = vm.get("/vm/config");
    assert_eq!(config["drives"][1]["rate_limiter"]["bandwidth"]["one_time_burst"], 5);

    // Another process shows the same, and runs it.
    let file = vm.dir().join("config.json");
    fs::write(&file, config.to_string()).unwrap();
    let mut with_api = Process::start(&["--config-file", file.to_str().unwrap()]);
    assert_eq!(get(&with_api.socket(), "/vm/config"), config);
    assert_eq!(get(&with_api.socket(), "/")["state"], "Running");
    with_api.signal("-TERM");
    assert_eq!(with_api.end().code(), Some(0));

    // A third one runs it without an API, to its end.
    config["boot-source"]["boot_args"] = json!(format!("{BOOT_ARGS} vesicle.init=reboot"));
    fs::write(&file, config.to_string()).unwrap();
    let no_api = || Command::new(env!("CARGO_BIN_EXE_vesicle")).args(["--no-api", "--config-file"]).arg(&file).output();
    let ended = no_api().unwrap();
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");

    fs::write(&file, r#"{"machine-config":{"vcpu_count":1,"mem_size_mib":128,"cores":1}}"#).unwrap();
    let refused = no_api().unwrap();
    assert_eq!(refused.status.code(), Some(152));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("cores"), "{refused:?}");
}

#[test]
fn a_stale_socket_is_replaced_a_live_one_refused_and_ours_removed_at_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api.sock");
    drop(UnixListener::bind(&path).unwrap());
    let mut process = Process::start_in(dir, &[]);
    until("an answer", || UnixStream::connect(&path).ok());
    let metadata = fs::metadata(&path).unwrap();
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);

    let second = Command::new(env!("CARGO_BIN_EXE_vesicle")).arg("--api-sock").arg(&path).output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&second.stderr).contains("in use"), "{second:?}");
    assert_eq!(get(&path, "/")["state"], "Not started");

    process.signal("-INT");
    assert_eq!(process.end().code(), Some(0));
    assert!(!path.exists());
}

/// Who sees the path connects, and is never refused: here the process takes half a second to listen.
#[test]
fn the_socket_is_there_when_it_listens_and_not_before() {
    let mut slowly = Command::new("strace");
    slowly.args(["-D", "-qq", "-o", "/dev/null", "-e", "trace=listen", "-e", "inject=listen:delay_enter=500000"]);
    slowly.arg(env!("CARGO_BIN_EXE_vesicle"));
    let (begin, process) = (Instant::now(), Process::spawn(tempfile::tempdir().unwrap(), slowly, &[]));
    until("the path", || match UnixStream::connect(process.socket()) {
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        connected => Some(connected.unwrap()),
    });
    assert!(begin.elapsed() >= Duration::from_millis(500), "nothing was slowed down");
    assert_eq!(get(&process.socket(), "/")["state"], "Not started");
}

/// What a process may still do once its guest runs does not include much; this it has to.
#[test]
fn the_socket_is_removed_by_a_process_whose_guest_has_run() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api.sock");
    let mut process = Process::start_in(dir, &[]);
    until("an answer", || UnixStream::connect(&path).ok());
    let api = vesiclectl::Client::new(&path);
    let boot_args = format!("{BOOT_ARGS} vesicle.init=reboot");
    let source = json!({ "kernel_image_path": artefact("kernel-tuned"), "initrd_path": artefact("initramfs-tuned"), "boot_args": boot_args });
    api.must_put("/boot-source", &source).unwrap();
    api.must_put("/actions", &json!({ "action_type": "InstanceStart" })).unwrap();
    assert_eq!(process.end().code(), Some(0));
    assert!(!path.exists());
}

#[test]
fn bad_arguments_have_a_status_of_their_own() {
    for arguments in [&["--api-sock", "fd:0"][..], &["--api-sock", "fd:77"], &["--no-such-flag"], &["--id", "a_b"]] {
        let ended = Command::new(env!("CARGO_BIN_EXE_vesicle")).args(arguments).output().unwrap();
        assert_eq!(ended.status.code(), Some(153), "{arguments:?}: {ended:?}");
        assert!(!ended.stderr.is_empty());
    }
}

#[test]
fn failed_starts_have_a_status_of_their_own_when_nobody_reads_what_they_say() {
    let dir = tempfile::tempdir().unwrap();
    let (log, bad) = (dir.path().join("log"), dir.path().join("bad.json"));
    fs::write(&bad, "{").unwrap();
    let (log_path, bad) = (log.to_str().unwrap(), bad.to_str().unwrap());
    for (arguments, status) in [
        (&["--no-such-flag"][..], 153),
        (&["--config-file", bad], 152),
        (&["--log-path", log_path, "--config-file", bad], 152),
        (&["--help"], 1),
    ] {
        let nobody = || std::io::pipe().unwrap().1;
        let mut command = Command::new(env!("CARGO_BIN_EXE_vesicle"));
        let ended = command.args(arguments).stdout(nobody()).stderr(nobody()).status().unwrap();
        assert_eq!(ended.code(), Some(status), "{arguments:?}: {ended:?}");
    }
    let log = fs::read_to_string(log).unwrap();
    assert!(log.contains("bad.json") && log.lines().count() == 1, "{log}");
}

#[test]
fn fatal_signals_have_a_status_of_their_own() {
    let statuses = [("SYS", 148), ("BUS", 149), ("SEGV", 150), ("XFSZ", 151), ("XCPU", 154), ("PIPE", 155)];
    for (signal, status) in statuses.into_iter().chain([("HUP", 156), ("ILL", 157)]) {
        let mut process = Process::start(&[]);
        process.signal(&format!("-{signal}"));
        assert_eq!(process.end().code(), Some(status), "SIG{signal}");
        assert!(process.log().contains(&format!("SIG{signal}")), "{}", process.log());
    }
}

#[test]
fn events_tell_the_whole_life_and_why_it_ended() {
    let mut vm = Guest::tuned().configure();
    let mut listener = Command::new("curl");
    listener.args(["-sSN", "-o", "-", "-D", "/dev/stderr", "--unix-socket"]).arg(vm.api().socket());
    let mut listener =
        listener.arg("http://localhost/events").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // The head comes first: from then on nothing is missed.
    let mut head = [0; 15];
    listener.stderr.as_mut().unwrap().read_exact(&mut head).unwrap();
    assert_eq!(&head, b"HTTP/1.1 200 OK");

    vm.start();
    vm.wait_until_ready();
    vm.pause();
    vm.resume();
    vm.shut_down();
    let output = listener.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let events: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("event: ")).collect();
    assert_eq!(events, ["started", "paused", "resumed", "exited"]);
    let last = text.lines().rfind(|line| line.starts_with("data: ")).unwrap();
    let last: Value = serde_json::from_str(&last["data: ".len()..]).unwrap();
    assert_eq!((&last["state"], &last["status"]), (&json!("Exited"), &json!(0)), "{last}");
    assert!(last["reason"].as_str().unwrap().contains("reset"), "{last}");
}

/// The value of an OpenMetrics sample.
fn sample(text: &str, name: &str) -> f64 {
    let line = text.lines().find(|line| line.split([' ', '{']).next() == Some(name));
    line.unwrap_or_else(|| panic!("{name} is not in\n{text}")).rsplit(' ').next().unwrap().parse().unwrap()
}

#[test]
fn metrics_count_and_are_the_same_in_the_file() {
    let mut vm = Guest::tuned().configure();
    let file = vm.dir().join("metrics");
    vm.put("/metrics", &json!({ "metrics_path": file, "emit_id": true, "properties": { "tenant": "a" } }));
    vm.refused_put("/metrics", &json!({ "metrics_path": file }));
    vm.start();
    vm.wait_until_ready();
    vm.ok("dd if=/dev/vda of=/dev/null bs=4k count=10 iflag=direct 2>/dev/null");
    let (status, text) = curl(vm.api().socket(), &[], "/metrics");
    assert_eq!(status, 200);
    assert!(text.ends_with("# EOF\n"), "{text}");
    assert!(sample(&text, "vesicle_block_read_count_total") >= 10.0);
    assert!(sample(&text, "vesicle_uart_write_count_total") > 0.0);

    vm.action("FlushMetrics");
    let line = fs::read_to_string(&file).unwrap();
    let line: Value = serde_json::from_str(line.lines().last().unwrap()).unwrap();
    assert!(line["block"]["read_count"].as_u64().unwrap() >= 10, "{line}");
    assert_eq!(line["block_job"], line["block"], "each drive by itself, and all of them");
    assert_eq!((&line["properties"]["tenant"], &line["id"]), (&json!("a"), &vm.get("/")["id"]), "{line}");
    vm.shut_down();
}

#[test]
fn the_serial_port_writes_to_a_file_and_no_faster_than_it_may() {
    let vm = Guest::tuned().job("echo to the file").configure();
    let file = vm.dir().join("serial");
    vm.put("/serial", &json!({ "serial_out_path": file }));
    let mut vm = vm;
    vm.start();
    assert_eq!(vm.wait_job(), Some(0));
    assert_eq!(fs::read_to_string(&file).unwrap(), "to the file\n");
    assert_eq!(vm.output(), "");

    let vm = Guest::tuned().job("head -c 20000 /dev/zero | tr '\\0' x").configure();
    let file = vm.dir().join("serial");
    // A thousand bytes, and none after them within this guest's life.
    vm.put("/serial", &json!({ "serial_out_path": file, "rate_limiter": { "size": 1000, "refill_time": 3_600_000 } }));
    let mut vm = vm;
    vm.start();
    assert_eq!(vm.wait_job(), Some(0));
    let written = fs::metadata(&file).unwrap().len();
    assert!((1..=1100).contains(&written), "{written}");
}

#[test]
fn clients_of_every_kind_leave_no_descriptor_behind() {
    let process = Process::start(&[]);
    let socket = process.socket();
    get(&socket, "/");
    let idle = until("the first connection to close", || {
        let first = process.descriptors();
        std::thread::sleep(Duration::from_millis(50));
        (process.descriptors() == first).then_some(first)
    });
    for round in 0..12 {
        get(&socket, "/vm/config");
        refused(
            &socket,
            "PUT",
            "/drives/a",
            &json!({ "drive_id": "a", "is_root_device": false, "path_on_host": "/nonexistent" }),
        );
        let mut client = UnixStream::connect(&socket).unwrap();
        match round % 4 {
            // Gone at once, gone after half a head, gone after half a body, and speaking something else.
            0 => {}
            1 => client.write_all(b"GET / HT").unwrap(),
            2 => client.write_all(b"PUT /vm HTTP/1.1\r\nContent-Length: 100\r\n\r\n{").unwrap(),
            _ => client.write_all(b"\x16\x03\x01\x02\x00\x01\r\n\r\n").unwrap(),
        }
    }
    until("the descriptors to be closed", || (process.descriptors() == idle).then_some(()));

    // A file that is refused for what it is, and one that takes another's place, are closed as well.
    let kernel = artefact("kernel-tuned");
    done(&socket, "PUT", "/boot-source", &json!({ "kernel_image_path": kernel }));
    for _ in 0..4 {
        refused(&socket, "PUT", "/boot-source", &json!({ "kernel_image_path": "/etc/passwd" }));
        done(&socket, "PUT", "/boot-source", &json!({ "kernel_image_path": kernel }));
    }
    until("all but the kernel to be closed", || (process.descriptors() == idle + 1).then_some(()));
    assert_eq!(get(&socket, "/")["state"], "Not started");
}

#[test]
fn the_eleventh_connection_is_told_so_and_the_tenth_still_works() {
    let process = Process::start(&[]);
    let socket = process.socket();
    let held: Vec<_> = (0..10).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    let (status, body) = curl(&socket, &[], "/");
    assert!(status == 503 && body.contains("fault_message"), "{status} {body}");
    drop(held);
    until("room again", || (curl(&socket, &[], "/").0 == 200).then_some(()));
}

#[test]
fn a_log_goes_where_the_client_says() {
    let process = Process::start(&["--level", "Debug"]);
    let log = process.dir.path().join("other");
    done(&process.socket(), "PUT", "/logger", &json!({ "log_path": log, "level": "Debug", "show_level": true }));
    get(&process.socket(), "/vm/config");
    until("a line about it", || fs::read_to_string(&log).unwrap().contains("GET /vm/config").then_some(()));
    let fault = refused(&process.socket(), "PUT", "/logger", &json!({ "log_path": "/nonexistent/log" }));
    assert!(fault.contains("/nonexistent/log"), "{fault}");
}

/// The bit map that changes the four bytes of a register to `text`.
fn spell(text: [u8; 4]) -> String {
    format!("0b{:032b}", u32::from_le_bytes(text))
}

#[test]
fn a_guest_sees_the_cpu_it_is_configured_to_see() {
    // What the host has, the guest would have.
    let host = fs::read_to_string("/proc/cpuinfo").unwrap();
    assert!(host.contains(" sse4_2 ") && host.contains(" ssse3 "), "{host}");
    let vm = Guest::debian("6.12").vcpus(2).configure();
    let config = json!({
        "kvm_capabilities": ["3", "!56"],
        "cpuid_modifiers": [
            { "leaf": "0x1", "subleaf": "0x0", "flags": 0,
              "modifiers": [{ "register": "ecx", "bitmap": "0b0xxxx_xxxx_xxxx_xxxx_xxxx" }] },
            { "leaf": "0x80000002", "subleaf": "0x0", "flags": 0,
              "modifiers": [{ "register": "eax", "bitmap": spell(*b"Mine") }] },
        ],
        "msr_modifiers": [{ "addr": "0x3b", "bitmap": "0b1_0000_0000_0000" }],
    });
    vm.put("/cpu-config", &config);
    assert_eq!(vm.get("/vm/config")["cpu-config"]["msr_modifiers"][0]["addr"], "0x3b");
    let mut vm = vm;
    vm.start();
    vm.wait_until_ready();
    let guest = vm.ok("cat /proc/cpuinfo");
    assert_eq!(guest.matches(" ssse3 ").count(), 2, "{guest}");
    assert_eq!(guest.matches(" sse4_2 ").count(), 0, "{guest}");
    assert_eq!(guest.matches("model name\t: Mine").count(), 2, "{guest}");
    // IA32_TSC_ADJUST, which Linux expects to be zero.
    let log = vm.ok("dmesg");
    assert!(log.contains("TSC ADJUST: CPU0: 4096 force to 0"), "{log}");
    vm.refused_put("/cpu-config", &json!({}));
    vm.shut_down();
}

#[test]
fn a_cpu_that_the_host_cannot_show_is_refused_at_the_start() {
    let vm = Guest::tuned().configure();
    for (config, says) in [
        (
            json!({ "cpuid_modifiers": [{ "leaf": "0x77777777", "subleaf": "0x1", "flags": 0, "modifiers": [] }] }),
            "no CPUID leaf 0x77777777, subleaf 0x1",
        ),
        (json!({ "msr_modifiers": [{ "addr": "0xdeadbeef", "bitmap": "0b1" }] }), "no MSR 0xdeadbeef"),
        (json!({ "kvm_capabilities": ["99999"] }), "lacks capability 99999"),
    ] {
        vm.put("/cpu-config", &config);
        let fault = vm.refused_put("/actions", &json!({ "action_type": "InstanceStart" }));
        assert!(fault.contains(says), "{fault}");
    }
    vm.put("/cpu-config", &json!({}));
    let mut vm = vm;
    vm.start();
    vm.wait_until_ready();
    vm.shut_down();
}

#[test]
fn a_log_is_filtered_by_level_and_module_and_says_where_its_lines_come_from() {
    let process = Process::start(&[]);
    let socket = process.socket();
    let log = process.dir.path().join("filtered");
    let logger = |body: Value| done(&socket, "PUT", "/logger", &body);
    // A request that is answered is a line at level Debug, one that is refused a warning.
    let lines_of_two_requests = || {
        let before = fs::read_to_string(&log).unwrap().len();
        get(&socket, "/version");
        refused(&socket, "PUT", "/actions", &json!({ "action_type": "Dance" }));
        fs::read_to_string(&log).unwrap()[before..].to_owned()
    };
    logger(json!({ "log_path": log, "level": "Warning" }));
    let lines = lines_of_two_requests();
    assert!(lines.contains(":api] PUT /actions: 400 ") && lines.lines().count() == 1, "{lines}");
    logger(json!({ "level": "debug", "show_level": true, "show_log_origin": true }));
    let lines = lines_of_two_requests();
    assert!(lines.contains(":api:DEBUG:src/api/server.rs:") && lines.contains("] GET /version: 200\n"), "{lines}");
    assert!(lines.contains(":api:WARN:src/api/server.rs:"), "{lines}");
    for (body, count) in [
        (json!({ "module": "vesicle::machine", "level": "Debug" }), 0),
        (json!({ "module": "vesicle::api::ser", "level": "Debug" }), 2),
        (json!({ "show_level": true }), 1),
        (json!({ "module": "vesicle::api::server::x", "level": "Debug" }), 0),
        (json!({ "module": "vesicle", "level": "Error" }), 0),
        (json!({ "level": "Off" }), 0),
        (json!({ "level": "Trace" }), 2),
        (json!({ "level": "WARN" }), 1),
    ] {
        logger(body.clone());
        let lines = lines_of_two_requests();
        // The answer to PUT /logger itself comes before.
        assert_eq!(lines.lines().count(), count, "{body}: {lines}");
    }
    assert!(refused(&socket, "PUT", "/logger", &json!({ "level": "Loud" })).contains("Loud"));
    let shown = get(&socket, "/vm/config");
    let expected = json!({
        "log_path": log, "level": "Warning", "show_level": true, "show_log_origin": true, "module": "vesicle"
    });
    assert_eq!(shown["logger"], expected);
    let process = Process::start(&["--level", "Error"]);
    assert_eq!(get(&process.socket(), "/vm/config")["logger"], Value::Null);
}

#[test]
fn one_place_in_the_log_cannot_fill_a_disk() {
    let process = Process::start(&[]);
    let socket = process.socket();
    let start = Instant::now();
    for _ in 0..60 {
        refused(&socket, "PUT", "/actions", &json!({ "action_type": "Dance" }));
    }
    // Ten lines in five seconds, and a word about those that were left out.
    let periods = start.elapsed().as_secs() as usize / 5 + 2;
    let lines = process.log().lines().count();
    assert!((10..=11 * periods).contains(&lines), "{lines} in {periods}");
    let (_, metrics) = curl(&socket, &[], "/metrics");
    assert!(sample(&metrics, "vesicle_logger_rate_limited_log_count_total") >= 60.0 - lines as f64, "{metrics}");
}

#[test]
fn a_fifo_without_a_reader_is_refused_at_once_and_a_slow_reader_holds_up_nobody() {
    let vm = Guest::tuned().argument("--level").argument("Debug").launch();
    let fifo = vm.dir().join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    for (path, field) in [("/logger", "log_path"), ("/serial", "serial_out_path"), ("/metrics", "metrics_path")] {
        let fault = vm.refused_put(path, &json!({ field: fifo }));
        assert!(fault.contains(field), "{fault}");
    }
    let reader = fs::OpenOptions::new().read(true).write(true).open(&fifo).unwrap();
    vm.put("/logger", &json!({ "log_path": fifo, "level": "Debug" }));
    // More than a pipe holds.
    for _ in 0..2000 {
        assert_eq!(vm.api().get("/version").unwrap().status, 200);
    }
    let metrics = vm.api().get("/metrics").unwrap().body;
    assert!(sample(&metrics, "vesicle_logger_missed_log_count_total") > 0.0, "{metrics}");
    drop(reader);
    assert_eq!(vm.api().get("/version").unwrap().status, 200, "a reader that went away is no matter");
}
