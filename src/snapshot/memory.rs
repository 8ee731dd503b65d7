//! The memory file: guest RAM, sparse.
//!
//! What is written is what the guest, or the VMM for it, has ever touched. The kernel knows: a page of
//! anonymous memory that was never touched is neither present nor swapped, and a page of a private
//! file mapping that was written is not a page of the file any more (Documentation/admin-guide/mm/pagemap.rst).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd};
use std::os::unix::fs::FileExt;

use super::Id;
use crate::memory::{GuestRam, PAGE_SIZE};

/// Follows RAM in the file: this, then the snapshot's id.
const TRAILER_MAGIC: [u8; 8] = *b"VSCLMEM\x01";
/// Bytes of the trailer.
pub const TRAILER: u64 = 24;

/// Bits of an entry of pagemap.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_A_FILE: u64 = 1 << 61;
/// Entries read at a time.
const CHUNK: usize = 8192;

/// Why a memory file cannot be written or used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A call failed.
    #[error("cannot {0}")]
    Io(&'static str, #[source] io::Error),
    /// It is not as long as RAM.
    #[error("it is {found} bytes long; {expected} bytes of guest memory and a trailer make {}", expected + TRAILER)]
    Size {
        /// In the file.
        found: u64,
        /// Guest RAM in bytes.
        expected: u64,
    },
    /// It has no trailer.
    #[error("it is not a snapshot's memory file")]
    NotMemory,
    /// It belongs to another state file.
    #[error("it belongs to another snapshot than the state file")]
    OtherSnapshot,
}

/// The page tables of this process, to ask what was touched.
#[derive(Debug)]
pub struct Pagemap(File);

impl Pagemap {
    /// Opens it, in `/proc/self` if that was passed in.
    ///
    /// # Errors
    /// There is no /proc.
    pub fn open(proc: Option<BorrowedFd<'_>>) -> Result<Self, Error> {
        let fail = |source| Error::Io("open /proc/self/pagemap", source);
        let Some(proc) = proc else { return File::open("/proc/self/pagemap").map(Self).map_err(fail) };
        let flags = libc::O_RDONLY | libc::O_CLOEXEC;
        // SAFETY: the path is a string that lives for the call, and the descriptor is borrowed.
        let fd = unsafe { libc::openat(proc.as_raw_fd(), c"pagemap".as_ptr(), flags) };
        if fd < 0 {
            return Err(fail(io::Error::last_os_error()));
        }
        // SAFETY: the descriptor was just opened, for this alone.
        Ok(Self(unsafe { File::from_raw_fd(fd) }))
    }

    /// Another descriptor of it.
    ///
    /// # Errors
    /// The process has too many.
    pub fn try_clone(&self) -> Result<Self, Error> {
        self.0.try_clone().map(Self).map_err(|source| Error::Io("duplicate the descriptor of pagemap", source))
    }

    /// Calls `take` with each run of wanted pages among the `size` bytes mapped at `host`: those that
    /// are touched, or those within one of the ascending ranges `always`; all as offsets from `host`.
    fn runs(
        &self,
        (host, size): (u64, u64),
        touched: impl Fn(u64) -> bool,
        always: &[Range<u64>],
        mut take: impl FnMut(Range<u64>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut entries = vec![0; CHUNK * 8];
        let mut always = always.iter().peekable();
        let mut run: Option<Range<u64>> = None;
        for start in (0..size).step_by(CHUNK * PAGE_SIZE as usize) {
            let count = ((size - start) / PAGE_SIZE).min(CHUNK as u64);
            let bytes = &mut entries[..count as usize * 8];
            let fail = |source| Error::Io("read /proc/self/pagemap", source);
            self.0.read_exact_at(bytes, (host + start) / PAGE_SIZE * 8).map_err(fail)?;
            for (page, entry) in (0..).zip(bytes.as_chunks().0) {
                let at = start + page * PAGE_SIZE;
                while always.next_if(|range| range.end <= at).is_some() {}
                if !touched(u64::from_le_bytes(*entry)) && always.peek().is_none_or(|range| range.start > at) {
                    continue;
                }
                match &mut run {
                    Some(run) if run.end == at => run.end += PAGE_SIZE,
                    _ => {
                        if let Some(run) = run.replace(at..at + PAGE_SIZE) {
                            take(run)?;
                        }
                    }
                }
            }
        }
        run.map_or(Ok(()), take)
    }
}

/// Which pages of RAM go into the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Pages {
    /// All that are not zero because nobody ever touched them.
    All,
    /// Those that differ from the memory file that RAM came from; all, if it came from none.
    Changed,
    /// Those that were noted as written, a bit each, for every slot of RAM.
    Noted(Vec<Vec<u64>>),
}

