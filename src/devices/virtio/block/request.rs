//! One block request: taken apart once, then a small state machine that says which operation on
//! the host file comes next. It does no I/O itself, so both engines run it.

use std::io;
use std::ptr;
use std::sync::atomic::AtomicU8;

use libc::{FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, iovec};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::disk::{Disk, SECTOR_SIZE};
use crate::devices::virtio::{Buffers, IoVecs, Violation};

/// Status byte of a request (virtio 1.2 §5.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    Ok = VIRTIO_BLK_S_OK as isize,
    IoError = VIRTIO_BLK_S_IOERR as isize,
    Unsupported = VIRTIO_BLK_S_UNSUPP as isize,
}

/// Most segments of one discard.
pub(super) const MAX_DISCARD_SEGMENTS: u32 = 16;
/// Most sectors of one segment of a discard: 2 GiB.
pub(super) const MAX_DISCARD_SECTORS: u32 = 4 << 20;
/// Most segments of one write-zeroes, and most sectors (16 MiB): what a host file system that
/// cannot zero a range makes us write in one request.
pub(super) const MAX_ZEROES_SEGMENTS: u32 = 1;
/// See [`MAX_ZEROES_SEGMENTS`].
pub(super) const MAX_ZEROES_SECTORS: u32 = 32 << 10;

/// What the driver and the drive allow.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    pub(super) read_only: bool,
    pub(super) flush: bool,
    pub(super) discard: bool,
}

/// One operation on the host file. At most `i32::MAX` bytes are done at once by the host.
#[derive(Debug)]
pub(super) enum Operation<'a> {
    Read { into: &'a [iovec], offset: u64 },
    Write { from: &'a [iovec], offset: u64 },
    Sync,
    Allocate { mode: i32, offset: u64, length: u64 },
}

/// Where a request stands.
#[derive(Debug)]
pub(super) enum Step {
    /// [`Request::operation`] is to be carried out.
    Operate,
    /// Nothing is left to do.
    Done(Status),
    /// The host failed.
    Failed(io::Error),
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    Flush,
    GetId,
    Discard,
    WriteZeroes,
    Other(u32),
}

impl From<u32> for Kind {
    fn from(kind: u32) -> Self {
        match kind {
            VIRTIO_BLK_T_IN => Self::Read,
            VIRTIO_BLK_T_OUT => Self::Write,
            VIRTIO_BLK_T_FLUSH => Self::Flush,
            VIRTIO_BLK_T_GET_ID => Self::GetId,
            VIRTIO_BLK_T_DISCARD => Self::Discard,
            VIRTIO_BLK_T_WRITE_ZEROES => Self::WriteZeroes,
            other => Self::Other(other),
        }
    }
}

/// How a range is freed or zeroed; tried in this order until the host supports one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    PunchHole,
    ZeroRange,
    WriteZeroes,
}

/// A segment of a discard or write-zeroes, checked.
#[derive(Debug, Clone, Copy)]
struct Range {
    offset: u64,
    length: u64,
    unmap: bool,
}

/// A request from the chain to the status byte; reused from request to request.
#[derive(Debug)]
pub(super) struct Request {
    head: u16,
    kind: Kind,
    pub(super) buffers: Buffers,
    /// In guest RAM, like [`Buffers`].
    status: *mut u8,
    /// Where in the file the rest of the data belongs.
    offset: u64,
    /// Bytes of data at the start.
    length: u64,
    /// What is left of a discard or write-zeroes, last first.
    ranges: Vec<Range>,
    method: Method,
    zeroes: IoVecs,
}

// SAFETY: `status` points into guest RAM, as the pointers in `IoVecs` do: see there.
unsafe impl Send for Request {}

impl Default for Request {
    fn default() -> Self {
        Self {
            head: 0,
            kind: Kind::Other(0),
            buffers: Buffers::default(),
            status: ptr::null_mut(),
            offset: 0,
            length: 0,
            ranges: Vec::new(),
            method: Method::PunchHole,
            zeroes: IoVecs::default(),
        }
    }
}

impl Request {
    /// Takes [`Self::buffers`], filled from the chain at `head`, apart: a header of 16 bytes first, the
    /// status byte last, however they are cut into buffers (§2.7.4).
    ///
    /// # Errors
    ///
    /// [`Violation`] if the chain lacks header or status. What can be answered in the status byte
    /// is not an error.
    ///
    /// # Safety
    ///
    /// The memory the buffers are in is alive.
    pub(super) unsafe fn parse(&mut self, head: u16, disk: &Disk, rules: Rules) -> Result<Step, Violation> {
        self.head = head;
        self.length = 0;
        self.ranges.clear();
        let Some(status) = self.buffers.writable.take_last_byte() else { return Err(Violation::Framing(head)) };
        self.status = status;
        // SAFETY: alive by this function's contract.
        let Some(header) = (unsafe { self.buffers.readable.read() }) else { return Err(Violation::Framing(head)) };
        let [kind, _priority, low, high] = words(header);
        self.kind = Kind::from(kind);
        Ok(self.begin(u64::from(low) | u64::from(high) << 32, disk, rules))
    }

