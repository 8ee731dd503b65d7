//! The virtio-mmio transport (virtio 1.2 §4.2, version 2).
//!
//! ```text
//!            ┌────────────────────── 0 written ──────────────────────┐
//!            ▼                                                       │
//!  reset ─▶ ACKNOWLEDGE ─▶ DRIVER ─▶ FEATURES_OK ─▶ DRIVER_OK ──▶ NEEDS_RESET
//!                            │ features  │ queue registers │ device runs   ▲
//!                            └ writable  └ writable        └── violation ──┘
//! ```
//!
//! A reset is synchronous for the driver: the write of 0 returns when the device has let go of
//! guest memory. If I/O is in flight, the vCPU sleeps, without the lock, until the vmm thread has
//! seen it complete.

mod saved;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE as ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER as DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK as DRIVER_OK, VIRTIO_CONFIG_S_FAILED as FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK as FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET as NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio as reg;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueState;
use vmm_sys_util::eventfd::EventFd;

use super::state::Registers;
use super::{
    Activation, Device, INTERRUPT_CONFIG_CHANGE, Interrupt, KICK, Progress, Source, StateError, Violation,
    VirtioDevice, VirtioState, Virtqueue, Window,
};
use crate::devices::Line;
use crate::memory::GuestMemory;
use crate::warn_limited;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
/// "VSCL": nobody assigns virtio-mmio vendor ids.
const VENDOR: u32 = u32::from_le_bytes(*b"VSCL");
const CONFIG_SPACE: u64 = reg::VIRTIO_MMIO_CONFIG as u64;

/// What every device offers besides its own features.
const COMMON_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// A device and its transport, shared by the vCPU threads and the vmm thread.
pub struct VirtioMmio {
    transport: Mutex<Transport>,
    reset_done: Condvar,
    interrupt: Arc<Interrupt>,
    window: Window,
    kick: EventFd,
}

impl VirtioMmio {
    /// Puts `device` behind registers that the guest reads in `window`, and whose interrupt
    /// is `line`. `kick` is QueueNotify's descriptor, to be bound to any write at offset
    /// [`NOTIFY_OFFSET`](Self::NOTIFY_OFFSET), whatever its width and value.
    pub fn new(device: Device, memory: GuestMemory, line: Line, window: Window, kick: EventFd) -> Self {
        let interrupt = Arc::new(Interrupt::new(line, window.clone()));
        let transport = Transport::new(device, memory, Arc::clone(&interrupt), window.clone());
        transport.publish_all();
        Self { kick, transport: Mutex::new(transport), reset_done: Condvar::new(), interrupt, window }
    }

    /// Offset of InterruptACK in the register region. Nothing is lost if a write of
    /// [`INTERRUPT_USED_BUFFER`] alone never arrives: the bit then stays set, and says that the
    /// rings are worth a look, which is true at any time. What tells the driver that there is
    /// something new is the interrupt.
    pub const ACKNOWLEDGE_OFFSET: u64 = reg::VIRTIO_MMIO_INTERRUPT_ACK as u64;

    /// Offset of QueueNotify in the register region.
    pub const NOTIFY_OFFSET: u64 = reg::VIRTIO_MMIO_QUEUE_NOTIFY as u64;

    /// All descriptors to watch, edge-triggered, the kick among them.
    pub fn sources(&self) -> Vec<Source> {
        use std::os::fd::AsRawFd;
        let mut sources = self.lock().device.sources();
        sources.push(Source { tag: KICK, fd: self.kick.as_raw_fd() });
        sources
    }

