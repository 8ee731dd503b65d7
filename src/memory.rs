//! Guest RAM: layout and backing.
//!
//! ```text
//!  0                  RAM, up to 3 GiB
//!  0xC000_0000        MMIO gap: boot timer, virtio-mmio windows, I/O APIC, local APIC, KVM's own pages
//!  0x1_0000_0000      the rest of RAM
//! ```
//!
//! RAM is anonymous private memory that costs nothing until it is touched; pieces of files can be
//! mapped over it. It is never part of a core dump.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::{Deref, Range};
use std::os::fd::AsRawFd;
use std::sync::{Mutex, PoisonError};

use vm_memory::bitmap::{AtomicBitmap, BS, Bitmap};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionCollectionError, GuestRegionMmap,
    MemoryRegionAddress, VolatileSlice,
};

use crate::config::{FIRST_IRQ, HugePages, MAX_VIRTIO_DEVICES};
use crate::os::{checked, retried};

/// All of guest RAM; cheap to clone.
pub type GuestMemory = vm_memory::GuestMemoryMmap<Written>;
/// Which pages this process wrote, if that is tracked; what the guest wrote is known to KVM.
pub type Written = Option<AtomicBitmap>;
type Region = GuestRegionMmap<Written>;
type Slice<'a> = VolatileSlice<'a, BS<'a, Written>>;

/// Size of a base page in bytes.
pub const PAGE_SIZE: u64 = 4096;
const PAGE: NonZeroUsize = NonZeroUsize::new(PAGE_SIZE as usize).unwrap();
/// One mebibyte in bytes.
pub const MIB: u64 = 1 << 20;
/// Where RAM stops below 4 GiB and device addresses begin.
pub const MMIO_GAP_START: u64 = 0xC000_0000;
/// Where RAM goes on.
pub const MMIO_GAP_END: u64 = 0x1_0000_0000;
/// Sixteen bytes in the BIOS area that are others in every microVM that comes out of a snapshot (VM
/// generation ID, Microsoft 2012); the guest is told of their change by [`VM_GENERATION_IRQ`].
pub const VM_GENERATION_ID: u64 = 0xF_F000;
/// The I/O APIC pin that says that the generation changed: free since there is no second serial port.
pub const VM_GENERATION_IRQ: u32 = 3;
/// The byte a guest writes to say that it has booted.
pub const BOOT_TIMER: u64 = MMIO_GAP_START;
/// The window of the first virtio-mmio device.
pub const VIRTIO_MMIO_START: u64 = MMIO_GAP_START + VIRTIO_MMIO_SIZE;
/// Size of one virtio-mmio window in bytes.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// Registers of the I/O APIC.
pub const IO_APIC: u64 = 0xFEC0_0000;
/// Its version: a discrete one without an EOI register.
pub const IO_APIC_VERSION: u8 = 0x11;
/// Most pins of it.
pub const MAX_IO_APIC_PINS: usize = 24;
/// Registers of each vCPU's local APIC.
pub const LOCAL_APIC: u64 = 0xFEE0_0000;
/// One page for `KVM_SET_IDENTITY_MAP_ADDR`.
pub const KVM_IDENTITY_MAP: u64 = 0xFFFB_C000;
/// Three pages for `KVM_SET_TSS_ADDR`.
pub const KVM_TSS: u64 = 0xFFFB_D000;

const _: () = assert!(VIRTIO_MMIO_START + MAX_VIRTIO_DEVICES as u64 * VIRTIO_MMIO_SIZE <= IO_APIC);
const _: () = assert!(IO_APIC + PAGE_SIZE <= LOCAL_APIC && LOCAL_APIC + PAGE_SIZE <= KVM_IDENTITY_MAP);
const _: () = assert!(KVM_IDENTITY_MAP + PAGE_SIZE <= KVM_TSS && KVM_TSS + 3 * PAGE_SIZE <= MMIO_GAP_END);

/// KVM takes at most 2³¹ − 1 pages in one slot; half of that keeps slots aligned.
const MAX_SLOT_SIZE: u64 = 4 << 40;
const HUGE_PAGE_SIZE: u64 = 2 * MIB;

/// Where a virtio-mmio device sits: its window and its I/O APIC pin (edge-triggered, active high).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioDevice {
    /// Guest physical address of the [`VIRTIO_MMIO_SIZE`] window.
    pub base: u64,
    /// Global system interrupt.
    pub irq: u32,
}

