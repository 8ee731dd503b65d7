//! Copy on write: what the guest writes goes to a layer of its own, what it did not write is read from
//! below, where nothing ever changes.
//!
//! ```text
//!  reads ──▶ upper: what this guest wrote
//!              └─ not there ──▶ lower: what it had written when the snapshot was made
//!                                 └─ not there ──▶ base: path_on_host, of any number of guests
//! ```

use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::FileExt;

use super::bitmap::Bitmap;
use super::disk::SECTOR_SIZE;
use super::layer::{Layer, LayerError, LayerId};

/// Which of a drive's files; the number is the file's place in the Async engine's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// The file at path_on_host.
    Base = 0,
    /// What the guest wrote.
    Upper = 1,
    /// What was written when the snapshot was made.
    Lower = 2,
}

/// The files of an overlay, opened by whoever is allowed to.
#[derive(Debug)]
pub struct OverlayFiles {
    /// Takes the guest's writes.
    pub upper: File,
    /// The upper file is a layer that has a path, where what was flushed is found afterwards; this is the
    /// same file, opened once more. `None` if nobody finds it again: it is emptied.
    ///
    /// Its lock is on this, as io_uring keeps `upper` open for a moment after the process is gone.
    pub lasting: Option<File>,
    /// The upper layer must be empty.
    pub fresh: bool,
    /// A snapshot's layer, and the snapshot's id.
    pub lower: Option<(File, LayerId)>,
}

impl OverlayFiles {
    /// The same files once more.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        let lower = self.lower.as_ref().map(|(file, id)| Ok::<_, io::Error>((file.try_clone()?, *id))).transpose()?;
        let lasting = self.lasting.as_ref().map(File::try_clone).transpose()?;
        Ok(Self { upper: self.upper.try_clone()?, lasting, fresh: self.fresh, lower })
    }
}

/// Buffer of [`Overlay::copy_to`].
const COPY: usize = 256 << 10;
/// What is looked at for zeroes, which a copy leaves out, and written in one call.
const PIECE: usize = 32 << 10;

/// The layers above a drive's base.
#[derive(Debug)]
pub(super) struct Overlay {
    upper: Layer,
    lower: Option<Layer>,
    /// What the upper layer's file says that it has; `None` if nobody will ask it.
    saved: Option<Bitmap>,
    /// Of the drive.
    sectors: u64,
    /// Held as long as the file is open here.
    _lock: Option<File>,
}

