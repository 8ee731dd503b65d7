//! How operations reach the host file: at once on the calling thread, or through io_uring.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use libc::c_int;

use super::disk::check;
use super::request::Operation;

/// Most buffers one vectored system call takes.
const MAX_IOVECS: usize = libc::UIO_MAXIOV as usize;

/// Carries out `operation` on `file` now. A transfer may be partial.
pub(super) fn run(file: &File, operation: &Operation<'_>) -> io::Result<usize> {
    let fd = file.as_raw_fd();
    loop {
        let result = match *operation {
            Operation::Read { into, offset } => {
                // SAFETY: the buffers lie in guest RAM, which the device keeps alive (`IoVecs`);
                // the kernel may write there at any time, as the guest may.
                check(unsafe { libc::preadv(fd, into.as_ptr(), count(into), offset as i64) })
            }
            Operation::Write { from, offset } => {
                // SAFETY: as above, and the kernel only reads them.
                check(unsafe { libc::pwritev(fd, from.as_ptr(), count(from), offset as i64) })
            }
            // SAFETY: takes no memory.
            Operation::Sync => check(unsafe { libc::fdatasync(fd) } as isize),
            Operation::Allocate { mode, offset, length } => {
                // SAFETY: takes no memory.
                check(unsafe { libc::fallocate(fd, mode, offset as i64, length as i64) } as isize)
            }
        };
        match result {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// The vector count of a system call; what it leaves out is done by the next one.
fn count(vecs: &[libc::iovec]) -> c_int {
    vecs.len().min(MAX_IOVECS) as c_int
}
