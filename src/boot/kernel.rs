//! Kernel images: what they are, where they go, how they start.
//!
//! Three formats of entry, told apart by content: an ELF vmlinux with its 64-bit entry, an ELF
//! with a PVH note, and a bzImage (Linux boot protocol ≥ 2.12, 64-bit entry). Every field of an
//! image is hostile until it is checked; nothing is written before all of it is.

mod bzimage;
mod elf;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use linux_loader::bootparam::setup_header;

use super::HIGH_MEMORY;
use crate::config::{HugePages, ImageMapping};
use crate::memory::{self, GuestRam, MIB, MMIO_GAP_START, PAGE_SIZE};

/// Why a kernel or initrd cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not something with a size and an offset.
    #[error("the {what} is not a regular file")]
    NotAFile {
        /// Kernel or initrd.
        what: &'static str,
    },
    /// Reading failed.
    #[error("cannot read the {what}")]
    Read {
        /// The part that was read.
        what: &'static str,
        /// The host's reason.
        #[source]
        source: io::Error,
    },
    /// Neither ELF nor bzImage.
    #[error("the kernel is neither an ELF file nor a bzImage")]
    UnknownFormat,
    /// An ELF file of the wrong kind.
    #[error("the kernel is not a 64-bit little-endian x86-64 ELF executable")]
    WrongElf,
    /// A bzImage that is too old or for another processor mode.
    #[error("the bzImage lacks {what}")]
    OldBzImage {
        /// What is missing.
        what: &'static str,
    },
    /// A field of a header contradicts the file or the machine.
    #[error("the kernel's {what} is not valid: {value:#x}")]
    Header {
        /// Which field.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// A piece of the kernel that cannot be RAM.
    #[error("the kernel wants {size:#x} bytes at {gpa:#x}, outside of {HIGH_MEMORY:#x}..{MMIO_GAP_START:#x}")]
    SegmentOutside {
        /// Guest physical address.
        gpa: u64,
        /// Bytes.
        size: u64,
    },
    /// Two pieces in one place.
    #[error("two segments of the kernel overlap at {gpa:#x}")]
    SegmentsOverlap {
        /// Start of the second.
        gpa: u64,
    },
    /// The kernel cannot be entered.
    #[error("the kernel has no entry point within what it loads")]
    NoEntry,
    /// An initrd without content.
    #[error("the initrd is empty")]
    EmptyInitrd,
    /// More than any amount of memory could hold where it must be.
    #[error("kernel and initrd together need {needed_mib} MiB below {limit:#x}")]
    TooLarge {
        /// MiB from address 0.
        needed_mib: u64,
        /// The first address they may not use.
        limit: u64,
    },
    /// Too little guest memory.
    #[error("the kernel and its initrd need at least {needed_mib} MiB of guest memory, mem_size_mib is {have_mib}")]
    MemoryTooSmall {
        /// MiB that would do.
        needed_mib: u64,
        /// MiB configured.
        have_mib: u64,
    },
    /// Loading failed.
    #[error("cannot load the {what}")]
    Load {
        /// Kernel or initrd.
        what: &'static str,
        /// Why.
        #[source]
        source: memory::Error,
    },
}

/// Where and how the boot vCPU starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Long mode with identity-mapped page tables; `rsi` = [`super::ZERO_PAGE`].
    Linux64 {
        /// Instruction pointer.
        rip: u64,
    },
    /// 32-bit protected mode without paging; `ebx` = [`super::PVH_START_INFO`].
    Pvh {
        /// Instruction pointer.
        eip: u32,
    },
}

/// A piece of a kernel: `file_size` bytes at `offset` go to `gpa`, zeroes follow up to `size`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    gpa: u64,
    size: u64,
    offset: u64,
    file_size: u64,
}

