//! Which pages of this process were touched, or are its own: the kernel knows
//! (Documentation/admin-guide/mm/pagemap.rst).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use super::memory::Error;
use crate::memory::PAGE_SIZE;
use crate::os::checked;

/// Bits of an entry.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_A_FILE: u64 = 1 << 61;
/// Entries read, and regions found, at a time.
const ENTRIES: u64 = 8192;
const REGIONS: usize = 256;

/// What to look for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// Anonymous memory that is not as it was mapped: present, or swapped.
    Touched,
    /// Pages of a private file mapping that are not the file's any more.
    Private,
}

impl Which {
    /// Whether an entry is wanted.
    fn wants(self, entry: u64) -> bool {
        match self {
            Self::Touched => entry & (PRESENT | SWAPPED) != 0,
            Self::Private => entry & SWAPPED != 0 || entry & (PRESENT | OF_A_FILE) == PRESENT,
        }
    }
}

/// The page tables of this process.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    /// Before Linux 6.7 every entry has to be read.
    cannot_scan: AtomicBool,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Debug, Default)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    regions: u64,
    regions_len: u64,
    max_pages: u64,
    inverted: u64,
    all_of: u64,
    any_of: u64,
    returned: u64,
}

const PAGEMAP_SCAN: libc::Ioctl = 0xc060_6610_u32 as libc::Ioctl;
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;

const _: () = assert!(size_of::<Scan>() == 96 && size_of::<Region>() == 24);

impl Pagemap {
    /// Opens it, in `/proc/self` if that was passed in.
    ///
    /// # Errors
    /// There is no /proc.
    pub fn open(proc: Option<BorrowedFd<'_>>) -> Result<Self, Error> {
        let fail = |source| Error::Io("open /proc/self/pagemap", source);
        let Some(proc) = proc else { return File::open("/proc/self/pagemap").map(Self::of).map_err(fail) };
        let flags = libc::O_RDONLY | libc::O_CLOEXEC;
        // SAFETY: the path is a string that lives for the call, and the descriptor is borrowed.
        let fd = unsafe { libc::openat(proc.as_raw_fd(), c"pagemap".as_ptr(), flags) };
        checked(fd).map_err(fail)?;
        // SAFETY: the descriptor was just opened, for this alone.
        Ok(Self::of(unsafe { File::from_raw_fd(fd) }))
    }

    fn of(file: File) -> Self {
        Self { file, cannot_scan: AtomicBool::new(false) }
    }

