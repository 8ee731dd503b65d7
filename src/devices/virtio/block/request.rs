//! One block request: taken apart once, then a small state machine that says which operation on
//! the host file comes next. It does no I/O itself, so both engines run it.

use std::io;
use std::mem;
use std::ptr;
use std::sync::atomic::AtomicU8;

use libc::{FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, iovec};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::bitmap::Bitmap;
use super::disk::{Disk, SECTOR_SIZE};
use super::overlay::Place;
use crate::devices::virtio::{Buffers, IoVecs, Violation};

/// Status byte of a request (virtio 1.2 §5.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    Ok = VIRTIO_BLK_S_OK as isize,
    IoError = VIRTIO_BLK_S_IOERR as isize,
    Unsupported = VIRTIO_BLK_S_UNSUPP as isize,
}

/// Most bytes one request transfers: eight times what the largest of Linux does unless it is told otherwise.
pub(super) const MAX_TRANSFER: u64 = 32 << 20;
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

/// One operation on a host file. At most `i32::MAX` bytes are done at once by the host.
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
    /// The part of a read that comes from one file.
    part: IoVecs,
    /// What a flush that is under way has to announce once the data is on disk.
    unsaved: Bitmap,
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
            part: IoVecs::default(),
            unsaved: Bitmap::default(),
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
            Kind::Flush if rules.flush => Self::begin_flush(disk),
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

    /// What has been written so far is to be on disk. Of a layer that nobody finds nothing has to be.
    fn begin_flush(disk: &Disk) -> Step {
        match &disk.overlay {
            Some(overlay) if !overlay.is_lasting() => Step::Done(Status::Ok),
            _ => Step::Operate,
        }
    }

    /// The request is about to be carried out: a flush announces what has been written by now, and no other does.
    pub(super) fn start(&mut self, disk: &Disk) {
        if let (Kind::Flush, Some(overlay)) = (self.kind, &disk.overlay) {
            self.unsaved = overlay.unsaved();
        }
    }

    /// Whether it is a flush that waits for the data to be on disk, to announce it.
    pub(super) fn announces(&self) -> bool {
        self.unsaved.count() > 0
    }

    fn begin_transfer(&mut self, sector: u64, length: u64, disk: &Disk) -> Step {
        let whole = length.is_multiple_of(SECTOR_SIZE) && length <= MAX_TRANSFER;
        let Some(offset) = disk.offset(sector, length).filter(|_| whole) else {
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

    /// The operation that [`Step::Operate`] asks for, and on which of the disk's files.
    pub(super) fn operation(&mut self, disk: &Disk) -> (Place, Operation<'_>) {
        match self.kind {
            Kind::Read => self.read_operation(disk),
            Kind::Write => {
                let (place, offset) = disk.target(self.offset);
                (place, Operation::Write { from: self.buffers.readable.as_slice(), offset })
            }
            Kind::Discard | Kind::WriteZeroes => self.range_operation(disk),
            Kind::Flush | Kind::GetId | Kind::Other(_) => (disk.target(0).0, Operation::Sync),
        }
    }

    /// Reads as far as one file goes.
    fn read_operation(&mut self, disk: &Disk) -> (Place, Operation<'_>) {
        let all = &self.buffers.writable;
        let (place, offset, length) = disk.find(self.offset, all.len());
        if length == all.len() {
            return (place, Operation::Read { into: all.as_slice(), offset });
        }
        self.part.clear();
        self.part.append_up_to(all, length);
        (place, Operation::Read { into: self.part.as_slice(), offset })
    }

    fn range_operation(&self, disk: &Disk) -> (Place, Operation<'_>) {
        let Some(&Range { offset, length, .. }) = self.ranges.last() else { return (Place::Base, Operation::Sync) };
        let mode = match self.method {
            Method::PunchHole => FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
            Method::ZeroRange => FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE,
            Method::WriteZeroes => {
                let (place, offset) = disk.target(self.offset);
                return (place, Operation::Write { from: self.zeroes.as_slice(), offset });
            }
        };
        let (place, offset) = disk.target(offset);
        (place, Operation::Allocate { mode, offset, length })
    }

    /// Takes the result of [`Self::operation`] and says what comes next. A part done is continued
    /// where it stopped.
    pub(super) fn advance(&mut self, result: io::Result<usize>, disk: &mut Disk) -> Step {
        match (self.kind, result) {
            (Kind::Discard | Kind::WriteZeroes, result) => self.advance_range(result, disk),
            (Kind::Flush, result) => self.advance_flush(result, disk),
            (_, Err(error)) => Step::Failed(error),
            (Kind::Read, Ok(count)) => advance_transfer(&mut self.buffers.writable, &mut self.offset, count),
            (Kind::Write, Ok(count)) => {
                let step = advance_transfer(&mut self.buffers.readable, &mut self.offset, count);
                if matches!(step, Step::Done(_)) {
                    disk.wrote(self.offset - self.length, self.length);
                }
                step
            }
            (Kind::GetId | Kind::Other(_), Ok(_)) => Step::Done(Status::Ok),
        }
    }

    /// The data is on disk: what announces it may be written, and has to be on disk as well. The few pages
    /// of it are written at once, whichever engine syncs them.
    fn advance_flush(&mut self, result: io::Result<usize>, disk: &mut Disk) -> Step {
        let unsaved = mem::take(&mut self.unsaved);
        match (result, &mut disk.overlay) {
            (Err(error), _) => Step::Failed(error),
            (Ok(_), Some(overlay)) if unsaved.count() > 0 => match overlay.save(&unsaved) {
                Ok(()) => Step::Operate,
                Err(error) => Step::Failed(error),
            },
            _ => Step::Done(Status::Ok),
        }
    }

    fn advance_range(&mut self, result: io::Result<usize>, disk: &mut Disk) -> Step {
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
            if let Some(range) = self.ranges.pop() {
                disk.wrote(range.offset, range.length);
            }
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
mod tests;
