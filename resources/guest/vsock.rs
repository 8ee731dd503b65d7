//! The tests' vsock client and server, a static program for any guest (tools/guest builds it).
//!
//! - `vsock serve PORT HOW` accepts connections from the host until it is killed: `echo` sends back what comes,
//!   `store` sends it back when the host has finished sending, `deaf` reads nothing, `random` reads nothing and
//!   sends a line of random digits. It says on standard error which connections failed.
//! - `vsock pipe PORT` connects to the host: standard input goes there, and what comes back to standard output.
//! - `vsock churn PORT COUNT` connects to the host and closes, that many times; it prints how many were accepted.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::exit;
use std::thread;

const AF_VSOCK: i32 = 40;
const SOCK_STREAM: i32 = 1;
const SHUT_WR: i32 = 1;
const CID_ANY: u32 = u32::MAX;
const CID_HOST: u32 = 2;

/// `struct sockaddr_vm`.
#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    flags: u32,
}

unsafe extern "C" {
    fn socket(domain: i32, kind: i32, protocol: i32) -> i32;
    fn bind(fd: i32, address: *const Address, length: u32) -> i32;
    fn connect(fd: i32, address: *const Address, length: u32) -> i32;
    fn listen(fd: i32, backlog: i32) -> i32;
    fn accept(fd: i32, address: *mut Address, length: *mut u32) -> i32;
    fn shutdown(fd: i32, how: i32) -> i32;
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn new_socket() -> io::Result<OwnedFd> {
    // SAFETY: plain numbers; the descriptor that comes back is new and nobody else's.
    unsafe { Ok(OwnedFd::from_raw_fd(check(socket(AF_VSOCK, SOCK_STREAM, 0))?)) }
}

fn address(cid: u32, port: u32) -> Address {
    Address { family: AF_VSOCK as u16, reserved: 0, port, cid, flags: 0 }
}

fn dial(port: u32) -> io::Result<File> {
    let socket = new_socket()?;
    // SAFETY: the address lives for the call and is as long as it says.
    check(unsafe { connect(socket.as_raw_fd(), &address(CID_HOST, port), size_of::<Address>() as u32) })?;
    Ok(socket.into())
}

fn finish_sending(stream: &File) {
    // SAFETY: plain numbers.
    unsafe { shutdown(stream.as_raw_fd(), SHUT_WR) };
}

fn serve(port: u32, how: &str) -> io::Result<()> {
    let socket = new_socket()?;
    // SAFETY: the address lives for the call and is as long as it says.
    check(unsafe { bind(socket.as_raw_fd(), &address(CID_ANY, port), size_of::<Address>() as u32) })?;
    // SAFETY: plain numbers.
    check(unsafe { listen(socket.as_raw_fd(), 1024) })?;
    println!("listening");
    loop {
        // SAFETY: no address is wanted; the descriptor that comes back is new and nobody else's.
        let stream = unsafe {
            File::from_raw_fd(check(accept(socket.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut()))?)
        };
        let how = how.to_owned();
        thread::Builder::new().stack_size(48 << 10).spawn(move || answer(stream, &how))?;
    }
}

fn answer(mut stream: File, how: &str) {
    let result = match how {
        "echo" => copy(&stream, &stream),
        "store" => {
            let mut all = Vec::new();
            stream.read_to_end(&mut all).and_then(|_| stream.write_all(&all))
        }
        "random" => random().and_then(|line| stream.write_all(line.as_bytes())),
        _ => loop {
            thread::park();
        },
    };
    if let Err(error) = result {
        eprintln!("vsock: {error}");
    }
}

fn random() -> io::Result<String> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(format!("{:032x}\n", u128::from_ne_bytes(bytes)))
}

fn copy(mut from: &File, mut to: &File) -> io::Result<()> {
    let mut buffer = vec![0; 16 << 10];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(()),
            count => to.write_all(&buffer[..count])?,
        }
    }
}

fn pipe(port: u32) -> io::Result<()> {
    let stream = dial(port)?;
    let sender = stream.try_clone()?;
    let sending = thread::spawn(move || {
        let result = io::copy(&mut io::stdin(), &mut &sender);
        finish_sending(&sender);
        result
    });
    io::copy(&mut &stream, &mut io::stdout())?;
    // Who has finished sending may have finished receiving as well.
    let _ = sending.join();
    Ok(())
}

fn churn(port: u32, count: u32) -> io::Result<()> {
    println!("{}", (0..count).filter(|_| dial(port).is_ok()).count());
    Ok(())
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let number = |word: &str| word.parse().unwrap_or_else(|_| exit(2));
    let result = match words[..] {
        ["serve", port, how] => serve(number(port), how),
        ["pipe", port] => pipe(number(port)),
        ["churn", port, count] => churn(number(port), number(count)),
        _ => exit(2),
    };
    if let Err(error) = result {
        eprintln!("vsock: {error}");
        exit(1);
    }
}