    fn begin(&mut self, sector: u64, disk: &Disk, rules: Rules) -> Step {
        match self.kind {
            Kind::Read => self.begin_transfer(sector, self.buffers.writable.len(), disk),
            Kind::Write if rules.read_only => Step::Done(Status::IoError),
            Kind::Write => self.begin_transfer(sector, self.buffers.readable.len(), disk),
            Kind::Flush if rules.flush => Step::Operate,
            Kind::GetId => {
                // SAFETY: `parse`, from which this is called, promises that the memory is alive.
                self.length = unsafe { self.buffers.writable.write(&disk.id) } as u64;
                Step::Done(Status::Ok)
            }
            Kind::Discard | Kind::WriteZeroes if rules.discard && rules.read_only => Step::Done(Status::IoError),
            Kind::Discard | Kind::WriteZeroes if rules.discard => self.begin_ranges(disk),
            _ => Step::Done(Status::Unsupported),
        }
    }

    fn begin_transfer(&mut self, sector: u64, length: u64, disk: &Disk) -> Step {
        let Some(offset) = disk.offset(sector, length).filter(|_| length.is_multiple_of(SECTOR_SIZE)) else {
            return Step::Done(Status::IoError);
        };
        self.offset = offset;
        self.length = length;
        if length == 0 { Step::Done(Status::Ok) } else { Step::Operate }
    }

    /// §5.2.6: an unknown flag, or unmap on a discard, is unsupported. All segments are checked
    /// before the first is carried out.
    fn begin_ranges(&mut self, disk: &Disk) -> Step {
        let discard = self.kind == Kind::Discard;
        let (segments, sectors) = if discard {
            (MAX_DISCARD_SEGMENTS, MAX_DISCARD_SECTORS)
        } else {
            (MAX_ZEROES_SEGMENTS, MAX_ZEROES_SECTORS)
        };
        let length = self.buffers.readable.len();
        if length == 0 || !length.is_multiple_of(16) || length > u64::from(segments) * 16 {
            return Step::Done(Status::IoError);
        }
        // SAFETY: `parse`, from which this is called, promises that the memory is alive.
        while let Some(segment) = unsafe { self.buffers.readable.read() } {
            let [low, high, count, flags] = words(segment);
            let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
            if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || discard && unmap {
                return Step::Done(Status::Unsupported);
            }
            let length = u64::from(count) * SECTOR_SIZE;
            let Some(offset) = disk.offset(u64::from(low) | u64::from(high) << 32, length) else {
                return Step::Done(Status::IoError);
            };
            if count > sectors {
                return Step::Done(Status::IoError);
            }
            if count > 0 {
                self.ranges.push(Range { offset, length, unmap });
            }
        }
        self.ranges.reverse();
        self.begin_range()
    }

    fn begin_range(&mut self) -> Step {
        let Some(range) = self.ranges.last() else { return Step::Done(Status::Ok) };
        let punch = self.kind == Kind::Discard || range.unmap;
        self.method = if punch { Method::PunchHole } else { Method::ZeroRange };
        Step::Operate
    }

