//! The state file (SPEC.md, "Snapshot format").
//!
//! ```text
//!  offset  0  magic "VSCLSNAP"        16  snapshot id
//!          8  format version  u16     32  length of the body  u64
//!         10  architecture    u16     40  CRC-32 of bytes 0 to 40 and the body  u32
//!         12  zero            u32     44  body
//! ```
//!
//! Numbers are little-endian. Magic, version, architecture and checksum stand outside the body, so that a
//! file of another release is named as such and is not taken for a broken one.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Id;

/// The format that this release writes, and the only one that it reads.
pub const VERSION: u16 = 2;
/// No state file is as long: 32 vCPUs and 19 devices take a quarter of a megabyte.
pub const MAX_LENGTH: u64 = 1 << 20;

const MAGIC: [u8; 8] = *b"VSCLSNAP";
const X86_64: u16 = 1;
const CHECKED: usize = 40;
const HEADER: usize = 44;

/// Why a file is no state that can be loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It begins differently.
    #[error("it is not a snapshot's state file")]
    Magic,
    /// It ends too early, or goes on.
    #[error("it is {found} bytes long and should be {expected}")]
    Length {
        /// In the file.
        found: usize,
        /// By its header.
        expected: u64,
    },
    /// Of another release.
    #[error("it has format version {0}; this release reads version {VERSION}")]
    Version(u16),
    /// Of another kind of machine.
    #[error("it is of architecture {0}; this is x86_64, number {X86_64}")]
    Architecture(u16),
    /// Some byte is not what was written.
    #[error("it is damaged: its checksum is {found:#010x}, not {expected:#010x}")]
    Checksum {
        /// Of the file's content.
        found: u32,
        /// In the file.
        expected: u32,
    },
    /// The host does not give it.
    #[error("it cannot be read")]
    Read(#[source] io::Error),
    /// The body is not a state.
    #[error("its content makes no sense")]
    Body(#[source] postcard::Error),
}

/// What a state file says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Format version.
    pub version: u16,
    /// The snapshot.
    pub id: Id,
}

/// A file that may be a state file, and as much of its content as a state file can have.
///
/// # Errors
/// The host does not give it.
pub fn read(path: &Path) -> Result<(File, Vec<u8>), Error> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
    let file = file.map_err(Error::Read)?;
    let length = file.metadata().map_err(Error::Read)?.len().min(MAX_LENGTH);
    // A little more, so that one call finds the end.
    let mut content = Vec::with_capacity(length as usize + 64);
    (&file).take(MAX_LENGTH).read_to_end(&mut content).map_err(Error::Read)?;
    Ok((file, content))
}

/// The format version of the state file at `path`, which another release may have written. One of
/// this release's version is checked whole.
///
/// # Errors
/// It cannot be read, or is no state file, or damaged.
pub fn version_of(path: &Path) -> Result<u16, Error> {
    match check(&read(path)?.1) {
        Ok(Header { version, .. }) | Err(Error::Version(version)) => Ok(version),
        Err(error) => Err(error),
    }
}

/// A state file's content.
///
/// # Errors
/// `state` cannot be written down.
pub fn encode(id: Id, state: &impl Serialize) -> Result<Vec<u8>, Error> {
    Ok(seal(id, &postcard::to_allocvec(state).map_err(Error::Body)?))
}

/// The file with this body, which may be anything.
pub fn seal(id: Id, body: &[u8]) -> Vec<u8> {
    let mut file = Vec::with_capacity(HEADER + body.len());
    file.extend(MAGIC);
    file.extend(VERSION.to_le_bytes());
    file.extend(X86_64.to_le_bytes());
    file.extend([0; 4]);
    file.extend(id);
    file.extend((body.len() as u64).to_le_bytes());
    file.extend([0; 4]);
    file.extend(body);
    let checksum = checksum(&file).to_le_bytes();
    file[CHECKED..HEADER].copy_from_slice(&checksum);
    file
}

/// The state in a file's content, which may be anything.
///
/// # Errors
/// It is no state of this release, whole and undamaged.
pub fn decode<T: DeserializeOwned>(file: &[u8]) -> Result<(Header, T), Error> {
    let header = check(file)?;
    let (state, rest) = postcard::take_from_bytes(&file[HEADER..]).map_err(Error::Body)?;
    if !rest.is_empty() {
        return Err(Error::Length { found: file.len(), expected: (file.len() - rest.len()) as u64 });
    }
    Ok((header, state))
}

