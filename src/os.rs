//! What system calls return, where the standard library does not look at it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

/// The result of a call: what it counts, or a descriptor, or nothing.
///
/// # Errors
/// It was negative: the thread's `errno` says why.
pub fn checked(result: impl TryInto<usize>) -> io::Result<usize> {
    result.try_into().map_err(|_| io::Error::last_os_error())
}

/// Makes a call again as often as a signal interrupts it.
///
/// # Errors
/// Those of the call.
pub fn retried<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Where data, or a hole, begins in `file` from `offset` on (`SEEK_DATA`, `SEEK_HOLE`); `None` behind the last.
///
/// # Errors
/// Those of lseek(2).
pub fn seek(file: &File, offset: u64, whence: i32) -> io::Result<Option<u64>> {
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: the call has no memory of ours in it.
    match checked(unsafe { libc::lseek(file.as_raw_fd(), offset, whence) }) {
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        found => found.map(|found| Some(found as u64)),
    }
}

/// Whether there is one of `events` at `fd` within `timeout` milliseconds, or at all if it is negative.
///
/// # Errors
/// Those of poll(2).
pub fn poll(fd: RawFd, events: libc::c_short, timeout: libc::c_int) -> io::Result<bool> {
    let mut poll = libc::pollfd { fd, events, revents: 0 };
    // SAFETY: the call is told of one `pollfd`.
    checked(unsafe { libc::poll(&raw mut poll, 1, timeout) }).map(|ready| ready > 0)
}