    /// The operation that [`Step::Operate`] asks for.
    pub(super) fn operation(&self) -> Operation<'_> {
        match self.kind {
            Kind::Read => Operation::Read { into: self.buffers.writable.as_slice(), offset: self.offset },
            Kind::Write => Operation::Write { from: self.buffers.readable.as_slice(), offset: self.offset },
            Kind::Discard | Kind::WriteZeroes => self.range_operation(),
            Kind::Flush | Kind::GetId | Kind::Other(_) => Operation::Sync,
        }
    }

    fn range_operation(&self) -> Operation<'_> {
        let Some(&Range { offset, length, .. }) = self.ranges.last() else { return Operation::Sync };
        let mode = match self.method {
            Method::PunchHole => FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
            Method::ZeroRange => FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE,
            Method::WriteZeroes => return Operation::Write { from: self.zeroes.as_slice(), offset: self.offset },
        };
        Operation::Allocate { mode, offset, length }
    }

    /// Takes the result of [`Self::operation`] and says what comes next. A part done is continued
    /// where it stopped.
    pub(super) fn advance(&mut self, result: io::Result<usize>) -> Step {
        match (self.kind, result) {
            (Kind::Discard | Kind::WriteZeroes, result) => self.advance_range(result),
            (_, Err(error)) => Step::Failed(error),
            (Kind::Read, Ok(count)) => advance_transfer(&mut self.buffers.writable, &mut self.offset, count),
            (Kind::Write, Ok(count)) => advance_transfer(&mut self.buffers.readable, &mut self.offset, count),
            (Kind::Flush | Kind::GetId | Kind::Other(_), Ok(_)) => Step::Done(Status::Ok),
        }
    }

    fn advance_range(&mut self, result: io::Result<usize>) -> Step {
        let finished = match (self.method, result) {
            (Method::WriteZeroes, Ok(count)) => match advance_transfer(&mut self.zeroes, &mut self.offset, count) {
                Step::Done(_) => true,
                unfinished => return unfinished,
            },
            (_, Ok(_)) => true,
            (_, Err(error)) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => false,
            (_, Err(error)) => return Step::Failed(error),
        };
        if finished {
            self.ranges.pop();
            return self.begin_range();
        }
        self.method = match self.method {
            // A discard is a wish; a driver that hears it cannot be granted stops asking.
            _ if self.kind == Kind::Discard => return Step::Done(Status::Unsupported),
            Method::PunchHole => Method::ZeroRange,
            Method::ZeroRange => Method::WriteZeroes,
            Method::WriteZeroes => return Step::Failed(io::ErrorKind::Unsupported.into()),
        };
        if self.method == Method::WriteZeroes {
            self.prepare_zeroes();
        }
        Step::Operate
    }

    fn prepare_zeroes(&mut self) {
        let Some(&Range { offset, length, .. }) = self.ranges.last() else { return };
        self.offset = offset;
        self.zeroes.clear();
        let mut left = length;
        while left > 0 {
            let step = left.min(ZEROES.len() as u64);
            // Nothing is ever written there: the host only reads what it is to write.
            self.zeroes.push(ZEROES.as_ptr().cast_mut().cast(), step as usize);
            left -= step;
        }
    }

    /// Writes the status byte. Returns the head and the number of bytes written to the chain,
    /// for the used ring.
    ///
    /// # Safety
    ///
    /// The memory the buffers are in is alive.
    pub(super) unsafe fn finish(&mut self, status: Status) -> (u16, u32) {
        // SAFETY: the byte lies in guest RAM (`Buffers::fill`), alive by this function's contract.
        unsafe { ptr::write_volatile(self.status, status as u8) };
        let data = match self.kind {
            Kind::Read => self.length - self.buffers.writable.len().min(self.length),
            Kind::GetId => self.length,
            _ => 0,
        };
        // A chain is shorter than 4 GiB, the status byte included.
        (self.head, u32::try_from(data + 1).unwrap_or(u32::MAX))
    }

    /// What is asked for.
    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    /// Bytes of data to transfer.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// Bytes the host may have to touch for it.
    pub(super) fn weight(&self) -> u64 {
        self.length + self.ranges.iter().map(|range| range.length).sum::<u64>()
    }
}

/// What is written where the host can neither punch nor zero. In the zero-initialised data
/// segment, of which a read touches no memory.
static ZEROES: [AtomicU8; 64 << 10] = [const { AtomicU8::new(0) }; 64 << 10];

fn advance_transfer(vecs: &mut IoVecs, offset: &mut u64, count: usize) -> Step {
    if count == 0 {
        // The range was checked: the file is shorter than it was.
        return Step::Failed(io::ErrorKind::UnexpectedEof.into());
    }
    vecs.advance(count as u64);
    *offset += count as u64;
    if vecs.is_empty() { Step::Done(Status::Ok) } else { Step::Operate }
}