/// The header of a file whose content is whole and undamaged.
///
/// # Errors
/// As [`decode`], save for the body.
pub fn check(file: &[u8]) -> Result<Header, Error> {
    if !file.starts_with(&MAGIC) {
        return Err(Error::Magic);
    }
    let too_short = Error::Length { found: file.len(), expected: HEADER as u64 };
    let Some(head) = file.first_chunk::<HEADER>() else { return Err(too_short) };
    let version = u16::from_le_bytes([head[8], head[9]]);
    let architecture = u16::from_le_bytes([head[10], head[11]]);
    if version != VERSION {
        return Err(Error::Version(version));
    }
    if architecture != X86_64 {
        return Err(Error::Architecture(architecture));
    }
    let field = |at: usize| -> [u8; 8] { std::array::from_fn(|i| head[at + i]) };
    let expected = u64::from_le_bytes(field(32)).saturating_add(HEADER as u64);
    if file.len() as u64 != expected {
        return Err(Error::Length { found: file.len(), expected });
    }
    let expected = u32::from_le_bytes([head[40], head[41], head[42], head[43]]);
    let found = checksum(file);
    if found != expected {
        return Err(Error::Checksum { found, expected });
    }
    Ok(Header { version, id: std::array::from_fn(|i| head[16 + i]) })
}

fn checksum(file: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&file[..CHECKED]);
    hasher.update(&file[HEADER..]);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATE: (u32, &str, [u64; 3]) = (7, "hello", [1, 2, u64::MAX]);

    #[test]
    fn what_was_written_is_read() {
        let file = encode([9; 16], &STATE).unwrap();
        let (header, state) = decode::<(u32, String, [u64; 3])>(&file).unwrap();
        assert_eq!(header, Header { version: VERSION, id: [9; 16] });
        assert_eq!((state.0, state.1.as_str(), state.2), STATE);
    }

    #[test]
    fn every_damage_is_noticed() {
        let file = encode([9; 16], &STATE).unwrap();
        for at in 0..file.len() {
            for bit in 0..8 {
                let mut damaged = file.clone();
                damaged[at] ^= 1 << bit;
                assert!(check(&damaged).is_err(), "bit {bit} of byte {at}");
            }
            assert!(check(&file[..at]).is_err(), "cut at {at}");
        }
        let longer = [&file[..], &[0]].concat();
        assert!(matches!(check(&longer), Err(Error::Length { .. })));
    }

    #[test]
    fn another_release_or_machine_is_named() {
        let mut file = encode([0; 16], &STATE).unwrap();
        file[8] = 1;
        assert!(matches!(check(&file), Err(Error::Version(1))));
        file[8] = 2;
        file[10] = 2;
        assert!(matches!(check(&file), Err(Error::Architecture(2))));
        assert!(matches!(check(b"#!/bin/sh"), Err(Error::Magic)));
    }

    #[test]
    fn the_version_of_a_file_is_told_whatever_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        assert!(matches!(version_of(&path), Err(Error::Read(_))));
        let mut file = encode([0; 16], &STATE).unwrap();
        for version in [VERSION, VERSION + 1] {
            file[8..10].copy_from_slice(&version.to_le_bytes());
            std::fs::write(&path, &file).unwrap();
            assert_eq!(version_of(&path).unwrap(), version);
        }
        file[8..10].copy_from_slice(&VERSION.to_le_bytes());
        file[50] ^= 1;
        std::fs::write(&path, &file).unwrap();
        assert!(matches!(version_of(&path), Err(Error::Checksum { .. })));
    }

    #[test]
    fn a_body_that_goes_on_after_the_state_is_refused() {
        let longer = decode::<u8>(&seal([0; 16], &[1, 2]));
        assert!(matches!(longer, Err(Error::Length { found: 46, expected: 45 })));
    }

    #[test]
    fn a_body_that_lies_about_lengths_is_refused_and_costs_nothing() {
        // A list of 2^63 entries that is not there.
        let body = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f];
        assert!(matches!(decode::<Vec<u64>>(&seal([0; 16], &body)), Err(Error::Body(_))));
    }
}
