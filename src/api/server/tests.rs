//! The server over a real Unix socket, with a small vmm loop behind its channel.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};

use super::*;
use crate::config::MachineConfig;
use crate::control::{self, Lifecycle, Refusal, Reply as VmmReply};

/// A served socket; its vmm answers GET / and GET /machine-config, does what it is told, and
/// refuses to start.
struct Api {
    path: std::path::PathBuf,
    events: Option<control::Publisher>,
    thread: Option<thread::JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

fn listener(path: &std::path::Path) -> StdListener {
    let listener = StdListener::bind(path).unwrap();
    listener.set_nonblocking(true).unwrap();
    listener
}

impl Api {
    fn new(limits: Limits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        let (to_vmm, commands) = control::channel().unwrap();
        std::thread::spawn(move || {
            let mut poll =
                libc::pollfd { fd: std::os::fd::AsRawFd::as_raw_fd(commands.wake()), events: libc::POLLIN, revents: 0 };
            // SAFETY: `poll` is one valid pollfd.
            while unsafe { libc::poll(&mut poll, 1, -1) } != 0 {
                let _ = commands.wake().read();
                while let Some(request) = commands.next() {
                    let _ = request.reply.send(match request.command {
                        Command::GetInstance => {
                            Ok(VmmReply::Instance { id: "vm-1".into(), state: Lifecycle::Configuring })
                        }
                        Command::GetMachine => Ok(VmmReply::Machine(MachineConfig::default())),
                        Command::Start => Err(Refusal("There is no kernel.".into())),
                        Command::PutMetadata(_) => Ok(VmmReply::DoesNotFit(Refusal("It is too large.".into()))),
                        _ => Ok(VmmReply::Done),
                    });
                }
            }
        });
        let (events, receiver) = control::events(16);
        let thread = spawn(listener(&path), limits, to_vmm, receiver, || ()).unwrap();
        Self { path, events: Some(events), thread: Some(thread), _dir: dir }
    }

    fn connect(&self) -> Client {
        let stream = StdStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        Client { stream, unread: Vec::new() }
    }

    fn exit(&mut self) {
        self.events.take();
        self.thread.take().unwrap().join().unwrap();
    }
}

struct Client {
    stream: StdStream,
    unread: Vec<u8>,
}

impl Client {
    fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.stream.write_all(bytes.as_ref()).unwrap();
    }

    fn request(&mut self, method: &str, path: &str, body: &str) -> (u16, String) {
        let length = body.len();
        self.send(format!("{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{body}"));
        self.reply()
    }

    /// Reads until `self.unread` holds what `found` wants; its result.
    fn until<T>(&mut self, found: impl Fn(&[u8]) -> Option<T>) -> T {
        loop {
            if let Some(value) = found(&self.unread) {
                return value;
            }
            let mut chunk = [0; 4096];
            let length = match self.stream.read(&mut chunk) {
                // A fuzzer has an alarm clock.
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                read => read.unwrap(),
            };
            assert_ne!(length, 0, "closed after {:?}", String::from_utf8_lossy(&self.unread));
            self.unread.extend_from_slice(&chunk[..length]);
        }
    }

    /// The head of the next reply.
    fn head(&mut self) -> String {
        let end = self.until(|bytes| bytes.windows(4).position(|four| four == b"\r\n\r\n"));
        String::from_utf8(self.unread.drain(..end + 4).collect()).unwrap()
    }

    /// Status and body of the next reply.
    fn reply(&mut self) -> (u16, String) {
        let head = self.head();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let length =
            head.lines().find_map(|line| line.strip_prefix("content-length: ")).map_or(0, |n| n.parse().unwrap());
        self.until(|bytes| (bytes.len() >= length).then_some(()));
        (status, String::from_utf8(self.unread.drain(..length).collect()).unwrap())
    }

    /// What comes until the server closes.
    fn rest(&mut self) -> String {
        let mut bytes = std::mem::take(&mut self.unread);
        self.stream.read_to_end(&mut bytes).unwrap();
        String::from_utf8(bytes).unwrap()
    }
}

fn fault((status, body): (u16, String)) -> (u16, String) {
    let error: types::Error = serde_json::from_str(&body).unwrap_or_else(|error| panic!("{body:?}: {error}"));
    (status, error.fault_message)
}

