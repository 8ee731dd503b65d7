//! The Async engine: io_uring, confined to a drive's files and five operations.
//!
//! The ring starts disabled, gets its files, its eventfd and its restrictions, and is only then
//! enabled: whatever corrupts this process later, the ring reads, writes, syncs and allocates the
//! drive's files, or what this process has open and puts in their place, and does nothing else.
//!
//! A flush is not ordered against what else is in flight: it has to cover the writes that were
//! completed before it was submitted (virtio 1.2 §5.2.6.2), and their data is with the host.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::register::Restriction;
use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, opcode};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::engine::count;
use super::overlay::Place;
use super::request::Operation;
use crate::os::retried;

/// `IORING_REGISTER_FILES_UPDATE`: the one registration that stays allowed, to change the file.
const REGISTER_FILES_UPDATE: u8 = 6;

/// A ring on one file.
pub(super) struct Uring {
    ring: IoUring,
    completion: EventFd,
    in_flight: u32,
}

impl Uring {
    /// A ring on `files`, in the order of their [`Place`]s, with room for `depth` operations.
    pub(super) fn new(files: &[RawFd], depth: u16) -> io::Result<Self> {
        let ring = IoUring::builder().setup_r_disabled().dontfork().build(depth.into())?;
        let completion = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let submitter = ring.submitter();
        submitter.register_files(files)?;
        submitter.register_eventfd(completion.as_raw_fd())?;
        submitter.register_restrictions(&mut [
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
            Restriction::sqe_op(opcode::Fallocate::CODE),
            Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()),
            Restriction::register_op(REGISTER_FILES_UPDATE),
        ])?;
        submitter.register_enable_rings()?;
        Ok(Self { ring, completion, in_flight: 0 })
    }

    /// Becomes readable at every completion.
    pub(super) fn completion_fd(&self) -> RawFd {
        self.completion.as_raw_fd()
    }

    /// Replaces the base. What is in flight finishes on the old one.
    pub(super) fn set_file(&self, file: &File) -> io::Result<()> {
        self.ring.submitter().register_files_update(Place::Base as u32, &[file.as_raw_fd()]).map(drop)
    }

    /// Queues `operation` on the file at `place`; its result comes from [`Self::completed`] with the same `token`.
    ///
    /// # Errors
    ///
    /// `EBUSY` when more than `depth` operations are queued.
    ///
    /// # Safety
    ///
    /// The operation's vector and the buffers it names stay where they are until its result came,
    /// or this engine is dropped.
    pub(super) unsafe fn start(&mut self, place: Place, token: u16, operation: &Operation<'_>) -> io::Result<()> {
        let file = Fixed(place as u32);
        let entry: Entry = match *operation {
            Operation::Read { into, offset } => {
                opcode::Readv::new(file, into.as_ptr(), count(into)).offset(offset).build()
            }
            Operation::Write { from, offset } => {
                opcode::Writev::new(file, from.as_ptr(), count(from)).offset(offset).build()
            }
            Operation::Sync => opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build(),
            Operation::Allocate { mode, offset, length } => {
                opcode::Fallocate::new(file, length).offset(offset).mode(mode).build()
            }
        };
        // SAFETY: what the entry points to lives long enough by this function's contract; `Drop`
        // waits for what is in flight.
        unsafe { self.ring.submission().push(&entry.user_data(token.into())) }
            .map_err(|_| io::Error::from_raw_os_error(libc::EBUSY))?;
        self.in_flight += 1;
        Ok(())
    }

    /// Hands what is queued to the kernel, all at once.
    ///
    /// # Errors
    ///
    /// The host is out of resources; what is queued stays queued.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        if self.ring.submission().is_empty() {
            return Ok(());
        }
        retried(|| self.ring.submit()).map(drop)
    }

    /// A result that has arrived.
    pub(super) fn completed(&mut self) -> Option<(u16, io::Result<usize>)> {
        let entry = self.ring.completion().next()?;
        self.in_flight -= 1;
        let result = usize::try_from(entry.result()).map_err(|_| io::Error::from_raw_os_error(-entry.result()));
        // The token went in as 16 bits.
        Some((entry.user_data() as u16, result))
    }

    /// Waits until a result has arrived.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        retried(|| self.ring.submit_and_wait(1)).map(drop)
    }
}