impl Overlay {
    /// The layers of a drive of `sectors`.
    pub(super) fn new(files: OverlayFiles, sectors: u64) -> Result<Self, LayerError> {
        let OverlayFiles { upper, lasting, fresh, lower } = files;
        let lower = lower.map(|(file, id)| Layer::open(file, sectors, id)).transpose()?;
        let Some(lasting) = lasting else {
            return Ok(Self { upper: Layer::temporary(upper, sectors)?, lower, saved: None, sectors, _lock: None });
        };
        lasting.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => LayerError::InUse,
            TryLockError::Error(source) => LayerError::Io("lock it", source),
        })?;
        let length = upper.metadata().map_err(|source| LayerError::Io("look at it", source))?.len();
        let upper = match length {
            0 => Layer::create(upper, sectors, LayerId::default())?,
            _ => Layer::open(upper, sectors, LayerId::default())?,
        };
        upper.complete()?;
        if fresh && upper.sectors.count() > 0 {
            return Err(LayerError::NotEmpty);
        }
        Ok(Self { saved: Some(upper.sectors.clone()), upper, lower, sectors, _lock: Some(lasting) })
    }

    /// Its files but the base, in the order of their places.
    pub(super) fn files(&self) -> impl Iterator<Item = &File> {
        std::iter::once(&self.upper.file).chain(self.lower.as_ref().map(|lower| &lower.file))
    }

    /// The file at `place`, if it is not the base.
    pub(super) fn file(&self, place: Place) -> Option<&File> {
        match place {
            Place::Base => None,
            Place::Upper => Some(&self.upper.file),
            Place::Lower => self.lower.as_ref().map(|lower| &lower.file),
        }
    }

    /// Where the drive's byte `offset` is to be read, and how many of the `length` bytes from there on
    /// follow it.
    pub(super) fn find(&self, offset: u64, length: u64) -> (Place, u64, u64) {
        let first = offset / SECTOR_SIZE;
        let count = (offset + length).div_ceil(SECTOR_SIZE) - first;
        let within = |count: u64| ((first + count) * SECTOR_SIZE - offset).min(length);
        let (in_upper, count) = self.upper.sectors.run(first, count);
        if in_upper {
            return (Place::Upper, self.upper.start + offset, within(count));
        }
        let Some(lower) = &self.lower else { return (Place::Base, offset, within(count)) };
        match lower.sectors.run(first, count) {
            (true, count) => (Place::Lower, lower.start + offset, within(count)),
            (false, count) => (Place::Base, offset, within(count)),
        }
    }

    /// Where the drive's byte `offset` is to be written.
    pub(super) fn target(&self, offset: u64) -> u64 {
        self.upper.start + offset
    }

    /// Whole sectors have been written.
    pub(super) fn wrote(&mut self, offset: u64, length: u64) {
        self.upper.sectors.set(offset / SECTOR_SIZE, length / SECTOR_SIZE);
    }

    /// Bytes that the guest has written, each counted once.
    pub(super) fn bytes(&self) -> u64 {
        self.upper.sectors.count() * SECTOR_SIZE
    }

    /// Whether anybody will look for what was flushed; otherwise a flush has nothing to do.
    pub(super) fn is_lasting(&self) -> bool {
        self.saved.is_some()
    }

    /// What a flush has to announce once the data is on disk.
    pub(super) fn unsaved(&self) -> Bitmap {
        self.saved.as_ref().map(|saved| self.upper.sectors.beyond(saved)).unwrap_or_default()
    }

    /// Announces in the file what [`Self::unsaved`] said, since which nothing else was announced.
    pub(super) fn save(&mut self, unsaved: &Bitmap) -> io::Result<()> {
        let Some(saved) = &mut self.saved else { return Ok(()) };
        self.upper.write_bitmap(unsaved)?;
        saved.merge(unsaved);
        Ok(())
    }

    /// A flush that waits, for when nothing else is to be done.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        let unsaved = self.unsaved();
        if unsaved.count() == 0 {
            return Ok(());
        }
        self.upper.file.sync_data()?;
        self.save(&unsaved)
    }

    /// Forgets what the guest wrote.
    pub(super) fn clear(&mut self) -> Result<(), LayerError> {
        self.saved = self.saved.take().map(|_| Bitmap::default());
        self.upper.clear()
    }

    /// Writes what is not in the base to `file`, which is empty, as one layer.
    pub(super) fn copy_to(&self, file: &File, id: LayerId) -> Result<(), LayerError> {
        let file = file.try_clone().map_err(|source| LayerError::Io("duplicate its descriptor", source))?;
        let mut copy = Layer::create(file, self.sectors, id)?;
        copy.sectors.merge(&self.upper.sectors);
        if let Some(lower) = &self.lower {
            copy.sectors.merge(&lower.sectors);
        }
        let mut buffer = vec![0; COPY];
        for (start, count) in copy.sectors.runs(self.sectors) {
            let (mut at, end) = (start * SECTOR_SIZE, (start + count) * SECTOR_SIZE);
            while at < end {
                let (place, from, length) = self.find(at, (end - at).min(COPY as u64));
                let Some(source) = self.file(place) else { break };
                let piece = &mut buffer[..length as usize];
                source
                    .read_exact_at(piece, from)
                    .map_err(|source| LayerError::Io("read what it is to hold", source))?;
                write_sparsely(&copy, at, piece).map_err(|source| LayerError::Io("write it", source))?;
                at += length;
            }
        }
        copy.write_bitmap(&copy.sectors).map_err(|source| LayerError::Io("write it", source))
    }
}

