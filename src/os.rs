//! What system calls return, where the standard library does not look at it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// The result of a call that counts.
///
/// # Errors
/// It was negative: the thread's `errno` says why.
pub fn checked(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
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
    match checked(unsafe { libc::lseek(file.as_raw_fd(), offset, whence) } as isize) {
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        found => found.map(|found| Some(found as u64)),
    }
}