impl MmioDevice {
    /// The place of the `index`th device; `None` from [`MAX_VIRTIO_DEVICES`] on.
    pub fn nth(index: usize) -> Option<Self> {
        let n = u32::try_from(index).ok().filter(|_| index < MAX_VIRTIO_DEVICES)?;
        Some(Self { base: VIRTIO_MMIO_START + u64::from(n) * VIRTIO_MMIO_SIZE, irq: FIRST_IRQ + n })
    }
}

/// How many pins the I/O APIC of a machine with `devices` virtio devices has: no more than are used, for a guest visits
/// all of them, and each visit is an exit.
pub const fn io_apic_pins(devices: usize) -> usize {
    FIRST_IRQ as usize + devices
}
const _: () = assert!(io_apic_pins(MAX_VIRTIO_DEVICES) <= MAX_IO_APIC_PINS);

/// Why guest RAM could not be made or filled.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not a whole number of pages, or none.
    #[error("{size} bytes of guest memory are not a whole number of {page_size}-byte pages")]
    Size {
        /// Requested bytes.
        size: u64,
        /// Bytes in a page of the requested kind.
        page_size: u64,
    },
    /// The host refused the address range, or has too few huge pages.
    #[error("cannot reserve {size} bytes for guest memory")]
    Reserve {
        /// Requested bytes.
        size: u64,
        /// The host's reason.
        #[source]
        source: MmapRegionError,
    },
    /// The regions do not fit each other.
    #[error("cannot lay out guest memory")]
    Layout(#[source] GuestRegionCollectionError),
    /// `madvise` failed.
    #[error("cannot set up {size} bytes of guest memory with madvise({advice})")]
    Advise {
        /// Name of the advice.
        advice: &'static str,
        /// Bytes it was for.
        size: u64,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
    /// An address range that is not all RAM.
    #[error("{len:#x} bytes at guest physical address {gpa:#x} are not within guest memory")]
    OutsideRam {
        /// Start of the range.
        gpa: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// A piece of a file that cannot be mapped: not whole pages, or past the end of the file.
    #[error("{len:#x} bytes at offset {offset:#x} of a file of {file_len:#x} bytes cannot be mapped at {gpa:#x}")]
    Unmappable {
        /// Guest physical address.
        gpa: u64,
        /// Offset in the file.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Size of the file.
        file_len: u64,
    },
    /// The file could not be read or mapped.
    #[error("cannot load {len:#x} bytes at file offset {offset:#x} to guest physical address {gpa:#x}")]
    File {
        /// Guest physical address.
        gpa: u64,
        /// Offset in the file.
        offset: u64,
        /// Bytes.
        len: u64,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
}

/// A range of RAM as KVM wants to know it (`KVM_SET_USER_MEMORY_REGION`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// Guest physical address.
    pub gpa: u64,
    /// Bytes.
    pub size: u64,
    /// Where the range begins in this process.
    pub host: u64,
}

/// Guest RAM and how it is backed.
#[derive(Debug)]
pub struct GuestRam {
    memory: GuestMemory,
    huge_pages: HugePages,
    /// Where images are mapped, as offsets into RAM without the gap.
    mapped: Mutex<Vec<Range<u64>>>,
    /// The memory file of the snapshot that this RAM is a private mapping of.
    base: Option<File>,
    /// Another process has what is not there yet.
    served: bool,
}

impl GuestRam {
    /// Reserves `size` bytes of guest RAM. Nothing is allocated until it is touched, save that
    /// hugetlbfs pages are set aside now, so that the guest cannot run out of them later.
    ///
    /// # Errors
    /// `size` is 0 or not a multiple of the page size, or the host refuses.
    pub fn new(size: u64, huge_pages: HugePages) -> Result<Self, Error> {
        Self::reserve(size, huge_pages, false)
    }

    /// The same, with a record of the pages that this process writes.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn tracked(size: u64, huge_pages: HugePages) -> Result<Self, Error> {
        Self::reserve(size, huge_pages, true)
    }

    fn reserve(size: u64, huge_pages: HugePages, track: bool) -> Result<Self, Error> {
        let page_size = if huge_pages == HugePages::Size2M { HUGE_PAGE_SIZE } else { PAGE_SIZE };
        if size == 0 || !size.is_multiple_of(page_size) {
            return Err(Error::Size { size, page_size });
        }
        let written = |len| track.then(|| AtomicBitmap::new(len as usize, PAGE));
        let regions = ranges(size).map(|(gpa, len)| reserve(gpa, len, huge_pages, written(len)));
        let regions = regions.collect::<Result<_, _>>()?;
        let memory = GuestMemory::from_regions(regions).map_err(Error::Layout)?;
        Ok(Self { memory, huge_pages, mapped: Mutex::default(), base: None, served: false })
    }

    /// The memory itself.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// How the RAM is backed.
    pub fn huge_pages(&self) -> HugePages {
        self.huge_pages
    }

    /// The memory slots to register with KVM, by ascending address.
    pub fn slots(&self) -> impl Iterator<Item = Slot> + '_ {
        self.memory.iter().map(|region| Slot {
            gpa: region.start_addr().0,
            size: region.len(),
            host: region.as_ptr() as u64,
        })
    }

    /// Bytes of RAM.
    pub fn size(&self) -> u64 {
        self.memory.iter().map(|region| region.len()).sum()
    }

    /// The first address after the RAM below the MMIO gap.
    pub fn low_end(&self) -> u64 {
        self.size().min(MMIO_GAP_START)
    }

    /// Notes that `range` of slot `index` is not what it was, if that is tracked.
    pub fn note_written(&self, index: usize, range: &Range<u64>) {
        if let Some(region) = self.memory.iter().nth(index) {
            Deref::deref(region).bitmap().mark_dirty(range.start as usize, (range.end - range.start) as usize);
        }
    }

    /// Which pages this process wrote since the last call, a bit each, for every slot; `None` unless
    /// that is tracked.
    pub fn take_written(&self) -> Option<Vec<Vec<u64>>> {
        let take = |region: &Region| Some(Deref::deref(region).bitmap().as_ref()?.get_and_reset());
        self.memory.iter().map(take).collect()
    }

    /// Where images are mapped: ascending ranges of whole pages, as offsets into RAM without the gap.
    pub fn mapped(&self) -> Vec<Range<u64>> {
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner).clone();
        mapped.sort_by_key(|range| range.start);
        mapped
    }

    /// The memory file that this RAM came from.
    pub fn base(&self) -> Option<&File> {
        self.base.as_ref()
    }

    /// Bytes in a page of RAM.
    pub fn page_size(&self) -> u64 {
        if self.huge_pages == HugePages::Size2M { HUGE_PAGE_SIZE } else { PAGE_SIZE }
    }

    /// Whether pages that are not there are not zero: another process has them.
    pub fn is_served(&self) -> bool {
        self.served
    }

    /// From now on another process has what is not there.
    pub fn set_served(&mut self) {
        self.served = true;
    }

    /// The pages below 1 MiB, which are written before the guest runs, shall not make the host zero 2 MiB for them.
    pub fn keep_low_pages_small(&self) {
        if self.huge_pages == HugePages::None
            && let Ok(low) = self.slice(0, self.size().min(MIB))
        {
            // A hint: hosts without transparent huge pages refuse it.
            let _ = advise(&low, libc::MADV_NOHUGEPAGE, "MADV_NOHUGEPAGE");
        }
    }

    /// Makes RAM what the memory file of a snapshot holds: a private mapping, of which pages are read
    /// when they are touched and copied when they are written. Huge pages cannot be mapped so; they
    /// are filled at once.
    ///
    /// # Errors
    /// The file is too short, or the host refuses.
    pub fn load(&mut self, file: File) -> Result<(), Error> {
        let mut offset = 0;
        for slot in self.slots().collect::<Vec<_>>() {
            if self.huge_pages == HugePages::Size2M {
                self.read_file(slot.gpa, &file, offset, slot.size)?;
            } else {
                self.map(slot.gpa, &file, offset, slot.size)?;
            }
            offset += slot.size;
        }
        self.base = (self.huge_pages != HugePages::Size2M).then_some(file);
        Ok(())
    }

    /// Maps `len` bytes of `file` from `offset` over RAM at `gpa`, copy-on-write: pages are shared
    /// with the page cache until the guest writes them. What lies past the end of the file in its
    /// last page reads as zeroes. The file must not be truncated while the guest lives: touching a
    /// page that is gone ends the process with SIGBUS.
    ///
    /// # Errors
    /// `gpa` or `offset` is not page-aligned, the range is not RAM, `len` goes beyond the file or
    /// ends within a page that is not its last, RAM is made of huge pages, or the host refuses.
    pub fn map_file(&self, gpa: u64, file: &File, offset: u64, len: u64) -> Result<(), Error> {
        self.map(gpa, file, offset, len)?;
        let start = offset_of(gpa);
        let range = start..(start + len).next_multiple_of(PAGE_SIZE);
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner).push(range);
        Ok(())
    }

    fn map(&self, gpa: u64, file: &File, offset: u64, len: u64) -> Result<(), Error> {
        let fail = |source| Error::File { gpa, offset, len, source };
        let file_len = file.metadata().map_err(fail)?.len();
        let end = offset.checked_add(len).filter(|&end| len > 0 && end <= file_len);
        let whole = end.is_some_and(|end| end == file_len || end.is_multiple_of(PAGE_SIZE));
        let aligned = gpa.is_multiple_of(PAGE_SIZE) && offset.is_multiple_of(PAGE_SIZE);
        if !whole || !aligned || self.huge_pages == HugePages::Size2M {
            return Err(Error::Unmappable { gpa, offset, len, file_len });
        }
        let slice = self.slice(gpa, len.next_multiple_of(PAGE_SIZE))?;
        let offset = libc::off_t::try_from(offset).map_err(|e| fail(io::Error::other(e)))?;
        let host = slice.ptr_guard_mut().as_ptr();
        // SAFETY: `host` and the length are whole pages within one of our own mappings, which
        // keeps its extent; Rust holds no references into guest memory, only volatile slices.
        let mapped = unsafe {
            libc::mmap(
                host.cast(),
                slice.len(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                offset,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(fail(io::Error::last_os_error()));
        }
        advise(&slice, libc::MADV_DONTDUMP, "MADV_DONTDUMP")
    }

    /// Reads `len` bytes of `file` from `offset` straight into RAM at `gpa`.
    ///
    /// # Errors
    /// The range is not RAM, the file ends too early, or a read fails.
    pub fn read_file(&self, gpa: u64, file: &File, offset: u64, len: u64) -> Result<(), Error> {
        // Nothing may lie anywhere, at the very end of RAM too.
        if len == 0 {
            return Ok(());
        }
        let fail = |source| Error::File { gpa, offset, len, source };
        let slice = self.slice(gpa, len)?;
        let start = libc::off_t::try_from(offset).map_err(|e| fail(io::Error::other(e)))?;
        let mut done = 0;
        while done < slice.len() {
            let at = libc::off_t::try_from(done).ok().and_then(|done| start.checked_add(done));
            let at = at.ok_or_else(|| fail(io::ErrorKind::InvalidInput.into()))?;
            let host = slice.ptr_guard_mut().as_ptr().wrapping_add(done);
            // SAFETY: `host` and the length stay within the slice, which is mapped writable as
            // long as `self` lives; guest memory is never borrowed as Rust references.
            let read = || checked(unsafe { libc::pread(file.as_raw_fd(), host.cast(), slice.len() - done, at) });
            match retried(read).map_err(fail)? {
                0 => return Err(fail(io::ErrorKind::UnexpectedEof.into())),
                count => done += count,
            }
        }
        Ok(())
    }

    /// Allocates the pages of a range that is about to be written, in one call. A hint: hosts
    /// before Linux 5.14 do not know it, and what fails here is allocated when it is written.
    ///
    /// # Errors
    /// The range is not RAM.
    pub fn populate(&self, gpa: u64, len: u64) -> Result<(), Error> {
        let start = gpa - gpa % PAGE_SIZE;
        let end = gpa.checked_add(len).and_then(|end| end.checked_next_multiple_of(PAGE_SIZE));
        let slice = self.slice(start, end.ok_or(Error::OutsideRam { gpa, len })? - start)?;
        let _ = advise(&slice, libc::MADV_POPULATE_WRITE, "MADV_POPULATE_WRITE");
        Ok(())
    }

    fn slice(&self, gpa: u64, len: u64) -> Result<Slice<'_>, Error> {
        let outside = Error::OutsideRam { gpa, len };
        let Ok(count) = usize::try_from(len) else { return Err(outside) };
        self.memory.get_slice(GuestAddress(gpa), count).map_err(|_| outside)
    }
}