/// Writes `data` to a new layer; pieces that are all zeroes stay holes.
fn write_sparsely(layer: &Layer, offset: u64, data: &[u8]) -> io::Result<()> {
    for (piece, at) in data.chunks(PIECE).zip((layer.start + offset..).step_by(PIECE)) {
        if piece.iter().any(|byte| *byte != 0) {
            layer.file.write_all_at(piece, at)?;
        }
    }
    Ok(())
}

#[cfg(any(test, fuzzing))]
pub(crate) mod tests_random {
    use proptest::prelude::*;

    use super::super::bitmap::CHUNK_BYTES;
    use super::super::layer::HEADER;
    use super::*;
    use crate::generated::{Change, change, changes, inputs, properties};

    const ID: LayerId = [7; 16];
    /// Not a whole number of words of the bitmap.
    const SECTORS: u64 = 200;

    /// A layer with a few sectors whose header and bitmap were changed.
    fn forged(id: LayerId, header: &[Change], bitmap: &[Change], length: Option<u64>) -> File {
        let mut layer = Layer::create(tempfile::tempfile().unwrap(), SECTORS, id).unwrap();
        for (start, count) in [(0, 1), (60, 10), (SECTORS - 1, 1)] {
            layer.sectors.set(start, count);
        }
        layer.write_bitmap(&layer.sectors).unwrap();
        for (at, size, changes) in [(0, 40, header), (HEADER, SECTORS.div_ceil(8) + 8, bitmap)] {
            let mut bytes = vec![0; size as usize];
            layer.file.read_exact_at(&mut bytes, at).unwrap();
            change(&mut bytes, changes);
            bytes.truncate(if at == 0 { HEADER } else { CHUNK_BYTES } as usize);
            layer.file.write_all_at(&bytes, at).unwrap();
        }
        length.into_iter().for_each(|length| layer.file.set_len(length).unwrap());
        layer.file
    }

    properties! {
        #![proptest_config(inputs(100))]

        /// It is refused, or every byte of the drive is in one of the files, at a place that belongs to the drive.
        #[test]
        fn forged_layers_show_the_drive_and_nothing_else(
            (upper_header, upper_bitmap, lower_header, lower_bitmap) in (changes(), changes(), changes(), changes()),
            length in prop::option::weighted(0.2, 0..120_000u64),
            intact in prop::bool::weighted(0.8),
        ) {
            let header = |changes: Vec<Change>| if intact { Vec::new() } else { changes };
            let upper = forged(LayerId::default(), &header(upper_header), &upper_bitmap, length);
            let lower = forged(ID, &header(lower_header), &lower_bitmap, length);
            let lasting = Some(tempfile::tempfile().unwrap());
            let Ok(overlay) = Overlay::new(OverlayFiles { upper, lasting, fresh: false, lower: Some((lower, ID)) }, SECTORS)
            else {
                return Ok(());
            };
            let (mut at, end) = (0, SECTORS * SECTOR_SIZE);
            while at < end {
                let (place, from, length) = overlay.find(at, end - at);
                prop_assert!(length > 0 && length.is_multiple_of(SECTOR_SIZE) && length <= end - at, "{length} at {at}");
                let start = if place == Place::Base { 0 } else { HEADER + CHUNK_BYTES };
                prop_assert_eq!(from, start + at);
                at += length;
            }
            // What it has is read back, or cannot be read; it fits in a file that has the drive's size.
            let copy = tempfile::tempfile().unwrap();
            if overlay.copy_to(&copy, ID).is_ok() {
                prop_assert_eq!(copy.metadata().unwrap().len(), HEADER + CHUNK_BYTES + end);
            }
        }
    }
}
