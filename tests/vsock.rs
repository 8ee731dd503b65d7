//! Stories of guests and host processes that talk over vsock.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use common::rest::wait_until_at_rest;
use common::snapshot::Snapshot;
use common::{Guest, MicroVm, PATIENCE, artefact, wait_until};
use serde_json::json;

const ECHO: u32 = 5000;
const STORE: u32 = 5001;
const DEAF: u32 = 5002;

/// A booted guest with a vsock and the program that uses it.
struct Talker {
    vm: MicroVm,
}

impl Talker {
    fn boot(guest: Guest) -> Self {
        let vm = guest.drive("tool", &artefact("vsock"), json!({ "is_read_only": true })).configure();
        let uds_path = vm.dir().join("v.sock");
        vm.put("/vsock", &json!({ "guest_cid": 7, "uds_path": uds_path }));
        vm.start();
        allow_descriptors();
        let mut talker = Self { vm };
        talker.vm.wait_until_ready();
        talker.vm.ok("cat /dev/vda >/run/vsock && chmod +x /run/vsock");
        talker
    }

    fn tuned() -> Self {
        Self::boot(Guest::tuned())
    }

    /// Has the guest listen.
    fn serve(&mut self, port: u32, how: &str) {
        self.vm.ok(&format!(
            "ulimit -n 4096; /run/vsock serve {port} {how} >/run/{port} 2>&1 & until grep -q listening /run/{port}; do sleep 0.05; done"
        ));
    }

    fn path(&self) -> PathBuf {
        self.vm.dir().join("v.sock")
    }

    /// Where the host listens for the guest's connections to `port`.
    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.vm.dir().join(format!("v.sock_{port}"))).unwrap()
    }

    /// Connects and asks for a port, without waiting for the answer.
    fn ask(&self, line: &str) -> UnixStream {
        let mut stream = UnixStream::connect(self.path()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        // One that is refused at once may not even take the line.
        let _ = stream.write_all(line.as_bytes());
        stream
    }

    /// A connection to a port of the guest; `None` if it is closed without a word.
    fn try_connect(&self, port: u32) -> Option<UnixStream> {
        let mut stream = self.ask(&format!("CONNECT {port}\n"));
        let line = read_line(&mut stream)?;
        let host_port: u32 = line.strip_prefix("OK ").unwrap().parse().unwrap();
        assert!(host_port >= 1 << 30);
        Some(stream)
    }

    fn connect(&self, port: u32) -> UnixStream {
        self.try_connect(port).expect("the guest listens")
    }

    /// The guest has come out of a snapshot in which it had a connection to its echo: a new one works, and the old one
    /// ends. Returns the new one.
    fn news_of_a_reset(&mut self) -> UnixStream {
        let mut stream = self.connect(ECHO);
        assert_eq!(exchange(&mut stream, b"at once"), b"at once");
        self.vm.ok(&format!("until grep -q 'reset by peer' /run/{ECHO}; do sleep 0.05; done"));
        stream
    }

    fn descriptors(&mut self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.vm.pid())).unwrap().count()
    }

    /// Waits until the VMM has no more descriptors than that.
    fn await_descriptors(&mut self, count: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.descriptors() > count {
            assert!(Instant::now() < deadline, "{} descriptors, {count} before", self.descriptors());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Memory of its own outside of what is as large as guest RAM, in bytes.
    fn private_memory(&mut self) -> u64 {
        let smaps = fs::read_to_string(format!("/proc/{}/smaps", self.vm.pid())).unwrap();
        let (mut total, mut size) = (0, 0);
        for line in smaps.lines() {
            let mut words = line.split_whitespace();
            let (key, value) = (words.next(), words.next().and_then(|word| word.parse::<u64>().ok()));
            match (key, value) {
                (Some("Size:"), Some(kib)) => size = kib,
                (Some("Anonymous:"), Some(kib)) if size < 8 << 10 => total += kib << 10,
                _ => {}
            }
        }
        total
    }

    fn await_metric(&self, name: &str, value: u64) {
        let deadline = Instant::now() + PATIENCE;
        while self.metric(name) != value {
            assert!(Instant::now() < deadline, "{name} is {}, not {value}", self.metric(name));
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn metric(&self, name: &str) -> u64 {
        let text = self.vm.api().get("/metrics").unwrap().body;
        let name = format!("vesicle_vsock_{name}_total ");
        text.lines().find_map(|line| line.strip_prefix(&name)).unwrap().parse().unwrap()
    }
}

/// This process has the other ends of all connections. The VMM, started before, raises its limit itself.
fn allow_descriptors() {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: `limit` is valid for reading and writing.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit), 0);
        limit.rlim_cur = limit.rlim_max.min(1 << 16);
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &limit), 0);
    }
}

/// A line without its newline; `None` at the end of the stream.
fn read_line(stream: &mut UnixStream) -> Option<String> {
    let mut line = Vec::new();
    loop {
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(1) if byte[0] == b'\n' => return Some(String::from_utf8(line).unwrap()),
            Ok(1) => line.push(byte[0]),
            Err(error) if error.kind() != ErrorKind::ConnectionReset => panic!("{error}"),
            _ => {
                assert!(line.is_empty(), "{line:?}");
                return None;
            }
        }
    }
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 23) as u8).collect()
}

