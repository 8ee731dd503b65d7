//! The memory file: guest RAM, sparse.
//!
//! What is written is what the guest, or the VMM for it, has ever touched. The kernel knows: a page of
//! anonymous memory that was never touched is neither present nor swapped, and a page of a private
//! file mapping that was written is not a page of the file any more (Documentation/admin-guide/mm/pagemap.rst).

use std::arch::x86_64::{
    __m128i, _mm_cmpeq_epi8, _mm_load_si128, _mm_movemask_epi8, _mm_or_si128, _mm_setzero_si128, _mm_store_si128,
};
use std::fs::File;
use std::io;
use std::iter;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::ptr;

use super::Id;
use super::pagemap::{Pagemap, Which};
use crate::memory::{GuestRam, PAGE_SIZE, Slot};
use crate::os::{checked, retried, seek};

/// Follows RAM in the file: this, then the snapshot's id.
const TRAILER_MAGIC: [u8; 8] = *b"VSCLMEM\x01";
/// The id in the trailer of a file that is being merged.
pub const NO_SNAPSHOT: Id = [0; 16];
/// Bytes of the trailer.
pub const TRAILER: u64 = 24;

/// Bytes that a reset copies back instead of dropping them: what a guest wrote once it writes again,
/// and a copy costs less than two page faults.
const COPIED_BACK: u64 = 2 << 20;

/// Why a memory file cannot be written or used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A call failed.
    #[error("cannot {0}")]
    Io(&'static str, #[source] io::Error),
    /// It is not as long as RAM.
    #[error("it is {found} bytes long; {expected} bytes of guest memory and a trailer make {}", expected.saturating_add(TRAILER))]
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
    /// Others hold it.
    #[error("it is in use: a microVM runs from it, or a Diff is being merged into it")]
    InUse,
}

