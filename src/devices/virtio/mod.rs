//! Virtio devices (virtio 1.2) and what they share.
//!
//! The set is closed, so it is an enum with one match per operation. A device is made once, with
//! its backend, before the guest runs; [`Device::activate`] and [`Device::reset`] may follow each
//! other any number of times.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestMemory;

/// The device's side of its interrupt (virtio 1.2 §4.2.2, registers InterruptStatus and
/// InterruptACK). Lock-free: the guest reads and acknowledges it at every interrupt, while the
/// vmm thread may hold the device.
#[derive(Debug)]
pub struct Interrupt {
    status: AtomicU32,
    irqfd: EventFd,
}

/// Bit of InterruptStatus: a buffer was used.
pub const INTERRUPT_USED_BUFFER: u32 = 1;
/// Bit of InterruptStatus: the configuration changed (also: the device needs a reset).
pub const INTERRUPT_CONFIG_CHANGE: u32 = 2;

impl Interrupt {
    /// An interrupt that raises `irqfd`.
    pub fn new(irqfd: EventFd) -> Self {
        Self { status: AtomicU32::new(0), irqfd }
    }

    /// The descriptor to register with KVM.
    pub fn irqfd(&self) -> &EventFd {
        &self.irqfd
    }

    /// Sets `bits` and interrupts the guest.
    pub fn raise(&self, bits: u32) {
        self.status.fetch_or(bits, Ordering::SeqCst);
        // The write fails only if the counter would overflow: then the interrupt is pending anyway.
        let _ = self.irqfd.write(1);
    }

    /// InterruptStatus.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// InterruptACK.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }
}

/// What the driver and the transport agreed on, handed over at DRIVER_OK.
pub struct Activation {
    /// Guest RAM.
    pub memory: GuestMemory,
    /// The configured queues, all valid and ready, in device order.
    pub queues: Vec<Queue>,
    /// The acknowledged feature bits.
    pub features: u64,
    /// Where used buffers are announced.
    pub interrupt: Arc<Interrupt>,
}

/// A descriptor the event loop watches for a device, with the tag it hands back to `on_event`.
/// All are registered, edge-triggered, when the machine is built.
#[derive(Debug, Clone, Copy)]
pub struct Source {
    /// Device-specific number; [`KICK`] is the transport's.
    pub tag: u8,
    /// Watched for reading.
    pub fd: RawFd,
}

/// The tag of a queue notification: look at all queues.
pub const KICK: u8 = 0;
