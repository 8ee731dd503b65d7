//! The service on the guest's link: Ethernet frames in, Ethernet frames out.
//!
//! A network device shows it the beginning of every frame that the guest sends and hands over what
//! it claims; what comes out of [`Endpoint::transmit`] belongs into the guest's receive queue.
//! Nothing is made before the first frame that is claimed. All time comes from the caller, counted
//! from any origin.

use std::net::Ipv4Addr;
use std::sync::PoisonError;
use std::time::Duration;

use super::stack::Stack;
use super::{Shared, frames};
use crate::metrics::METRICS;

/// As much of a frame as [`Endpoint::claims`] wants to see, in bytes.
pub const HEADER: usize = 64;
/// The longest frame that [`Endpoint::transmit`] writes, in bytes.
pub const MAX_FRAME: usize = 1514;
/// The longest frame that [`Endpoint::receive`] is given: an IP datagram, segmentation left to us.
pub const MAX_RECEIVED: usize = 14 + 65_535;

/// See the module.
pub struct Endpoint {
    address: Ipv4Addr,
    mmds: Shared,
    stack: Option<Box<Stack>>,
}

impl Endpoint {
    /// The service `mmds` at `address`.
    pub fn new(address: Ipv4Addr, mmds: Shared) -> Self {
        Self { address, mmds, stack: None }
    }

    /// Whether a frame that begins with `header` (all of it, or its first [`HEADER`] bytes) is for
    /// the service, and for nobody else.
    pub fn claims(&self, header: &[u8]) -> bool {
        frames::is_for(self.address, header)
    }

    /// Takes a frame of the guest's. Its checksums are not looked at: the guest may have left them
    /// to us (virtio 1.2 §5.1.6.2, VIRTIO_NET_HDR_F_NEEDS_CSUM).
    pub fn receive(&mut self, frame: &mut [u8], now: Duration) {
        METRICS.mmds.rx_accepted.inc();
        frames::readdress(frame);
        if frame.len() > MAX_RECEIVED || frames::is_fragment(frame) {
            METRICS.mmds.rx_accepted_err.inc();
            return;
        }
        let stack = self.stack.get_or_insert_with(|| Box::new(Stack::new(self.address, now)));
        let mut mmds = self.mmds.lock().unwrap_or_else(PoisonError::into_inner);
        stack.receive(frame, &mut mmds, now);
    }

    /// Writes the next frame for the guest into `buffer`, which has room for [`MAX_FRAME`] bytes,
    /// and returns its length; `None` if there is none now.
    pub fn transmit(&mut self, buffer: &mut [u8], now: Duration) -> Option<usize> {
        let stack = self.stack.as_mut()?;
        let mut mmds = self.mmds.lock().unwrap_or_else(PoisonError::into_inner);
        let length = stack.transmit(buffer, &mut mmds, now)?;
        METRICS.mmds.tx_frames.inc();
        METRICS.mmds.tx_bytes.add(length as u64);
        Some(length)
    }

    /// After how long [`Self::transmit`] is to be called although no frame came, once it has
    /// returned `None`; `None` while nothing is under way.
    pub fn delay(&mut self, now: Duration) -> Option<Duration> {
        self.stack.as_mut()?.delay(now)
    }

    /// Whether nothing is under way: [`Self::transmit`] would have nothing.
    pub fn is_quiet(&self) -> bool {
        self.stack.as_ref().is_none_or(|stack| stack.is_quiet())
    }

    /// Forgets everything under way: the guest's driver starts anew.
    pub fn reset(&mut self) {
        self.stack = None;
    }
}