#[test]
fn a_client_configures_on_one_connection() {
    let api = Api::new(Limits::default());
    let mut client = api.connect();
    let (status, body) = client.request("GET", "/", "");
    assert_eq!(status, 200);
    let info: types::InstanceInfo = serde_json::from_str(&body).unwrap();
    assert_eq!((info.id.as_str(), info.state), ("vm-1", types::InstanceState::NotStarted));
    let (status, body) = client.request("PUT", "/machine-config", r#"{"vcpu_count": 2, "mem_size_mib": 256}"#);
    assert_eq!((status, body.as_str()), (204, ""));
    let (status, body) = client.request("GET", "/machine-config", "");
    assert_eq!(status, 200);
    assert!(body.contains(r#""vcpu_count":1"#));
    let start = r#"{"action_type": "InstanceStart"}"#;
    assert_eq!(fault(client.request("PUT", "/actions", start)), (400, "There is no kernel.".into()));
}

#[test]
fn requests_in_one_packet_are_answered_in_order() {
    let api = Api::new(Limits::default());
    let mut client = api.connect();
    let body = r#"{"state": "Paused"}"#;
    let patch = format!("PATCH /vm HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    client.send(format!("GET /version HTTP/1.1\r\n\r\n{patch}GET /nope HTTP/1.1\r\n\r\n"));
    let (status, body) = client.reply();
    assert!(status == 200 && body.contains(r#""firecracker_version":"1.17.0""#), "{body}");
    assert_eq!(client.reply(), (204, String::new()));
    assert_eq!(fault(client.reply()).0, 400);
}

#[test]
fn an_old_client_that_does_not_ask_for_it_keeps_its_connection() {
    let api = Api::new(Limits::default());
    let mut client = api.connect();
    for _ in 0..3 {
        client.send("GET / HTTP/1.0\r\n\r\n");
        assert_eq!(client.reply().0, 200);
        client.send("PUT /actions HTTP/1.0\r\nContent-Length: 33\r\n\r\n{\"action_type\": \"SendCtrlAltDel\"}");
        assert!(client.head().contains(" 204 "));
    }
    client.send("GET / HTTP/1.0\r\nConnection: close\r\n\r\n");
    assert!(client.rest().contains(" 200 "), "and then the connection ends");

    let mut client = api.connect();
    client.send("GET /events HTTP/1.0\r\n\r\n");
    client.head();
    drop(api);
    client.rest();
}

#[test]
fn a_deprecated_field_is_answered_with_a_header() {
    let api = Api::new(Limits::default());
    let mut client = api.connect();
    for (path, body, deprecated) in [
        ("/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 128}"#, false),
        ("/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 128, "cpu_template": "None"}"#, true),
        (
            "/snapshot/load",
            r#"{"snapshot_path": "s", "mem_backend": {"backend_type": "File", "backend_path": "m"}}"#,
            false,
        ),
        ("/snapshot/load", r#"{"snapshot_path": "s", "mem_file_path": "m"}"#, true),
    ] {
        client.send(format!("PUT {path} HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len()));
        let head = client.head();
        assert!(head.starts_with("HTTP/1.1 204 "), "{head}");
        assert_eq!(head.contains("deprecation: true\r\n"), deprecated, "{head}");
    }
}

#[test]
fn the_eleventh_connection_is_turned_away_until_another_closes() {
    let api = Api::new(Limits::default());
    let mut clients: Vec<_> = (0..10).map(|_| api.connect()).collect();
    for client in &mut clients {
        assert_eq!(client.request("GET", "/version", "").0, 200);
    }
    let mut eleventh = api.connect();
    let (status, message) = fault(eleventh.request("GET", "/", ""));
    assert_eq!(status, 503);
    assert!(message.contains("Too many connections"));
    assert_eq!(eleventh.rest(), "");
    clients.pop();
    // The server learns of it in its own time.
    let served = (0..10_000).any(|_| {
        std::thread::sleep(Duration::from_millis(2));
        api.connect().request("GET", "/version", "").0 == 200
    });
    assert!(served);
    assert_eq!(clients[0].request("GET", "/version", "").0, 200);
}

#[test]
fn a_client_that_was_answered_may_be_silent() {
    let short = Duration::from_millis(50);
    let api = Api::new(Limits { head_timeout: short, ..Limits::default() });
    for version in ["1.0", "1.1"] {
        let mut client = api.connect();
        for _ in 0..3 {
            client.send(format!("GET /version HTTP/{version}\r\n\r\n"));
            assert_eq!(client.reply().0, 200);
            std::thread::sleep(4 * short);
        }
    }
}

#[test]
fn the_client_that_has_been_silent_for_longest_gives_up_its_place() {
    let short = Duration::from_millis(500);
    let api = Api::new(Limits { connections: 3, head_timeout: short, ..Limits::default() });
    let mut events = api.connect();
    events.send("GET /events HTTP/1.1\r\n\r\n");
    events.head();
    let (mut longest, mut other) = (api.connect(), api.connect());
    assert_eq!(longest.request("GET", "/version", "").0, 200);
    std::thread::sleep(short / 4);
    assert_eq!(other.request("GET", "/version", "").0, 200);
    assert_eq!(api.connect().request("GET", "/version", "").0, 503, "nobody has been silent for long");
    std::thread::sleep(2 * short);
    let mut late = api.connect();
    assert_eq!(late.request("GET", "/version", "").0, 200);
    assert_eq!(longest.rest(), "");
    assert_eq!(other.request("GET", "/version", "").0, 200);
    assert_eq!(api.connect().request("GET", "/version", "").0, 503, "it was one place that was asked for");
    drop(api);
    assert!(events.rest().ends_with("0\r\n\r\n"), "who listens is not silent");
}

#[test]
fn what_is_left_of_an_old_clients_body_is_no_request() {
    let api = Api::new(Limits { max_payload: 64, body_timeout: Duration::from_millis(50), ..Limits::default() });
    let inner = "GET /version HTTP/1.0\r\n\r\n";
    let mut late = api.connect();
    late.send(format!("PUT /mmds HTTP/1.0\r\nContent-Length: {}\r\n\r\n{{", 1 + inner.len()));
    assert_eq!(late.reply().0, 400);
    let _ = late.stream.write_all(inner.as_bytes());
    assert_eq!(late.rest(), "");

    let mut long = api.connect();
    let body = " ".repeat(64 + DRAIN + (64 << 10));
    long.send(format!("PUT /mmds HTTP/1.0\r\nContent-Length: {}\r\n\r\n", body.len() + inner.len()));
    let _ = long.stream.write_all(body.as_bytes());
    let _ = long.stream.write_all(inner.as_bytes());
    let mut replies = Vec::new();
    let _ = long.stream.read_to_end(&mut replies);
    assert!(!String::from_utf8_lossy(&replies).contains(" 200 "));
}

#[test]
fn a_crowd_of_silent_connections_does_not_lock_the_others_out() {
    let limits = Limits { connections: 1, head_timeout: Duration::from_millis(200), ..Limits::default() };
    let api = Api::new(limits);
    let _silent: Vec<_> = (0..8).map(|_| api.connect()).collect();
    let mut last = api.connect();
    last.stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    assert!([200, 503].contains(&last.request("GET", "/version", "").0));
}

/// A PUT /logger of exactly `length` bytes.
fn logger_body(length: usize) -> String {
    let empty = r#"{"module": ""}"#.len();
    format!(r#"{{"module": "{}"}}"#, "x".repeat(length - empty))
}

#[test]
fn a_body_may_be_as_long_as_the_limit_and_no_longer() {
    let api = Api::new(Limits::default());
    let mut client = api.connect();
    assert_eq!(client.request("PUT", "/logger", &logger_body(51_200)).0, 204);
    let (status, message) = fault(client.request("PUT", "/logger", &logger_body(51_201)));
    assert_eq!(status, 400);
    assert!(message.contains("larger than 51200 bytes"), "{message}");
    // Much more than the sockets hold: it is read, so that the client comes to read the refusal.
    let (status, _) = fault(api.connect().request("PUT", "/logger", &logger_body(900_000)));
    assert_eq!(status, 400);
}

#[test]
fn a_body_may_come_in_chunks() {
    let api = Api::new(Limits { max_payload: 64, ..Limits::default() });
    let mut client = api.connect();
    let head = "PUT /actions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n";
    client.send(format!("{head}11\r\n{{\"action_type\": \"\r\n"));
    std::thread::sleep(Duration::from_millis(20));
    client.send("e\r\nFlushMetrics\"}\r\n0\r\n\r\n");
    assert_eq!(client.reply(), (204, String::new()));
    client.send(format!("{head}41\r\n{}\r\n0\r\n\r\n", "x".repeat(0x41)));
    let (status, message) = fault(client.reply());
    assert!(status == 400 && message.contains("larger than 64 bytes"), "{message}");
}

#[test]
fn a_request_without_a_length_has_no_body() {
    let api = Api::new(Limits::default());
    let mut client = api.connect();
    client.send("PUT /actions HTTP/1.1\r\n\r\n");
    let (status, message) = fault(client.reply());
    assert_eq!((status, message.as_str()), (400, "PUT /actions: the request has no body; send a JSON object."));
    client.send("GET / HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}");
    assert_eq!(fault(client.reply()), (400, "GET /: a GET request cannot have a body.".into()));
}

#[test]
fn what_is_not_http_gets_an_empty_reply_and_a_closed_connection() {
    let api = Api::new(Limits::default());
    let long = format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(HEAD_BUFFER));
    for (bytes, status) in [
        ("PUT /actions HTTP/1.1\r\nContent-Length: -1\r\n\r\n{}", "400"),
        ("PUT /actions HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}", "400"),
        ("PUT /actions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", ""),
        ("GET / HTTP/9.9\r\n\r\n", "400"),
        ("\0\x01\x02\r\n\r\n", "400"),
        ("GET /\u{7f} \u{e9} HTTP/1.1\r\n\r\n", "400"),
        (long.as_str(), "431"),
    ] {
        let mut client = api.connect();
        // The server may have closed before it has read all of it.
        let _ = client.stream.write_all(bytes.as_bytes());
        let mut reply = Vec::new();
        let _ = client.stream.read_to_end(&mut reply);
        let reply = String::from_utf8(reply).unwrap();
        if !status.is_empty() {
            assert!(reply.starts_with(&format!("HTTP/1.1 {status} ")), "{bytes:?}: {reply}");
            assert!(reply.ends_with("\r\n\r\n"), "{bytes:?}: {reply}");
        }
    }
    assert_eq!(api.connect().request("GET", "/version", "").0, 200);
}

#[test]
fn a_client_that_stops_halfway_is_cut_off() {
    let short = Duration::from_millis(100);
    let api = Api::new(Limits { head_timeout: short, body_timeout: short, ..Limits::default() });
    let mut client = api.connect();
    client.send("GET /vers");
    assert!(!client.rest().contains("200"));
    let mut client = api.connect();
    client.send("PUT /actions HTTP/1.1\r\nContent-Length: 100\r\n\r\n{\"action");
    let (status, message) = fault(client.reply());
    assert!(status == 400 && message.contains("did not arrive"), "{message}");
    assert_eq!(client.rest(), "");
}

#[test]
fn metadata_over_the_limit_is_told_413() {
    let api = Api::new(Limits::default());
    let before = METRICS.put_api_requests.mmds_fails.get();
    let (status, body) = api.connect().request("PUT", "/mmds", "{}");
    assert_eq!((status, body.as_str()), (413, r#"{"fault_message":"It is too large."}"#));
    assert!(METRICS.put_api_requests.mmds_fails.get() > before);
}

#[test]
fn a_vmm_that_is_gone_is_a_refusal() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api.sock");
    let (to_vmm, commands) = control::channel().unwrap();
    drop(commands);
    let (_events, receiver) = control::events(1);
    drop(spawn(listener(&path), Limits::default(), to_vmm, receiver, || ()).unwrap());
    let mut client = Client { stream: StdStream::connect(&path).unwrap(), unread: Vec::new() };
    assert_eq!(fault(client.request("GET", "/", "")), (400, "The VMM is shutting down.".into()));
}

#[test]
fn events_stream_until_the_last_one_is_out() {
    let mut api = Api::new(Limits::default());
    let mut client = api.connect();
    client.send("GET /events HTTP/1.1\r\n\r\n");
    let head = client.head();
    assert!(head.contains("content-type: text/event-stream\r\n"), "{head}");
    let events = api.events.clone().unwrap();
    for event in [Event::Started, Event::Paused, Event::Resumed] {
        events.publish(event);
    }
    let resumed = b"event: resumed\ndata: {\"state\":\"Running\"}\n\n";
    client.until(|bytes| bytes.windows(resumed.len()).any(|window| window == resumed).then_some(()));
    events.publish(Event::Exited { status: 0, reason: "The guest \"reset\".".into() });
    drop(events);
    api.exit();
    let stream = client.rest();
    let last = "event: exited\ndata: {\"state\":\"Exited\",\"status\":0,\"reason\":\"The guest \\\"reset\\\".\"}\n\n";
    assert!(stream.contains("event: started\ndata: {\"state\":\"Running\"}\n\n"), "{stream}");
    assert!(stream.contains("event: paused\ndata: {\"state\":\"Paused\"}\n\n"), "{stream}");
    assert!(stream.contains(last) && stream.ends_with("0\r\n\r\n"), "{stream}");
}

#[test]
fn the_end_does_not_wait_for_clients_that_dawdle() {
    let mut api = Api::new(Limits::default());
    let mut idle = api.connect();
    assert_eq!(idle.request("GET", "/version", "").0, 200);
    let mut halfway = api.connect();
    halfway.send("PUT /actions HTTP/1.1\r\nContent-Length: 100\r\n\r\n{");
    let start = Instant::now();
    api.exit();
    assert!(start.elapsed() < 10 * GRACE);
    assert_eq!(idle.rest(), "");
}

#[test]
fn the_contract_and_the_metrics_are_served() {
    let api = Api::new(Limits::default());
    let mut client = api.connect();
    assert_eq!(client.request("GET", "/openapi.yaml", ""), (200, OPENAPI.to_owned()));
    let (status, text) = client.request("GET", "/metrics", "");
    assert!(status == 200 && text.contains("vesicle_get_api_requests_vmm_version_count_total"));
    client.send("GET /metrics HTTP/1.1\r\n\r\n");
    assert!(client.head().contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8\r\n"));
}

crate::generated::properties! {
    #![proptest_config(crate::generated::inputs(300))]

    /// Requests that are cut, doubled, overwritten or nothing of the sort; then one that is right.
    #[test]
    fn no_bytes_end_the_server(
        packets in proptest::collection::vec(packet(), 1..4),
        changes in crate::generated::changes(),
    ) {
        static API: std::sync::LazyLock<Api> = std::sync::LazyLock::new(|| Api::new(Limits::default()));
        let mut bytes = packets.concat();
        crate::generated::change(&mut bytes, &changes);
        let mut client = API.connect();
        let _ = client.stream.write_all(&bytes);
        let _ = client.stream.shutdown(std::net::Shutdown::Write);
        let mut replies = Vec::new();
        let _ = client.stream.read_to_end(&mut replies);
        proptest::prop_assert!(replies.is_empty() || replies.starts_with(b"HTTP/1."));
        drop(client);
        // The connections of other cases may not have been seen to close yet.
        let answered = (0..10_000).any(|_| {
            let (status, _) = API.connect().request("GET", "/", "");
            status == 200 || (std::thread::sleep(Duration::from_millis(2)), false).1
        });
        proptest::prop_assert!(answered);
    }
}

fn packet() -> impl proptest::strategy::Strategy<Value = Vec<u8>> {
    use proptest::prelude::*;

    use crate::generated::prop_oneof;
    let request = |method: &str, path: &str, headers: &str, body: &str| {
        format!("{method} {path} HTTP/1.1\r\n{headers}\r\n{body}").into_bytes()
    };
    let start = r#"{"action_type":"FlushMetrics"}"#;
    prop_oneof![
        Just(request("GET", "/", "", "")),
        Just(request("GET", "/metrics", "Connection: close\r\n", "")),
        Just(request("PUT", "/actions", "Content-Length: 30\r\n", start)),
        Just(request("PUT", "/actions", "Content-Length: 30\r\nExpect: 100-continue\r\n", start)),
        Just(request("PATCH", "/vm", "Transfer-Encoding: chunked\r\n", "3\r\n{}\n\r\n0\r\n\r\n")),
        Just(request("PUT", "/actions", "Content-Length: 60000\r\n", start)),
        any::<u64>().prop_map(move |length| request("PUT", "/vm", &format!("Content-Length: {length}\r\n"), "{}")),
        proptest::collection::vec(any::<u8>(), 0..40),
    ]
}

#[test]
#[ignore = "counts the descriptors of its process: descriptors_do_not_leak runs it in one of its own"]
fn descriptors_of_a_process_alone() {
    let api = Api::new(Limits { connections: 4, ..Limits::default() });
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    assert_eq!(api.connect().request("GET", "/", "").0, 200);
    let settled =
        |limit| (0..10_000).any(|_| open() <= limit || (std::thread::sleep(Duration::from_millis(10)), false).1);
    std::thread::sleep(Duration::from_millis(100));
    let before = open();
    for bytes in ["", "G", "GET / HTTP/1.1\r\n\r\n", "PUT / HTTP/1.1\r\nContent-Length: 9\r\n\r\nx", "\0\r\n\r\n"] {
        for _ in 0..40 {
            let _ = api.connect().stream.write_all(bytes.as_bytes());
        }
    }
    for _ in 0..20 {
        api.connect().send("GET /events HTTP/1.1\r\n\r\n");
    }
    assert!(settled(before), "{before} descriptors became {}", open());
}

#[test]
fn descriptors_do_not_leak() {
    let test = concat!(module_path!(), "::descriptors_of_a_process_alone");
    let (_, test) = test.split_once("::").unwrap();
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    let output = command.args(["--exact", test, "--ignored"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}