/// The offset into RAM without the gap of a guest physical address, which is one of RAM.
fn offset_of(gpa: u64) -> u64 {
    if gpa < MMIO_GAP_START { gpa } else { gpa - MMIO_GAP_END + MMIO_GAP_START }
}

/// The guest physical address of an offset into RAM without the gap.
pub fn address_of(offset: u64) -> u64 {
    if offset < MMIO_GAP_START { offset } else { offset - MMIO_GAP_START + MMIO_GAP_END }
}

/// Whether there is a record of the pages that are written to `memory`.
pub fn is_tracked(memory: &GuestMemory) -> bool {
    memory.iter().any(|region| Deref::deref(region).bitmap().is_some())
}

/// Has the pages of the `len` bytes from `offset` on, of RAM without the gap, in the page tables: for `write`, those of a
/// file are copied, else they stay shared. It stops where a slot ends; returns how many bytes that are, `None` if the
/// host refuses or there is no such RAM.
pub fn populate(memory: &GuestMemory, mut offset: u64, len: u64, write: bool) -> Option<u64> {
    let (advice, name) = match write {
        true => (libc::MADV_POPULATE_WRITE, "MADV_POPULATE_WRITE"),
        false => (libc::MADV_POPULATE_READ, "MADV_POPULATE_READ"),
    };
    for region in memory.iter() {
        if let Some(left) = region.len().checked_sub(offset).filter(|&left| left > 0) {
            let len = len.min(left);
            let slice = region.get_slice(MemoryRegionAddress(offset), usize::try_from(len).ok()?).ok()?;
            return advise(&slice, advice, name).ok().map(|()| len);
        }
        offset -= region.len();
    }
    None
}

