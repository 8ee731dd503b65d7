//! What the guest sees: a closed list.
//!
//! A device sees guest memory, its queues, an interrupt and a file descriptor; it never sees
//! KVM, the API or the machine.

pub mod boot_timer;
pub mod bus;
pub mod i8042;
pub mod io_apic;
pub mod serial;
pub mod virtio;

/// Pulses a device's pin of the I/O APIC: an edge.
pub type Line = Box<dyn Fn() + Send + Sync>;