fn words(bytes: [u8; 16]) -> [u32; 4] {
    let (words, _) = bytes.as_chunks::<4>();
    std::array::from_fn(|i| u32::from_le_bytes(words[i]))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

    use super::*;
    use crate::memory::GuestMemory;

    const SECTORS: u64 = 64;
    const ANYTHING: Rules = Rules { read_only: false, flush: true, discard: true };

    fn memory() -> GuestMemory {
        crate::memory::pieces(&[(0, 1 << 20)])
    }

    fn disk() -> Disk {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&pattern(0), 0).unwrap();
        Disk::new(file, "d").unwrap()
    }

    fn pattern(salt: usize) -> Vec<u8> {
        (0..(SECTORS * SECTOR_SIZE) as usize).map(|i| (i * 7 + i / 251 + salt) as u8).collect()
    }

    /// A request of `kind` at sector 0 for all the data at 0x1000, in pieces of 1000 bytes.
    fn request(memory: &GuestMemory, kind: u32, data: u64, disk: &Disk) -> (Request, Step) {
        let host = |at| memory.get_host_address(GuestAddress(at)).unwrap();
        memory.write_obj([kind, 0, 0, 0], GuestAddress(0)).unwrap();
        let mut request = Request::default();
        let Buffers { readable, writable } = &mut request.buffers;
        readable.push(host(0), 16);
        let vecs = if kind == VIRTIO_BLK_T_IN { &mut *writable } else { readable };
        for at in (0..data).step_by(1000) {
            vecs.push(host(0x1000 + at), 1000.min(data - at) as usize);
        }
        writable.push(host(0x100), 1);
        // SAFETY: the caller holds the memory.
        let step = unsafe { request.parse(3, disk, ANYTHING) }.unwrap();
        (request, step)
    }

    /// A host that does at most `most` bytes at a time, and supports no fallocate.
    fn reluctantly(most: usize, file: &File, operation: &Operation<'_>) -> io::Result<usize> {
        let (vecs, write, mut offset) = match *operation {
            Operation::Read { into, offset } => (into, false, offset),
            Operation::Write { from, offset } => (from, true, offset),
            Operation::Sync => return Ok(0),
            Operation::Allocate { .. } => return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
        };
        let mut done = 0;
        for vec in vecs {
            let step = vec.iov_len.min(most - done);
            let mut bytes = vec![0; step];
            // SAFETY: the request's memory is alive; nobody else accesses it.
            let slice = unsafe { VolatileSlice::<()>::new(vec.iov_base.cast(), step) };
            if write {
                slice.copy_to(&mut bytes);
                file.write_all_at(&bytes, offset)?;
            } else {
                file.read_exact_at(&mut bytes, offset)?;
                slice.copy_from(&bytes);
            }
            offset += step as u64;
            done += step;
        }
        Ok(done)
    }

    fn carry_out(request: &mut Request, mut step: Step, most: usize, disk: &Disk) -> Status {
        loop {
            match step {
                Step::Operate => step = request.advance(reluctantly(most, &disk.file, &request.operation())),
                Step::Done(status) => return status,
                Step::Failed(error) => panic!("{error}"),
            }
        }
    }

    #[test]
    fn what_the_host_does_in_parts_is_neither_repeated_nor_lost() {
        let length = SECTORS * SECTOR_SIZE;
        for most in [1, 7, 511, 512, 999, 1000, 1001, 4096, 1 << 20] {
            let (memory, disk) = (memory(), disk());
            let (mut read, step) = request(&memory, VIRTIO_BLK_T_IN, length, &disk);
            assert_eq!(carry_out(&mut read, step, most, &disk), Status::Ok);
            // SAFETY: the memory is alive.
            assert_eq!(unsafe { read.finish(Status::Ok) }, (3, length as u32 + 1));
            let mut data = vec![0; length as usize];
            memory.read_slice(&mut data, GuestAddress(0x1000)).unwrap();
            assert_eq!(data, pattern(0));

            memory.write_slice(&pattern(99), GuestAddress(0x1000)).unwrap();
            let (mut write, step) = request(&memory, VIRTIO_BLK_T_OUT, length, &disk);
            assert_eq!(carry_out(&mut write, step, most, &disk), Status::Ok);
            disk.file.read_exact_at(&mut data, 0).unwrap();
            assert_eq!(data, pattern(99));
        }
    }

    #[test]
    fn a_host_that_can_neither_punch_nor_zero_is_written_zeroes() {
        for unmap in [0u32, 1] {
            let (memory, disk) = (memory(), disk());
            memory.write_obj([1, 0, SECTORS as u32 - 2, unmap], GuestAddress(0x1000)).unwrap();
            let (mut zero, step) = request(&memory, VIRTIO_BLK_T_WRITE_ZEROES, 16, &disk);
            assert_eq!(carry_out(&mut zero, step, 777, &disk), Status::Ok);
            let mut expected = pattern(0);
            let end = expected.len() - 512;
            expected[512..end].fill(0);
            let mut data = vec![0; expected.len()];
            disk.file.read_exact_at(&mut data, 0).unwrap();
            assert_eq!(data, expected);
        }
    }

    #[test]
    fn a_discard_the_host_does_not_know_is_unsupported() {
        let (memory, disk) = (memory(), disk());
        memory.write_obj([0u32, 0, 8, 0], GuestAddress(0x1000)).unwrap();
        let (mut discard, step) = request(&memory, VIRTIO_BLK_T_DISCARD, 16, &disk);
        assert_eq!(carry_out(&mut discard, step, 1, &disk), Status::Unsupported);
    }

    #[test]
    fn an_error_of_the_host_ends_a_request() {
        for kind in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_FLUSH] {
            let (memory, disk) = (memory(), disk());
            let (mut request, step) = request(&memory, kind, 512, &disk);
            assert!(matches!(step, Step::Operate));
            let error = io::Error::from_raw_os_error(libc::EIO);
            assert!(matches!(request.advance(Err(error)), Step::Failed(_)));
            // SAFETY: the memory is alive.
            assert_eq!(unsafe { request.finish(Status::IoError) }, (3, 1));
            assert_eq!(memory.read_obj::<u8>(GuestAddress(0x100)).unwrap(), 1);
        }
    }
}
