//! A layer: those sectors of a drive that are not as they are below it, in a sparse file.
//!
//! ```text
//!  offset  0  magic "VSCLLAYR"       4096  a bit for each sector, lowest first: it is here
//!          8  format version  u32       d  the sectors: number n is at d + 512 n
//!         12  sector size     u32
//!         16  drive's size    u64    d is 4096, and 4096 more for every 16 MiB of the drive or part of them.
//!         24  id, 16 bytes           Numbers are little-endian.
//! ```
//!
//! A bit for each sector and not for each block of 4096 bytes: the guest writes whole sectors, so a write
//! never has to fetch the rest of a block from below first, which two writes at a time would do over each
//! other. The bitmap is written after the data that it announces is on disk.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::bitmap::{Bitmap, CHUNK_BYTES, CHUNK_SECTORS};
use super::disk::SECTOR_SIZE;
use crate::os::seek;

const MAGIC: [u8; 8] = *b"VSCLLAYR";
const VERSION: u32 = 1;
/// Where the bitmap begins.
pub(super) const HEADER: u64 = 4096;

/// Whose layer it is: the snapshot's id, or nobody's, all zeroes.
pub type LayerId = [u8; 16];

/// Why a file cannot be a layer.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// A call failed.
    #[error("cannot {0}")]
    Io(&'static str, #[source] io::Error),
    /// It begins differently.
    #[error("it is not a drive's layer")]
    Magic,
    /// Of another release.
    #[error("it has format version {0}; this release reads version {VERSION}")]
    Version(u32),
    /// The drive has got longer or shorter since, or it is another one.
    #[error("it is a layer of a drive of {found} bytes, and this one has {expected}")]
    Size {
        /// By its header.
        found: u64,
        /// The drive's.
        expected: u64,
    },
    /// It belongs to another state file, or is part of a snapshot and must not be written.
    #[error("it belongs to another snapshot")]
    OtherSnapshot,
    /// Somebody writes to it, or reads what is to be written.
    #[error("it is in use by another drive")]
    InUse,
    /// The guest's memory would know nothing of it.
    #[error("it holds what a guest wrote, which the guest of this snapshot did not; name a new file")]
    NotEmpty,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) file: File,
    /// The sectors it has.
    pub(super) sectors: Bitmap,
    /// Where sector 0 would be in the file.
    pub(super) start: u64,
    /// Length of the file.
    length: u64,
}

impl Layer {
    /// An empty layer of a drive of `sectors` in a file that nobody will open again: it has no header.
    pub(super) fn temporary(file: File, sectors: u64) -> Result<Self, LayerError> {
        let mut layer = Self { file, sectors: Bitmap::default(), start: 0, length: sectors * SECTOR_SIZE };
        layer.clear()?;
        Ok(layer)
    }

    /// An empty layer, in an empty file.
    pub(super) fn create(file: File, sectors: u64, id: LayerId) -> Result<Self, LayerError> {
        let header = [
            &MAGIC[..],
            &VERSION.to_le_bytes(),
            &(SECTOR_SIZE as u32).to_le_bytes(),
            &(sectors * SECTOR_SIZE).to_le_bytes(),
            &id,
        ];
        file.write_all_at(&header.concat(), 0).map_err(|source| LayerError::Io("write its header", source))?;
        let mut layer = Self::laid_out(file, sectors);
        layer.clear()?;
        Ok(layer)
    }

    /// The layer in a file that may have been written by anybody; its content is not looked at. Sectors
    /// that it claims beyond the drive's are nobody's.
    pub(super) fn open(file: File, sectors: u64, id: LayerId) -> Result<Self, LayerError> {
        let mut header = [0; 40];
        file.read_exact_at(&mut header, 0).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => LayerError::Magic,
            _ => LayerError::Io("read its header", error),
        })?;
        let [version, _] = [8, 12].map(|at| u32::from_le_bytes(std::array::from_fn(|i| header[at + i])));
        let found = u64::from_le_bytes(std::array::from_fn(|i| header[16 + i]));
        if header[..8] != MAGIC {
            return Err(LayerError::Magic);
        }
        if version != VERSION {
            return Err(LayerError::Version(version));
        }
        if found != sectors * SECTOR_SIZE {
            return Err(LayerError::Size { found, expected: sectors * SECTOR_SIZE });
        }
        if header[24..] != id {
            return Err(LayerError::OtherSnapshot);
        }
        let mut layer = Self::laid_out(file, sectors);
        layer.read_bitmap().map_err(|source| LayerError::Io("read its bitmap", source))?;
        Ok(layer)
    }

    fn laid_out(file: File, sectors: u64) -> Self {
        let start = HEADER + sectors.div_ceil(CHUNK_SECTORS) * CHUNK_BYTES;
        Self { file, sectors: Bitmap::default(), start, length: start + sectors * SECTOR_SIZE }
    }

    /// Empties it.
    pub(super) fn clear(&mut self) -> Result<(), LayerError> {
        self.sectors.clear();
        let keep = if self.start == 0 { 0 } else { HEADER };
        let resized = self.file.set_len(keep).and_then(|()| self.file.set_len(self.length));
        resized.map_err(|source| LayerError::Io("set its size", source))
    }

    /// Has its full length, which a process that died may not have given it.
    pub(super) fn complete(&self) -> Result<(), LayerError> {
        let fail = |source| LayerError::Io("set its size", source);
        if self.file.metadata().map_err(fail)?.len() < self.length {
            self.file.set_len(self.length).map_err(fail)?;
        }
        Ok(())
    }

    fn read_bitmap(&mut self) -> io::Result<()> {
        let (mut at, mut bytes) = (HEADER, [0; CHUNK_BYTES as usize]);
        while let Some(data) = seek(&self.file, at, libc::SEEK_DATA)?.filter(|data| *data < self.start) {
            let index = (data.max(HEADER) - HEADER) / CHUNK_BYTES;
            at = HEADER + index * CHUNK_BYTES;
            self.file.read_exact_at(&mut bytes, at)?;
            self.sectors.add_chunk(index, &bytes);
            at += CHUNK_BYTES;
        }
        Ok(())
    }

    /// Writes the chunks of `bitmap` over those of the file.
    pub(super) fn write_bitmap(&self, bitmap: &Bitmap) -> io::Result<()> {
        bitmap.chunks().try_for_each(|(index, bytes)| self.file.write_all_at(&bytes, HEADER + index * CHUNK_BYTES))
    }
}
