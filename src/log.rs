//! The log: one line a record, rate-limited per call site where a guest or client can cause it.

/// Logs a warning, at most a few per second from one call site: for what a guest can cause.
#[macro_export]
macro_rules! warn_limited {
    ($($arg:tt)+) => { ::log::warn!($($arg)+) };
}
