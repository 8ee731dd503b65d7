#![allow(dead_code)]
//! The other side of the transport: a guest that drives a device through its registers and its
//! virtqueue as it likes, and an event loop that does what the real one does.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use virtio_bindings::virtio_mmio as reg;
use vm_memory::{Bytes, GuestAddress};

use vmm_sys_util::eventfd::EventFd;

use super::{Device, Source, VirtioMmio, Windows};
use crate::memory::{GuestMemory, pieces};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

pub const VERSION_1: u64 = 1 << 32;
pub const EVENT_IDX: u64 = 1 << 29;
pub const INDIRECT_DESC: u64 = 1 << 28;

/// Guest RAM below the gap, and above it.
pub const LOW_RAM: u64 = 8 << 20;
pub const HIGH_RAM_START: u64 = 4 << 30;
pub const HIGH_RAM: u64 = 1 << 20;

/// Where the guest puts its first queue, how far the others are from it, and where its buffers may start.
pub const DESCRIPTORS: u64 = 0x1000;
pub const AVAILABLE: u64 = 0x3000;
pub const USED: u64 = 0x4000;
pub const NEXT_QUEUE: u64 = 0x4000;
pub const BUFFERS: u64 = 0x1_0000;
/// Most queues of a device.
const QUEUES: usize = 3;

/// A buffer of a chain.
#[derive(Debug, Clone, Copy)]
pub struct Buffer {
    pub address: u64,
    pub length: u32,
    pub writable: bool,
}

/// A device-readable buffer.
pub fn readable(address: u64, length: u32) -> Buffer {
    Buffer { address, length, writable: false }
}

/// A device-writable buffer.
pub fn writable(address: u64, length: u32) -> Buffer {
    Buffer { address, length, writable: true }
}

pub fn guest_memory() -> GuestMemory {
    pieces(&[(0, LOW_RAM), (HIGH_RAM_START, HIGH_RAM)])
}

/// A file in memory: flushing it costs nothing.
pub fn file(size: u64) -> File {
    // SAFETY: the name is a C string, the descriptor is new and ours.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"disk".as_ptr(), libc::MFD_CLOEXEC)) };
    file.set_len(size).unwrap();
    file
}

/// A guest with one device.
pub struct Guest {
    kick: EventFd,
    pub memory: GuestMemory,
    pub mmio: Arc<VirtioMmio>,
    /// Not taken yet.
    pub interrupts: Arc<AtomicU32>,
    pub queue_size: u16,
    events: EventLoop,
    queues: [Queue; QUEUES],
    selected: Cell<usize>,
}

/// How far the guest is with a queue.
#[derive(Default)]
struct Queue {
    next_descriptor: Cell<u16>,
    next_available: Cell<u16>,
    next_used: Cell<u16>,
}

impl Guest {
    pub fn new(device: Device) -> Self {
        let memory = guest_memory();
        let interrupts = Arc::new(AtomicU32::new(0));
        let line = Arc::clone(&interrupts);
        let line = Box::new(move || _ = line.fetch_add(1, Ordering::SeqCst));
        let window = Windows::new(1).get(0).unwrap();
        let kick = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let mmio = Arc::new(VirtioMmio::new(device, memory.clone(), line, window, kick.try_clone().unwrap()));
        let events = EventLoop::new(&mmio.sources());
        let queues = std::array::from_fn(|_| Queue::default());
        Self { memory, mmio, kick, interrupts, queue_size: 256, events, queues, selected: Cell::new(0) }
    }

    /// Means queue `index` from now on; the first one at the beginning.
    pub fn select(&self, index: usize) -> &Self {
        self.selected.set(index);
        self
    }

    fn queue(&self) -> &Queue {
        &self.queues[self.selected.get()]
    }

    /// Where `part` of the selected queue is.
    fn of_queue(&self, part: u64) -> u64 {
        part + NEXT_QUEUE * self.selected.get() as u64
    }

    /// A guest whose driver accepted everything and is ready.
    pub fn booted(device: Device) -> Self {
        let guest = Self::new(device);
        let features = guest.offered();
        guest.boot(features);
        assert_eq!(guest.status(), 0xf);
        guest
    }

    pub fn read(&self, register: u32) -> u32 {
        let mut word = [0; 4];
        self.mmio.read(register.into(), &mut word);
        u32::from_le_bytes(word)
    }

    pub fn write(&self, register: u32, value: u32) {
        self.mmio.write(register.into(), &value.to_le_bytes());
    }

