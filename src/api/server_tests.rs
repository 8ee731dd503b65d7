//! The server over a real Unix socket, with a small vmm loop behind its channel.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener as StdListener, UnixStream as StdStream};

use super::*;
use crate::config::VmConfig;
use crate::control::{self, Lifecycle, Refusal, Reply as VmmReply};

/// A served socket; its vmm answers GET / and GET /machine-config, does what it is told, and
/// refuses to start.
struct Api {
    path: std::path::PathBuf,
    events: Option<broadcast::Sender<Event>>,
    thread: Option<JoinHandle<()>>,
    _dir: tempfile::TempDir,
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
            while unsafe { libc::poll(&mut poll, 1, 2000) } == 1 {
                let _ = commands.wake().read();
                while let Some(request) = commands.next() {
                    let _ = request.reply.send(match request.command {
                        Command::GetInstance => {
                            Ok(VmmReply::Instance { id: "vm-1".into(), state: Lifecycle::Configuring })
                        }
                        Command::GetConfig => Ok(VmmReply::Config(Box::<VmConfig>::default())),
                        Command::Start => Err(Refusal("There is no kernel.".into())),
                        _ => Ok(VmmReply::Done),
                    });
                }
            }
        });
        let (events, receiver) = broadcast::channel(16);
        let thread = spawn(StdListener::bind(&path).unwrap(), limits, to_vmm, receiver).unwrap();
        Self { path, events: Some(events), thread: Some(thread), _dir: dir }
    }

    fn connect(&self) -> Client {
        let stream = StdStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
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
            let length = self.stream.read(&mut chunk).unwrap();
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