impl Drop for Uring {
    /// The kernel must be done with guest memory before anyone unmaps it.
    fn drop(&mut self) {
        while self.in_flight > 0 && self.wait().is_ok() {
            while self.completed().is_some() {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use io_uring::types::Fd;

    use super::*;

    const FILE: Fixed = Fixed(Place::Base as u32);

    /// The result of `entry`, which the test got by without [`Uring::start`].
    fn force(uring: &mut Uring, entry: &Entry) -> io::Result<usize> {
        // SAFETY: no entry of these tests names memory that does not outlive it.
        unsafe { uring.ring.submission().push(entry) }.unwrap();
        uring.in_flight += 1;
        uring.wait().unwrap();
        uring.completed().unwrap().1
    }

    #[test]
    fn the_ring_does_nothing_but_what_a_drive_needs_and_only_to_its_file() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(b"one", 0).unwrap();
        let mut uring = match Uring::new(&[file.as_raw_fd()], 4) {
            Ok(uring) => uring,
            Err(error) => return eprintln!("SKIPPED: io_uring: {error}"),
        };
        let mut buffer = [0u8; 3];
        let vec = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: 3 };
        assert_eq!(force(&mut uring, &opcode::Readv::new(FILE, &vec, 1).build()).unwrap(), 3);

        let other = tempfile::tempfile().unwrap();
        let fd = Fd(other.as_raw_fd());
        for entry in [
            opcode::Nop::new().build(),
            opcode::Readv::new(fd, &vec, 1).build(),
            opcode::Writev::new(fd, &vec, 1).build(),
            opcode::Fsync::new(fd).build(),
            opcode::Read::new(FILE, vec.iov_base.cast(), 3).build(),
            opcode::OpenAt::new(Fd(libc::AT_FDCWD), c"/etc/passwd".as_ptr()).build(),
        ] {
            let refused = force(&mut uring, &entry);
            assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EACCES));
        }
        let submitter = uring.ring.submitter();
        for refused in [
            submitter.register_eventfd(uring.completion.as_raw_fd()),
            submitter.unregister_files(),
            submitter.register_files(&[other.as_raw_fd()]),
            submitter.register_probe(&mut io_uring::Probe::new()),
        ] {
            assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EACCES));
        }
        other.write_all_at(b"two", 0).unwrap();
        uring.set_file(&other).unwrap();
        assert_eq!(force(&mut uring, &opcode::Readv::new(FILE, &vec, 1).build()).unwrap(), 3);
        assert_eq!(&buffer, b"two");
    }

    #[test]
    fn more_than_the_ring_holds_is_refused_and_nothing_is_lost() {
        let file = tempfile::tempfile().unwrap();
        let mut uring = match Uring::new(&[file.as_raw_fd()], 2) {
            Ok(uring) => uring,
            Err(error) => return eprintln!("SKIPPED: io_uring: {error}"),
        };
        // SAFETY: no buffers.
        let mut start = |token| unsafe { uring.start(Place::Base, token, &Operation::Sync) };
        start(0).unwrap();
        start(1).unwrap();
        assert_eq!(start(2).unwrap_err().raw_os_error(), Some(libc::EBUSY));
        let mut done = Vec::new();
        while done.len() < 2 {
            uring.wait().unwrap();
            while let Some((token, result)) = uring.completed() {
                done.push((token, result.unwrap()));
            }
        }
        done.sort_unstable();
        assert_eq!(done, [(0, 0), (1, 0)]);
    }
}
