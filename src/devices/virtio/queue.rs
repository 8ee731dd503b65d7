//! A split virtqueue as devices use it (virtio 1.2 §2.7).
//!
//! ```text
//!  descriptor table   16 × size   address u64, length u32, flags u16, next u16
//!  available ring      6 + 2 × size   flags, idx, ring[size], used_event
//!  used ring           6 + 8 × size   flags, idx, ring[size] of (id u32, length u32), avail_event
//! ```
//!
//! Where the three lie in this process is found out once, when the driver has set the queue up:
//! from then on a request costs a handful of plain loads and stores. The guest may change all of
//! it at any time, so every field is read once and checked after it was read.

use std::num::Wrapping;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};

use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::QueueState;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{Buffers, INTERRUPT_USED_BUFFER, Interrupt, Position, Violation};
use crate::memory::{self, GuestMemory};

const DESCRIPTOR_SIZE: u64 = 16;
/// Bytes of the used ring without its elements, and of an element.
const USED_RING: u64 = 6;
const USED_ELEMENT: u64 = 8;

/// Guest RAM by host address.
#[derive(Debug)]
struct Ram {
    regions: Vec<Region>,
    /// Keeps the regions mapped.
    memory: GuestMemory,
    /// What is written is noted in `memory`.
    tracked: bool,
}

#[derive(Debug)]
struct Region {
    start: u64,
    length: u64,
    host: *mut u8,
}

impl Ram {
    fn new(memory: GuestMemory) -> Self {
        let regions = memory
            .iter()
            .map(|region| Region { start: region.start_addr().0, length: region.len(), host: region.as_ptr() })
            .collect();
        let tracked = memory::is_tracked(&memory);
        Self { regions, memory, tracked }
    }

    /// The host address of `address`, and how many bytes follow it in its region.
    fn find(&self, address: u64) -> Option<(*mut u8, u64)> {
        self.regions.iter().find_map(|region| {
            let offset = address.wrapping_sub(region.start);
            (offset < region.length).then(|| (region.host.wrapping_add(offset as usize), region.length - offset))
        })
    }

    /// Notes that `length` bytes at `address` are written.
    fn mark(&self, address: u64, length: u64) {
        if self.tracked
            && let Some(region) = self.memory.find_region(GuestAddress(address))
        {
            region.bitmap().mark_dirty((address - region.start_addr().0) as usize, length as usize);
        }
    }

    /// The host address of `length` bytes at `address`, if all are in one region.
    fn range(&self, address: u64, length: u64) -> Option<*mut u8> {
        self.find(address).filter(|&(_, rest)| length <= rest).map(|(host, _)| host)
    }
}

/// A descriptor, copied out of guest memory.
struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

/// A writable buffer of a chain that was taken and not used yet.
struct Held {
    head: u16,
    address: u64,
    length: u64,
}

/// A queue that was set up, with the memory it lies in and the interrupt that announces it.
pub struct Virtqueue {
    index: usize,
    size: u16,
    event_idx: bool,
    descriptors: *const u8,
    available: *const AtomicU16,
    used: *const AtomicU16,
    /// Its guest physical address.
    used_ring: u64,
    /// The next entry of the available ring to take, and the end of those known to be there.
    next_available: Wrapping<u16>,
    end_available: Wrapping<u16>,
    /// The next entry of the used ring to write, and the first the driver was not told of.
    next_used: Wrapping<u16>,
    unannounced: Wrapping<u16>,
    /// What is to be noted as written when its chain is used, be that after a snapshot; empty unless that is tracked.
    held: Vec<Held>,
    ram: Ram,
    interrupt: Arc<Interrupt>,
}

// SAFETY: the pointers refer to guest RAM, which `ram` keeps mapped and which is no thread's own;
// every access is atomic or volatile.
unsafe impl Send for Virtqueue {}

