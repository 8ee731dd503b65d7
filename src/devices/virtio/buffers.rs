//! Descriptor chains as scatter-gather lists for the host's vectored system calls.

use libc::iovec;
use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemoryBackend, VolatileSlice};

use super::Violation;
use crate::memory::GuestMemory;

/// Guest buffers in order, as host addresses. Data is consumed from the front. Kept from request
/// to request, so that the steady state allocates nothing.
///
/// Every entry lies within guest RAM; whoever hands entries to the kernel or reads them keeps the
/// [`GuestMemory`] they came from alive.
#[derive(Debug, Default)]
pub struct IoVecs {
    vecs: Vec<iovec>,
    /// The first one that is not consumed.
    first: usize,
    len: u64,
}

// SAFETY: the pointers refer to guest RAM, which is mapped for the whole process and is no
// thread's own; dereferencing them is unsafe and argued for where it is done.
unsafe impl Send for IoVecs {}

impl IoVecs {
    /// Bytes left.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// What is left, for `readv`, `writev` and their kin.
    pub fn as_slice(&self) -> &[iovec] {
        &self.vecs[self.first..]
    }

    /// Forgets everything, keeps the allocation.
    pub fn clear(&mut self) {
        self.vecs.clear();
        self.first = 0;
        self.len = 0;
    }

    /// Appends a buffer; an empty one is left out.
    pub fn push(&mut self, slice: &VolatileSlice<'_>) {
        if !slice.is_empty() {
            self.len += slice.len() as u64;
            self.vecs.push(iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() });
        }
    }

    /// Consumes up to `count` bytes.
    pub fn advance(&mut self, count: u64) {
        let mut count = count.min(self.len);
        self.len -= count;
        while count > 0 {
            let vec = &mut self.vecs[self.first];
            let step = count.min(vec.iov_len as u64) as usize;
            vec.iov_base = vec.iov_base.wrapping_byte_add(step);
            vec.iov_len -= step;
            count -= step as u64;
            if vec.iov_len == 0 {
                self.first += 1;
            }
        }
    }

    /// Takes the last byte away and returns its address.
    pub fn take_last_byte(&mut self) -> Option<*mut u8> {
        let vec = self.vecs.last_mut().filter(|_| self.len > 0)?;
        vec.iov_len -= 1;
        self.len -= 1;
        let byte = vec.iov_base.wrapping_byte_add(vec.iov_len).cast();
        if vec.iov_len == 0 {
            self.vecs.pop();
        }
        Some(byte)
    }

    /// Consumes as many bytes as `data` holds, copying them there, once. Returns whether there were
    /// that many; if not, nothing is consumed.
    ///
    /// # Safety
    ///
    /// The guest memory the buffers came from is alive.
    pub unsafe fn read(&mut self, data: &mut [u8]) -> bool {
        if self.len < data.len() as u64 {
            return false;
        }
        let mut done = 0;
        for vec in self.as_slice() {
            // SAFETY: an entry lies within guest RAM, alive by this function's contract.
            let slice = unsafe { VolatileSlice::new(vec.iov_base.cast(), vec.iov_len) };
            done += slice.copy_to(&mut data[done..]);
            if done == data.len() {
                break;
            }
        }
        self.advance(done as u64);
        true
    }

    /// Consumes up to as many bytes as `data` holds, overwriting them with it. Returns how many.
    ///
    /// # Safety
    ///
    /// The guest memory the buffers came from is alive.
    pub unsafe fn write(&mut self, data: &[u8]) -> usize {
        let mut done = 0;
        for vec in self.as_slice() {
            let step = vec.iov_len.min(data.len() - done);
            // SAFETY: an entry lies within guest RAM, alive by this function's contract.
            let slice = unsafe { VolatileSlice::<()>::new(vec.iov_base.cast(), step) };
            slice.copy_from(&data[done..done + step]);
            done += step;
            if done == data.len() {
                break;
            }
        }
        self.advance(done as u64);
        done
    }
}

/// One descriptor chain: what the device may read, then what it may write.
#[derive(Debug, Default)]
pub struct Buffers {
    /// Device-readable buffers.
    pub readable: IoVecs,
    /// Device-writable buffers.
    pub writable: IoVecs,
}

impl Buffers {
    /// Replaces the content with the buffers of `chain`, a chain of a queue of `queue_size`.
    ///
    /// # Errors
    ///
    /// [`Violation`] if the chain does not end, is longer than the queue, has a readable buffer
    /// after a writable one (virtio 1.2 §2.7.4.2), or leaves guest RAM.
    pub fn fill(
        &mut self,
        chain: DescriptorChain<&GuestMemory>,
        memory: &GuestMemory,
        queue_size: u16,
    ) -> Result<(), Violation> {
        self.readable.clear();
        self.writable.clear();
        let head = chain.head_index();
        let mut complete = false;
        let mut count = 0;
        for descriptor in chain {
            count += 1;
            let out_of_order = !descriptor.is_write_only() && !self.writable.is_empty();
            if out_of_order || count > queue_size {
                return Err(Violation::Chain(head));
            }
            complete = !descriptor.has_next();
            let vecs = if descriptor.is_write_only() { &mut self.writable } else { &mut self.readable };
            for slice in memory.get_slices(descriptor.addr(), descriptor.len() as usize) {
                let slice = slice.map_err(|_| Violation::Buffer {
                    head,
                    address: descriptor.addr().0,
                    length: descriptor.len(),
                })?;
                vecs.push(&slice);
            }
        }
        // The iterator ends early at an index outside of the table, at a bad indirect table and at
        // a loop: what tells them from a proper end is that the last descriptor has a successor.
        if complete { Ok(()) } else { Err(Violation::Chain(head)) }
    }
}
