//! Virtio devices (virtio 1.2) and what they share.
//!
//! ```text
//!  guest ──registers──▶ VirtioMmio (vcpu thread) ──activate, reset──▶ Device
//!    │                      ▲ one lock per device                       │
//!    └──kick (ioeventfd)──▶ VirtioMmio::on_event (vmm thread) ──────────┘──Line──▶ guest
//! ```
//!
//! The set is closed, so it is an enum with one match per operation. A device is made once, with
//! its backend, before the guest runs; [`VirtioDevice::activate`] and [`VirtioDevice::reset`] may
//! follow each other any number of times.

pub mod block;
mod buffers;
mod mmio;
pub mod net;
mod queue;
pub mod rate_limiter;
pub mod state;
#[cfg(any(test, fuzzing))]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_races;
#[cfg(any(test, fuzzing))]
pub(crate) mod tests_random;
pub mod vsock;
mod window;

use std::fmt;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_bindings::virtio_mmio::VIRTIO_MMIO_INTERRUPT_STATUS;

pub use block::Block;
pub use buffers::{Buffers, IoVecs};
pub use mmio::VirtioMmio;
pub use net::Net;
pub use queue::Virtqueue;
pub use rate_limiter::RateLimiter;
pub use state::{Position, StateError, VirtioState};
pub use vsock::Vsock;
pub use window::{Window, Windows};

use super::Line;

/// The device's side of its interrupt (virtio 1.2 §4.2.2, registers InterruptStatus and
/// InterruptACK). Lock-free: the guest reads and acknowledges it at every interrupt, while the
/// vmm thread may hold the device. The status lives in the window, where the guest reads it.
pub struct Interrupt {
    window: Window,
    line: Line,
}

/// Bit of InterruptStatus: a buffer was used.
pub const INTERRUPT_USED_BUFFER: u32 = 1;
/// Bit of InterruptStatus: the configuration changed (also: the device needs a reset).
pub const INTERRUPT_CONFIG_CHANGE: u32 = 2;

impl Interrupt {
    /// The interrupt of the device behind `window`.
    pub fn new(line: Line, window: Window) -> Self {
        Self { window, line }
    }

    fn word(&self) -> &AtomicU32 {
        self.window.word(VIRTIO_MMIO_INTERRUPT_STATUS)
    }

    /// Sets `bits` and interrupts the guest.
    pub fn raise(&self, bits: u32) {
        self.word().fetch_or(bits, Ordering::SeqCst);
        (self.line)();
    }

    /// InterruptStatus.
    pub fn status(&self) -> u32 {
        self.word().load(Ordering::SeqCst)
    }

    /// Sets InterruptStatus to what it was in a snapshot, without an interrupt.
    fn restore(&self, status: u32) {
        self.word().store(status & (INTERRUPT_USED_BUFFER | INTERRUPT_CONFIG_CHANGE), Ordering::SeqCst);
    }

    /// InterruptACK.
    pub fn acknowledge(&self, bits: u32) {
        self.word().fetch_and(!bits, Ordering::SeqCst);
    }
}

/// What the driver and the transport agreed on, handed over at DRIVER_OK.
pub struct Activation {
    /// The configured queues in device order.
    pub queues: Vec<Virtqueue>,
    /// The acknowledged feature bits.
    pub features: u64,
}

/// A descriptor the event loop watches for a device, with the tag it hands back to `on_event`.
/// All are registered, edge-triggered, when the machine is built; nobody ever reads them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// Device-specific number; [`KICK`] is the transport's.
    pub tag: u8,
    /// Watched for reading.
    pub fd: RawFd,
}

/// The tag of a queue notification: look at all queues.
pub const KICK: u8 = 0;

/// What a device is (virtio 1.2 §5, the device IDs).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// Network interface.
    Net = 1,
    /// Block device.
    Block = 2,
    /// Socket device.
    Vsock = 19,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Net => "net",
            Kind::Block => "block",
            Kind::Vsock => "vsock",
        })
    }
}

