//! Randomness from the kernel.

use std::io;

use crate::os::checked;

/// Bytes nobody can guess (getrandom(2)).
///
/// # Errors
/// The kernel has none, or a filter is in the way.
pub fn bytes() -> io::Result<[u8; 16]> {
    let mut bytes = [0; 16];
    // SAFETY: `bytes` is writable for its length.
    match checked(unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) })? {
        count if count == bytes.len() => Ok(bytes),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}
