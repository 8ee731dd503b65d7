//! Descriptor chains as scatter-gather lists for the host's vectored system calls.

use std::ptr;

use libc::iovec;
use vm_memory::VolatileSlice;

/// Guest buffers in order, as host addresses. Data is consumed from the front. Kept from request
/// to request, so that the steady state allocates nothing.
///
/// Every entry lies within guest RAM; whoever hands entries to the kernel or reads them keeps the
/// guest memory they came from alive.
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

    /// Appends `length` bytes at `start`, if there are any.
    pub fn push(&mut self, start: *mut u8, length: usize) {
        if length > 0 {
            self.len += length as u64;
            self.vecs.push(iovec { iov_base: start.cast(), iov_len: length });
        }
    }

    /// Appends what is left of `other`.
    pub fn append(&mut self, other: &IoVecs) {
        self.vecs.drain(..self.first);
        self.first = 0;
        self.vecs.extend_from_slice(other.as_slice());
        self.len += other.len;
    }

    /// Takes the last buffer away.
    pub fn pop(&mut self) {
        if self.first < self.vecs.len()
            && let Some(vec) = self.vecs.pop()
        {
            self.len -= vec.iov_len as u64;
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

    /// Appends what follows the first `skip` bytes of `other`.
    pub fn append_from(&mut self, other: &Self, skip: usize) {
        let mut skip = skip;
        for vec in other.as_slice() {
            let step = skip.min(vec.iov_len);
            skip -= step;
            self.push(vec.iov_base.wrapping_byte_add(step).cast(), vec.iov_len - step);
        }
    }

    /// Appends the first `length` bytes of `other`.
    pub fn append_up_to(&mut self, other: &Self, length: u64) {
        let mut left = length;
        for vec in other.as_slice() {
            if left == 0 {
                break;
            }
            let step = left.min(vec.iov_len as u64);
            left -= step;
            self.push(vec.iov_base.cast(), step as usize);
        }
    }

    /// Drops what is behind the first `length` bytes.
    pub fn truncate(&mut self, length: u64) {
        while self.len > length {
            let Some(vec) = self.vecs.last_mut() else { return };
            let step = (self.len - length).min(vec.iov_len as u64);
            vec.iov_len -= step as usize;
            self.len -= step;
            if vec.iov_len == 0 {
                self.vecs.pop();
            }
        }
    }

    /// Copies everything to the end of `data`, and consumes it.
    ///
    /// # Safety
    ///
    /// The guest memory the buffers came from is alive.
    pub unsafe fn read_to(&mut self, data: &mut Vec<u8>) {
        let start = data.len();
        data.resize(start + self.len as usize, 0);
        // SAFETY: by this function's contract.
        unsafe { self.read_slice(&mut data[start..]) };
    }

    /// Copies `N` bytes out, once, and consumes them. `None`, and nothing consumed, if there are fewer.
    ///
    /// # Safety
    ///
    /// The guest memory the buffers came from is alive.
    pub unsafe fn read<const N: usize>(&mut self) -> Option<[u8; N]> {
        if self.len < N as u64 {
            return None;
        }
        if let Some(vec) = self.as_slice().first().filter(|vec| vec.iov_len >= N) {
            // SAFETY: an entry lies within guest RAM, alive by this function's contract.
            let data = unsafe { ptr::read_volatile(vec.iov_base.cast()) };
            self.advance(N as u64);
            return Some(data);
        }
        let mut data = [0; N];
        // SAFETY: by this function's contract.
        unsafe { self.read_slice(&mut data) };
        Some(data)
    }

    /// Copies out, once, and consumes up to as many bytes as `data` holds. Returns how many.
    ///
    /// # Safety
    ///
    /// The guest memory the buffers came from is alive.
    pub unsafe fn read_slice(&mut self, data: &mut [u8]) -> usize {
        let mut done = 0;
        for vec in self.as_slice() {
            // SAFETY: an entry lies within guest RAM, alive by this function's contract.
            let slice = unsafe { VolatileSlice::<()>::new(vec.iov_base.cast(), vec.iov_len) };
            done += slice.copy_to(&mut data[done..]);
            if done == data.len() {
                break;
            }
        }
        self.advance(done as u64);
        done
    }

    /// Overwrites with `data` what is `offset` bytes from the front, and consumes nothing.
    ///
    /// # Safety
    ///
    /// The guest memory the buffers came from is alive.
    pub unsafe fn write_at(&self, offset: u64, mut data: &[u8]) {
        let mut skip = offset;
        for vec in self.as_slice() {
            if data.is_empty() {
                break;
            }
            let start = skip.min(vec.iov_len as u64) as usize;
            skip -= start as u64;
            let step = data.len().min(vec.iov_len - start);
            // SAFETY: an entry lies within guest RAM, alive by this function's contract; `start` and
            // `step` stay within it.
            let slice = unsafe { VolatileSlice::<()>::new(vec.iov_base.cast::<u8>().wrapping_add(start), step) };
            slice.copy_from(&data[..step]);
            data = &data[step..];
        }
    }

    /// Consumes up to as many bytes as `data` holds, overwriting them with it. Returns how many.
    ///
    /// # Safety
    ///
    /// The guest memory the buffers came from is alive.
    pub unsafe fn write(&mut self, data: &[u8]) -> usize {
        let count = self.len.min(data.len() as u64);
        // SAFETY: by this function's contract.
        unsafe { self.write_at(0, data) };
        self.advance(count);
        count as usize
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
    /// Forgets everything, keeps the allocations.
    pub fn clear(&mut self) {
        self.readable.clear();
        self.writable.clear();
    }
}
