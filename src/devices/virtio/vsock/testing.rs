//! A guest with a vsock, packet by packet, and host processes around it.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use super::Vsock;
use crate::config::VsockConfig;
use crate::devices::virtio::Device;
use crate::devices::virtio::testing::{BUFFERS, Buffer, Guest, NEXT_QUEUE, USED, readable, writable};

pub const CID: u64 = 3;
pub const REQUEST: u16 = 1;
pub const RESPONSE: u16 = 2;
pub const RESET: u16 = 3;
pub const SHUTDOWN: u16 = 4;
pub const DATA: u16 = 5;
pub const CREDIT_UPDATE: u16 = 6;
pub const CREDIT_REQUEST: u16 = 7;

pub const RX: usize = 0;
pub const TX: usize = 1;
pub const EVENT: usize = 2;
const QUEUE_SIZE: u16 = 16;

/// Where the guest has its packets: the ones it sends, then the buffers it posts.
pub const PACKET: u64 = BUFFERS;
pub const PAYLOAD: u64 = BUFFERS + 0x1000;
pub const POSTED: u64 = 0x10_0000;
/// Bytes of a posted buffer: a header, and some data.
pub const POSTED_SIZE: u64 = 44 + 1000;

/// A packet as the guest sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub host_port: u32,
    pub guest_port: u32,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
    pub data: Vec<u8>,
}

/// The fields of a header that the guest sends.
#[derive(Debug, Clone, Copy)]
pub struct Fields {
    pub source: u64,
    pub destination: u64,
    pub guest_port: u32,
    pub host_port: u32,
    pub length: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl Fields {
    pub fn new(host_port: u32, guest_port: u32, op: u16) -> Self {
        let (buf_alloc, fwd_cnt) = (1 << 16, 0);
        Self {
            source: CID,
            destination: 2,
            guest_port,
            host_port,
            length: 0,
            kind: 1,
            op,
            flags: 0,
            buf_alloc,
            fwd_cnt,
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = [self.source, self.destination].map(u64::to_le_bytes).concat();
        bytes.extend([self.guest_port, self.host_port, self.length].map(u32::to_le_bytes).concat());
        bytes.extend([self.kind, self.op].map(u16::to_le_bytes).concat());
        bytes.extend([self.flags, self.buf_alloc, self.fwd_cnt].map(u32::to_le_bytes).concat());
        bytes
    }
}

pub struct Rig {
    pub guest: Guest,
    dir: TempDir,
}

impl Rig {
    /// Booted, without buffers posted.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let uds_path = dir.path().join("v.sock");
        let listener = UnixListener::bind(&uds_path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let config = VsockConfig { guest_cid: CID.try_into().unwrap(), uds_path };
        let mut guest = Guest::new(Device::Vsock(Box::new(Vsock::new(&config, listener).unwrap())));
        guest.queue_size = QUEUE_SIZE;
        let rig = Self { guest, dir };
        rig.boot();
        rig
    }

    pub fn boot(&self) {
        self.guest.boot(self.guest.offered());
        assert_eq!(self.guest.status(), 0xf);
    }

    /// Booted, with all buffers posted.
    pub fn ready() -> Self {
        let rig = Self::new();
        rig.post(QUEUE_SIZE);
        rig
    }

    /// Posts `count` buffers, and notifies.
    pub fn post(&self, count: u16) {
        self.guest.select(RX);
        for _ in 0..count {
            let head = self.guest.chain(&[writable(0, POSTED_SIZE as u32)]);
            self.guest.descriptor(head, Self::posted(head), POSTED_SIZE as u32, 2, 0);
            self.guest.offer(head);
        }
        self.guest.kick();
    }

    /// Lets everything come to rest; the guest then wants to know of the next buffer used in either queue.
    pub fn settle(&self) {
        while self.guest.turn(Duration::from_millis(20)) > 0 {}
        self.seen();
        self.await_interrupt();
    }

    /// The guest has looked at both queues, and wants to know of the next buffer used in either.
    pub fn await_interrupt(&self) {
        for queue in [RX, TX] {
            let index = self.guest.memory.read_obj(GuestAddress(USED + NEXT_QUEUE * queue as u64 + 2)).unwrap();
            self.guest.select(queue).set_used_event(index);
        }
        self.interrupts();
    }

    /// Interrupts since the last call.
    pub fn interrupts(&self) -> u32 {
        self.guest.interrupts.swap(0, Ordering::SeqCst)
    }

    fn posted(head: u16) -> u64 {
        POSTED + u64::from(head) * 0x1000
    }

    /// The packets that came; their buffers are posted again.
    pub fn seen(&self) -> Vec<Seen> {
        while self.guest.turn(Duration::ZERO) > 0 {}
        let mut all = Vec::new();
        loop {
            let used = self.guest.select(RX).used();
            if used.is_empty() {
                return all;
            }
            for &(head, length) in &used {
                let bytes = self.guest.get(Self::posted(head), length as usize);
                let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
                assert_eq!((word(0), word(4), word(8), word(12)), (2, 0, CID as u32, 0));
                assert_eq!(word(24), length - 44);
                let [kind, op] = [28, 30].map(|at| u16::from_le_bytes([bytes[at], bytes[at + 1]]));
                assert_eq!(kind, 1);
                let (host_port, guest_port) = (word(16), word(20));
                let (flags, buf_alloc, fwd_cnt) = (word(32), word(36), word(40));
                let data = bytes[44..].to_vec();
                all.push(Seen { host_port, guest_port, op, flags, buf_alloc, fwd_cnt, data });
            }
            self.post(used.len() as u16);
        }
    }

    /// The one packet that came.
    pub fn one(&self) -> Seen {
        let mut seen = self.seen();
        assert_eq!(seen.len(), 1, "{seen:?}");
        seen.remove(0)
    }

    pub fn ops(&self) -> Vec<u16> {
        self.seen().iter().map(|packet| packet.op).collect()
    }

    /// All data that came, of one connection.
    pub fn data(&self) -> Vec<u8> {
        let seen = self.seen();
        assert!(seen.iter().all(|packet| packet.op == DATA), "{seen:?}");
        seen.into_iter().flat_map(|packet| packet.data).collect()
    }

    /// Offers a chain of the tx queue without notifying.
    pub fn offer(&self, buffers: &[Buffer]) {
        self.guest.select(TX);
        let head = self.guest.chain(buffers);
        self.guest.offer(head);
    }

    /// Puts a packet of the guest in memory and returns its chain.
    pub fn place(&self, fields: &Fields, data: &[u8]) -> [Buffer; 2] {
        self.guest.put(PACKET, &fields.bytes());
        self.guest.put(PAYLOAD, data);
        [readable(PACKET, 44), readable(PAYLOAD, data.len() as u32)]
    }

    pub fn send_fields(&self, fields: &Fields, data: &[u8]) {
        let chain = self.place(fields, data);
        self.offer(&chain[..if data.is_empty() { 1 } else { 2 }]);
        self.guest.kick();
    }

    pub fn send(&self, host_port: u32, guest_port: u32, op: u16) {
        self.send_fields(&Fields::new(host_port, guest_port, op), b"");
    }

    pub fn send_shutdown(&self, host_port: u32, guest_port: u32, flags: u32) {
        self.send_fields(&Fields { flags, ..Fields::new(host_port, guest_port, SHUTDOWN) }, b"");
    }

    pub fn send_data(&self, host_port: u32, guest_port: u32, data: &[u8]) {
        let fields = Fields { length: data.len() as u32, ..Fields::new(host_port, guest_port, DATA) };
        self.send_fields(&fields, data);
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("v.sock")
    }

    /// A host process that listens for the guest.
    pub fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.dir.path().join(format!("v.sock_{port}"))).unwrap()
    }