/// Sends all of `data` and receives as many bytes, both at once.
fn exchange(stream: &mut UnixStream, data: &[u8]) -> Vec<u8> {
    let mut writer = stream.try_clone().unwrap();
    let mut received = vec![0; data.len()];
    thread::scope(|scope| {
        scope.spawn(move || writer.write_all(data).unwrap());
        stream.read_exact(&mut received).unwrap();
    });
    received
}

#[test]
fn a_vsock_carries_what_the_host_sends_and_brings_it_back() {
    for guest in Guest::of_each_kernel() {
        let mut talker = Talker::boot(guest);
        assert_eq!(talker.try_connect(ECHO).map(drop), None, "nobody listens");
        talker.serve(ECHO, "echo");
        let mut stream = talker.connect(ECHO);
        for length in [1, 2, 3000, 4096, 70_000, 3_000_000] {
            let data = pattern(length);
            assert!(exchange(&mut stream, &data) == data, "{length} bytes");
        }
        drop(stream);
        talker.vm.shut_down();
    }
}

#[test]
fn a_vsock_carries_what_the_guest_sends_and_half_closes_both_ways() {
    let mut talker = Talker::tuned();
    let (_, status) = talker.vm.run("echo hello | /run/vsock pipe 70");
    assert_ne!(status, 0, "nobody listens");

    // The guest finishes sending first, the host answers after that.
    let listener = talker.listen(70);
    let host = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        stream.write_all(b"got ").unwrap();
        stream.write_all(&all).unwrap();
    });
    assert_eq!(talker.vm.ok("echo -n hello | /run/vsock pipe 70"), "got hello");
    host.join().unwrap();

    // The host finishes sending first, the guest answers after that: more than either side's buffers hold.
    talker.serve(STORE, "store");
    let mut stream = talker.connect(STORE);
    let data = pattern(2_000_000);
    stream.write_all(&data).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut received = Vec::new();
    stream.read_to_end(&mut received).unwrap();
    assert!(received == data);
    talker.vm.shut_down();
}

#[test]
fn a_vsock_has_1023_connections_and_refuses_the_next() {
    let mut talker = Talker::boot(Guest::tuned().memory(256));
    talker.serve(ECHO, "echo");
    let idle = talker.descriptors();
    let mut streams: Vec<_> = (0..1023).map(|_| talker.connect(ECHO)).collect();
    assert_eq!(talker.try_connect(ECHO).map(drop), None, "one too many");
    let _listener = talker.listen(70);
    assert_ne!(talker.vm.run("echo | /run/vsock pipe 70").1, 0, "one too many from the guest as well");
    for (index, stream) in streams.iter_mut().enumerate() {
        let data = format!("{index:04}");
        assert_eq!(exchange(stream, data.as_bytes()), data.as_bytes());
    }
    streams.pop();
    talker.await_descriptors(idle + 1022);
    streams.push(talker.connect(ECHO));
    drop(streams);
    talker.await_descriptors(idle);
    talker.vm.shut_down();
}

/// VESICLE_VSOCK_ROUNDS says how often; every round takes seconds.
#[test]
fn a_vsock_that_opened_and_closed_1000_connections_again_and_again_leaks_nothing() {
    let rounds: u64 = std::env::var("VESICLE_VSOCK_ROUNDS").map_or(3, |rounds| rounds.parse().unwrap());
    let mut talker = Talker::boot(Guest::tuned().memory(256));
    talker.serve(ECHO, "echo");
    let listener = talker.listen(70);
    thread::spawn(move || listener.incoming().for_each(drop));
    let idle = talker.descriptors();
    let mut memory = 0;
    for round in 0..rounds {
        let streams: Vec<_> = (0..1000).map(|_| talker.connect(ECHO)).collect();
        drop(streams);
        assert_eq!(talker.vm.ok("/run/vsock churn 70 100"), "100");
        talker.await_metric("conns_removed", 1100 * (round + 1));
        talker.await_descriptors(idle);
        if round == 0 {
            memory = talker.private_memory();
        }
    }
    assert_eq!(talker.metric("conns_added"), 1100 * rounds);
    let grown = talker.private_memory().saturating_sub(memory);
    assert!(grown <= 64 << 10, "{grown} bytes more than after the first round");
    talker.vm.shut_down();
}

#[test]
fn a_vsock_whose_guest_does_not_read_uses_no_processor() {
    let mut talker = Talker::tuned();
    talker.serve(DEAF, "deaf");
    talker.serve(ECHO, "echo");
    let mut stream = talker.connect(DEAF);
    stream.set_write_timeout(Some(Duration::from_secs(2))).unwrap();
    let full = stream.write_all(&pattern(4_000_000)).unwrap_err();
    assert_eq!(full.kind(), ErrorKind::WouldBlock);
    wait_until_at_rest(talker.vm.pid());
    let mut other = talker.connect(ECHO);
    assert_eq!(exchange(&mut other, b"others go on"), b"others go on");
    talker.vm.shut_down();
}

