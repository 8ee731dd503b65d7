//! The I/O APIC (Intel 82093AA data sheet): which interrupt a device's pin stands for, and on which vCPU.
//!
//! Its registers are here and the local APICs in KVM, which takes an interrupt as the message that the I/O APIC would put
//! on the bus: one system call. KVM's own I/O APIC comes with a PIC, a PIT and its kernel thread, which no guest of this
//! machine has a use for, takes two calls for an edge, and lets whoever ends a VM wait for several grace periods.
//!
//! Every interrupt of the platform is an edge: a device pulses its pin, and nobody acknowledges. So there is no state but
//! what the guest has written, and which pins were pulsed while they were masked: those are served when they no longer are.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use super::Line;
use crate::config::at_most;
use crate::memory::{IO_APIC_VERSION, MAX_IO_APIC_PINS};

/// Offsets of the two registers that are mapped (§3.1).
const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;

/// Registers behind them (§3.2).
const REGISTER_ID: u8 = 0;
const REGISTER_VERSION: u8 = 1;
const REGISTER_ARBITRATION: u8 = 2;
const REGISTER_ENTRIES: u8 = 0x10;

/// Fields of an entry (§3.2.4). Delivery status and remote IRR, which only the chip writes, are always 0.
const ENTRY_VECTOR: u64 = 0xff;
const ENTRY_DELIVERY_SHIFT: u32 = 8;
const ENTRY_LOGICAL: u64 = 1 << 11;
const ENTRY_MASKED: u64 = 1 << 16;
const ENTRY_DESTINATION_SHIFT: u32 = 56;
const ENTRY_WRITABLE: u64 = 0xff00_0000_0001_afff;

const DELIVERY_MASK: u64 = 7;
/// Delivery modes that make sense for a device: fixed, lowest priority, NMI.
const DELIVERED: [u64; 3] = [0, 1, 4];

/// An interrupt as local APICs get it (Intel SDM volume 3, "Message Signalled Interrupts").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Which of them it is for.
    pub address: u32,
    /// Vector and delivery mode.
    pub data: u32,
}

const MESSAGE_ADDRESS: u32 = 0xfee0_0000;
const MESSAGE_DESTINATION_SHIFT: u32 = 12;
const MESSAGE_LOGICAL: u32 = 1 << 2;

/// What the guest has written, and what it has not heard of yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApicState {
    id: u8,
    select: u8,
    #[serde(deserialize_with = "at_most::<_, _, MAX_IO_APIC_PINS>")]
    entries: Vec<u64>,
    held_back: u32,
}

impl IoApicState {
    /// How many pins there are.
    pub fn pins(&self) -> usize {
        self.entries.len()
    }
}

/// See the module. Lock-free: the vmm thread pulses pins while vCPUs write registers.
pub struct IoApic {
    send: Box<dyn Fn(Message) + Send + Sync>,
    id: AtomicU8,
    select: AtomicU8,
    entries: Vec<AtomicU64>,
    /// Pins that were pulsed while they were masked, a bit each.
    held_back: AtomicU32,
}

impl IoApic {
    /// With `pins` pins, at most [`MAX_IO_APIC_PINS`]; what they deliver goes to `send`.
    pub fn new(pins: usize, send: impl Fn(Message) + Send + Sync + 'static) -> Self {
        Self {
            send: Box::new(send),
            id: AtomicU8::new(0),
            select: AtomicU8::new(0),
            entries: (0..pins.min(MAX_IO_APIC_PINS)).map(|_| AtomicU64::new(ENTRY_MASKED)).collect(),
            held_back: AtomicU32::new(0),
        }
    }

    /// What a device pulses `pin` through.
    pub fn line(self: &Arc<Self>, pin: u32) -> Line {
        let chip = Arc::clone(self);
        Box::new(move || chip.pulse(pin))
    }

    /// An edge at `pin`.
    pub fn pulse(&self, pin: u32) {
        let Some(entry) = self.entries.get(pin as usize) else { return };
        let value = entry.load(Ordering::SeqCst);
        if value & ENTRY_MASKED == 0 {
            return self.deliver(value);
        }
        // Whoever unmasks the pin looks for its bit afterwards: one of the two sees what the other did.
        self.held_back.fetch_or(1 << pin, Ordering::SeqCst);
        self.serve(pin, entry.load(Ordering::SeqCst));
    }