    /// A host process that has said `greeting`.
    pub fn dial(&self, greeting: &str) -> UnixStream {
        let mut stream = UnixStream::connect(self.path()).unwrap();
        stream.write_all(greeting.as_bytes()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        self.run();
        stream
    }

    /// Lets the device work.
    pub fn run(&self) {
        while self.guest.turn(Duration::ZERO) > 0 {}
    }

    /// An open connection to port 52 that the host asked for, and its port on the host's side.
    pub fn open_from_host(&self) -> (UnixStream, u32) {
        let mut stream = self.dial("CONNECT 52\n");
        let request = self.one();
        assert_eq!((request.op, request.guest_port), (REQUEST, 52));
        self.send(request.host_port, 52, RESPONSE);
        assert_eq!(read_line(&mut stream), format!("OK {}", request.host_port));
        (stream, request.host_port)
    }

    /// An open connection from port 1000 to host port 70.
    pub fn open_from_guest(&self) -> UnixStream {
        let listener = self.listen(70);
        self.send(70, 1000, REQUEST);
        assert_eq!(self.one().op, RESPONSE);
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    /// How many connections the device has.
    pub fn connections(&self) -> usize {
        self.guest.mmio.update(|device| match device {
            Device::Vsock(vsock) => vsock.muxer.connections(),
            _ => unreachable!(),
        })
    }

    /// The device gave up, and said so.
    pub fn needs_reset(&self) -> bool {
        self.guest.status() & 0x40 != 0
    }
}

/// A line of a stream, without its newline.
pub fn read_line(stream: &mut UnixStream) -> String {
    let mut line = Vec::new();
    loop {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        if byte[0] == b'\n' {
            return String::from_utf8(line).unwrap();
        }
        line.push(byte[0]);
    }
}

/// Reads to the end of a stream, which must come.
pub fn rest(stream: &mut UnixStream) -> Vec<u8> {
    let mut data = Vec::new();
    // A peer that closes with something unread says so by an error after the data.
    let _ = stream.read_to_end(&mut data).inspect_err(|error| {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    });
    data
}
