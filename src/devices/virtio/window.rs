//! The registers of a virtio-mmio device as the guest reads them: a page of plain memory.
//!
//! KVM maps the pages into the guest read-only. A read, of which every interrupt needs one, then
//! costs no exit; a write is an access to a device as ever. The transport keeps the words current.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::memory::{Slot, VIRTIO_MMIO_SIZE, VIRTIO_MMIO_START};

const WORDS: usize = VIRTIO_MMIO_SIZE as usize / 4;

#[repr(C, align(4096))]
#[derive(Debug)]
struct Page([AtomicU32; WORDS]);

const _: () = assert!(size_of::<Page>() as u64 == VIRTIO_MMIO_SIZE);

/// The windows of all devices, one behind the other. Clones are the same memory.
#[derive(Debug, Clone)]
pub struct Windows(Arc<[Page]>);

impl Windows {
    /// `count` windows that read as zero.
    pub fn new(count: usize) -> Self {
        // SAFETY: words of zero are a page.
        Self(unsafe { Arc::new_zeroed_slice(count).assume_init() })
    }

    /// The memory slot for all of them; `None` if there are none. It is valid as long as a clone of
    /// `self` lives.
    pub fn slot(&self) -> Option<Slot> {
        let size = self.0.len() as u64 * VIRTIO_MMIO_SIZE;
        (size > 0).then(|| Slot { gpa: VIRTIO_MMIO_START, size, host: self.0.as_ptr() as u64 })
    }

    /// The window of device `index`, if there is one.
    pub fn get(&self, index: usize) -> Option<Window> {
        (index < self.0.len()).then(|| Window { windows: self.clone(), index })
    }
}

/// One device's window.
#[derive(Debug, Clone)]
pub struct Window {
    windows: Windows,
    index: usize,
}

impl Window {
    /// The word at `offset` bytes, which wrap around at the window's end.
    pub fn word(&self, offset: u32) -> &AtomicU32 {
        &self.windows.0[self.index].0[offset as usize / 4 % WORDS]
    }

    /// Changes the word at `offset`.
    pub fn set(&self, offset: u32, value: u32) {
        self.word(offset).store(value, Ordering::SeqCst);
    }

    /// Reads as the guest does, at any offset and width.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        for (distance, byte) in (0..).zip(data) {
            let at = offset.wrapping_add(distance);
            let word = self.word(at as u32).load(Ordering::SeqCst);
            *byte = word.to_le_bytes()[at as usize % 4];
        }
    }
}
