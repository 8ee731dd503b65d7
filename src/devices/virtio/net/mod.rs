//! virtio-net (virtio 1.2 §5.1) on a TAP.
//!
//! ```text
//!  guest's transmit queue ──writev──▶ TAP      ([tx]: one call per frame, headers included)
//!  guest's receive queue  ◀──readv─── TAP      ([rx]: into buffers that were reserved before)
//! ```
//!
//! Where the guest may have metadata, [service] stands between queues and TAP.
//!
//! Frames are not copied on the way, and not looked at: the header in front of each tells the
//! other side which checksum is missing and how to segment it. Each wake moves a bounded number of
//! frames in each direction and ends in at most one interrupt for each.

mod rx;
mod service;
mod tap;
mod tx;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU,
};

use self::rx::Receiver;
use self::service::Service;
pub use self::tap::{Error as TapError, Tap};
use self::tx::Transmitter;
use super::{
    Activation, CONFIG_SPACE_SIZE, Kind, Position, Progress, RateLimiter, Source, Violation, VirtioDevice, Virtqueue,
};
use crate::config::{NetConfig, NetUpdate};
use crate::mmds::Endpoint;
use crate::{metrics, warn_limited};

/// Size of each of the two queues.
const QUEUE_SIZE: u16 = 256;
/// `struct virtio_net_hdr` with num_buffers, which is always there since virtio 1.0 (§5.1.6).
const HEADER_SIZE: usize = 12;
/// Longest frame a TAP takes or gives, in bytes: an Ethernet header, a VLAN tag and 64 KiB, with the header in front.
const MAX_FRAME: usize = HEADER_SIZE + 18 + 65_536;
/// What one wake moves in one direction before it lets other devices run.
const MAX_FRAMES_PER_WAKE: usize = 128;
/// See [`MAX_FRAMES_PER_WAKE`].
const MAX_BYTES_PER_WAKE: usize = 4 << 20;

/// A wake that moves so many bytes to the guest is probably not the last of its kind.
const STREAM: usize = 32 << 10;

/// Source tags.
const TAP: u8 = 1;
const RX_LIMITER: u8 = 2;
const TX_LIMITER: u8 = 3;
const SERVICE: u8 = 4;

/// What is offered on every host.
const FEATURES: [u32; 12] = [
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_MRG_RXBUF,
    // Only if the host segments UDP.
    VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_USO,
];

/// How much a direction has moved in one wake.
#[derive(Debug, Default)]
struct Budget {
    frames: usize,
    bytes: usize,
}

impl Budget {
    fn spend(&mut self, bytes: usize) {
        self.frames += 1;
        self.bytes += bytes;
    }

    fn is_spent(&self) -> bool {
        self.frames >= MAX_FRAMES_PER_WAKE || self.bytes >= MAX_BYTES_PER_WAKE
    }
}

/// A network interface.
pub struct Net {
    iface_id: String,
    features: u64,
    /// The configuration space (§5.1.4) up to and including the MTU.
    config_space: [u8; CONFIG_SPACE_SIZE],
    tap: Tap,
    rx_limiter: RateLimiter,
    tx_limiter: RateLimiter,
    /// Metadata, for guests that may have it through this interface.
    service: Option<Box<Service>>,
    active: Option<Active>,
    /// The last wake moved [`STREAM`] to the guest.
    streaming: bool,
    /// What to say at the next event, because activation cannot.
    failed: Option<Violation>,
    metrics: Arc<metrics::Net>,
}

/// What the driver handed over.
struct Active {
    rx: Receiver,
    tx: Transmitter,
}

impl Net {
    /// An interface at the other end of `tap`.
    ///
    /// # Errors
    ///
    /// The process has no descriptor left for a timer.
    pub fn new(config: &NetConfig, tap: Tap, metrics: Arc<metrics::Net>) -> io::Result<Self> {
        let mut features = FEATURES.iter().fold(0, |bits, bit| bits | 1 << bit);
        if !tap.has_uso() {
            features &= !(1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6 | 1 << VIRTIO_NET_F_HOST_USO);
        }
        let mut config_space = [0; CONFIG_SPACE_SIZE];
        if let Some(mac) = config.guest_mac {
            features |= 1 << VIRTIO_NET_F_MAC;
            config_space[..6].copy_from_slice(&mac.0);
        }
        if let Some(mtu) = config.mtu {
            features |= 1 << VIRTIO_NET_F_MTU;
            config_space[10..12].copy_from_slice(&mtu.to_le_bytes());
        }
        Ok(Self {
            iface_id: config.iface_id.clone(),
            features,
            config_space,
            tap,
            rx_limiter: RateLimiter::new(&config.rx_rate_limiter)?,
            tx_limiter: RateLimiter::new(&config.tx_rate_limiter)?,
            service: None,
            active: None,
            streaming: false,
            failed: None,
            metrics,
        })
    }