    /// Calls `take` with each run of wanted pages among the `size` bytes mapped at `host`: those that
    /// are `which`, or within one of the ascending ranges `always`; all as offsets from `host`.
    ///
    /// # Errors
    /// The kernel does not say, or `take` fails.
    pub fn runs(
        &self,
        (host, size): (u64, u64),
        which: Which,
        always: &[Range<u64>],
        mut take: impl FnMut(Range<u64>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let mut found = Vec::new();
        let mut run = 0..0;
        let mut start = 0;
        while start < size {
            found.clear();
            let end = self.find(host, start..size, which, &mut found)?;
            let clipped = always.iter().map(|range| range.start.max(start)..range.end.min(end));
            found.extend(clipped.filter(|range| !range.is_empty()));
            found.sort_unstable_by_key(|range| range.start);
            for next in found.drain(..) {
                if next.start <= run.end {
                    run.end = run.end.max(next.end);
                    continue;
                }
                let whole = std::mem::replace(&mut run, next);
                if !whole.is_empty() {
                    take(whole)?;
                }
            }
            start = end;
        }
        if run.is_empty() { Ok(()) } else { take(run) }
    }

    /// Finds what is wanted from the beginning of `range` on; returns how far it looked.
    fn find(&self, host: u64, range: Range<u64>, which: Which, found: &mut Vec<Range<u64>>) -> Result<u64, Error> {
        if !self.cannot_scan.load(Ordering::Relaxed) {
            match self.scan(host, &range, which, found) {
                Ok(end) if end > range.start => return Ok(end),
                _ => self.cannot_scan.store(true, Ordering::Relaxed),
            }
            found.clear();
        }
        self.read(host, &range, which, found).map_err(|source| Error::Io("read /proc/self/pagemap", source))
    }

    /// Has the kernel look (PAGEMAP_SCAN).
    fn scan(&self, host: u64, range: &Range<u64>, which: Which, found: &mut Vec<Range<u64>>) -> io::Result<u64> {
        let mut regions = [Region::default(); REGIONS];
        let not_of_a_file = if which == Which::Private { PAGE_IS_FILE } else { 0 };
        let mut scan = Scan {
            size: size_of::<Scan>() as u64,
            start: host + range.start,
            end: host + range.end,
            regions: regions.as_mut_ptr() as u64,
            regions_len: REGIONS as u64,
            inverted: not_of_a_file,
            all_of: not_of_a_file,
            any_of: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            returned: PAGE_IS_SWAPPED,
            ..Scan::default()
        };
        // SAFETY: `scan` says its size, and how many regions there is room for.
        let count = checked(unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &raw mut scan) })?;
        found.extend(regions.iter().take(count).map(|region| region.start - host..region.end - host));
        Ok(scan.walk_end.saturating_sub(host).min(range.end))
    }

    /// Looks at every entry.
    fn read(&self, host: u64, range: &Range<u64>, which: Which, found: &mut Vec<Range<u64>>) -> io::Result<u64> {
        let count = ((range.end - range.start) / PAGE_SIZE).min(ENTRIES);
        let mut entries = vec![0; count as usize * 8];
        self.file.read_exact_at(&mut entries, (host + range.start) / PAGE_SIZE * 8)?;
        for (page, entry) in (0..).zip(entries.as_chunks().0) {
            if which.wants(u64::from_le_bytes(*entry)) {
                let at = range.start + page * PAGE_SIZE;
                match found.last_mut() {
                    Some(last) if last.end == at => last.end += PAGE_SIZE,
                    _ => found.push(at..at + PAGE_SIZE),
                }
            }
        }
        Ok(range.start + count * PAGE_SIZE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scanning_and_reading_find_the_same_pages() {
        const SIZE: u64 = 20_000 * PAGE_SIZE;
        // SAFETY: a new mapping, at an address of the kernel's choice; huge pages would touch more
        // than asked for.
        let host = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            let host =
                libc::mmap(std::ptr::null_mut(), SIZE as usize, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            assert_ne!(host, libc::MAP_FAILED);
            libc::madvise(host, SIZE as usize, libc::MADV_NOHUGEPAGE);
            host as u64
        };
        let touched: Vec<u64> = (0..2000).map(|i| i * 7 % 20_000).chain([19_998, 19_999]).collect();
        for page in &touched {
            // SAFETY: within the mapping.
            unsafe { ((host + page * PAGE_SIZE) as *mut u8).write_volatile(1) };
        }
        let always = [PAGE_SIZE..3 * PAGE_SIZE, 15_000 * PAGE_SIZE..15_002 * PAGE_SIZE];
        let scanned = Pagemap::open(None).unwrap();
        let read = Pagemap { cannot_scan: AtomicBool::new(true), ..Pagemap::open(None).unwrap() };
        let pages = |pagemap: &Pagemap, which| {
            let mut pages = Vec::new();
            let take = |run: Range<u64>| {
                assert!(!run.is_empty() && pages.last().is_none_or(|last| *last + 1 < run.start / PAGE_SIZE));
                pages.extend(run.start / PAGE_SIZE..run.end / PAGE_SIZE);
                Ok(())
            };
            pagemap.runs((host, SIZE), which, &always, take).unwrap();
            pages
        };
        let mut expected = [touched, vec![1, 2, 15_000, 15_001]].concat();
        expected.sort_unstable();
        expected.dedup();
        for which in [Which::Touched, Which::Private] {
            assert_eq!(pages(&scanned, which), expected);
            assert_eq!(pages(&read, which), expected);
        }
        // SAFETY: the mapping from above, which nothing uses any more.
        unsafe { libc::munmap(host as *mut _, SIZE as usize) };
    }
}
