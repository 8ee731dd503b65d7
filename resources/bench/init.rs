//! The benchmarks' guest: one static program that is all there is in the initramfs (tools/bench builds it).
//!
//! `bench=MODE` on the kernel's command line, which the kernel hands on in the environment, says what to do:
//!
//! - `exit` resets the machine at once.
//! - `ready` writes 123 to the boot timer and sleeps.
//! - `rand-read:N`, `rand-write:N`, `seq-read:N`, `seq-write:N` make N requests to /dev/vda past the page cache, of 4 KiB
//!   at random places or of 1 MiB one after the other, print `bench NANOSECONDS` on ttyS0 and reset the machine.
//!   `deep-read:N` and `deep-write:N` are `rand-read:N` and `rand-write:N` with four requests at a time.
//! - `vsock` serves one client, see there.
//! - `together` keeps all devices busy, see there.
//! - `tcp-send:N`, `tcp-receive:N`, `tcp-round-trip:N` connect from 10.77.0.2 on eth0 to port 7777 of 10.77.0.1 and send or
//!   receive N MiB, or send N bytes, each when the one before has come back; then as above.
//! - `udp-send:N` sends N datagrams of 64 bytes there, `udp-receive:1` drops what comes to that port, for ever.
#![no_std]
#![no_main]

mod together;
mod vsock;

use core::arch::{asm, naked_asm};

const READ: usize = 0;
const WRITE: usize = 1;
const OPEN: usize = 2;
const CLOSE: usize = 3;
const MMAP: usize = 9;
const IOCTL: usize = 16;
const PREAD: usize = 17;
const PWRITE: usize = 18;
const PAUSE: usize = 34;
const NANOSLEEP: usize = 35;
const SOCKET: usize = 41;
const CONNECT: usize = 42;
const SHUTDOWN: usize = 48;
const BIND: usize = 49;
const SETSOCKOPT: usize = 54;
const FORK: usize = 57;
const EXIT: usize = 60;
const WAIT: usize = 61;
const MKDIR: usize = 83;
const MKNOD: usize = 133;
const MOUNT: usize = 165;
const REBOOT: usize = 169;
const CLOCK_GETTIME: usize = 228;

const O_RDWR: usize = 2;
const O_NOCTTY: usize = 0o400;
const O_DIRECT: usize = 0o40000;
const O_SYNC: usize = 0o4010000;
const PROT_READ_WRITE: usize = 3;
const MAP_SHARED: usize = 1;
const MAP_ANONYMOUS: usize = 0x20;
const MAP_POPULATE: usize = 0x8000;

const BOOT_TIMER: usize = 0xC000_0000;
const BOOTED: u8 = 123;
const PAGE: usize = 4096;
const MIB: usize = 1 << 20;
/// The part of the drive that is used, in bytes.
const AREA: usize = 64 * MIB;

