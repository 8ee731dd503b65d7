//! The working set of a snapshot (SPEC.md, "Working sets"): the pages that a first run touched.
//!
//! ```text
//!  offset  0  magic "VSCLWSET"          16  id of the snapshot
//!          8  format version  u16       32  runs of pages, 16 bytes each, to the end of the file:
//!         10  zero            u16            offset in the memory file  u64
//!         12  CRC-32 of the rest  u32        length in bytes, and 1 if they were written  u64
//! ```
//!
//! Numbers are little-endian; runs are whole pages, ascend and do not overlap.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;

use super::Id;
use crate::memory::PAGE_SIZE;

/// The format that this release writes, and the only one that it reads.
pub const VERSION: u16 = 1;
/// Most runs in a file.
pub const MAX_RUNS: usize = 1 << 18;

const MAGIC: [u8; 8] = *b"VSCLWSET";
const HEADER: usize = 32;
const RUN: usize = 16;
/// In the length of a run: it was written.
const WRITTEN: u64 = 1;

/// Pages beside each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// Where, as offsets into the memory file.
    pub range: Range<u64>,
    /// Whether they were written.
    pub written: bool,
}

/// Why a file is no working set of a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It begins differently, or too soon ends.
    #[error("it is not a working set")]
    Magic,
    /// Of another release.
    #[error("it has format version {0}; this release reads version {VERSION}")]
    Version(u16),
    /// Some byte is not what was written, or not there.
    #[error("it is damaged: its checksum is {found:#010x}, not {expected:#010x}")]
    Checksum {
        /// Of the file's content.
        found: u32,
        /// In the file.
        expected: u32,
    },
    /// There are more runs than are ever written.
    #[error("it is longer than {MAX_RUNS} runs of pages")]
    TooLong,
    /// Pages of other memory.
    #[error("it belongs to another snapshot than the state file")]
    OtherSnapshot,
    /// No whole pages, out of order, or beyond the end of RAM.
    #[error("its run {index}, {length:#x} bytes at {offset:#x}, is not among the {size:#x} bytes of guest memory")]
    Run {
        /// Which, from 0.
        index: usize,
        /// Where it is said to be.
        offset: u64,
        /// How long.
        length: u64,
        /// Size of guest memory.
        size: u64,
    },
    /// The host does not give it.
    #[error("it cannot be read")]
    Read(#[source] io::Error),
}

/// The content of a file with `runs`, at most [`MAX_RUNS`] and in order, of snapshot `id`.
pub fn encode(id: Id, runs: &[Run]) -> Vec<u8> {
    let mut file = Vec::with_capacity(HEADER + RUN * runs.len());
    file.extend(MAGIC);
    file.extend(VERSION.to_le_bytes());
    file.extend([0; 6]);
    file.extend(id);
    for Run { range, written } in runs {
        file.extend(range.start.to_le_bytes());
        file.extend(((range.end - range.start) | u64::from(*written)).to_le_bytes());
    }
    let checksum = checksum(&file).to_le_bytes();
    file[12..16].copy_from_slice(&checksum);
    file
}

/// The runs in `file`, which may be anything, for the `size` bytes of guest memory of snapshot `id`.
///
/// # Errors
/// It cannot be read, or is not that.
pub fn read(file: &File, id: Id, size: u64) -> Result<Vec<Run>, Error> {
    let most = HEADER + RUN * MAX_RUNS;
    let mut content = Vec::new();
    file.take(most as u64 + 1).read_to_end(&mut content).map_err(Error::Read)?;
    if content.len() > most {
        return Err(Error::TooLong);
    }
    decode(&content, id, size)
}

fn decode(file: &[u8], id: Id, size: u64) -> Result<Vec<Run>, Error> {
    let Some((head, body)) = file.split_first_chunk::<HEADER>() else { return Err(Error::Magic) };
    if !head.starts_with(&MAGIC) {
        return Err(Error::Magic);
    }
    let version = u16::from_le_bytes([head[8], head[9]]);
    if version != VERSION {
        return Err(Error::Version(version));
    }
    let expected = u32::from_le_bytes([head[12], head[13], head[14], head[15]]);
    let found = checksum(file);
    let (pairs, rest) = body.as_chunks::<RUN>();
    if found != expected || !rest.is_empty() {
        return Err(Error::Checksum { found, expected });
    }
    if head[16..] != id {
        return Err(Error::OtherSnapshot);
    }
    let mut end = 0;
    let runs = pairs.iter().enumerate().map(|(index, pair)| {
        let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| pair[at + i]));
        let (offset, length, written) = (number(0), number(8) & !WRITTEN, number(8) & WRITTEN != 0);
        let pages = offset.is_multiple_of(PAGE_SIZE) && length.is_multiple_of(PAGE_SIZE);
        match offset.checked_add(length).filter(|&end| end <= size) {
            Some(stop) if pages && offset >= end && length > 0 => {
                end = stop;
                Ok(Run { range: offset..stop, written })
            }
            _ => Err(Error::Run { index, offset, length, size }),
        }
    });
    runs.collect()
}

