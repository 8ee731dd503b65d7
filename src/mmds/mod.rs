//! The metadata service: a JSON document that the launcher writes through the API and the guest
//! reads over HTTP at a link-local address.
//!
//! ```text
//!  launcher ──PUT, PATCH /mmds──▶ Store ◀── http ◀── Endpoint ◀──Ethernet frames──▶ virtio-net
//!                                            └─ Tokens
//! ```
//!
//! [`endpoint`] is the only host the guest can talk to at that address: what is for it never
//! reaches the TAP. It is made of parts that do no I/O and take the time as an argument.

pub mod endpoint;
mod frames;
pub mod http;
mod stack;
pub mod store;
pub mod token;

use std::sync::{Arc, Mutex};

use crate::config::{MmdsConfig, MmdsVersion};

pub use endpoint::Endpoint;
pub use store::Store;
pub use token::Tokens;

/// The service, shared by the API's side and the guest's.
pub type Shared = Arc<Mutex<Mmds>>;

/// What the requests of a guest are answered from.
#[derive(Debug)]
pub struct Mmds {
    /// The document.
    pub store: Store,
    /// The sessions.
    pub tokens: Tokens,
    /// Whether a token is needed to read.
    pub version: MmdsVersion,
    /// Answer in text whatever the guest accepts.
    pub imds_compat: bool,
}

impl Mmds {
    /// An empty document of at most `limit` bytes of JSON.
    pub fn new(limit: usize) -> Self {
        Self {
            store: Store::new(limit),
            tokens: Tokens::default(),
            version: MmdsVersion::default(),
            imds_compat: false,
        }
    }

    /// Takes over what concerns the answers.
    pub fn configure(&mut self, config: &MmdsConfig) {
        self.version = config.version;
        self.imds_compat = config.imds_compat;
    }
}

#[cfg(any(test, fuzzing))]
pub(crate) mod tests;
#[cfg(test)]
mod tests_parallel;
