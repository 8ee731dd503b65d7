//! The host file behind a drive. Always raw: its content is never looked at.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use virtio_bindings::virtio_blk::VIRTIO_BLK_ID_BYTES;

use super::Error;
use super::overlay::{Overlay, OverlayFiles, Place};

/// The unit of capacity and of request addresses, whatever the device's block size (virtio 1.2 §5.2.4).
pub(super) const SECTOR_SIZE: u64 = 512;

/// Bytes of a device id, padded with NULs.
pub(super) const ID_SIZE: usize = VIRTIO_BLK_ID_BYTES as usize;

/// What a drive stands on, opened by whoever is allowed to.
#[derive(Debug)]
pub struct Backend {
    /// For reading, and for writing unless the drive is read-only or has an overlay.
    pub file: File,
    /// Takes the writes instead.
    pub overlay: Option<OverlayFiles>,
}

impl From<File> for Backend {
    fn from(file: File) -> Self {
        Self { file, overlay: None }
    }
}

impl Backend {
    /// The same files once more.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        let overlay = self.overlay.as_ref().map(OverlayFiles::try_clone).transpose()?;
        Ok(Self { file: self.file.try_clone()?, overlay })
    }
}

/// An open backing file and what was learnt from it.
#[derive(Debug)]
pub(super) struct Disk {
    pub(super) file: File,
    pub(super) overlay: Option<Overlay>,
    /// Capacity.
    pub(super) sectors: u64,
    /// Answer to GET_ID.
    pub(super) id: [u8; ID_SIZE],
}

impl Disk {
    /// Takes size and identity of the file, a regular file or a block device.
    pub(super) fn new(backend: Backend, drive_id: &str) -> Result<Self, Error> {
        let Backend { mut file, overlay } = backend;
        let metadata = file.metadata().map_err(Error::Identify)?;
        if !metadata.is_file() && !metadata.file_type().is_block_device() {
            return Err(Error::NotADisk);
        }
        // Of a block device the metadata knows no size, but its end can be sought.
        let size = file.seek(SeekFrom::End(0)).map_err(Error::Identify)?;
        if size % SECTOR_SIZE != 0 {
            log::warn!("drive {drive_id}: its size of {size} bytes is rounded down to whole 512-byte sectors");
        }
        let identity = format!("{}{}{}", metadata.dev(), metadata.rdev(), metadata.ino());
        let mut id = [0; ID_SIZE];
        for (to, from) in id.iter_mut().zip(identity.bytes()) {
            *to = from;
        }
        let sectors = size / SECTOR_SIZE;
        let overlay = overlay.map(|files| Overlay::new(files, sectors)).transpose().map_err(Error::Overlay)?;
        Ok(Self { file, overlay, sectors, id })
    }

    /// All files, in the order of their [`Place`]s.
    pub(super) fn descriptors(&self) -> Vec<RawFd> {
        let layers = self.overlay.iter().flat_map(Overlay::files);
        std::iter::once(&self.file).chain(layers).map(AsRawFd::as_raw_fd).collect()
    }

    /// The file at `place`.
    pub(super) fn file_at(&self, place: Place) -> &File {
        self.overlay.as_ref().and_then(|overlay| overlay.file(place)).unwrap_or(&self.file)
    }

    /// Which file to read for the drive's byte `offset`, where, and for how many of `length` bytes.
    pub(super) fn find(&self, offset: u64, length: u64) -> (Place, u64, u64) {
        match &self.overlay {
            None => (Place::Base, offset, length),
            Some(overlay) => overlay.find(offset, length),
        }
    }

    /// Which file to write for the drive's byte `offset`, and where.
    pub(super) fn target(&self, offset: u64) -> (Place, u64) {
        match &self.overlay {
            None => (Place::Base, offset),
            Some(overlay) => (Place::Upper, overlay.target(offset)),
        }
    }

    /// A range was written, freed or zeroed.
    pub(super) fn wrote(&mut self, offset: u64, length: u64) {
        if let Some(overlay) = &mut self.overlay {
            overlay.wrote(offset, length);
        }
    }

    /// The byte range of `count` bytes at `sector`, if it is within the capacity.
    pub(super) fn offset(&self, sector: u64, count: u64) -> Option<u64> {
        let end = sector.checked_add(count.div_ceil(SECTOR_SIZE))?;
        // The capacity in bytes is a file offset, so no product overflows.
        (end <= self.sectors).then(|| sector * SECTOR_SIZE)
    }
}
