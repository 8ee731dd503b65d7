//! The vsock device's configuration.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{ConfigError, check_path};

/// A guest's CID: what it is called on its side of a vsock connection, 3 to 2^32 - 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct GuestCid(u32);

impl TryFrom<u64> for GuestCid {
    type Error = ConfigError;

    fn try_from(cid: u64) -> Result<Self, ConfigError> {
        u32::try_from(cid).ok().filter(|cid| (3..u32::MAX).contains(cid)).map(Self).ok_or(ConfigError::GuestCid(cid))
    }
}

impl From<GuestCid> for u64 {
    fn from(cid: GuestCid) -> Self {
        cid.0.into()
    }
}

/// The vsock device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockConfig {
    /// The guest's.
    pub guest_cid: GuestCid,
    /// Where host processes connect; beside it, with `_PORT` appended, they listen.
    pub uds_path: PathBuf,
}

impl VsockConfig {
    /// The same if it is legal; nothing is bound.
    ///
    /// # Errors
    /// An empty path.
    pub fn checked(self) -> Result<Self, ConfigError> {
        check_path("uds_path", &self.uds_path)?;
        Ok(self)
    }
}
