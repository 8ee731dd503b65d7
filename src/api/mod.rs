//! HTTP and JSON on a Unix socket.
//!
//! ```text
//!  socket ──bytes──▶ server ──method, path, body──▶ routes ──Command──▶ vmm thread
//!                      ▲                              │ types, convert: JSON to configuration
//!                      └──────────status, JSON────────┘ error: a refusal
//! ```
//!
//! Everything that can be checked without the machine is checked here, so the vmm thread sees
//! legal configurations only. The published contract is `resources/openapi.yaml`.

mod convert;
pub mod error;
pub mod routes;
pub mod server;
pub mod types;

#[cfg(test)]
mod contract_tests;

pub use error::ApiError;
pub use routes::config_commands;

/// The version of the API that published clients know, and this release is compatible with.
pub const API_VERSION: &str = "1.17.0";
/// This release.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
