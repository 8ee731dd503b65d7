//! A driver on another processor: notifications and interrupts are asked for and skipped while
//! both sides look at each other's index (virtio 1.2 §2.7.7, §2.7.10). If either forgets to look
//! again after it asked, the two sleep for ever.

use std::hint::spin_loop;
use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
use std::thread;
use std::time::{Duration, Instant};

use virtio_queue::QueueState;
use vm_memory::{Bytes, GuestAddress};

use super::testing::{AVAILABLE, BUFFERS, DESCRIPTORS, USED, guest_memory};
use super::{Buffers, Interrupt, Virtqueue, Windows};
use crate::memory::GuestMemory;

/// Long enough for a missing second look to be found more often than not.
const TIME: Duration = Duration::from_secs(1);
const SIZE: u16 = 16;

/// The driver's side of a queue with EVENT_IDX.
struct Driver {
    memory: GuestMemory,
    kick: AtomicBool,
    interrupt: Arc<AtomicU32>,
}

impl Driver {
    fn load(&self, address: u64) -> u16 {
        self.memory.load(GuestAddress(address), Ordering::Acquire).unwrap()
    }

    fn store(&self, value: u16, address: u64) {
        self.memory.store(value, GuestAddress(address), Ordering::Release).unwrap();
    }

    /// Offers request `number`, and notifies the device only if it asked for that.
    fn offer(&self, number: u16) {
        self.store(number.wrapping_add(1), AVAILABLE + 2);
        fence(Ordering::SeqCst);
        if self.load(USED + 4 + 8 * u64::from(SIZE)) == number {
            self.kick.store(true, Ordering::SeqCst);
        }
    }

    /// Waits until request `number` is used: by looking, which catches the device just before it
    /// looks for the next, or asleep, woken by nothing but an interrupt.
    fn wait(&self, number: u16, asleep: bool) -> bool {
        if asleep {
            self.store(number, AVAILABLE + 4 + 2 * u64::from(SIZE));
            fence(Ordering::SeqCst);
        }
        let used = || self.load(USED + 2) == number.wrapping_add(1);
        used() || sleep_until(|| (!asleep || self.interrupt.swap(0, Ordering::SeqCst) > 0) && used())
    }
}

/// Waits for `condition`; false if it does not come true for a long time.
fn sleep_until(condition: impl Fn() -> bool) -> bool {
    for spins in 0u32.. {
        if condition() {
            return true;
        }
        spin_loop();
        if spins > 1000 {
            break;
        }
    }
    let deadline = Instant::now() + Duration::from_secs(60);
    while Instant::now() < deadline {
        if condition() {
            return true;
        }
        thread::yield_now();
    }
    false
}

fn queue(memory: &GuestMemory, interrupt: &Arc<AtomicU32>) -> Virtqueue {
    let state = QueueState {
        max_size: SIZE,
        size: SIZE,
        ready: true,
        desc_table: DESCRIPTORS,
        avail_ring: AVAILABLE,
        used_ring: USED,
        event_idx_enabled: true,
        ..QueueState::default()
    };
    let line = Arc::clone(interrupt);
    let interrupt =
        Interrupt::new(Box::new(move || _ = line.fetch_add(1, Ordering::SeqCst)), Windows::new(1).get(0).unwrap());
    // Every entry of the available ring is descriptor 0: a buffer of one byte.
    memory.write_obj([BUFFERS, 1], GuestAddress(DESCRIPTORS)).unwrap();
    Virtqueue::new(0, &state, memory.clone(), Arc::new(interrupt)).unwrap()
}

#[test]
fn no_notification_and_no_interrupt_is_lost() {
    let memory = guest_memory();
    let interrupt = Arc::new(AtomicU32::new(0));
    let mut queue = queue(&memory, &interrupt);
    let driver = Driver { memory, kick: AtomicBool::new(true), interrupt };
    thread::scope(|scope| {
        let vcpu = scope.spawn(|| {
            let start = Instant::now();
            // The clock is read rarely: between two requests there should be nothing at all.
            for number in (0u32..).take_while(|number| !number.is_multiple_of(1024) || start.elapsed() < TIME) {
                let number = number as u16;
                driver.offer(number);
                assert!(driver.wait(number, number.is_multiple_of(8)), "request {number}: nobody was woken");
            }
        });
        let mut buffers = Buffers::default();
        let mut done = Wrapping(0u32);
        while !vcpu.is_finished() {
            while let Some(head) = queue.pop(&mut buffers).unwrap() {
                queue.add_used(head, 0);
                done += 1;
                // Now and then the device is a little late: with the next look, and with the interrupt.
                for _ in 0..done.0 % 32 {
                    spin_loop();
                }
                queue.announce();
            }
            let kicked = || driver.kick.swap(false, Ordering::SeqCst) || vcpu.is_finished();
            assert!(sleep_until(kicked), "after {done}: the driver notified nobody");
        }
        vcpu.join().unwrap();
    });
}