fn checksum(file: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&file[..12]);
    hasher.update(&file[16..]);
    hasher.finalize()
}

#[cfg(any(test, fuzzing))]
pub(crate) mod tests {
    use super::*;
    use crate::generated::{change, changes, properties};

    const ID: Id = [7; 16];
    const SIZE: u64 = 64 * PAGE_SIZE;

    fn runs(pages: &[(u64, u64, bool)]) -> Vec<Run> {
        let run = |&(from, to, written): &(u64, u64, bool)| Run { range: from * PAGE_SIZE..to * PAGE_SIZE, written };
        pages.iter().map(run).collect()
    }

    #[test]
    fn what_was_written_is_read() {
        for pages in [&[][..], &[(0, 1, true), (1, 3, false), (60, 64, true)]] {
            assert_eq!(decode(&encode(ID, &runs(pages)), ID, SIZE).unwrap(), runs(pages));
        }
    }

    #[test]
    fn every_damage_is_noticed() {
        let file = encode(ID, &runs(&[(0, 1, true), (2, 3, false)]));
        for at in 0..file.len() {
            for bit in 0..8 {
                let mut damaged = file.clone();
                damaged[at] ^= 1 << bit;
                assert!(decode(&damaged, ID, SIZE).is_err(), "bit {bit} of byte {at}");
            }
            assert!(decode(&file[..at], ID, SIZE).is_err(), "cut at {at}");
        }
        let longer = [&file[..], &[0]].concat();
        assert!(matches!(decode(&longer, ID, SIZE), Err(Error::Checksum { .. })));
    }

    #[test]
    fn what_is_not_this_memory_is_named() {
        let file = encode(ID, &runs(&[(0, 1, true)]));
        assert!(matches!(decode(&file, [8; 16], SIZE), Err(Error::OtherSnapshot)));
        assert!(matches!(decode(b"#!/bin/sh", ID, SIZE), Err(Error::Magic)));
        let mut later = file.clone();
        later[8] = 2;
        assert!(matches!(decode(&later, ID, SIZE), Err(Error::Version(2))));
        for wrong in
            [&[(63, 65, false)][..], &[(2, 3, true), (1, 2, true)], &[(1, 3, true), (2, 4, true)], &[(5, 5, true)]]
        {
            let error = decode(&encode(ID, &runs(wrong)), ID, SIZE).unwrap_err();
            assert!(matches!(error, Error::Run { .. }), "{wrong:?}: {error}");
        }
        let uneven =
            [Run { range: 8..PAGE_SIZE, written: false }, Run { range: u64::MAX - 4095..u64::MAX, written: true }];
        for run in uneven {
            assert!(matches!(decode(&encode(ID, &[run]), ID, SIZE), Err(Error::Run { index: 0, .. })));
        }
    }

    properties! {
        /// What is read of a file whose checksum is right was in it, and is memory.
        #[test]
        fn forged_runs_are_in_memory_and_in_order(changes in changes()) {
            let mut file = encode(ID, &runs(&[(0, 1, true), (1, 3, false), (60, 64, true)]));
            let mut body = file.split_off(16);
            change(&mut body, &changes);
            file.extend(body);
            let checksum = checksum(&file).to_le_bytes();
            file[12..16].copy_from_slice(&checksum);
            if let Ok(runs) = decode(&file, ID, SIZE) {
                assert!(runs.is_sorted_by(|one, next| one.range.end <= next.range.start));
                assert!(runs.iter().all(|run| !run.range.is_empty() && run.range.end <= SIZE));
                assert_eq!(encode(ID, &runs), file);
            }
        }
    }

    #[test]
    fn a_file_without_end_costs_little() {
        let zero = File::open("/dev/zero").unwrap();
        assert!(matches!(read(&zero, ID, SIZE), Err(Error::TooLong)));
    }
}