    pub fn status(&self) -> u32 {
        self.read(reg::VIRTIO_MMIO_STATUS)
    }

    pub fn set_status(&self, status: u32) {
        self.write(reg::VIRTIO_MMIO_STATUS, status);
    }

    pub fn offered(&self) -> u64 {
        let page = |page| {
            self.write(reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL, page);
            u64::from(self.read(reg::VIRTIO_MMIO_DEVICE_FEATURES))
        };
        page(0) | page(1) << 32
    }

    pub fn accept(&self, features: u64) {
        for (page, bits) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, page);
            self.write(reg::VIRTIO_MMIO_DRIVER_FEATURES, bits);
        }
    }

    /// What a driver does before DRIVER_OK.
    pub fn prepare(&self, features: u64) {
        self.set_status(0);
        self.set_status(1);
        self.set_status(3);
        self.accept(features);
        self.set_status(0xb);
        self.put(DESCRIPTORS, &[0; (BUFFERS - DESCRIPTORS) as usize]);
        for (index, queue) in self.queues.iter().enumerate() {
            self.select(index);
            self.write(reg::VIRTIO_MMIO_QUEUE_SEL, index as u32);
            if self.read(reg::VIRTIO_MMIO_QUEUE_NUM_MAX) > 0 {
                let [descriptors, available, used] = [DESCRIPTORS, AVAILABLE, USED].map(|part| self.of_queue(part));
                self.set_up_queue(index as u32, self.queue_size.into(), descriptors, available, used);
            }
            queue.next_descriptor.set(0);
            queue.next_available.set(0);
            queue.next_used.set(0);
        }
        self.select(0);
        self.write(reg::VIRTIO_MMIO_QUEUE_SEL, 0);
    }

    /// A reset for which the vmm thread may have something to do.
    pub fn reset(&self) {
        let mmio = Arc::clone(&self.mmio);
        let vcpu = std::thread::spawn(move || mmio.write(reg::VIRTIO_MMIO_STATUS.into(), &[0; 4]));
        while !vcpu.is_finished() {
            self.turn(Duration::ZERO);
            std::thread::yield_now();
        }
    }

    pub fn boot(&self, features: u64) {
        self.prepare(features);
        self.set_status(0xf);
    }

    pub fn set_up_queue(&self, queue: u32, size: u32, descriptors: u64, available: u64, used: u64) {
        self.write(reg::VIRTIO_MMIO_QUEUE_SEL, queue);
        self.write(reg::VIRTIO_MMIO_QUEUE_NUM, size);
        for (low, high, address) in [
            (reg::VIRTIO_MMIO_QUEUE_DESC_LOW, reg::VIRTIO_MMIO_QUEUE_DESC_HIGH, descriptors),
            (reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH, available),
            (reg::VIRTIO_MMIO_QUEUE_USED_LOW, reg::VIRTIO_MMIO_QUEUE_USED_HIGH, used),
        ] {
            self.write(low, address as u32);
            self.write(high, (address >> 32) as u32);
        }
        self.write(reg::VIRTIO_MMIO_QUEUE_READY, 1);
    }

    /// Writes a descriptor of the table at `table`.
    pub fn descriptor_at(&self, table: u64, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(table + 16 * u64::from(index))).unwrap();
    }

    /// The queue's descriptor table.
    pub fn table(&self) -> u64 {
        self.of_queue(DESCRIPTORS)
    }

    /// Begins the queue anew, after a reset of the device.
    pub fn forget(&self) {
        let queue = self.queue();
        for at in [&queue.next_descriptor, &queue.next_available, &queue.next_used] {
            at.set(0);
        }
        self.set_available_index(0);
        self.memory.write_obj(0u16, GuestAddress(self.of_queue(USED) + 2)).unwrap();
    }

    /// Writes a descriptor of the queue.
    pub fn descriptor(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        self.descriptor_at(self.of_queue(DESCRIPTORS), index, address, length, flags, next);
    }

    /// Links `buffers` into a chain and returns its head.
    pub fn chain(&self, buffers: &[Buffer]) -> u16 {
        let head = self.queue().next_descriptor.get();
        let at = |i: usize| (head + i as u16) % self.queue_size;
        for (i, buffer) in buffers.iter().enumerate() {
            let more = if i + 1 < buffers.len() { NEXT } else { 0 };
            let flags = if buffer.writable { WRITE | more } else { more };
            self.descriptor(at(i), buffer.address, buffer.length, flags, at(i + 1));
        }
        self.queue().next_descriptor.set(at(buffers.len()));
        head
    }

    /// Puts `head` in the available ring.
    pub fn offer(&self, head: u16) {
        let index = self.queue().next_available.get();
        let slot = u64::from(index % self.queue_size);
        self.memory.write_obj(head, GuestAddress(self.of_queue(AVAILABLE) + 4 + 2 * slot)).unwrap();
        self.queue().next_available.set(index.wrapping_add(1));
        self.set_available_index(self.queue().next_available.get());
    }

    pub fn set_available_index(&self, index: u16) {
        self.memory.write_obj(index, GuestAddress(self.of_queue(AVAILABLE) + 2)).unwrap();
    }

    /// The used buffer after which the guest wants to be interrupted.
    pub fn set_used_event(&self, index: u16) {
        self.memory
            .write_obj(index, GuestAddress(self.of_queue(AVAILABLE) + 4 + 2 * u64::from(self.queue_size)))
            .unwrap();
    }

    /// The available buffer after which the device wants to be notified.
    pub fn available_event(&self) -> u16 {
        self.memory.read_obj(GuestAddress(self.of_queue(USED) + 4 + 8 * u64::from(self.queue_size))).unwrap()
    }

    /// Notifies the device as KVM does, without waiting for it.
    pub fn notify(&self) {
        self.kick.write(1).unwrap();
    }

    /// Notifies the device and lets it work until it has nothing to do.
    pub fn kick(&self) {
        self.notify();
        while self.turn(Duration::ZERO) > 0 {}
    }

    /// One turn of the event loop. Returns the number of events.
    pub fn turn(&self, timeout: Duration) -> usize {
        let tags = self.events.wait(timeout);
        for &tag in &tags {
            self.mmio.on_event(tag);
        }
        tags.len()
    }

    /// Turns the event loop until `count` more buffers are used, which must not take a minute.
    pub fn await_used(&self, count: usize) -> Vec<(u16, u32)> {
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut used = self.used();
        while used.len() < count {
            assert!(Instant::now() < deadline, "{} of {count} buffers used in a minute", used.len());
            self.turn(Duration::from_millis(100));
            used.extend(self.used());
        }
        used
    }

    /// The buffers used since the last call: head and bytes written.
    pub fn used(&self) -> Vec<(u16, u32)> {
        let end: u16 = self.memory.read_obj(GuestAddress(self.of_queue(USED) + 2)).unwrap();
        let mut used = Vec::new();
        while self.queue().next_used.get() != end {
            let slot = self.of_queue(USED) + 4 + 8 * u64::from(self.queue().next_used.get() % self.queue_size);
            let [head, length]: [u32; 2] = self.memory.read_obj(GuestAddress(slot)).unwrap();
            used.push((head as u16, length));
            self.queue().next_used.set(self.queue().next_used.get().wrapping_add(1));
        }
        used
    }

    /// Takes and acknowledges the interrupt; 0 if there was none.
    pub fn interrupt(&self) -> u32 {
        if self.interrupts.swap(0, Ordering::SeqCst) == 0 {
            return 0;
        }
        let status = self.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS);
        self.write(reg::VIRTIO_MMIO_INTERRUPT_ACK, status);
        status
    }

    pub fn put(&self, address: u64, data: &[u8]) {
        self.memory.write_slice(data, GuestAddress(address)).unwrap();
    }

    pub fn get(&self, address: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.memory.read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }
}

/// Watches sources as the machine's event loop does: edge-triggered, nothing is read.
struct EventLoop {
    epoll: OwnedFd,
}

impl EventLoop {
    fn new(sources: &[Source]) -> Self {
        // SAFETY: the descriptor is new and ours.
        let epoll = unsafe { OwnedFd::from_raw_fd(libc::epoll_create1(libc::EPOLL_CLOEXEC)) };
        for source in sources {
            let mut event =
                libc::epoll_event { events: (libc::EPOLLIN | libc::EPOLLET) as u32, u64: source.tag.into() };
            // SAFETY: both descriptors are open, the event is on the stack.
            let added = unsafe { libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, source.fd, &mut event) };
            assert_eq!(added, 0, "{}", io::Error::last_os_error());
        }
        Self { epoll }
    }

    fn wait(&self, timeout: Duration) -> Vec<u8> {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 8];
        let timeout = timeout.as_millis() as i32;
        // SAFETY: the array is as long as it says.
        let count = unsafe { libc::epoll_wait(self.epoll.as_raw_fd(), events.as_mut_ptr(), 8, timeout) };
        events.iter().take(count.max(0) as usize).map(|event| event.u64 as u8).collect()
    }
}
