//! Snapshots: what their two files look like.
//!
//! The state file ([`format`]) holds everything but guest RAM; it is small, read in one call, and
//! hostile until each part of it was accepted by what it is for. The memory file ([`memory`]) is
//! guest RAM, one region after the other, with holes where the guest never wrote, and a trailer
//! that says which snapshot it belongs to.

pub mod draft;
pub mod format;
pub mod memory;
pub mod pagemap;
pub mod uffd;
pub mod working_set;

/// What a state file and its memory file have in common: random, new for every snapshot.
pub type Id = [u8; 16];
