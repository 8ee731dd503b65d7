//! All devices at once. Two processes keep drive and network busy, and this one sends back what comes over vsock.
//!
//! The network carries pieces of [`PIECE`] bytes in both directions, the guest's turn first. Each of the guest's begins
//! with the number of bytes that the drive has moved so far, so that the host sees all three.

use core::sync::atomic::{AtomicU64, Ordering};

use super::{
    EXIT, FORK, MAP_ANONYMOUS, MAP_POPULATE, MAP_SHARED, MMAP, O_DIRECT, O_RDWR, OPEN, PREAD, PROT_READ_WRITE, PWRITE, WRITE,
    call, connect, receive, vsock,
};

const PIECE: usize = 64 << 10;
/// Of a request to the drive.
const REQUEST: usize = 16 << 10;

/// Memory that is there and that children share.
fn memory(size: usize) -> usize {
    call(MMAP, [0, size, PROT_READ_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, usize::MAX, 0]) as usize
}

/// Returns when the host has closed its vsock connection.
pub fn run() {
    // SAFETY: the page was just mapped, stays, and is used as nothing else.
    let moved = unsafe { &*(memory(size_of::<AtomicU64>()) as *const AtomicU64) };
    for work in [drive, network] {
        if call(FORK, [0; 6]) == 0 {
            work(moved);
            call(EXIT, [1, 0, 0, 0, 0, 0]);
        }
    }
    vsock::run();
}

/// Reads and writes in turn, up and down the drive. Ends with the first request that fails.
fn drive(moved: &AtomicU64) {
    let drive = call(OPEN, [c"/dev/vda".as_ptr() as usize, O_RDWR | O_DIRECT, 0, 0, 0, 0]) as usize;
    let buffer = memory(REQUEST);
    let mut place = 0;
    while [PREAD, PWRITE].iter().all(|&number| call(number, [drive, buffer, REQUEST, place, 0, 0]) == REQUEST as isize) {
        moved.fetch_add(2 * REQUEST as u64, Ordering::Relaxed);
        place = (place + REQUEST) % super::AREA;
    }
}

/// Ends with the connection.
fn network(moved: &AtomicU64) {
    let Some(socket) = connect() else { return };
    let buffer = memory(PIECE);
    loop {
        // SAFETY: the buffer was just mapped and is used by nobody else.
        unsafe { (buffer as *mut u64).write_volatile(moved.load(Ordering::Relaxed)) };
        let mut sent = 0;
        while sent < PIECE {
            match call(WRITE, [socket, buffer + sent, PIECE - sent, 0, 0, 0]) {
                count @ 1.. => sent += count as usize,
                _ => return,
            }
        }
        if !receive(socket, buffer, PIECE) {
            return;
        }
    }
}