/// A system call. Its arguments are numbers and pointers to memory that lives for the call.
fn call(number: usize, arguments: [usize; 6]) -> isize {
    let [a, b, c, d, e, f] = arguments;
    let result;
    // SAFETY: the Linux system call ABI of x86-64; no call made here changes memory that the compiler knows, save
    // what its arguments point to, and memory is assumed clobbered.
    unsafe {
        asm!("syscall", inlateout("rax") number => result, in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d,
            in("r8") e, in("r9") f, lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}

/// The entry point: argc, argv and the environment are on the stack.
#[unsafe(naked)]
#[unsafe(no_mangle)]
extern "C" fn _start() -> ! {
    naked_asm!("mov rdi, rsp", "and rsp, -16", "call {main}", "ud2", main = sym main)
}

extern "C" fn main(stack: *const usize) -> ! {
    match mode(stack) {
        Some(b"ready") => ready(),
        Some(b"vsock") => vsock::run(),
        Some(b"together") => {
            devices();
            together::run();
        }
        Some(mode) => work(mode),
        None => {}
    }
    reset()
}

/// The value of `bench=` in the environment.
fn mode<'a>(stack: *const usize) -> Option<&'a [u8]> {
    // SAFETY: the System V ABI: argc, that many pointers, a null, then the environment's pointers up to a null, each
    // to a string that ends with a NUL and stays.
    unsafe {
        let mut variable = stack.add(*stack + 2);
        while *variable != 0 {
            let start = *variable as *const u8;
            // Volatile, or the compiler makes this a call of strlen, which is in a library that is not there.
            let length = (0..).take_while(|&i| start.add(i).read_volatile() != 0).count();
            if let Some(mode) = core::slice::from_raw_parts(start, length).strip_prefix(b"bench=") {
                return Some(mode);
            }
            variable = variable.add(1);
        }
    }
    None
}

fn reset() -> ! {
    loop {
        call(REBOOT, [0xfee1_dead, 672_274_793, 0x0123_4567, 0, 0, 0]);
    }
}

fn ready() {
    const CHARACTER_DEVICE: usize = 0o20600;
    call(MKNOD, [c"/mem".as_ptr() as usize, CHARACTER_DEVICE, 1 << 8 | 1, 0, 0, 0]);
    let mem = call(OPEN, [c"/mem".as_ptr() as usize, O_RDWR | O_SYNC, 0, 0, 0, 0]);
    let timer = call(MMAP, [0, PAGE, PROT_READ_WRITE, MAP_SHARED, mem as usize, BOOT_TIMER]);
    if timer > 0 {
        // SAFETY: the call has just mapped a page there, and nothing else uses it.
        unsafe { (timer as *mut u8).write_volatile(BOOTED) };
    }
    loop {
        call(PAUSE, [0; 6]);
    }
}

fn work(mode: &[u8]) {
    let Some(colon) = mode.iter().position(|&byte| byte == b':') else { return };
    let (kind, count) = (&mode[..colon], number(&mode[colon + 1..]));
    devices();
    match kind {
        b"tcp-send" | b"tcp-receive" | b"tcp-round-trip" => report(tcp(kind, count).unwrap_or(0)),
        b"udp-send" | b"udp-receive" => udp(kind, count),
        _ => block(kind, count),
    }
}

fn devices() {
    call(MKDIR, [c"/dev".as_ptr() as usize, 0o700, 0, 0, 0, 0]);
    call(MOUNT, [c"dev".as_ptr() as usize, c"/dev".as_ptr() as usize, c"devtmpfs".as_ptr() as usize, 0, 0, 0]);
}

const AF_INET: u16 = 2;
const STREAM: usize = 1;
const DATAGRAM: usize = 2;
/// In memory as they are in an IP header.
const HOST: [u8; 4] = [10, 77, 0, 1];
const GUEST: [u8; 4] = [10, 77, 0, 2];
const PORT: u16 = 7777;
/// What one system call sends or receives at most, in bytes.
const CHUNK: usize = 128 << 10;

/// `struct sockaddr_in`.
#[repr(C)]
struct Address {
    family: u16,
    port: u16,
    host: [u8; 4],
    zero: [u8; 8],
}

impl Address {
    fn new(host: [u8; 4], port: u16) -> Self {
        Self { family: AF_INET, port: port.to_be(), host, zero: [0; 8] }
    }
}

/// `struct ifreq` with an address or, in its first 16 bits, flags.
#[repr(C)]
struct Request {
    name: [u8; 16],
    value: Address,
    rest: [u8; 8],
}

/// Gives eth0 its address and puts it up. False if there is none.
fn set_up() -> bool {
    const SET_FLAGS: usize = 0x8914;
    const SET_ADDRESS: usize = 0x8916;
    let mut request = Request { name: [0; 16], value: Address::new(GUEST, 0), rest: [0; 8] };
    request.name[..4].copy_from_slice(b"eth0");
    let socket = call(SOCKET, [AF_INET as usize, DATAGRAM, 0, 0, 0, 0]) as usize;
    let mut ok = call(IOCTL, [socket, SET_ADDRESS, &raw const request as usize, 0, 0, 0]) == 0;
    request.value = Address { family: 1, ..Address::new([0; 4], 0) };
    ok &= call(IOCTL, [socket, SET_FLAGS, &raw const request as usize, 0, 0, 0]) == 0;
    ok
}

/// A connection to the host; `None` if something failed.
fn connect() -> Option<usize> {
    if !set_up() {
        return None;
    }
    let socket = call(SOCKET, [AF_INET as usize, STREAM, 0, 0, 0, 0]) as usize;
    let one = 1u32;
    call(SETSOCKOPT, [socket, 6, 1, &raw const one as usize, 4, 0]); // TCP_NODELAY
    let host = Address::new(HOST, PORT);
    let connected = call(CONNECT, [socket, &raw const host as usize, size_of::<Address>(), 0, 0, 0]) == 0;
    connected.then_some(socket)
}

/// The time it took in nanoseconds; `None` if something failed.
fn tcp(kind: &[u8], count: usize) -> Option<u64> {
    let socket = connect()?;
    let buffer = call(MMAP, [0, CHUNK, PROT_READ_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, usize::MAX, 0]) as usize;
    // What the connection set in motion comes to rest.
    let moment = [0u64, 20_000_000];
    call(NANOSLEEP, [moment.as_ptr() as usize, 0, 0, 0, 0, 0]);
    let start = now();
    let done = match kind {
        b"tcp-send" => send(socket, buffer, count * MIB),
        b"tcp-receive" => call(WRITE, [socket, buffer, 1, 0, 0, 0]) == 1 && receive(socket, buffer, count * MIB),
        _ => (0..count).all(|_| {
            call(WRITE, [socket, buffer, 1, 0, 0, 0]) == 1 && call(READ, [socket, buffer, CHUNK, 0, 0, 0]) == 1
        }),
    };
    let elapsed = now() - start;
    call(CLOSE, [socket, 0, 0, 0, 0, 0]);
    done.then_some(elapsed)
}

/// Whether anything arrives is not its concern.
fn udp(kind: &[u8], count: usize) {
    const SIZE: usize = 64;
    set_up();
    let socket = call(SOCKET, [AF_INET as usize, DATAGRAM, 0, 0, 0, 0]) as usize;
    let (number, peer) = if kind == b"udp-send" { (CONNECT, HOST) } else { (BIND, [0; 4]) };
    let address = Address::new(peer, PORT);
    call(number, [socket, &raw const address as usize, size_of::<Address>(), 0, 0, 0]);
    let data = [7u8; SIZE];
    for _ in 0..count {
        if number == BIND {
            call(PAUSE, [0; 6]);
        }
        call(WRITE, [socket, data.as_ptr() as usize, SIZE, 0, 0, 0]);
    }
}

/// Sends so many bytes and waits until the other side has read them, which it says by closing.
fn send(socket: usize, buffer: usize, mut left: usize) -> bool {
    while left > 0 {
        let sent = call(WRITE, [socket, buffer, left.min(CHUNK), 0, 0, 0]);
        if sent <= 0 {
            return false;
        }
        left -= sent as usize;
    }
    call(SHUTDOWN, [socket, 1, 0, 0, 0, 0]);
    call(READ, [socket, buffer, CHUNK, 0, 0, 0]) == 0
}

fn receive(socket: usize, buffer: usize, mut left: usize) -> bool {
    while left > 0 {
        let received = call(READ, [socket, buffer, left.min(CHUNK), 0, 0, 0]);
        if received <= 0 {
            return false;
        }
        left -= received as usize;
    }
    true
}

fn block(kind: &[u8], count: usize) {
    let (number, size, random) = match kind {
        b"rand-read" | b"deep-read" => (PREAD, PAGE, true),
        b"rand-write" | b"deep-write" => (PWRITE, PAGE, true),
        b"seq-read" => (PREAD, MIB, false),
        b"seq-write" => (PWRITE, MIB, false),
        _ => return,
    };
    let drive = call(OPEN, [c"/dev/vda".as_ptr() as usize, O_RDWR | O_DIRECT, 0, 0, 0, 0]) as usize;
    // Shared memory that is populated at once: no page faults in what is measured.
    let buffer = call(MMAP, [0, size, PROT_READ_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, usize::MAX, 0]);

    let requests = |count: usize, seed: u64| {
        let (mut place, mut random_state) = (0, seed);
        (0..count).fold(true, |ok, _| {
            if random {
                random_state = random_state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                place = (random_state >> 33) as usize % (AREA / PAGE) * PAGE;
            }
            let done = call(number, [drive, buffer as usize, size, place, 0, 0]) == size as isize;
            place = (place + size) % AREA;
            ok && done
        })
    };
    let start = now();
    let deep = kind.starts_with(b"deep");
    let done = if deep { in_processes(4, |index| requests(count / 4, index)) } else { requests(count, 1) };
    let elapsed = now() - start;
    report(if done { elapsed } else { 0 });
}

/// Does that in so many processes at once. Whether all have done it.
fn in_processes(count: u64, work: impl Fn(u64) -> bool) -> bool {
    for index in 0..count {
        if call(FORK, [0; 6]) == 0 {
            let status = usize::from(!work(index));
            call(EXIT, [status, 0, 0, 0, 0, 0]);
        }
    }
    (0..count).fold(true, |ok, _| {
        let mut status = 0u32;
        let ended = call(WAIT, [usize::MAX, &raw mut status as usize, 0, 0, 0, 0]) > 0;
        // SAFETY: it lives here; the call may have written to it.
        ok && ended && unsafe { (&raw const status).read_volatile() } == 0
    })
}

fn number(digits: &[u8]) -> usize {
    digits.iter().fold(0, |number, digit| number * 10 + usize::from(digit & 0xf))
}

/// The monotonic clock in nanoseconds.
fn now() -> u64 {
    const MONOTONIC: usize = 1;
    let mut time = [0u64; 2];
    call(CLOCK_GETTIME, [MONOTONIC, time.as_mut_ptr() as usize, 0, 0, 0, 0]);
    time[0] * 1_000_000_000 + time[1]
}

fn report(mut nanoseconds: u64) {
    let mut line = *b"bench 00000000000000000000\n";
    for digit in line[6..26].iter_mut().rev() {
        *digit = b'0' + (nanoseconds % 10) as u8;
        nanoseconds /= 10;
    }
    let tty = call(OPEN, [c"/dev/ttyS0".as_ptr() as usize, O_RDWR | O_NOCTTY, 0, 0, 0, 0]) as usize;
    call(WRITE, [tty, line.as_ptr() as usize, line.len(), 0, 0, 0]);
    // Waits until the line is out.
    call(CLOSE, [tty, 0, 0, 0, 0, 0]);
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    reset()
}
