//! How operations reach the host file: at once on the calling thread, or through io_uring.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use super::overlay::Place;
use super::request::Operation;
use super::uring::Uring;
use crate::config::IoEngine;
use crate::os::{checked, retried};

/// Most buffers one vectored system call takes.
const MAX_IOVECS: usize = libc::UIO_MAXIOV as usize;

/// Carries out the operations of one drive.
pub(super) enum Engine {
    /// On the calling thread.
    Sync,
    /// In the kernel, while the calling thread goes on.
    Async(Box<Uring>),
}

impl Engine {
    /// An engine for `files` that has up to `depth` operations in flight if it is asynchronous.
    pub(super) fn new(kind: IoEngine, files: &[RawFd], depth: u16) -> io::Result<Self> {
        Ok(match kind {
            IoEngine::Sync => Self::Sync,
            IoEngine::Async => Self::Async(Box::new(Uring::new(files, depth)?)),
        })
    }

    /// The eventfd of completions.
    pub(super) fn completion_fd(&self) -> Option<RawFd> {
        match self {
            Self::Sync => None,
            Self::Async(uring) => Some(uring.completion_fd()),
        }
    }

    /// The operations to come on the base are for `file`.
    pub(super) fn set_file(&self, file: &File) -> io::Result<()> {
        match self {
            Self::Sync => Ok(()),
            Self::Async(uring) => uring.set_file(file),
        }
    }

    /// Starts `operation` on a file, which is at the place it is said to be. Returns its result if it is known already;
    /// otherwise it comes from [`Self::completed`] with `token`. A transfer may be partial.
    ///
    /// # Safety
    ///
    /// The operation's vector and the buffers it names stay where they are until its result is
    /// known, or this engine is dropped.
    #[inline]
    pub(super) unsafe fn start(
        &mut self,
        file: (Place, &File),
        token: u16,
        operation: &Operation<'_>,
    ) -> Option<io::Result<usize>> {
        match self {
            // SAFETY: by this function's contract.
            Self::Sync => Some(unsafe { run(file.1, operation) }),
            // SAFETY: by this function's contract.
            Self::Async(uring) => unsafe { uring.start(file.0, token, operation) }.err().map(Err),
        }
    }

    /// Hands on what was started since the last time.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        match self {
            Self::Sync => Ok(()),
            Self::Async(uring) => uring.submit(),
        }
    }

    /// A result that has arrived since the last time.
    pub(super) fn completed(&mut self) -> Option<(u16, io::Result<usize>)> {
        match self {
            Self::Sync => None,
            Self::Async(uring) => uring.completed(),
        }
    }

    /// Waits until a result has arrived. To be called only while one is due.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        match self {
            Self::Sync => Ok(()),
            Self::Async(uring) => uring.wait(),
        }
    }
}

/// Carries out `operation` on `file` now.
///
/// # Safety
///
/// The buffers it names are valid until this function returns.
unsafe fn run(file: &File, operation: &Operation<'_>) -> io::Result<usize> {
    let fd = file.as_raw_fd();
    retried(|| match *operation {
        Operation::Read { into, offset } => {
            // SAFETY: valid by this function's contract; that the guest may access the buffers
            // meanwhile is no matter to the kernel, and Rust sees no reference to them.
            checked(unsafe { libc::preadv(fd, into.as_ptr(), count(into) as i32, offset as i64) })
        }
        Operation::Write { from, offset } => {
            // SAFETY: as above.
            checked(unsafe { libc::pwritev(fd, from.as_ptr(), count(from) as i32, offset as i64) })
        }
        // SAFETY: takes no memory.
        Operation::Sync => checked(unsafe { libc::fdatasync(fd) }),
        Operation::Allocate { mode, offset, length } => {
            // SAFETY: takes no memory.
            checked(unsafe { libc::fallocate(fd, mode, offset as i64, length as i64) })
        }
    })
}

/// The vector count of one operation; what it leaves out is for the next.
pub(super) fn count(vecs: &[libc::iovec]) -> u32 {
    vecs.len().min(MAX_IOVECS) as u32
}