/// Memory of the given pieces, for tests.
#[cfg(any(test, fuzzing))]
pub fn pieces(pieces: &[(u64, u64)]) -> GuestMemory {
    let regions = pieces.iter().map(|&(gpa, size)| reserve(gpa, size, HugePages::None, None).unwrap());
    GuestMemory::from_regions(regions.collect()).unwrap()
}

/// Splits `size` bytes of RAM around the MMIO gap and into slots KVM can take.
fn ranges(size: u64) -> impl Iterator<Item = (u64, u64)> {
    let low = size.min(MMIO_GAP_START);
    let high = size - low;
    let pieces = (0..high).step_by(MAX_SLOT_SIZE as usize);
    let above = pieces.map(move |at| (MMIO_GAP_END + at, (high - at).min(MAX_SLOT_SIZE)));
    std::iter::once((0, low)).chain(above)
}

fn reserve(gpa: u64, size: u64, huge_pages: HugePages, written: Written) -> Result<Region, Error> {
    let backing = match huge_pages {
        HugePages::Size2M => libc::MAP_HUGETLB | libc::MAP_HUGE_2MB,
        HugePages::None | HugePages::Transparent => libc::MAP_NORESERVE,
    };
    let region = usize::try_from(size).map_err(|_| MmapRegionError::InvalidOffsetLength).and_then(|size| {
        MmapRegionBuilder::new_with_bitmap(size, written)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | backing)
            .with_hugetlbfs(huge_pages == HugePages::Size2M)
            .build()
    });
    let region = region.map_err(|source| Error::Reserve { size, source })?;
    let region = GuestRegionMmap::new(region, GuestAddress(gpa)).ok_or(Error::OutsideRam { gpa, len: size })?;
    let slice = region.as_volatile_slice().map_err(|_| Error::OutsideRam { gpa, len: size })?;
    advise(&slice, libc::MADV_DONTDUMP, "MADV_DONTDUMP")?;
    if huge_pages == HugePages::Transparent {
        advise(&slice, libc::MADV_HUGEPAGE, "MADV_HUGEPAGE")?;
    }
    Ok(region)
}

fn advise(slice: &Slice<'_>, advice: libc::c_int, name: &'static str) -> Result<(), Error> {
    // SAFETY: the range lies within one of our mappings, and none of the advice used here
    // changes what the memory holds.
    let done = checked(unsafe { libc::madvise(slice.ptr_guard_mut().as_ptr().cast(), slice.len(), advice) });
    done.map(drop).map_err(|source| Error::Advise { advice: name, size: slice.len() as u64, source })
}

#[cfg(test)]
mod tests;