    /// Has the guest find the metadata service on this interface.
    ///
    /// # Errors
    ///
    /// The process has no descriptor left for a timer.
    pub fn serve(&mut self, endpoint: Endpoint) -> io::Result<()> {
        self.service = Some(Box::new(Service::new(endpoint)?));
        Ok(())
    }

    /// Changes the limits.
    pub fn update_rate_limiters(&mut self, update: &NetUpdate) {
        self.rx_limiter.update(&update.rx_rate_limiter);
        self.tx_limiter.update(&update.tx_rate_limiter);
    }

    /// Moves frames in both directions, the guest's first: often they call for an answer that is
    /// there at once.
    fn exchange(&mut self) -> Result<Progress, Violation> {
        let Some(Active { rx, tx }) = &mut self.active else { return Ok(Progress::Idle) };
        if self.streaming {
            // Who feeds us may share our processor: let it finish what it is at. Half as many wakes,
            // interrupts and exits then, where processors are few, and no difference where they are not.
            std::thread::yield_now();
        }
        let mut service = self.service.as_deref_mut();
        let (mut out, mut back) = (Budget::default(), Budget::default());
        let sent = tx.run(&self.tap, service.as_deref_mut(), &mut self.tx_limiter, &self.metrics, &mut out);
        let received = rx.run(&self.tap, service.as_deref_mut(), &mut self.rx_limiter, &self.metrics, &mut back);
        self.streaming = back.bytes >= STREAM;
        if let Some(service) = service {
            service.set_timer();
        }
        tx.announce();
        rx.announce();
        match (sent?, received?) {
            (Progress::Idle, Progress::Idle) => Ok(Progress::Idle),
            _ => Ok(Progress::More),
        }
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> Kind {
        Kind::Net
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE; 2]
    }

    fn config_space(&self) -> [u8; CONFIG_SPACE_SIZE] {
        self.config_space
    }

    fn activate(&mut self, activation: Activation) {
        self.failed = None;
        if let Err(error) = self.tap.set_offloads(activation.features) {
            warn_limited!("interface {}: the TAP refuses what the guest acknowledged: {error}", self.iface_id);
            self.failed = Some(Violation::Backend);
            return;
        }
        let merge = activation.features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        let [rx, tx]: [Virtqueue; 2] = match activation.queues.try_into() {
            Ok(queues) => queues,
            // The transport sets up as many as there are in `queue_sizes`.
            Err(_) => return,
        };
        self.active = Some(Active { rx: Receiver::new(rx, merge), tx: Transmitter::new(tx) });
    }

    fn reset(&mut self) -> bool {
        self.active = None;
        if let Some(service) = &mut self.service {
            service.reset();
        }
        true
    }

    fn on_event(&mut self, tag: u8) -> Result<Progress, Violation> {
        if let Some(violation) = self.failed.take() {
            return Err(violation);
        }
        match tag {
            TAP => {
                self.metrics.rx_tap_event_count.inc();
                if let Some(active) = &mut self.active {
                    active.rx.tap_is_readable();
                }
            }
            RX_LIMITER => self.rx_limiter.on_timer(),
            TX_LIMITER => self.tx_limiter.on_timer(),
            SERVICE => {
                if let Some(service) = &mut self.service {
                    service.timer_fired();
                }
            }
            _ => self.metrics.queue_event_count.inc(),
        }
        self.exchange()
    }

    fn sources(&self) -> Vec<Source> {
        let service = self.service.iter().map(|service| Source { tag: SERVICE, fd: service.timer_fd() });
        let mut sources = vec![
            Source { tag: TAP, fd: self.tap.as_raw_fd() },
            Source { tag: RX_LIMITER, fd: self.rx_limiter.timer_fd() },
            Source { tag: TX_LIMITER, fd: self.tx_limiter.timer_fd() },
        ];
        sources.extend(service);
        sources
    }

    /// Nothing is ever in flight: a frame is with the guest or with the TAP.
    fn quiesce(&mut self) {}

    fn positions(&self) -> Vec<Position> {
        self.active.iter().flat_map(|active| [active.rx.position(), active.tx.position()]).collect()
    }

    /// Frames get lost on any network.
    fn on_restored(&mut self) {}

    fn count_violation(&self) {
        self.metrics.needs_reset.inc();
    }
}

#[cfg(any(test, fuzzing))]
pub(crate) mod tests;