impl Virtqueue {
    /// Queue `index` of a device as the driver set it up.
    ///
    /// # Errors
    ///
    /// [`Violation`] unless it is ready, its size a power of two, and each part of it aligned and in
    /// guest RAM.
    pub fn new(
        index: usize,
        state: &QueueState,
        memory: GuestMemory,
        interrupt: Arc<Interrupt>,
    ) -> Result<Self, Violation> {
        let size = state.size;
        if !state.ready || !size.is_power_of_two() || size > state.max_size {
            return Err(Violation::QueueSize { queue: index, size, ready: state.ready });
        }
        let ram = Ram::new(memory);
        let place = |part, address: u64, length, alignment| {
            let host = ram.range(address, length).filter(|_| address != 0 && address.is_multiple_of(alignment));
            host.ok_or(Violation::QueueAddress { queue: index, part, address })
        };
        // The rings end in the event index fields, whether used or not. Regions begin at page
        // boundaries, so what is aligned for the guest is aligned here.
        let descriptors = place("descriptor table", state.desc_table, DESCRIPTOR_SIZE * u64::from(size), 16)?;
        let available = place("available ring", state.avail_ring, 6 + 2 * u64::from(size), 2)?;
        let used = place("used ring", state.used_ring, USED_RING + USED_ELEMENT * u64::from(size), 4)?;
        Ok(Self {
            index,
            size,
            event_idx: state.event_idx_enabled,
            descriptors,
            available: available.cast(),
            used: used.cast(),
            used_ring: state.used_ring,
            next_available: Wrapping(state.next_avail),
            end_available: Wrapping(state.next_avail),
            next_used: Wrapping(state.next_used),
            unannounced: Wrapping(state.next_used),
            held: Vec::new(),
            ram,
            interrupt,
        })
    }

    /// Takes the next chain: its buffers replace what is in `buffers`. Returns its head, or `None`
    /// if there is none; the driver then notifies when it offers one.
    ///
    /// The buffers lie in memory that this queue keeps alive.
    ///
    /// # Errors
    ///
    /// [`Violation`] if the ring or the chain is malformed. It is not taken a second time.
    pub fn pop(&mut self, buffers: &mut Buffers) -> Result<Option<u16>, Violation> {
        if self.next_available == self.end_available && !self.look_for_more()? {
            return Ok(None);
        }
        let slot = self.next_available.0 & (self.size - 1);
        let head = u16::from_le(self.available(2 + slot).load(Ordering::Relaxed));
        self.next_available += 1;
        self.gather(head, buffers)?;
        Ok(Some(head))
    }

    /// Puts the chain that was taken last back, to be taken again.
    pub fn undo_pop(&mut self) {
        self.next_available -= 1;
    }

    /// How far it has got, with the last `reserved` chains put back that were taken and not used.
    pub fn position(&self, reserved: u16) -> Position {
        Position { next_available: (self.next_available - Wrapping(reserved)).0, next_used: self.next_used.0 }
    }

    /// How many chains it can hold.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Gives the chain at `head` back with `written` bytes in its writable buffers.
    pub fn add_used(&mut self, head: u16, written: u32) {
        self.put_used(head, written);
        self.publish_used();
    }

    /// Puts the chain at `head` in the used ring, where the driver sees it once
    /// [`Self::publish_used`] says so.
    pub fn put_used(&mut self, head: u16, written: u32) {
        for buffer in self.held.extract_if(.., |buffer| buffer.head == head) {
            self.ram.mark(buffer.address, buffer.length);
        }
        let slot = self.next_used.0 & (self.size - 1);
        let element = self.used.wrapping_add(2 + 4 * usize::from(slot)).cast::<AtomicU32>();
        // SAFETY: `slot` is less than the size of the ring, all of which lies in guest RAM and is
        // aligned to 4 bytes (`Self::new`).
        let (id, length) = unsafe { (&*element, &*element.wrapping_add(1)) };
        id.store(u32::from(head).to_le(), Ordering::Relaxed);
        length.store(written.to_le(), Ordering::Relaxed);
        self.next_used += 1;
    }