/// How the driver broke the protocol. The device stops and asks for a reset; the VM lives on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// The driver is ready but its queue is not, or its size is none (virtio 1.2 §2.7).
    #[error("queue {queue} is unusable: size {size}, ready: {ready}")]
    QueueSize {
        /// Queue index.
        queue: usize,
        /// What the driver chose; 0 if it does not fit 16 bits.
        size: u16,
        /// QueueReady.
        ready: bool,
    },
    /// Part of a queue is outside of guest RAM, or not aligned.
    #[error("queue {queue}: {part} at {address:#x} is not aligned or not in guest RAM")]
    QueueAddress {
        /// Queue index.
        queue: usize,
        /// Descriptor table, available ring or used ring.
        part: &'static str,
        /// Guest physical address.
        address: u64,
    },
    /// More chains on offer than the queue is long.
    #[error("queue {queue}: the available index {index} is {ahead} ahead")]
    AvailableIndex {
        /// Queue index.
        queue: usize,
        /// What the driver wrote.
        index: u16,
        /// How far that is from the last chain taken.
        ahead: u16,
    },
    /// A head index, or an index in a chain, that is not in the descriptor table; a chain that
    /// is longer than the queue, longer than 4 GiB, or nests indirect tables (§2.7.5).
    #[error("the descriptor chain at head {0} is malformed")]
    Chain(u16),
    /// A buffer that is not in guest RAM.
    #[error("the chain at head {head} has a buffer of {length} bytes at {address:#x}, not in guest RAM")]
    Buffer {
        /// Head of the chain.
        head: u16,
        /// Guest physical address.
        address: u64,
        /// Bytes.
        length: u32,
    },
    /// A request that has no room for its header or its status (§5.2.6).
    #[error("the request at head {0} lacks its header or its status byte")]
    Framing(u16),
    /// What the device stands on refuses what was acknowledged.
    #[error("the host refuses what the driver acknowledged")]
    Backend,
    /// A packet shorter than its header or than its header says, or a buffer that is too short for one (§5.10.6).
    #[error("the packet or packet buffer at head {0} is too short")]
    Packet(u16),
}

/// What is left when an event was handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Progress {
    /// Nothing; another event will come.
    Idle,
    /// The device stopped to let others run: call it again.
    More,
}

/// Bytes of the longest configuration space, and more.
pub const CONFIG_SPACE_SIZE: usize = 128;

/// A device behind the transport.
///
/// `activate` and `reset` come from a vCPU thread, the rest from the vmm thread, always under the
/// transport's lock. Until the first `activate`, and after a `reset`, events find nothing to do.
pub trait VirtioDevice {
    /// Device ID.
    fn kind(&self) -> Kind;
    /// The feature bits that the device offers: 0 to 23 and from 50 on (virtio 1.2 §2.2).
    fn features(&self) -> u64;
    /// The largest size of each queue: powers of two.
    fn queue_sizes(&self) -> &'static [u16];
    /// The configuration space (§2.5); what is past its end is zero.
    fn config_space(&self) -> [u8; CONFIG_SPACE_SIZE];
    /// The driver is ready. Called only while the device is reset.
    fn activate(&mut self, activation: Activation);
    /// Stops: nothing more is taken from the queues or reported to the guest. Returns whether
    /// nothing is in flight any more; if not, the caller hands on events and asks again.
    fn reset(&mut self) -> bool;
    /// Handles an event of one of [`Self::sources`] or a [`KICK`].
    fn on_event(&mut self, tag: u8) -> Result<Progress, Violation>;
    /// The descriptors to watch besides the kick.
    fn sources(&self) -> Vec<Source>;
    /// Waits until nothing is in flight and the guest has been told.
    fn quiesce(&mut self);
    /// How far the queues have got, in device order, without what is only reserved; nothing while the
    /// device is not active. Called while it is quiet.
    fn positions(&self) -> Vec<Position>;
    /// After the activation for a guest that comes out of a snapshot: what the host's side of the
    /// device knew of it is lost, and the guest is told if it has to know.
    fn on_restored(&mut self);
    /// Counts a violation among the device's metrics.
    fn count_violation(&self);
}

/// The closed set.
pub enum Device {
    /// virtio-block.
    Block(Box<Block>),
    /// virtio-net.
    Net(Box<Net>),
    /// virtio-vsock.
    Vsock(Box<Vsock>),
}

/// One match per operation, so that a new kind cannot be forgotten anywhere.
macro_rules! each {
    ($self:expr, $device:ident => $call:expr) => {
        match $self {
            Device::Block($device) => $call,
            Device::Net($device) => $call,
            Device::Vsock($device) => $call,
        }
    };
}

impl VirtioDevice for Device {
    fn kind(&self) -> Kind {
        each!(self, device => device.kind())
    }

    fn features(&self) -> u64 {
        each!(self, device => device.features())
    }

    fn queue_sizes(&self) -> &'static [u16] {
        each!(self, device => device.queue_sizes())
    }

    fn config_space(&self) -> [u8; CONFIG_SPACE_SIZE] {
        each!(self, device => device.config_space())
    }

    fn activate(&mut self, activation: Activation) {
        each!(self, device => device.activate(activation))
    }

    fn reset(&mut self) -> bool {
        each!(self, device => device.reset())
    }

    fn on_event(&mut self, tag: u8) -> Result<Progress, Violation> {
        each!(self, device => device.on_event(tag))
    }

    fn sources(&self) -> Vec<Source> {
        each!(self, device => device.sources())
    }

    fn quiesce(&mut self) {
        each!(self, device => device.quiesce())
    }

    fn positions(&self) -> Vec<Position> {
        each!(self, device => device.positions())
    }

    fn on_restored(&mut self) {
        each!(self, device => device.on_restored())
    }

    fn count_violation(&self) {
        each!(self, device => device.count_violation())
    }
}
