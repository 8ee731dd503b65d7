//! A split virtqueue as devices use it (virtio 1.2 §2.7).

use std::mem;
use std::sync::Arc;

use virtio_queue::{Error, Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::{Buffers, INTERRUPT_USED_BUFFER, Interrupt, Violation};
use crate::memory::GuestMemory;

/// A queue that was set up, with the memory it lies in and the interrupt that announces it.
#[derive(Debug)]
pub struct Virtqueue {
    index: usize,
    queue: Queue,
    memory: GuestMemory,
    interrupt: Arc<Interrupt>,
    /// Buffers were used and the driver was not told.
    unannounced: bool,
}

impl Virtqueue {
    /// Queue `index` of a device as the driver set it up.
    ///
    /// # Errors
    ///
    /// [`Violation`] unless all of it is aligned, in guest RAM and ready.
    pub fn new(
        index: usize,
        state: QueueState,
        memory: GuestMemory,
        interrupt: Arc<Interrupt>,
    ) -> Result<Self, Violation> {
        if !state.ready {
            return Err(Violation::Queue(index, Error::QueueNotReady));
        }
        let size = usize::from(state.size);
        // The rings end in the event index fields, whether used or not.
        for (part, address, length) in [
            ("descriptor table", state.desc_table, 16 * size),
            ("available ring", state.avail_ring, 6 + 2 * size),
            ("used ring", state.used_ring, 6 + 8 * size),
        ] {
            if address == 0 || !memory.check_range(GuestAddress(address), length) {
                return Err(Violation::QueueAddress { queue: index, part, address });
            }
        }
        let queue = Queue::try_from(state).map_err(|error| Violation::Queue(index, error))?;
        Ok(Self { index, queue, memory, interrupt, unannounced: false })
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
        let broken = |error| Violation::Queue(self.index, error);
        let mut chain = self.queue.iter(&self.memory).map_err(broken)?.next();
        if chain.is_none() && self.queue.enable_notification(&self.memory).map_err(broken)? {
            // One was offered just before the driver could know that it has to notify.
            chain = self.queue.iter(&self.memory).map_err(broken)?.next();
        }
        let Some(chain) = chain else { return Ok(None) };
        let head = chain.head_index();
        buffers.fill(chain, &self.memory, self.queue.size())?;
        Ok(Some(head))
    }

    /// Puts the chain that was taken last back, to be taken again.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives the chain at `head` back with `written` bytes in its writable buffers.
    ///
    /// # Errors
    ///
    /// [`Violation`] if `head` is not in the descriptor table.
    pub fn add_used(&mut self, head: u16, written: u32) -> Result<(), Violation> {
        self.unannounced = true;
        self.queue.add_used(&self.memory, head, written).map_err(|error| Violation::Queue(self.index, error))
    }

    /// Interrupts the driver if it wants to know of what was used since the last time.
    ///
    /// # Errors
    ///
    /// None that a queue in guest RAM can have.
    pub fn announce(&mut self) -> Result<(), Violation> {
        let broken = |error| Violation::Queue(self.index, error);
        if mem::take(&mut self.unannounced) && self.queue.needs_notification(&self.memory).map_err(broken)? {
            self.interrupt.raise(INTERRUPT_USED_BUFFER);
        }
        Ok(())
    }
}