#[test]
fn a_vsock_whose_host_does_not_read_uses_no_processor() {
    let mut talker = Talker::tuned();
    let listener = talker.listen(70);
    talker.vm.ok("(head -c 3000000 /dev/zero | /run/vsock pipe 70 >/run/answer; echo over >/run/over) &");
    let (mut stream, _) = listener.accept().unwrap();
    // Until the guest may not send any more.
    let mut sent = 0;
    wait_until(|| {
        thread::sleep(Duration::from_millis(500));
        let now = talker.metric("tx_bytes_count");
        let full = now > 0 && now == sent;
        sent = now;
        full
    });
    wait_until_at_rest(talker.vm.pid());
    let mut received = Vec::new();
    stream.read_to_end(&mut received).unwrap();
    assert_eq!(received.len(), 3_000_000);
    drop(stream);
    talker.vm.ok("until [ -e /run/over ]; do sleep 0.05; done");
    talker.vm.shut_down();
}

#[test]
fn a_vsock_keeps_its_connections_over_a_pause() {
    let mut talker = Talker::tuned();
    talker.serve(ECHO, "echo");
    let mut stream = talker.connect(ECHO);
    assert_eq!(exchange(&mut stream, b"before"), b"before");
    for _ in 0..3 {
        talker.vm.pause();
        stream.write_all(b"meanwhile").unwrap();
        let mut newcomer = talker.ask(&format!("CONNECT {ECHO}\n"));
        talker.vm.resume();
        let mut answer = [0; 9];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"meanwhile");
        assert!(read_line(&mut newcomer).unwrap().starts_with("OK "));
        assert_eq!(exchange(&mut newcomer, b"new"), b"new");
    }
    talker.vm.shut_down();
}

#[test]
fn a_vsock_socket_is_bound_when_configured_and_removed_at_the_end() {
    let mut vm = Guest::tuned().configure();
    let path = vm.dir().join("v.sock");
    let body = json!({ "guest_cid": 3, "uds_path": path });
    let _other = UnixListener::bind(&path).unwrap();
    let fault = vm.refused_put("/vsock", &body);
    assert!(fault.contains("v.sock") && fault.contains("exists"), "{fault}");
    assert!(vm.get("/vm/config")["vsock"].is_null(), "a refused request changes nothing");
    fs::remove_file(&path).unwrap();
    vm.put("/vsock", &body);
    UnixStream::connect(&path).unwrap();
    let reply = vm.api().put("/vsock", &json!({ "guest_cid": 4, "uds_path": path, "vsock_id": "v" })).unwrap();
    assert_eq!(reply.status, 204, "the same path again");
    assert_eq!(vm.get("/vm/config")["vsock"], json!({ "guest_cid": 4, "uds_path": path }));
    let other = vm.dir().join("w.sock");
    vm.put("/vsock", &json!({ "guest_cid": 4, "uds_path": other }));
    assert!(!path.exists() && other.exists());
    vm.start();
    let fault = vm.refused_put("/vsock", &body);
    assert!(fault.contains("not supported after starting"), "{fault}");
    vm.terminate();
    assert!(vm.wait_exit().success());
    assert!(!other.exists());
}

#[test]
fn a_vsock_line_that_never_comes_is_not_waited_for_forever() {
    let mut talker = Talker::tuned();
    talker.serve(ECHO, "echo");
    let mut silent: Vec<_> = (0..70).map(|_| talker.ask("CONN")).collect();
    let mut last = talker.connect(ECHO);
    assert_eq!(exchange(&mut last, b"served"), b"served");
    for stream in &mut silent {
        assert_eq!(read_line(stream), None);
    }
    for wrong in ["GET / HTTP/1.1\r\n", "CONNECT x\n", &"x".repeat(40)] {
        assert_eq!(read_line(&mut talker.ask(wrong)), None, "{wrong:?}");
    }
    talker.vm.shut_down();
}

#[test]
fn a_vsock_connection_ends_with_a_load_and_with_a_reset_and_a_new_one_works_at_once() {
    let mut talker = Talker::boot(Guest::tuned().argument("--allow-path=/"));
    talker.serve(ECHO, "echo");
    let mut old = talker.connect(ECHO);
    assert_eq!(exchange(&mut old, b"before"), b"before");
    let snapshot = Snapshot::of(&talker.vm);
    talker.vm.kill();
    let mut clone = Talker { vm: talker.vm.successor() };
    let mut load = snapshot.load();
    load["vsock_override"] = json!({ "uds_path": clone.path() });
    clone.vm.put("/snapshot/load", &load);
    assert_eq!(clone.vm.get("/vm/config")["vsock"]["uds_path"], json!(clone.path()));
    let mut stream = clone.news_of_a_reset();
    for _ in 0..2 {
        clone.vm.put("/snapshot/reset", &json!({ "keep_drive_writes": true }));
        assert_eq!(read_line(&mut stream), None, "the host's side ends, too");
        stream = clone.news_of_a_reset();
    }
    clone.vm.shut_down();
}
