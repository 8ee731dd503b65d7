//! A page fault handler: serves the guest memory of one microVM from a snapshot's memory file.
//!
//! `page_faults SOCKET MEMORY`
//!
//! It says `listening`, ends with the microVM, and says how many pages it has served.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};

use vesicle::snapshot::uffd::Mapping;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// `struct uffdio_copy`.
#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

const UFFDIO_COPY: libc::Ioctl = 0xc028_aa03_u32 as libc::Ioctl;
/// Bytes that are filled together.
const AROUND: u64 = 128 << 10;
/// `UFFD_EVENT_PAGEFAULT`, the first byte of a `struct uffd_msg`; the address is at byte 16 of 32.
const PAGE_FAULT: u8 = 0x12;

/// Takes the microVM's one message: where its memory is, and what its page faults come from.
fn accept(socket: &str) -> (UnixStream, Vec<Mapping>, File) {
    let listener = UnixListener::bind(socket).unwrap();
    println!("listening");
    let (stream, _) = listener.accept().unwrap();
    let mut message = vec![0; 64 << 10];
    let (count, faults) = stream.recv_with_fd(&mut message).unwrap();
    (stream, serde_json::from_slice(&message[..count]).unwrap(), faults.unwrap())
}

/// Waits for page faults; `false` if the microVM has ended instead.
fn wait(faults: RawFd, stream: RawFd) -> bool {
    let fds = [(faults, libc::POLLIN), (stream, libc::POLLRDHUP)];
    let mut polls = fds.map(|(fd, events)| libc::pollfd { fd, events, revents: 0 });
    // SAFETY: the call is told how many there are.
    assert!(unsafe { libc::poll(polls.as_mut_ptr(), 2, -1) } > 0);
    polls[1].revents == 0
}

/// Fills guest memory from `to` on with `data`; returns how many pages of `page_size` it filled, which are
/// fewer where some are there already.
fn fill(faults: RawFd, to: u64, data: &[u8], page_size: u64) -> u64 {
    let mut copy = Copy { to, from: data.as_ptr() as u64, len: data.len() as u64, mode: 0, copied: 0 };
    // SAFETY: the ioctl reads and writes one `Copy`, and reads `data`.
    if unsafe { libc::ioctl(faults, UFFDIO_COPY, &raw mut copy) } < 0 {
        // Some are there already, or the microVM is about to be gone.
        let error = io::Error::last_os_error().raw_os_error();
        assert!([Some(libc::EEXIST), Some(libc::EAGAIN), Some(libc::ESRCH)].contains(&error), "{error:?}");
    }
    u64::try_from(copy.copied).unwrap_or(0) / page_size
}

fn main() {
    let [_, socket, memory] = std::env::args().collect::<Vec<_>>().try_into().expect("page_faults SOCKET MEMORY");
    let memory = File::open(memory).unwrap();
    let (stream, mappings, mut faults) = accept(&socket);
    let (mut data, mut served) = (Vec::new(), 0);
    while wait(faults.as_raw_fd(), stream.as_raw_fd()) {
        let mut message = [0; 32];
        // Two threads may have waited for the same page.
        match faults.read(&mut message) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            result => assert_eq!(result.unwrap(), message.len()),
        }
        assert_eq!(message[0], PAGE_FAULT);
        let address = u64::from_ne_bytes(message[16..24].try_into().unwrap());
        let within =
            |mapping: &&Mapping| address.checked_sub(mapping.base_host_virt_addr).is_some_and(|at| at < mapping.size);
        let Mapping { base_host_virt_addr, size, offset, page_size, .. } = *mappings.iter().find(within).unwrap();
        // The pages around it will be wanted soon; if some of them are there, the one that is waited for.
        for around in [AROUND.max(page_size), page_size] {
            let start = (address - base_host_virt_addr) / around * around;
            data.resize(around.min(size - start) as usize, 0);
            memory.read_exact_at(&mut data, offset + start).unwrap();
            let filled = fill(faults.as_raw_fd(), base_host_virt_addr + start, &data, page_size);
            served += filled;
            if filled * page_size == data.len() as u64 {
                break;
            }
        }
    }
    println!("{served} pages served");
}