/// What a kernel image says about itself, checked.
#[derive(Debug, Clone)]
pub struct KernelInfo {
    /// The 64-bit entry point, if it lies within what is loaded.
    pub linux64: Option<u64>,
    /// The PVH entry point, if there is one within what is loaded.
    pub pvh: Option<u32>,
    /// Carries Linux's own ELF notes, or is a bzImage.
    pub is_linux: bool,
    /// The first address after the memory it occupies when it starts.
    pub end: u64,
    /// The setup header of a bzImage, for the zero page.
    pub setup_header: Option<setup_header>,
    segments: Vec<Segment>,
}

/// What to load and how.
#[derive(Debug, Clone, Copy)]
pub struct Images<'a> {
    /// An ELF file or a bzImage.
    pub kernel: &'a File,
    /// An initial RAM disk.
    pub initrd: Option<&'a File>,
    /// Map from the files, or copy. Guest RAM on huge pages is always copied to.
    pub mapping: ImageMapping,
}

/// A kernel and its initrd in guest RAM.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// Where to start.
    pub entry: Entry,
    /// Guest physical address and bytes of the initrd.
    pub initrd: Option<(u64, u64)>,
    /// The first address after the memory the kernel occupies when it starts.
    pub kernel_end: u64,
    /// The setup header of a bzImage, for the zero page.
    pub setup_header: Option<setup_header>,
}

/// Reads and checks a kernel's headers.
///
/// # Errors
/// Not a regular file, unreadable, not a kernel, or one that contradicts itself.
pub fn inspect(kernel: &File) -> Result<KernelInfo, Error> {
    let file_len = regular_len(kernel, "kernel")?;
    let mut magic = [0; 4];
    if file_len >= magic.len() as u64 {
        read_at(kernel, &mut magic, 0, "kernel")?;
    }
    let is_elf = magic == *b"\x7fELF";
    let info = if is_elf { elf::inspect(kernel, file_len) } else { bzimage::inspect(kernel, file_len) }?;
    if info.entry().is_some() { Ok(info) } else { Err(Error::NoEntry) }
}

/// Loads a kernel and its initrd into guest RAM: the kernel where it wants to be, the initrd as
/// high as it may be. Everything is checked before anything is written.
///
/// # Errors
/// As [`inspect`], and: too little memory, or the host fails to map or read.
pub fn load(ram: &GuestRam, images: &Images<'_>) -> Result<Loaded, Error> {
    let kernel = inspect(images.kernel)?;
    let entry = kernel.entry().ok_or(Error::NoEntry)?;
    let initrd = match images.initrd {
        Some(file) => Some((file, place_initrd(ram, &kernel, regular_len(file, "initrd")?)?)),
        None => None,
    };
    check_memory(ram, kernel.end, MMIO_GAP_START)?;

    let mapping = if ram.huge_pages() == HugePages::None { images.mapping } else { ImageMapping::Private };
    for segment in &kernel.segments {
        fill(ram, images.kernel, segment, mapping).map_err(|source| Error::Load { what: "kernel", source })?;
    }
    if let Some((file, piece)) = &initrd {
        fill(ram, file, piece, mapping).map_err(|source| Error::Load { what: "initrd", source })?;
    }
    Ok(Loaded {
        entry,
        initrd: initrd.map(|(_, piece)| (piece.gpa, piece.size)),
        kernel_end: kernel.end,
        setup_header: kernel.setup_header,
    })
}

impl KernelInfo {
    /// Checks the segments against the file and each other.
    fn new(mut segments: Vec<Segment>, file_len: u64) -> Result<Self, Error> {
        segments.retain(|s| s.size > 0);
        segments.sort_unstable_by_key(|s| s.gpa);
        let mut end = HIGH_MEMORY;
        for s in &segments {
            if s.file_size > s.size {
                return Err(Error::Header { what: "segment file size", value: s.file_size });
            }
            if s.offset.checked_add(s.file_size).is_none_or(|end| end > file_len) {
                return Err(Error::Header { what: "segment file offset", value: s.offset });
            }
            let outside = Error::SegmentOutside { gpa: s.gpa, size: s.size };
            let Some(segment_end) = s.gpa.checked_add(s.size) else { return Err(outside) };
            if s.gpa < HIGH_MEMORY || segment_end > MMIO_GAP_START {
                return Err(outside);
            }
            if s.gpa < end {
                return Err(Error::SegmentsOverlap { gpa: s.gpa });
            }
            end = segment_end;
        }
        Ok(Self { linux64: None, pvh: None, is_linux: false, end, setup_header: None, segments })
    }