    /// Has the driver see what was put in the used ring.
    pub fn publish_used(&mut self) {
        self.ram.mark(self.used_ring, USED_RING + USED_ELEMENT * u64::from(self.size));
        // The driver sees the elements before the index that covers them.
        self.used(1).store(self.next_used.0.to_le(), Ordering::Release);
    }

    /// Interrupts the driver if it wants to know of what was used since the last time (§2.7.7, §2.7.10).
    pub fn announce(&mut self) {
        if self.is_awaited() {
            self.interrupt.raise(INTERRUPT_USED_BUFFER);
        }
    }

    /// The same, and if the driver is interrupted, it looks at `other` queue of the device as well. Returns whether
    /// it was.
    pub fn announce_with(&mut self, other: &mut Self) -> bool {
        let awaited = self.is_awaited();
        if awaited {
            other.unannounced = other.next_used;
            self.interrupt.raise(INTERRUPT_USED_BUFFER);
        }
        awaited
    }

    /// How many were used that the driver was not told of.
    pub fn unannounced(&self) -> u16 {
        (self.next_used - self.unannounced).0
    }

    /// Whether the driver wants to know of what was used since it was asked last.
    fn is_awaited(&mut self) -> bool {
        if self.unannounced == self.next_used {
            return false;
        }
        // The used index has to be out before the driver's wish is read: it looks again after
        // it has changed its wish.
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = Wrapping(u16::from_le(self.available(2 + self.size).load(Ordering::Relaxed)));
            self.next_used - event - Wrapping(1) < self.next_used - self.unannounced
        } else {
            let flags = u16::from_le(self.available(0).load(Ordering::Relaxed));
            u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0
        };
        self.unannounced = self.next_used;
        wanted
    }

    /// Whether the driver has offered something since the last look. If not, it will notify.
    fn look_for_more(&mut self) -> Result<bool, Violation> {
        Ok(self.read_index()? || self.ask_for_notification()?)
    }

    /// Asks the driver to notify when it offers the next (§2.7.10). Returns whether it has done so
    /// before it could know.
    fn ask_for_notification(&mut self) -> Result<bool, Violation> {
        // Without event indices the driver always notifies: it was never asked not to.
        if !self.event_idx {
            return Ok(false);
        }
        self.set_available_event(self.next_available);
        self.read_index()
    }

    /// The driver notifies when it offers the chain at this index.
    fn set_available_event(&self, index: Wrapping<u16>) {
        let field = 2 + 4 * usize::from(self.size);
        self.ram.mark(self.used_ring + 2 * field as u64, 2);
        self.used(field).store(index.0.to_le(), Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// The driver's index into the available ring. It will notify when it moves it on, whatever of the
    /// ring was taken.
    pub fn await_more(&mut self) -> Result<u16, Violation> {
        self.read_index()?;
        if self.event_idx {
            self.set_available_event(self.end_available);
            self.read_index()?;
        }
        Ok(self.end_available.0)
    }

    /// Asks the driver to notify only when it offers the chain after the next. Returns whether there is one by now, of
    /// which it may not notify.
    pub fn await_second(&mut self) -> Result<bool, Violation> {
        if !self.event_idx {
            return Ok(false);
        }
        self.set_available_event(self.next_available + Wrapping(1));
        self.read_index()
    }

    fn read_index(&mut self) -> Result<bool, Violation> {
        // What the driver wrote before the index is seen with it.
        let end = Wrapping(u16::from_le(self.available(1).load(Ordering::Acquire)));
        let ahead = (end - self.next_available).0;
        if ahead > self.size {
            return Err(Violation::AvailableIndex { queue: self.index, index: end.0, ahead });
        }
        self.end_available = end;
        Ok(ahead > 0)
    }

    /// Collects the buffers of the chain at `head` (§2.7.5).
    fn gather(&mut self, head: u16, buffers: &mut Buffers) -> Result<(), Violation> {
        let malformed = Violation::Chain(head);
        // It may have been put back.
        self.held.retain(|buffer| buffer.head != head);
        buffers.clear();
        let (mut table, mut table_size, mut indirect) = (self.descriptors, u32::from(self.size), false);
        let mut index = head;
        let mut count = 0;
        let mut total = 0u32;
        loop {
            if u32::from(index) >= table_size {
                return Err(malformed);
            }
            // SAFETY: the table lies in guest RAM up to `table_size`: here by `Self::new`, the
            // indirect one by the check below.
            let descriptor = unsafe { read_descriptor(table, index) };
            let has = |flag: u32| u32::from(descriptor.flags) & flag != 0;
            if has(VRING_DESC_F_INDIRECT) {
                // At most one indirect table, at the end of the chain, of whole descriptors.
                let length = u64::from(descriptor.length);
                let nested = indirect || has(VRING_DESC_F_NEXT) || !length.is_multiple_of(DESCRIPTOR_SIZE);
                let place = self.ram.range(descriptor.address, length).filter(|_| !nested);
                table = place.ok_or(malformed)?;
                (table_size, index, indirect) = (descriptor.length / 16, 0, true);
                continue;
            }
            count += 1;
            total = match total.checked_add(descriptor.length) {
                // A chain with a loop is longer than the queue, too.
                Some(total) if count <= self.size => total,
                _ => return Err(malformed),
            };
            self.add_buffer(head, &descriptor, has(VRING_DESC_F_WRITE), buffers)?;
            if !has(VRING_DESC_F_NEXT) {
                return Ok(());
            }
            index = descriptor.next;
        }
    }

    fn add_buffer(
        &mut self,
        head: u16,
        descriptor: &Descriptor,
        writable: bool,
        buffers: &mut Buffers,
    ) -> Result<(), Violation> {
        let &Descriptor { mut address, length, .. } = descriptor;
        if !writable && !buffers.writable.is_empty() {
            return Err(Violation::Chain(head));
        }
        let vecs = if writable { &mut buffers.writable } else { &mut buffers.readable };
        let mut left = u64::from(length);
        while left > 0 {
            let Some((host, rest)) = self.ram.find(address) else {
                return Err(Violation::Buffer { head, address: descriptor.address, length });
            };
            let step = left.min(rest);
            if writable && self.ram.tracked {
                // Noted now, should the chain never be used, and again when it is.
                self.ram.mark(address, step);
                self.held.push(Held { head, address, length: step });
            }
            vecs.push(host, step as usize);
            left -= step;
            address = address.wrapping_add(step);
        }
        Ok(())
    }

    /// A field of the available ring, counted in 16 bits.
    fn available(&self, field: u16) -> &AtomicU16 {
        debug_assert!(field < 3 + self.size);
        // SAFETY: the ring of `3 + size` fields lies in guest RAM, aligned (`Self::new`).
        unsafe { &*self.available.wrapping_add(usize::from(field)) }
    }

    /// A field of the used ring, counted in 16 bits.
    fn used(&self, field: usize) -> &AtomicU16 {
        debug_assert!(field < 3 + 4 * usize::from(self.size));
        // SAFETY: the ring of `3 + 4 * size` fields lies in guest RAM, aligned (`Self::new`).
        unsafe { &*self.used.wrapping_add(field) }
    }
}

/// Copies a descriptor, once.
///
/// # Safety
///
/// The table at `table` has more than `index` descriptors, all in mapped memory.
unsafe fn read_descriptor(table: *const u8, index: u16) -> Descriptor {
    /// Numbers that may lie anywhere, since an indirect table may: two loads, where bytes are sixteen.
    #[repr(C, packed)]
    struct Raw(u64, u64);
    let at = table.wrapping_add(usize::from(index) * DESCRIPTOR_SIZE as usize);
    // SAFETY: by this function's contract; the type has no alignment, and every value is one of it.
    let Raw(address, rest) = unsafe { ptr::read_volatile(at.cast()) };
    let rest = u64::from_le(rest);
    Descriptor {
        address: u64::from_le(address),
        length: rest as u32,
        flags: (rest >> 32) as u16,
        next: (rest >> 48) as u16,
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::config::HugePages;
    use crate::devices::virtio::Windows;
    use crate::devices::virtio::testing::{AVAILABLE, DESCRIPTORS, USED, guest_memory};
    use crate::memory::GuestRam;

    fn queue(memory: &GuestMemory) -> Virtqueue {
        let state = QueueState {
            max_size: 16,
            size: 16,
            ready: true,
            desc_table: DESCRIPTORS,
            avail_ring: AVAILABLE,
            used_ring: USED,
            event_idx_enabled: true,
            ..QueueState::default()
        };
        let interrupt = Interrupt::new(Box::new(|| {}), Windows::new(1).get(0).unwrap());
        Virtqueue::new(0, &state, memory.clone(), Arc::new(interrupt)).unwrap()
    }

    /// A frame arrives in a chain that was taken long before, a disk answers after a snapshot has begun.
    #[test]
    fn what_is_written_to_a_chain_after_a_snapshot_is_in_the_next_one() {
        let ram = GuestRam::tracked(1 << 20, HugePages::None).unwrap();
        let (memory, mut queue) = (ram.memory(), queue(ram.memory()));
        let page = |number: u64| {
            let words = &ram.take_written().unwrap()[0];
            words[number as usize / 64] >> (number % 64) & 1 == 1
        };
        for (field, value) in [(0, 0x8000u64), (8, 0x2_0000_2000)] {
            memory.write_obj(value, GuestAddress(DESCRIPTORS + field)).unwrap();
        }
        memory.write_obj(1u16, GuestAddress(AVAILABLE + 2)).unwrap();
        let mut buffers = Buffers::default();
        assert_eq!(queue.pop(&mut buffers), Ok(Some(0)));
        assert_eq!(buffers.writable.len(), 0x2000);
        assert!(page(9));
        assert!(!page(9), "a snapshot has it");
        queue.add_used(0, 0x2000);
        assert!(page(9), "the next one needs it again");
        queue.add_used(0, 0);
        assert!(!page(9), "a driver that lies costs nothing");
    }

    #[test]
    fn a_chain_that_is_put_back_again_and_again_takes_no_room() {
        let ram = GuestRam::tracked(1 << 20, HugePages::None).unwrap();
        let mut queue = queue(ram.memory());
        ram.memory().write_obj(0x2_0000_2000u64, GuestAddress(DESCRIPTORS + 8)).unwrap();
        ram.memory().write_obj(1u16, GuestAddress(AVAILABLE + 2)).unwrap();
        for _ in 0..100 {
            assert_eq!(queue.pop(&mut Buffers::default()), Ok(Some(0)));
            queue.undo_pop();
        }
        assert_eq!(queue.held.len(), 1);
    }

    #[test]
    fn what_is_offered_just_before_the_driver_could_know_is_found() {
        let memory = guest_memory();
        let mut queue = queue(&memory);
        for number in 1..1000u16 {
            assert_eq!(queue.pop(&mut Buffers::default()), Ok(None));
            assert!(!queue.read_index().unwrap());
            memory.write_obj(number, GuestAddress(AVAILABLE + 2)).unwrap();
            assert!(queue.ask_for_notification().unwrap());
            assert_eq!(queue.pop(&mut Buffers::default()), Ok(Some(0)));
            assert_eq!(memory.read_obj::<u16>(GuestAddress(USED + 4 + 8 * 16)).unwrap(), number - 1);
        }
    }

    #[test]
    fn what_the_driver_may_not_notify_of_is_found() {
        let memory = guest_memory();
        let mut queue = queue(&memory);
        let event = || memory.read_obj::<u16>(GuestAddress(USED + 4 + 8 * 16)).unwrap();
        assert_eq!((queue.await_second(), event()), (Ok(false), 1));
        memory.write_obj(1u16, GuestAddress(AVAILABLE + 2)).unwrap();
        assert_eq!((queue.await_second(), event()), (Ok(true), 1));
        assert_eq!(queue.pop(&mut Buffers::default()), Ok(Some(0)));
        assert_eq!((queue.pop(&mut Buffers::default()), event()), (Ok(None), 1));
    }
}
