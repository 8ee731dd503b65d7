//! How the guest reaches the metadata service.

use std::collections::HashSet;
use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use super::{ConfigError, MAX_VIRTIO_DEVICES, at_most};

/// Whether the guest needs a token to read metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum MmdsVersion {
    /// No.
    #[default]
    V1,
    /// Yes.
    V2,
}

/// How the guest reaches the metadata service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MmdsConfig {
    /// Through these, each once.
    #[serde(deserialize_with = "at_most::<_, _, MAX_VIRTIO_DEVICES>")]
    pub network_interfaces: Vec<String>,
    /// With a token or without.
    pub version: MmdsVersion,
    /// At this address, which is link-local.
    pub ipv4_address: Ipv4Addr,
    /// Answer in text whatever the guest accepts.
    pub imds_compat: bool,
}

/// Where the guest finds metadata if the configuration does not say.
pub const DEFAULT_MMDS_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

impl MmdsConfig {
    /// The same if it is legal; whether the interfaces exist is not looked at.
    ///
    /// # Errors
    /// No interface, or an address that is not link-local (RFC 3927 §2.1).
    pub fn checked(mut self) -> Result<Self, ConfigError> {
        let mut named = HashSet::new();
        self.network_interfaces.retain(|id| named.insert(id.clone()));
        if self.network_interfaces.is_empty() {
            return Err(ConfigError::MmdsWithoutInterface);
        }
        if !matches!(self.ipv4_address.octets(), [169, 254, 1..=254, _]) {
            return Err(ConfigError::MmdsAddress(self.ipv4_address));
        }
        Ok(self)
    }
}