    fn loads(&self, gpa: u64) -> bool {
        self.segments.iter().any(|s| (s.gpa..s.gpa + s.file_size).contains(&gpa))
    }

    fn entry(&self) -> Option<Entry> {
        let linux64 = self.linux64.map(|rip| Entry::Linux64 { rip });
        let pvh = self.pvh.map(|eip| Entry::Pvh { eip });
        // The entry point of a kernel that is not Linux may expect any processor mode, so a PVH note says more about it.
        if self.is_linux { linux64.or(pvh) } else { pvh.or(linux64) }
    }
}

/// Where the initrd goes: the highest page-aligned place below the end of low RAM and below what
/// the kernel can address.
fn place_initrd(ram: &GuestRam, kernel: &KernelInfo, len: u64) -> Result<Segment, Error> {
    if len == 0 {
        return Err(Error::EmptyInitrd);
    }
    // A bzImage says how far it can see; other kernels see all of low RAM.
    let seen = kernel.setup_header.map_or(MMIO_GAP_START, |header| u64::from(header.initrd_addr_max) + 1);
    let limit = seen.min(MMIO_GAP_START);
    // Neither sum overflows: a kernel ends below 4 GiB and a file is shorter than 2^63 bytes.
    check_memory(ram, kernel.end.next_multiple_of(PAGE_SIZE) + len.next_multiple_of(PAGE_SIZE), limit)?;
    let top = ram.low_end().min(limit);
    let gpa = top - top % PAGE_SIZE - len.next_multiple_of(PAGE_SIZE);
    Ok(Segment { gpa, size: len, offset: 0, file_size: len })
}

/// Checks that RAM from 0 to `needed` may exist (it ends before `limit`) and does.
fn check_memory(ram: &GuestRam, needed: u64, limit: u64) -> Result<(), Error> {
    let needed_mib = needed.div_ceil(MIB);
    if needed > limit - limit % PAGE_SIZE {
        return Err(Error::TooLarge { needed_mib, limit });
    }
    if needed > ram.low_end() {
        return Err(Error::MemoryTooSmall { needed_mib, have_mib: ram.size() / MIB });
    }
    Ok(())
}

/// Puts a piece of a file into RAM, which is zero before.
fn fill(ram: &GuestRam, file: &File, s: &Segment, mapping: ImageMapping) -> Result<(), memory::Error> {
    let end = s.gpa + s.file_size;
    let (first, last) = (s.gpa.next_multiple_of(PAGE_SIZE), end - end % PAGE_SIZE);
    let congruent = s.gpa % PAGE_SIZE == s.offset % PAGE_SIZE;
    if mapping == ImageMapping::Private || !congruent || first >= last {
        ram.populate(s.gpa, s.file_size)?;
        return ram.read_file(s.gpa, file, s.offset, s.file_size);
    }
    // Pages at the edges may belong to two segments, or end in what must be zero: copy those.
    let at = |gpa: u64| s.offset + (gpa - s.gpa);
    ram.read_file(s.gpa, file, s.offset, first - s.gpa)?;
    ram.map_file(first, file, at(first), last - first)?;
    ram.read_file(last, file, at(last), end - last)
}

fn regular_len(file: &File, what: &'static str) -> Result<u64, Error> {
    let metadata = file.metadata().map_err(|source| Error::Read { what, source })?;
    if metadata.is_file() { Ok(metadata.len()) } else { Err(Error::NotAFile { what }) }
}

fn read_at(file: &File, buf: &mut [u8], offset: u64, what: &'static str) -> Result<(), Error> {
    file.read_exact_at(buf, offset).map_err(|source| Error::Read { what, source })
}

#[cfg(any(test, fuzzing))]
pub(crate) mod tests;
