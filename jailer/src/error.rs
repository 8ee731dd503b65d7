//! Why there is no jail.

use std::io;

/// See the module.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system refuses something.
    #[error("cannot {what}: {source}")]
    System {
        /// What was tried.
        what: String,
        /// The errno.
        source: io::Error,
    },
    /// We refuse something.
    #[error("{0}")]
    Refused(String),
}

/// Says what was tried, of a result that does not.
pub trait Failed<T> {
    /// `what` follows "cannot".
    ///
    /// # Errors
    /// The one there is.
    fn failed<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> Failed<T> for Result<T, E> {
    fn failed<S: Into<String>>(self, what: impl FnOnce() -> S) -> Result<T, Error> {
        self.map_err(|source| Error::System { what: what().into(), source: source.into() })
    }
}
