//! The state of a virtio-mmio device in a snapshot: plain data, hostile until the transport took it.

use serde::{Deserialize, Serialize};
use virtio_queue::QueueState;

use super::CONFIG_SPACE_SIZE;
use crate::config::at_most;

/// No device here has more.
const MAX_QUEUES: usize = 3;

/// How far a queue has got: the next entries of its rings that the device will look at.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Of the available ring.
    pub next_available: u16,
    /// Of the used ring.
    pub next_used: u16,
}

/// A queue as the driver set it up (virtio 1.2 §4.2.2, the Queue registers).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedQueue {
    /// QueueNum.
    pub size: u16,
    /// QueueReady.
    pub ready: bool,
    /// Guest physical address of the descriptor table.
    pub descriptors: u64,
    /// Of the available ring.
    pub available: u64,
    /// Of the used ring.
    pub used: u64,
    /// Where the device was.
    pub position: Position,
}

impl SavedQueue {
    pub(super) fn new(queue: &QueueState, position: Position) -> Self {
        Self {
            size: queue.size,
            ready: queue.ready,
            descriptors: queue.desc_table,
            available: queue.avail_ring,
            used: queue.used_ring,
            position,
        }
    }

    /// The registers of a queue that may be `max_size` long. What is wrong with them is found when the
    /// device is activated, as it is when a driver writes them.
    pub(super) fn registers(&self, max_size: u16) -> QueueState {
        QueueState {
            max_size,
            size: self.size,
            ready: self.ready,
            desc_table: self.descriptors,
            avail_ring: self.available,
            used_ring: self.used,
            next_avail: self.position.next_available,
            next_used: self.position.next_used,
            ..QueueState::default()
        }
    }
}

/// What the driver has written, besides the queues' registers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    /// Status (§2.1).
    pub status: u32,
    /// DeviceFeaturesSel.
    pub device_features_sel: u32,
    /// DriverFeaturesSel.
    pub driver_features_sel: u32,
    /// What the driver accepted.
    pub driver_features: u64,
    /// It accepted a bit that does not exist.
    pub alien_features: bool,
    /// QueueSel.
    pub queue_sel: u32,
}

/// A device and its transport, with nothing in flight.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioState {
    /// Device ID.
    pub kind: u32,
    /// The registers.
    pub registers: Registers,
    /// The queues.
    #[serde(deserialize_with = "at_most::<_, _, MAX_QUEUES>")]
    pub queues: Vec<SavedQueue>,
    /// ConfigGeneration.
    pub config_generation: u32,
    /// InterruptStatus.
    pub interrupt: u32,
    /// The configuration space that the guest saw.
    #[serde(deserialize_with = "at_most::<_, _, CONFIG_SPACE_SIZE>")]
    pub config_space: Vec<u8>,
}

/// Why a state does not fit the device it is for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// Another kind of device.
    #[error("it is of device kind {found}, not {expected}")]
    Kind {
        /// In the state.
        found: u32,
        /// Of the device.
        expected: u32,
    },
    /// Queues are missing, or there are too many.
    #[error("it has {found} queues, not {expected}")]
    Queues {
        /// In the state.
        found: usize,
        /// Of the device.
        expected: usize,
    },
    /// The guest uses what this device does not offer.
    #[error("its driver uses the features {0:#x}, which this device does not offer")]
    Features(u64),
    /// A status that no device is ever in.
    #[error("its status {0:#x} is none that a device can have")]
    Status(u32),
}
