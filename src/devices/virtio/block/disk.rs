//! The host file behind a drive. Always raw: its content is never looked at.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use virtio_bindings::virtio_blk::VIRTIO_BLK_ID_BYTES;

use super::Error;

/// The unit of capacity and of request addresses, whatever the device's block size (virtio 1.2 §5.2.4).
pub(super) const SECTOR_SIZE: u64 = 512;

/// Bytes of a device id, padded with NULs.
pub(super) const ID_SIZE: usize = VIRTIO_BLK_ID_BYTES as usize;

/// An open backing file and what was learnt from it.
#[derive(Debug)]
pub(super) struct Disk {
    pub(super) file: File,
    /// Capacity.
    pub(super) sectors: u64,
    /// Answer to GET_ID.
    pub(super) id: [u8; ID_SIZE],
}

impl Disk {
    /// Takes size and identity of `file`, a regular file or a block device.
    pub(super) fn new(mut file: File, drive_id: &str) -> Result<Self, Error> {
        let identify = |source| Error::Identify { drive: drive_id.to_owned(), source };
        let metadata = file.metadata().map_err(identify)?;
        if !metadata.is_file() && !metadata.file_type().is_block_device() {
            return Err(Error::NotADisk { drive: drive_id.to_owned() });
        }
        // Of a block device the metadata knows no size, but its end can be sought.
        let size = file.seek(SeekFrom::End(0)).map_err(identify)?;
        if size % SECTOR_SIZE != 0 {
            log::warn!("drive {drive_id}: its size of {size} bytes is rounded down to whole 512-byte sectors");
        }
        let identity = format!("{}{}{}", metadata.dev(), metadata.rdev(), metadata.ino());
        let mut id = [0; ID_SIZE];
        for (to, from) in id.iter_mut().zip(identity.bytes()) {
            *to = from;
        }
        Ok(Self { file, sectors: size / SECTOR_SIZE, id })
    }

    /// The byte range of `count` bytes at `sector`, if it is within the capacity.
    pub(super) fn offset(&self, sector: u64, count: u64) -> Option<u64> {
        let end = sector.checked_add(count.div_ceil(SECTOR_SIZE))?;
        // The capacity in bytes is a file offset, so no product overflows.
        (end <= self.sectors).then(|| sector * SECTOR_SIZE)
    }
}

/// A system call's result as a byte count.
pub(super) fn check(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