    /// Delivers what was held back at `pin`, whose entry is `value` now.
    fn serve(&self, pin: u32, value: u64) {
        if value & ENTRY_MASKED == 0 && self.held_back.fetch_and(!(1 << pin), Ordering::SeqCst) & 1 << pin != 0 {
            self.deliver(value);
        }
    }

    fn deliver(&self, entry: u64) {
        let mode = entry >> ENTRY_DELIVERY_SHIFT & DELIVERY_MASK;
        if DELIVERED.contains(&mode) {
            let destination = (entry >> ENTRY_DESTINATION_SHIFT) as u32;
            let logical = if entry & ENTRY_LOGICAL == 0 { 0 } else { MESSAGE_LOGICAL };
            (self.send)(Message {
                address: MESSAGE_ADDRESS | destination << MESSAGE_DESTINATION_SHIFT | logical,
                data: (entry & (ENTRY_VECTOR | DELIVERY_MASK << ENTRY_DELIVERY_SHIFT)) as u32,
            });
        }
    }

    /// The guest loads from `offset`.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            SELECT => self.select.load(Ordering::Relaxed).into(),
            WINDOW => self.register(self.select.load(Ordering::Relaxed)),
            _ => 0,
        };
        data.fill(0);
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
    }

    /// The guest stores to `offset`.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 4];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        let value = u32::from_le_bytes(bytes);
        match offset {
            SELECT => self.select.store(value as u8, Ordering::Relaxed),
            WINDOW => self.set_register(self.select.load(Ordering::Relaxed), value),
            _ => {}
        }
    }

    /// The entry that `register` is half of, its pin, and how far to the left that half is.
    fn entry(&self, register: u8) -> Option<(&AtomicU64, u32, u32)> {
        let half = register.checked_sub(REGISTER_ENTRIES)?;
        let pin = half / 2;
        Some((self.entries.get(usize::from(pin))?, pin.into(), if half & 1 == 0 { 0 } else { 32 }))
    }

    fn register(&self, register: u8) -> u32 {
        match register {
            REGISTER_ID | REGISTER_ARBITRATION => u32::from(self.id.load(Ordering::Relaxed)) << 24,
            REGISTER_VERSION => u32::from(IO_APIC_VERSION) | (self.entries.len().saturating_sub(1) as u32) << 16,
            _ => self.entry(register).map_or(0, |(entry, _, shift)| (entry.load(Ordering::SeqCst) >> shift) as u32),
        }
    }

    fn set_register(&self, register: u8, value: u32) {
        if register == REGISTER_ID {
            return self.id.store((value >> 24) as u8 & 0xf, Ordering::Relaxed);
        }
        let Some((entry, pin, shift)) = self.entry(register) else { return };
        let written = |old| (old & !(0xffff_ffff << shift) | u64::from(value) << shift) & ENTRY_WRITABLE;
        let old = entry.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |old| Some(written(old)));
        self.serve(pin, written(old.unwrap_or_else(|old| old)));
    }

    /// How many pins there are.
    pub fn pins(&self) -> usize {
        self.entries.len()
    }

    /// Its state.
    pub fn save(&self) -> IoApicState {
        IoApicState {
            id: self.id.load(Ordering::Relaxed),
            select: self.select.load(Ordering::Relaxed),
            entries: self.entries.iter().map(|entry| entry.load(Ordering::SeqCst)).collect(),
            held_back: self.held_back.load(Ordering::SeqCst),
        }
    }

    /// Takes a state on, of an I/O APIC with as many pins.
    pub fn restore(&self, state: &IoApicState) {
        self.id.store(state.id & 0xf, Ordering::Relaxed);
        self.select.store(state.select, Ordering::Relaxed);
        self.held_back.store(state.held_back, Ordering::SeqCst);
        for (entry, value) in self.entries.iter().zip(&state.entries) {
            entry.store(value & ENTRY_WRITABLE, Ordering::SeqCst);
        }
    }
}

#[cfg(any(test, fuzzing))]
pub(crate) mod tests;
