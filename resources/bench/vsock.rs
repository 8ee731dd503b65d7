//! The guest's part of the vsock benchmarks: it listens on port 5000, connects to port 1234 of the host to say so, and
//! sends back what its one client sends.

use super::{MAP_ANONYMOUS, MAP_POPULATE, MAP_SHARED, MMAP, PROT_READ_WRITE, call};

const READ: usize = 0;
const WRITE: usize = 1;
const SOCKET: usize = 41;
const CONNECT: usize = 42;
const ACCEPT: usize = 43;
const BIND: usize = 49;
const LISTEN: usize = 50;

const AF_VSOCK: u16 = 40;
const SOCK_STREAM: usize = 1;
const CID_ANY: u32 = u32::MAX;
const CID_HOST: u32 = 2;
const LISTEN_PORT: u32 = 5000;
const READY_PORT: u32 = 1234;
const BUFFER: usize = 64 << 10;

/// `struct sockaddr_vm`.
#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    flags: u32,
}

fn socket(number: usize, cid: u32, port: u32) -> usize {
    let socket = call(SOCKET, [AF_VSOCK.into(), SOCK_STREAM, 0, 0, 0, 0]) as usize;
    let address = Address { family: AF_VSOCK, reserved: 0, port, cid, flags: 0 };
    call(number, [socket, &raw const address as usize, size_of::<Address>(), 0, 0, 0]);
    socket
}

/// Returns when the client has closed.
pub fn run() {
    let listener = socket(BIND, CID_ANY, LISTEN_PORT);
    call(LISTEN, [listener, 1, 0, 0, 0, 0]);
    socket(CONNECT, CID_HOST, READY_PORT);
    // Shared memory that is populated at once: no page faults in what is measured.
    let buffer =
        call(MMAP, [0, BUFFER, PROT_READ_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, usize::MAX, 0]) as usize;
    let client = call(ACCEPT, [listener, 0, 0, 0, 0, 0]) as usize;
    loop {
        let count = call(READ, [client, buffer, BUFFER, 0, 0, 0]);
        if count <= 0 || call(WRITE, [client, buffer, count as usize, 0, 0, 0]) != count {
            return;
        }
    }
}
