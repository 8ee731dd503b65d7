//! Network interfaces.

use std::fmt;
use std::os::fd::RawFd;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{ConfigError, RateLimiterConfig, RateLimiterUpdate, check_resource_id};

/// Longest name of a network interface in bytes (`IFNAMSIZ` without the terminating NUL).
pub const MAX_INTERFACE_NAME: usize = 15;
/// Least MTU of a virtio-net device (virtio 1.2 §5.1.4.1).
pub const MIN_MTU: u16 = 68;

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MacAddress(pub [u8; 6]);

impl FromStr for MacAddress {
    type Err = ConfigError;

    /// Six pairs of hexadecimal digits with colons between them.
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let bad = || ConfigError::GuestMac(text.to_owned());
        let mut pairs = text.split(':');
        let mut address = [0; 6];
        for byte in &mut address {
            let pair = pairs.next().filter(|pair| pair.len() == 2 && pair.bytes().all(|b| b.is_ascii_hexdigit()));
            *byte = pair.and_then(|pair| u8::from_str_radix(pair, 16).ok()).ok_or_else(bad)?;
        }
        if pairs.next().is_some() { Err(bad()) } else { Ok(Self(address)) }
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Which TAP an interface is the other end of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum HostDevice {
    /// The one of this name; to open it takes CAP_NET_ADMIN or being its owner.
    Named(String),
    /// A descriptor that the launcher opened and declared with `--pass-fd`.
    Passed(RawFd),
}

impl FromStr for HostDevice {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let bad = || ConfigError::HostDevName(text.to_owned());
        if let Some(number) = text.strip_prefix("fd:") {
            return number.parse().ok().filter(|fd| *fd >= 0).map(Self::Passed).ok_or_else(bad);
        }
        // A percent sign would have the kernel make up a name.
        let legal = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'/' | b':' | b'%');
        let fits = (1..=MAX_INTERFACE_NAME).contains(&text.len()) && text.bytes().all(legal);
        if fits { Ok(Self::Named(text.to_owned())) } else { Err(bad()) }
    }
}

impl fmt::Display for HostDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Named(name) => f.write_str(name),
            Self::Passed(fd) => write!(f, "fd:{fd}"),
        }
    }
}

/// A virtio-net interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetConfig {
    /// Resource id, `[A-Za-z0-9_]+`.
    pub iface_id: String,
    /// The TAP.
    pub host_device: HostDevice,
    /// The guest's address; `None` leaves the choice to the guest.
    pub guest_mac: Option<MacAddress>,
    /// What the guest is told is the largest packet, in bytes.
    pub mtu: Option<u16>,
    /// Limits of what the guest receives.
    pub rx_rate_limiter: RateLimiterConfig,
    /// Limits of what the guest sends.
    pub tx_rate_limiter: RateLimiterConfig,
}

impl NetConfig {
    /// The same if it is legal; the TAP is not looked at.
    ///
    /// # Errors
    /// A bad id, name of the TAP or MTU.
    pub fn checked(self) -> Result<Self, ConfigError> {
        check_resource_id("iface_id", &self.iface_id)?;
        // A snapshot may say anything.
        let device = self.host_device.to_string();
        if device.parse().as_ref() != Ok(&self.host_device) {
            return Err(ConfigError::HostDevName(device));
        }
        match self.mtu {
            Some(mtu) if mtu < MIN_MTU => Err(ConfigError::Mtu(mtu)),
            _ => Ok(self),
        }
    }
}

/// A change to an interface of a running microVM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetUpdate {
    /// Which interface.
    pub iface_id: String,
    /// New limits of what the guest receives.
    pub rx_rate_limiter: RateLimiterUpdate,
    /// New limits of what the guest sends.
    pub tx_rate_limiter: RateLimiterUpdate,
}

impl NetUpdate {
    /// The same if it is legal. A change of nothing is legal.
    ///
    /// # Errors
    /// A bad id.
    pub fn checked(self) -> Result<Self, ConfigError> {
        check_resource_id("iface_id", &self.iface_id)?;
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_six_pairs_of_digits_and_nothing_else() {
        let address: MacAddress = "06:00:aC:10:00:02".parse().unwrap();
        assert_eq!(address, MacAddress([6, 0, 0xac, 0x10, 0, 2]));
        assert_eq!(address.to_string(), "06:00:ac:10:00:02");
        for bad in
            ["", "06:00:ac:10:00", "06:00:ac:10:00:02:03", "6:0:ac:10:0:2", "06-00-ac-10-00-02", "+6:00:ac:10:00:02"]
        {
            assert_eq!(bad.parse::<MacAddress>(), Err(ConfigError::GuestMac(bad.to_owned())));
        }
    }

    #[test]
    fn a_host_device_is_a_name_the_kernel_takes_or_a_descriptor() {
        assert_eq!("tap0".parse(), Ok(HostDevice::Named("tap0".into())));
        assert_eq!("fd:7".parse(), Ok(HostDevice::Passed(7)));
        assert_eq!(HostDevice::Passed(7).to_string(), "fd:7");
        for bad in ["", "sixteen_letters_", "a/b", "tap%d", "tap 0", "fd:", "fd:-1", "fd:x", "t\u{e4}p"] {
            assert_eq!(bad.parse::<HostDevice>(), Err(ConfigError::HostDevName(bad.to_owned())));
        }
    }

    #[test]
    fn what_no_request_says_is_refused_as_well() {
        let config = |host_device, mtu| NetConfig {
            iface_id: "eth0".into(),
            host_device,
            guest_mac: None,
            mtu,
            rx_rate_limiter: RateLimiterConfig::default(),
            tx_rate_limiter: RateLimiterConfig::default(),
        };
        let tap = HostDevice::Named("tap0".into());
        assert_eq!(config(tap.clone(), Some(67)).checked(), Err(ConfigError::Mtu(67)));
        for mtu in [None, Some(68), Some(65_535)] {
            assert!(config(tap.clone(), mtu).checked().is_ok());
        }
        assert!(config(HostDevice::Passed(3), None).checked().is_ok());
        for device in ["", "tap%d", "fd:3", "t\0", "sixteen_letters_"] {
            let refused = Err(ConfigError::HostDevName(device.to_owned()));
            assert_eq!(config(HostDevice::Named(device.to_owned()), None).checked(), refused);
        }
        let refused = Err(ConfigError::HostDevName("fd:-1".to_owned()));
        assert_eq!(config(HostDevice::Passed(-1), None).checked(), refused);
    }
}
