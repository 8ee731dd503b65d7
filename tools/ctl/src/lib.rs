//! A small launcher for Vesicle, the pieces that `vesiclectl`, the tests and the benchmarks have in common.
//!
//! - [`Vesicle`] is a running VMM process that was handed its API socket and ends with its owner.
//! - [`Client`] speaks HTTP/1.1 to that socket.
//! - [`Job`] is the drive on which the default guest finds the command to run and leaves its exit status; [`BOOT_ARGS`]
//!   are for its kernel.
//! - [`scratch`] has directories that no signal leaves behind.

mod client;
mod job;
pub mod scratch;
mod vesicle;

pub use client::{Client, ClientError, Response};
pub use job::{BOOT_ARGS, Job, Script, quote};
pub use vesicle::{Signaller, Vesicle};