/// Writes `pages` of `ram` into `file`, which is empty or holds earlier pages of the same RAM, and
/// says which snapshot it belongs to from now on.
///
/// # Errors
/// The file cannot be written: the disk is full, say. Or there is no /proc.
pub fn write(ram: &GuestRam, pages: &Pages, pagemap: &Pagemap, id: Id, file: &File) -> Result<(), Error> {
    let fail = |what| move |source| Error::Io(what, source);
    file.set_len(ram.size() + TRAILER).map_err(fail("set its size"))?;
    match pages {
        Pages::Noted(noted) => write_noted(ram, noted, file)?,
        _ => write_mapped(ram, pages, pagemap, file)?,
    }
    mark(file, ram.size(), id)
}

fn write_noted(ram: &GuestRam, noted: &[Vec<u64>], file: &File) -> Result<(), Error> {
    let mut offset = 0;
    for (slot, bits) in ram.slots().zip(noted) {
        let is_noted = |page: u64| bits.get((page / 64) as usize).is_some_and(|word| word >> (page % 64) & 1 != 0);
        let mut page = 0;
        let pages = slot.size / PAGE_SIZE;
        while let Some(start) = (page..pages).find(|&page| is_noted(page)) {
            page = (start..pages).find(|&page| !is_noted(page)).unwrap_or(pages);
            let (from, length) = (start * PAGE_SIZE, (page - start) * PAGE_SIZE);
            write_out(file, slot.host + from, length, offset + from)?;
        }
        offset += slot.size;
    }
    Ok(())
}

fn write_mapped(ram: &GuestRam, pages: &Pages, pagemap: &Pagemap, file: &File) -> Result<(), Error> {
    let base = ram.base().map(|base| data_of(base, ram.size())).transpose();
    let base = base.map_err(|source| Error::Io("look at its base", source))?;
    let touched = |entry: u64| match base {
        None => entry & (PRESENT | SWAPPED) != 0,
        // A page of the file is as it was there.
        Some(_) => is_private(entry),
    };
    let always = match (&base, pages) {
        (Some(data), Pages::All) => data.clone(),
        (Some(_), _) => Vec::new(),
        // Images are mapped: what the guest did not touch of them is not zero either.
        (None, _) => ram.mapped(),
    };
    let mut offset = 0;
    for slot in ram.slots() {
        let always: Vec<_> = always
            .iter()
            .map(|range| range.start.max(offset)..range.end.min(offset + slot.size))
            .filter(|range| !range.is_empty())
            .map(|range| range.start - offset..range.end - offset)
            .collect();
        pagemap.runs((slot.host, slot.size), touched, &always, |run| {
            write_out(file, slot.host + run.start, run.end - run.start, offset + run.start)
        })?;
        offset += slot.size;
    }
    Ok(())
}

/// Drops every page of `ram` that differs from the memory file it came from: it is as it was loaded.
/// Nobody else uses RAM meanwhile.
///
/// # Errors
/// There is no /proc, or the host refuses.
pub fn forget(ram: &GuestRam, pagemap: &Pagemap) -> Result<(), Error> {
    for slot in ram.slots() {
        pagemap.runs((slot.host, slot.size), is_private, &[], |run| {
            let (start, length) = ((slot.host + run.start) as *mut libc::c_void, (run.end - run.start) as usize);
            // SAFETY: the range is part of a mapping of guest RAM, which no Rust reference points into.
            match unsafe { libc::madvise(start, length, libc::MADV_DONTNEED) } {
                0 => Ok(()),
                _ => Err(Error::Io("drop its changed pages", io::Error::last_os_error())),
            }
        })?;
    }
    Ok(())
}

