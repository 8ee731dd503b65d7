//! From a guest's access to the device it means. The list is closed, so this is a match, and each
//! device has one lock of its own; an access to anything else reads as all ones.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::boot_timer::BootTimer;
use super::i8042::{self, I8042};
use super::io_apic::IoApic;
use super::serial::{self, Serial};
use super::virtio::VirtioMmio;
use crate::memory::{BOOT_TIMER, IO_APIC, PAGE_SIZE, VIRTIO_MMIO_SIZE, VIRTIO_MMIO_START};

/// What the guest writes to the boot timer when its user space is up.
const BOOT_COMPLETE: u8 = 123;

/// Everything outside RAM.
pub struct Bus {
    /// COM1.
    pub serial: Mutex<Serial>,
    /// Keyboard controller.
    pub i8042: Mutex<I8042>,
    /// What their interrupts go through.
    pub io_apic: Arc<IoApic>,
    /// The virtio devices, in the order of their windows, once they are plugged in.
    pub slots: OnceLock<Vec<Arc<VirtioMmio>>>,
    /// At [`BOOT_TIMER`], if there is one.
    pub boot_timer: Option<BootTimer>,
}

/// A poisoned lock is impossible while a panic aborts the process; tests get the data regardless.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Bus {
    /// The serial port.
    pub fn serial(&self) -> MutexGuard<'_, Serial> {
        lock(&self.serial)
    }

    /// The virtio devices.
    pub fn virtio(&self) -> &[Arc<VirtioMmio>] {
        self.slots.get().map(Vec::as_slice).unwrap_or_default()
    }

    /// The keyboard controller.
    pub fn i8042(&self) -> MutexGuard<'_, I8042> {
        lock(&self.i8042)
    }

    /// IN: a register of a legacy device is one byte wide.
    pub fn io_in(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        let [byte] = data else { return };
        match port {
            serial::COM1..=COM1_LAST => *byte = self.serial().read(port - serial::COM1),
            i8042::DATA_PORT | i8042::COMMAND_PORT => *byte = self.i8042().read(port),
            _ => {}
        }
    }

    /// OUT.
    pub fn io_out(&self, port: u16, data: &[u8]) {
        let &[byte] = data else { return };
        match port {
            serial::COM1..=COM1_LAST => self.serial().write(port - serial::COM1, byte),
            i8042::DATA_PORT | i8042::COMMAND_PORT => self.i8042().write(port, byte),
            _ => {}
        }
    }

    /// A load outside RAM.
    pub fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        if let Some((device, offset)) = self.virtio_at(gpa) {
            device.read(offset, data);
        } else if let Some(offset) = io_apic_at(gpa) {
            self.io_apic.read(offset, data);
        } else {
            data.fill(0xff);
        }
    }

    /// A store outside RAM.
    pub fn mmio_write(&self, gpa: u64, data: &[u8]) {
        if let Some((device, offset)) = self.virtio_at(gpa) {
            device.write(offset, data);
        } else if let Some(offset) = io_apic_at(gpa) {
            self.io_apic.write(offset, data);
        } else if let Some(timer) = &self.boot_timer
            && gpa == BOOT_TIMER
            && data.first() == Some(&BOOT_COMPLETE)
        {
            timer.report();
        }
    }

    fn virtio_at(&self, gpa: u64) -> Option<(&VirtioMmio, u64)> {
        let from_start = gpa.checked_sub(VIRTIO_MMIO_START)?;
        let index = usize::try_from(from_start / VIRTIO_MMIO_SIZE).ok()?;
        Some((self.virtio().get(index)?.as_ref(), from_start % VIRTIO_MMIO_SIZE))
    }
}

/// The offset of `gpa` in the I/O APIC's page.
fn io_apic_at(gpa: u64) -> Option<u64> {
    gpa.checked_sub(IO_APIC).filter(|&offset| offset < PAGE_SIZE)
}

const COM1_LAST: u16 = serial::COM1 + serial::PORTS - 1;