    /// A guest's read at `offset` of the region, on a host that does not let it read the window.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        self.window.read(offset, data);
    }

    /// A guest's write at `offset` of the region (vCPU threads). Registers are written by aligned
    /// words; anything else, and the configuration space, is ignored.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let (Ok(word), 0, 0..CONFIG_SPACE) = (<[u8; 4]>::try_from(data), offset % 4, offset) else { return };
        let value = u32::from_le_bytes(word);
        match offset as u32 {
            reg::VIRTIO_MMIO_INTERRUPT_ACK => self.interrupt.acknowledge(value),
            reg::VIRTIO_MMIO_QUEUE_NOTIFY => self.notify_self(),
            reg::VIRTIO_MMIO_STATUS if value == 0 => self.reset(),
            register => {
                let mut transport = self.lock();
                transport.write(register, value);
                transport.publish();
            }
        }
    }

    /// Handles an event of a [`Source`] (vmm thread).
    pub fn on_event(&self, tag: u8) {
        let mut transport = self.lock();
        if transport.paused {
            return;
        }
        let outcome = transport.device.on_event(tag);
        self.conclude(transport, outcome);
    }

    /// Waits until nothing is in flight and lets nothing start until [`Self::resume`] (vmm thread,
    /// while no vCPU runs or on the way out).
    pub fn quiesce(&self) {
        let mut transport = self.lock();
        transport.paused = true;
        transport.device.quiesce();
        self.conclude(transport, Ok(Progress::Idle));
    }

    /// Lets the device work again (vmm thread). Every source is taken to have had an event: what came
    /// meanwhile was not looked at and will not come again.
    pub fn resume(&self) {
        self.lock().paused = false;
        for source in self.sources() {
            self.on_event(source.tag);
        }
    }

    /// Changes the device while nothing is in flight (vmm thread); then the queues are looked at.
    pub fn update<R>(&self, change: impl FnOnce(&mut Device) -> R) -> R {
        let mut transport = self.lock();
        transport.device.quiesce();
        let result = change(&mut transport.device);
        // A reset may have waited for what was in flight.
        self.conclude(transport, Ok(Progress::Idle));
        self.on_event(KICK);
        result
    }

    /// Changes what matters only to what is yet to begin (vmm thread); then the queues are looked at.
    pub fn adjust(&self, change: impl FnOnce(&mut Device)) {
        change(&mut self.lock().device);
        self.on_event(KICK);
    }

    /// Tells the guest that an update gave the device another configuration space (vmm thread).
    pub fn config_changed(&self) {
        self.lock().config_changed();
    }

    /// The state of the device while it is quiet.
    pub fn save(&self) -> VirtioState {
        self.lock().save()
    }

    /// Puts a quiet device into a state, up to where it would handle events: that is for
    /// [`Self::resume`], until which it is as after [`Self::quiesce`]. Whatever it did before is forgotten.
    ///
    /// # Errors
    ///
    /// [`StateError`] if it is no state of this device.
    pub fn restore(&self, state: &VirtioState) -> Result<(), StateError> {
        let mut transport = self.lock();
        transport.paused = true;
        if !transport.device.reset() {
            // What is left is the host's side, which the vmm thread closes with the next event.
            let _ = transport.device.on_event(KICK);
            transport.device.reset();
        }
        transport.complete_reset();
        transport.restore(state)
    }

    fn conclude(&self, mut transport: MutexGuard<'_, Transport>, outcome: Result<Progress, Violation>) {
        match outcome {
            Ok(Progress::Idle) => {}
            Ok(Progress::More) => self.notify_self(),
            Err(violation) => transport.needs_reset(&violation),
        }
        if transport.resetting && transport.device.reset() {
            transport.complete_reset();
            self.reset_done.notify_all();
        }
    }

    fn reset(&self) {
        let mut transport = self.lock();
        if transport.device.reset() {
            transport.complete_reset();
            self.reset_done.notify_all();
            return;
        }
        transport.resetting = true;
        // What is in flight may have completed a moment ago, its event handled already.
        self.notify_self();
        let waited = self.reset_done.wait_while(transport, |transport| transport.resetting);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    fn notify_self(&self) {
        // The write fails only if the counter would overflow: then an event is pending anyway.
        let _ = self.kick.write(1);
    }

    fn lock(&self) -> MutexGuard<'_, Transport> {
        // A thread that panicked takes the process down in release; in tests its state is whole.
        self.transport.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The registers, and the device behind them.
struct Transport {
    device: Device,
    memory: GuestMemory,
    interrupt: Arc<Interrupt>,
    window: Window,
    registers: Registers,
    queues: Vec<QueueState>,
    config_generation: u32,
    /// A vCPU waits for the device to let go.
    resetting: bool,
    paused: bool,
}

impl Transport {
    fn new(device: Device, memory: GuestMemory, interrupt: Arc<Interrupt>, window: Window) -> Self {
        let queues = fresh_queues(&device);
        Self {
            device,
            memory,
            interrupt,
            window,
            registers: Registers::default(),
            queues,
            config_generation: 0,
            resetting: false,
            paused: false,
        }
    }

    fn offered_features(&self) -> u64 {
        self.device.features() | COMMON_FEATURES
    }

    /// Fills the window, save InterruptStatus, which is there first.
    fn publish_all(&self) {
        for register in (0..CONFIG_SPACE as u32).step_by(4).filter(|r| *r != reg::VIRTIO_MMIO_INTERRUPT_STATUS) {
            self.window.set(register, self.read(register));
        }
        self.publish_config();
    }

    /// Brings the window up to date with what a register write may have changed.
    fn publish(&self) {
        for register in [
            reg::VIRTIO_MMIO_DEVICE_FEATURES,
            reg::VIRTIO_MMIO_QUEUE_NUM_MAX,
            reg::VIRTIO_MMIO_QUEUE_READY,
            reg::VIRTIO_MMIO_STATUS,
            reg::VIRTIO_MMIO_CONFIG_GENERATION,
        ] {
            self.window.set(register, self.read(register));
        }
    }

    fn publish_config(&self) {
        for (offset, &word) in (reg::VIRTIO_MMIO_CONFIG..).step_by(4).zip(self.device.config_space().as_chunks().0) {
            self.window.set(offset, u32::from_le_bytes(word));
        }
    }

    fn read(&self, register: u32) -> u32 {
        let queue = self.queues.get(self.registers.queue_sel as usize);
        match register {
            reg::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            reg::VIRTIO_MMIO_VERSION => VERSION,
            reg::VIRTIO_MMIO_DEVICE_ID => self.device.kind() as u32,
            reg::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            reg::VIRTIO_MMIO_DEVICE_FEATURES => page(self.offered_features(), self.registers.device_features_sel),
            reg::VIRTIO_MMIO_QUEUE_NUM_MAX => queue.map_or(0, |queue| queue.max_size.into()),
            reg::VIRTIO_MMIO_QUEUE_READY => queue.map_or(0, |queue| queue.ready.into()),
            reg::VIRTIO_MMIO_STATUS => self.registers.status,
            // No shared memory region exists: length and base are -1 (§4.2.2).
            reg::VIRTIO_MMIO_SHM_LEN_LOW..=reg::VIRTIO_MMIO_SHM_BASE_HIGH => u32::MAX,
            reg::VIRTIO_MMIO_CONFIG_GENERATION => self.config_generation,
            _ => 0,
        }
    }

    fn write(&mut self, register: u32, value: u32) {
        if self.resetting {
            return;
        }
        match register {
            reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.registers.device_features_sel = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.registers.driver_features_sel = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES => self.accept_features(value),
            reg::VIRTIO_MMIO_QUEUE_SEL => self.registers.queue_sel = value,
            reg::VIRTIO_MMIO_STATUS => self.set_status(value),
            register => self.set_up_queue(register, value),
        }
    }

    /// §2.2: the driver accepts features between DRIVER and FEATURES_OK.
    fn accept_features(&mut self, value: u32) {
        if self.registers.status & (DRIVER | FEATURES_OK | FAILED) != DRIVER {
            return;
        }
        match self.registers.driver_features_sel {
            0 => set_low(&mut self.registers.driver_features, value),
            1 => set_high(&mut self.registers.driver_features, value),
            _ => self.registers.alien_features |= value != 0,
        }
    }

    /// A queue's registers are writable between FEATURES_OK and DRIVER_OK, its size and addresses
    /// only while it is not ready (§4.2.2.2). After DRIVER_OK nothing moves under a running device.
    fn set_up_queue(&mut self, register: u32, value: u32) {
        if self.registers.status & (FEATURES_OK | DRIVER_OK | FAILED) != FEATURES_OK {
            return;
        }
        let Some(queue) = self.queues.get_mut(self.registers.queue_sel as usize) else { return };
        if register == reg::VIRTIO_MMIO_QUEUE_READY {
            queue.ready = value == 1;
            return;
        }
        if queue.ready {
            return;
        }
        match register {
            // A size that does not fit is left for activation to refuse.
            reg::VIRTIO_MMIO_QUEUE_NUM => queue.size = u16::try_from(value).unwrap_or(0),
            reg::VIRTIO_MMIO_QUEUE_DESC_LOW => set_low(&mut queue.desc_table, value),
            reg::VIRTIO_MMIO_QUEUE_DESC_HIGH => set_high(&mut queue.desc_table, value),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_low(&mut queue.avail_ring, value),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_high(&mut queue.avail_ring, value),
            reg::VIRTIO_MMIO_QUEUE_USED_LOW => set_low(&mut queue.used_ring, value),
            reg::VIRTIO_MMIO_QUEUE_USED_HIGH => set_high(&mut queue.used_ring, value),
            _ => {}
        }
    }

    /// §2.1: the driver sets bits in order and never clears one. A write that does is ignored.
    fn set_status(&mut self, value: u32) {
        // The device's own bit is not the driver's to set; it may write back what it read.
        let value = value & !NEEDS_RESET | self.registers.status & NEEDS_RESET;
        if value & self.registers.status != self.registers.status || self.registers.status & FAILED != 0 {
            return;
        }
        if value & FAILED != 0 {
            self.registers.status |= FAILED;
            self.device.reset();
            return;
        }
        for (bit, before) in [(ACKNOWLEDGE, 0), (DRIVER, ACKNOWLEDGE), (FEATURES_OK, DRIVER), (DRIVER_OK, FEATURES_OK)]
        {
            let asked = value & bit != 0 && self.registers.status & bit == 0;
            if !asked || self.registers.status & before != before {
                continue;
            }
            match bit {
                FEATURES_OK if !self.features_acceptable() => return,
                DRIVER_OK => self.activate(),
                _ => self.registers.status |= bit,
            }
        }
    }

    fn features_acceptable(&self) -> bool {
        let alien = self.registers.alien_features || self.registers.driver_features & !self.offered_features() != 0;
        !alien && self.registers.driver_features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn activate(&mut self) {
        self.registers.status |= DRIVER_OK;
        let event_idx = self.registers.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let queues: Result<Vec<Virtqueue>, Violation> = self
            .queues
            .iter()
            .enumerate()
            .map(|(index, state)| {
                let state = QueueState { event_idx_enabled: event_idx, ..*state };
                Virtqueue::new(index, &state, self.memory.clone(), Arc::clone(&self.interrupt))
            })
            .collect();
        match queues {
            Ok(queues) => self.device.activate(Activation { queues, features: self.registers.driver_features }),
            Err(violation) => self.needs_reset(&violation),
        }
    }

    /// §2.1.2: the device stops, says so, and waits for the driver to reset it.
    fn needs_reset(&mut self, violation: &Violation) {
        self.device.count_violation();
        warn_limited!("virtio-{} device needs a reset: {violation}", self.device.kind());
        self.device.reset();
        self.registers.status |= NEEDS_RESET;
        self.publish();
        self.interrupt.raise(INTERRUPT_CONFIG_CHANGE);
    }

    /// The generation changes after the space did (§4.2.2.1), and before the driver hears of it.
    fn config_changed(&mut self) {
        self.publish_config();
        self.config_generation = self.config_generation.wrapping_add(1);
        self.publish();
        if self.registers.status & DRIVER_OK != 0 {
            self.interrupt.raise(INTERRUPT_CONFIG_CHANGE);
        }
    }

    fn complete_reset(&mut self) {
        self.registers = Registers::default();
        self.queues = fresh_queues(&self.device);
        self.interrupt.acknowledge(u32::MAX);
        self.resetting = false;
        self.publish();
    }
}

fn fresh_queues(device: &Device) -> Vec<QueueState> {
    let fresh = |&size| QueueState { max_size: size, size, ..QueueState::default() };
    device.queue_sizes().iter().map(fresh).collect()
}

/// 32 bits of the 64 feature bits.
fn page(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address & !0xffff_ffff | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = *address & 0xffff_ffff | u64::from(value) << 32;
}