/// Whether a page of a private mapping is not the file's any more.
fn is_private(entry: u64) -> bool {
    entry & SWAPPED != 0 || entry & (PRESENT | OF_A_FILE) == PRESENT
}

/// Writes guest memory to the file, without a Rust reference to what the guest may change.
fn write_out(file: &File, host: u64, length: u64, offset: u64) -> Result<(), Error> {
    let mut done = 0;
    while done < length {
        let (from, at) = (host + done, libc::off_t::try_from(offset + done).unwrap_or(libc::off_t::MAX));
        // SAFETY: the range lies in guest RAM, which is mapped; the kernel only reads it.
        let count = unsafe { libc::pwrite(file.as_raw_fd(), from as *const _, (length - done) as usize, at) };
        match u64::try_from(count) {
            Ok(0) => return Err(Error::Io("write it", io::ErrorKind::WriteZero.into())),
            Ok(count) => done += count,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(Error::Io("write it", error)),
            },
        }
    }
    Ok(())
}

/// The pieces of `file` up to `size` that are not holes, in whole pages, by ascending offset.
///
/// # Errors
/// The file system does not say.
pub fn data_of(file: &File, size: u64) -> io::Result<Vec<Range<u64>>> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < size {
        let Some(start) = seek(file, at, libc::SEEK_DATA)? else { break };
        let Some(end) = seek(file, start, libc::SEEK_HOLE)? else { break };
        found.push(start / PAGE_SIZE * PAGE_SIZE..end.min(size).next_multiple_of(PAGE_SIZE));
        at = end;
    }
    found.retain(|range: &Range<u64>| range.start < size);
    Ok(found)
}

fn seek(file: &File, offset: u64, whence: i32) -> io::Result<Option<u64>> {
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: the call has no memory of ours in it.
    let found = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
    match u64::try_from(found) {
        Ok(found) => Ok(Some(found)),
        Err(_) => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        },
    }
}

/// Marks `file` as the memory, of `size` bytes, of snapshot `id`.
///
/// # Errors
/// It cannot be written.
pub fn mark(file: &File, size: u64, id: Id) -> Result<(), Error> {
    let trailer = [&TRAILER_MAGIC[..], &id].concat();
    file.write_all_at(&trailer, size).map_err(|source| Error::Io("write it", source))
}

/// The size of guest memory that `file` is as long as, and the snapshot it belongs to.
///
/// # Errors
/// It is no memory file.
pub fn identify(file: &File) -> Result<(u64, Id), Error> {
    let fail = |what| move |source| Error::Io(what, source);
    let length = file.metadata().map_err(fail("look at it"))?.len();
    let size = length.checked_sub(TRAILER).filter(|size| size % PAGE_SIZE == 0).ok_or(Error::NotMemory)?;
    let mut trailer = [0; TRAILER as usize];
    file.read_exact_at(&mut trailer, size).map_err(fail("read it"))?;
    let id = trailer.strip_prefix(&TRAILER_MAGIC).and_then(|id| id.try_into().ok()).ok_or(Error::NotMemory)?;
    Ok((size, id))
}

/// Checks that `file` may hold `size` bytes of RAM and, if `id` is given, that it belongs to that
/// snapshot. Its content is not looked at.
///
/// # Errors
/// It does not.
pub fn check(file: &File, size: u64, id: Option<Id>) -> Result<(), Error> {
    let found = file.metadata().map_err(|source| Error::Io("look at it", source))?.len();
    if found != size + TRAILER {
        return Err(Error::Size { found, expected: size });
    }
    let (_, theirs) = identify(file)?;
    if id.is_some_and(|id| theirs != id) { Err(Error::OtherSnapshot) } else { Ok(()) }
}
