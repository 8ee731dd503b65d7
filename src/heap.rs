//! The heap where libc is musl: its functions for memory, by Doug Lea's allocator, which is fast, and small at the
//! start.
//!
//! They replace libc's own, not only Rust's global allocator: what the standard library keeps for itself, such as a
//! thread's handle, it always asks libc for, and a second heap would cost a twentieth of the start.

use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use dlmalloc::{Allocator, Dlmalloc};

static HEAP: Mutex<Dlmalloc<Pages>> = Mutex::new(Dlmalloc::new_with_allocator(Pages));

fn heap() -> MutexGuard<'static, Dlmalloc<Pages>> {
    HEAP.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The alignment of whatever is allocated without one.
const ALIGNMENT: usize = 16;

/// malloc(3).
#[unsafe(no_mangle)]
extern "C" fn malloc(size: usize) -> *mut u8 {
    // SAFETY: any size may be asked for.
    unsafe { heap().c_malloc(size) }
}

/// calloc(3).
#[unsafe(no_mangle)]
extern "C" fn calloc(count: usize, size: usize) -> *mut u8 {
    match count.checked_mul(size) {
        // SAFETY: any size may be asked for.
        Some(size) => unsafe { heap().calloc(size, ALIGNMENT) },
        None => ptr::null_mut(),
    }
}

/// aligned_alloc(3). `alignment` is a power of two, as its callers make sure.
#[unsafe(no_mangle)]
unsafe extern "C" fn aligned_alloc(alignment: usize, size: usize) -> *mut u8 {
    // SAFETY: the alignment is a power of two, and any size may be asked for.
    unsafe { heap().c_memalign(alignment, size) }
}

/// realloc(3). `memory` is null or from one of these functions.
#[unsafe(no_mangle)]
unsafe extern "C" fn realloc(memory: *mut u8, size: usize) -> *mut u8 {
    // SAFETY: `memory` is as the caller has it from this heap, or null.
    unsafe { heap().c_realloc(memory, size) }
}

/// free(3). `memory` is null or from one of these functions, and nobody's afterwards.
#[unsafe(no_mangle)]
unsafe extern "C" fn free(memory: *mut u8) {
    // SAFETY: `memory` is as the caller has it from this heap, or null.
    unsafe { heap().c_free(memory) }
}

/// Where the heap has its memory from: mmap(2) and munmap(2) and nothing else, which keeps the system-call filters
/// small.
struct Pages;

// SAFETY: what is mapped is nobody else's, and zero, until all of it is unmapped.
unsafe impl Allocator for Pages {
    fn alloc(&self, size: usize) -> (*mut u8, usize, u32) {
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping, at an address of the kernel's choice, changes no memory that is in use.
        match unsafe { libc::mmap(ptr::null_mut(), size, access, flags, -1, 0) } {
            libc::MAP_FAILED => (ptr::null_mut(), 0, 0),
            memory => (memory.cast(), size, 0),
        }
    }

    fn remap(&self, _: *mut u8, _: usize, _: usize, _: bool) -> *mut u8 {
        ptr::null_mut()
    }

    fn free_part(&self, memory: *mut u8, size: usize, left: usize) -> bool {
        self.free(memory.wrapping_add(left), size - left)
    }

    fn free(&self, memory: *mut u8, size: usize) -> bool {
        // SAFETY: the heap gives back what `alloc` gave it, or the end of that.
        unsafe { libc::munmap(memory.cast(), size) == 0 }
    }

    fn can_release_part(&self, _: u32) -> bool {
        true
    }

    fn allocates_zeros(&self) -> bool {
        true
    }

    fn page_size(&self) -> usize {
        4096
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_and_zero_as_asked_and_keeps_its_content() {
        // SAFETY: what is allocated is written within its size and freed once.
        unsafe {
            let zeroed = calloc(3, 1000);
            assert!((0..3000).all(|at| *zeroed.add(at) == 0));
            zeroed.write_bytes(7, 3000);
            let grown = realloc(zeroed, 8 << 20);
            assert!((0..3000).all(|at| *grown.add(at) == 7));
            free(grown);
            let aligned = aligned_alloc(4096, 10);
            assert_eq!(aligned as usize % 4096, 0);
            free(aligned);
            free(ptr::null_mut());
            assert!(calloc(usize::MAX, 2).is_null() && malloc(usize::MAX / 2).is_null());
        }
    }

    /// As [`Pages`], and how much of it there is.
    struct Counted(std::cell::Cell<usize>);

    // SAFETY: as `Pages`, to which it leaves everything.
    unsafe impl Allocator for Counted {
        fn alloc(&self, size: usize) -> (*mut u8, usize, u32) {
            self.0.set(self.0.get() + size);
            Pages.alloc(size)
        }

        fn remap(&self, memory: *mut u8, old: usize, new: usize, may_move: bool) -> *mut u8 {
            Pages.remap(memory, old, new, may_move)
        }

        fn free_part(&self, memory: *mut u8, size: usize, left: usize) -> bool {
            self.0.set(self.0.get() - (size - left));
            Pages.free_part(memory, size, left)
        }

        fn free(&self, memory: *mut u8, size: usize) -> bool {
            self.0.set(self.0.get() - size);
            Pages.free(memory, size)
        }

        fn can_release_part(&self, flags: u32) -> bool {
            Pages.can_release_part(flags)
        }

        fn allocates_zeros(&self) -> bool {
            Pages.allocates_zeros()
        }

        fn page_size(&self) -> usize {
            Pages.page_size()
        }
    }

    #[test]
    fn what_was_much_is_given_back() {
        let mut heap = Dlmalloc::new_with_allocator(Counted(std::cell::Cell::new(0)));
        // SAFETY: what is allocated is freed once.
        unsafe {
            let small = heap.c_malloc(100);
            let large = heap.c_malloc(64 << 20);
            assert!(heap.allocator().0.get() > 64 << 20);
            heap.c_free(large);
            assert!(heap.allocator().0.get() < 1 << 20, "{}", heap.allocator().0.get());
            heap.c_free(small);
        }
    }
}