/// Holds `file` as long as it is open here: with others who run from it, or `alone`, to change it. Where the file system
/// has no locks it is not held.
///
/// # Errors
/// Others hold it, and either they or we would change it.
pub fn hold(file: &File, alone: bool) -> Result<(), Error> {
    // SAFETY: all-zero is a valid `flock`: from the beginning to the end.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = if alone { libc::F_WRLCK } else { libc::F_RDLCK } as libc::c_short;
    // SAFETY: the structure is what the command reads. Its locks belong to the open file, not to the process.
    let held = checked(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) });
    match held.err().and_then(|error| error.raw_os_error()) {
        Some(libc::EAGAIN | libc::EACCES) => Err(Error::InUse),
        _ => Ok(()),
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

/// Writes `pages` of `ram` into `file`, which is empty or, unless these are all, holds earlier pages of the
/// same RAM, and says which snapshot it belongs to from now on. Returns how many bytes they are.
///
/// # Errors
/// The file cannot be written: the disk is full, say. Or there is no /proc.
pub fn write(ram: &GuestRam, pages: Pages, pagemap: &Pagemap, id: Id, file: &File) -> Result<u64, Error> {
    let mut copy = Copy::new(ram, pages, file)?;
    copy.go_on(ram, pagemap, file, u64::MAX)?;
    mark(file, ram.size(), id).map(|()| copy.copied)
}

/// A copy of RAM in a file, made piece by piece.
#[derive(Debug)]
pub struct Copy {
    pages: Pages,
    which: Which,
    always: Vec<Range<u64>>,
    /// How far it is, as an offset into RAM without the gap.
    at: u64,
    /// Bytes copied.
    copied: u64,
}

impl Copy {
    /// Nothing is copied yet; `file` is as for [`write`].
    ///
    /// # Errors
    /// The disk is full, or the file that RAM came from cannot be looked at.
    pub fn new(ram: &GuestRam, pages: Pages, file: &File) -> Result<Self, Error> {
        let fail = |what| move |source| Error::Io(what, source);
        file.set_len(ram.size() + TRAILER).map_err(fail("set its size"))?;
        let base = ram.base().map(|base| data_of(base, ram.size())).transpose();
        let base = base.map_err(fail("look at its base"))?;
        // A page of the base is as it was there.
        let which = if base.is_some() { Which::Private } else { Which::Touched };
        let always = match (base, &pages) {
            (Some(data), Pages::All) => data,
            (Some(_), _) => Vec::new(),
            // Nobody knows what is not there.
            (None, Pages::All) if ram.is_served() => iter::once(0..ram.size()).collect(),
            // Images are mapped: what the guest did not touch of them is not zero either.
            (None, _) => ram.mapped(),
        };
        Ok(Self { pages, which, always, at: 0, copied: 0 })
    }

    /// Copies what is to be copied of the next `most` bytes of RAM; whether that was the last of it.
    ///
    /// # Errors
    /// The file cannot be written, or the kernel does not say which pages are to be.
    pub fn go_on(&mut self, ram: &GuestRam, pagemap: &Pagemap, file: &File, most: u64) -> Result<bool, Error> {
        let window = self.at..self.at.saturating_add(most).min(ram.size());
        let mut offset = 0;
        for (index, slot) in ram.slots().enumerate() {
            let part = window.start.max(offset)..window.end.min(offset + slot.size);
            if !part.is_empty() {
                self.copied += self.part(pagemap, file, (index, slot), offset, part)?;
            }
            offset += slot.size;
        }
        self.at = window.end;
        Ok(self.at == ram.size())
    }

    /// Bytes copied so far.
    pub fn copied(&self) -> u64 {
        self.copied
    }

    /// Copies from `part` of the slot that is at `offset`.
    fn part(
        &self,
        pagemap: &Pagemap,
        file: &File,
        (index, slot): (usize, Slot),
        offset: u64,
        part: Range<u64>,
    ) -> Result<u64, Error> {
        let (host, size) = (slot.host + (part.start - offset), part.end - part.start);
        if let Pages::Noted(noted) = &self.pages {
            let bits = noted.get(index).map_or(&[][..], Vec::as_slice);
            return write_noted(bits, slot, part.start - offset..part.end - offset, file, offset);
        }
        let always: Vec<_> = self
            .always
            .iter()
            .map(|range| range.start.max(part.start)..range.end.min(part.end))
            .filter(|range| !range.is_empty())
            .map(|range| range.start - part.start..range.end - part.start)
            .collect();
        let mut copied = 0;
        pagemap.runs((host, size), self.which, &always, |run| {
            copied += run.end - run.start;
            match self.pages {
                Pages::All => write_nonzero(file, host, run, part.start),
                _ => write_out(file, host + run.start, run.end - run.start, part.start + run.start),
            }
        })?;
        Ok(copied)
    }
}

/// Writes the pages of `part` of a slot, at `offset` in the file, whose bits are set; returns how many bytes that is.
fn write_noted(bits: &[u64], slot: Slot, part: Range<u64>, file: &File, offset: u64) -> Result<u64, Error> {
    let is_noted = |page: u64| bits.get((page / 64) as usize).is_some_and(|word| word >> (page % 64) & 1 != 0);
    let (mut page, pages, mut copied) = (part.start / PAGE_SIZE, part.end / PAGE_SIZE, 0);
    while let Some(start) = (page..pages).find(|&page| is_noted(page)) {
        page = (start..pages).find(|&page| !is_noted(page)).unwrap_or(pages);
        let (from, length) = (start * PAGE_SIZE, (page - start) * PAGE_SIZE);
        write_out(file, slot.host + from, length, offset + from)?;
        copied += length;
    }
    Ok(copied)
}

/// The memory file that RAM came from, to read it.
#[derive(Debug)]
pub struct Pristine {
    host: u64,
    size: u64,
}

impl Pristine {
    /// Maps it; `None` if RAM did not come from a file.
    ///
    /// # Errors
    /// There is no address space.
    pub fn map(ram: &GuestRam) -> Result<Option<Self>, Error> {
        let (Some(base), size) = (ram.base(), ram.size()) else { return Ok(None) };
        let (protection, flags) = (libc::PROT_READ, libc::MAP_SHARED | libc::MAP_NORESERVE);
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let host = unsafe { libc::mmap(ptr::null_mut(), size as usize, protection, flags, base.as_raw_fd(), 0) };
        if host == libc::MAP_FAILED {
            return Err(Error::Io("map it", io::Error::last_os_error()));
        }
        // SAFETY: the mapping from above. Guest memory is never part of a core dump.
        unsafe { libc::madvise(host, size as usize, libc::MADV_DONTDUMP) };
        Ok(Some(Self { host: host as u64, size }))
    }
}

impl Drop for Pristine {
    fn drop(&mut self) {
        // SAFETY: the mapping that `map` made, which nobody else knows.
        unsafe { libc::munmap(self.host as *mut libc::c_void, self.size as usize) };
    }
}

/// Makes every page of `ram` as it was loaded from `pristine`: the first [`COPIED_BACK`] bytes of what
/// was written are copied back, the rest is dropped.
///
/// # Errors
/// There is no /proc, or the host refuses.
pub fn take_back(ram: &GuestRam, pristine: &Pristine, pagemap: &Pagemap) -> Result<(), Error> {
    let (mut offset, mut budget) = (0, COPIED_BACK);
    for (index, slot) in ram.slots().enumerate() {
        pagemap.runs((slot.host, slot.size), Which::Private, &[], |run| {
            ram.note_written(index, &run);
            let length = run.end - run.start;
            if let Some(left) = budget.checked_sub(length)
                && offset + run.end <= pristine.size
            {
                budget = left;
                for at in run.step_by(PAGE_SIZE as usize) {
                    // SAFETY: both are whole pages, the one of the pristine file's mapping, the other of
                    // guest RAM, which no Rust reference points into and no vCPU or device uses now.
                    unsafe { copy_page((pristine.host + offset + at) as _, (slot.host + at) as _) };
                }
                return Ok(());
            }
            drop_pages(slot.host + run.start, length)
        })?;
        offset += slot.size;
    }
    Ok(())
}

/// Copies a page, sixteen bytes at a time: there is no call to the C library for it that would not
/// look at the length first.
///
/// # Safety
/// `from` is valid for reading, `to` for writing a page, both aligned to 16 bytes.
unsafe fn copy_page(from: *const __m128i, to: *mut __m128i) {
    for at in (0..PAGE_SIZE as usize / size_of::<__m128i>()).step_by(4) {
        for at in at..at + 4 {
            // SAFETY: within the page.
            unsafe { _mm_store_si128(to.add(at), _mm_load_si128(from.add(at))) };
        }
    }
}

/// Whether a page is full of zeros.
///
/// # Safety
/// `page` is valid for reading a page and aligned to 16 bytes.
unsafe fn is_zero(page: *const __m128i) -> bool {
    (0..PAGE_SIZE as usize / size_of::<__m128i>()).step_by(4).all(|at| {
        // SAFETY: within the page.
        let load = |at| unsafe { _mm_load_si128(page.add(at)) };
        // SAFETY: SSE2 belongs to every x86-64.
        unsafe {
            let all = _mm_or_si128(_mm_or_si128(load(at), load(at + 1)), _mm_or_si128(load(at + 2), load(at + 3)));
            _mm_movemask_epi8(_mm_cmpeq_epi8(all, _mm_setzero_si128())) == 0xffff
        }
    })
}

fn drop_pages(host: u64, length: u64) -> Result<(), Error> {
    // SAFETY: the range is part of a mapping of guest RAM, which no Rust reference points into.
    let dropped = checked(unsafe { libc::madvise(host as *mut libc::c_void, length as usize, libc::MADV_DONTNEED) });
    dropped.map(drop).map_err(|source| Error::Io("drop its changed pages", source))
}

/// Writes the pages of a run of the slot at `host`, which is at `offset` in the empty file, except those
/// that are zero: they are holes.
fn write_nonzero(file: &File, host: u64, run: Range<u64>, offset: u64) -> Result<(), Error> {
    // SAFETY: the page lies in guest RAM, which is mapped.
    let zero = |at: &u64| unsafe { is_zero((host + at) as *const __m128i) };
    let mut at = run.start;
    while at < run.end {
        let start = at;
        while at < run.end && !zero(&at) {
            at += PAGE_SIZE;
        }
        write_out(file, host + start, at - start, offset + start)?;
        while at < run.end && zero(&at) {
            at += PAGE_SIZE;
        }
    }
    Ok(())
}

/// Writes guest memory to the file, without a Rust reference to what the guest may change.
fn write_out(file: &File, host: u64, length: u64, offset: u64) -> Result<(), Error> {
    let mut done = 0;
    while done < length {
        let (from, at) = (host + done, libc::off_t::try_from(offset + done).unwrap_or(libc::off_t::MAX));
        // SAFETY: the range lies in guest RAM, which is mapped; the kernel only reads it.
        let write = || checked(unsafe { libc::pwrite(file.as_raw_fd(), from as _, (length - done) as usize, at) });
        match retried(write) {
            Ok(0) => return Err(Error::Io("write it", io::ErrorKind::WriteZero.into())),
            Ok(count) => done += count as u64,
            Err(error) => return Err(Error::Io("write it", error)),
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

/// Where the memory file of a snapshot is while another takes its place, and stays if that is not completed.
pub fn previous(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".previous");
    name.into()
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
    if found.checked_sub(TRAILER) != Some(size) {
        return Err(Error::Size { found, expected: size });
    }
    let (_, theirs) = identify(file)?;
    if id.is_some_and(|id| theirs != id) { Err(Error::OtherSnapshot) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::config::HugePages;
    use crate::memory::MIB;

    #[test]
    fn memory_that_there_cannot_be_is_of_no_file() {
        let file = tempfile::tempfile().unwrap();
        for length in [0, TRAILER - 1, TRAILER, 5 * PAGE_SIZE] {
            file.set_len(length).unwrap();
            let error = check(&file, u64::MAX, None).unwrap_err();
            assert!(error.to_string().starts_with(&format!("it is {length} bytes long;")), "{error}");
        }
    }

    #[test]
    fn a_copy_made_in_slices_is_the_same_as_one_made_at_once() {
        let ram = GuestRam::new(4 * MIB, HugePages::None).unwrap();
        let mut noted = vec![0; 16];
        for page in [0_u64, 1, 3, 62, 63, 64, 65, 500, 1023] {
            ram.memory().write_obj(page + 1, GuestAddress(page * PAGE_SIZE)).unwrap();
            noted[page as usize / 64] |= 1 << (page % 64);
        }
        let pagemap = Pagemap::open(None).unwrap();
        for pages in [Pages::All, Pages::Changed, Pages::Noted(vec![noted])] {
            let [whole, sliced] = [(); 2].map(|()| tempfile::tempfile().unwrap());
            write(&ram, pages.clone(), &pagemap, [7; 16], &whole).unwrap();
            let mut copy = Copy::new(&ram, pages, &sliced).unwrap();
            while !copy.go_on(&ram, &pagemap, &sliced, 3 * PAGE_SIZE).unwrap() {}
            assert_eq!(copy.copied(), 9 * PAGE_SIZE);
            mark(&sliced, ram.size(), [7; 16]).unwrap();
            let content = |file: &File| {
                let mut content = vec![0; (ram.size() + TRAILER) as usize];
                file.read_exact_at(&mut content, 0).unwrap();
                content
            };
            assert!(content(&whole) == content(&sliced));
            assert_eq!(content(&whole)[65 * PAGE_SIZE as usize], 66);
            assert_eq!(data_of(&sliced, ram.size()).unwrap().len(), 5);
        }
    }
}
