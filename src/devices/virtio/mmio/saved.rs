//! The registers in a snapshot.

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE as ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER as DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK as DRIVER_OK, VIRTIO_CONFIG_S_FAILED as FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK as FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET as NEEDS_RESET,
};

use super::{CONFIG_SPACE_SIZE, Transport};
use crate::devices::virtio::state::SavedQueue;
use crate::devices::virtio::{StateError, VirtioDevice, VirtioState};

impl Transport {
    pub(super) fn save(&self) -> VirtioState {
        let mut positions = self.device.positions().into_iter();
        let mut config_space = vec![0; CONFIG_SPACE_SIZE];
        self.device.read_config(0, &mut config_space);
        VirtioState {
            kind: self.device.kind() as u32,
            status: self.status,
            device_features_sel: self.device_features_sel,
            driver_features_sel: self.driver_features_sel,
            driver_features: self.driver_features,
            alien_features: self.alien_features,
            queue_sel: self.queue_sel,
            queues: self.queues.iter().map(|q| SavedQueue::new(q, positions.next().unwrap_or_default())).collect(),
            config_generation: self.config_generation,
            interrupt: self.interrupt.status(),
            config_space,
        }
    }

    pub(super) fn restore(&mut self, state: &VirtioState) -> Result<(), StateError> {
        let (kind, queues) = (self.device.kind() as u32, self.device.queue_sizes().len());
        let alien = state.driver_features & !self.offered_features();
        if state.kind != kind {
            return Err(StateError::Kind { found: state.kind, expected: kind });
        }
        if state.queues.len() != queues {
            return Err(StateError::Queues { found: state.queues.len(), expected: queues });
        }
        if state.status & FEATURES_OK != 0 && alien != 0 {
            return Err(StateError::Features(alien));
        }
        if state.status & !(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED | NEEDS_RESET) != 0
            || state.status & DRIVER_OK != 0 && state.status & FEATURES_OK == 0
        {
            return Err(StateError::Status(state.status));
        }
        self.status = state.status & !DRIVER_OK;
        self.device_features_sel = state.device_features_sel;
        self.driver_features_sel = state.driver_features_sel;
        self.driver_features = state.driver_features;
        self.alien_features = state.alien_features;
        self.queue_sel = state.queue_sel;
        self.config_generation = state.config_generation;
        let sizes = self.device.queue_sizes();
        self.queues = state.queues.iter().zip(sizes).map(|(queue, &size)| queue.registers(size)).collect();
        self.interrupt.restore(state.interrupt);
        if state.status & DRIVER_OK != 0 {
            // A device that had failed stays failed: the driver has still to reset it.
            if state.status & (FAILED | NEEDS_RESET) == 0 {
                self.activate();
                self.device.on_restored();
            }
            self.status |= DRIVER_OK;
        }
        self.publish_all();
        let mut space = vec![0; CONFIG_SPACE_SIZE];
        self.device.read_config(0, &mut space);
        if space != state.config_space {
            self.config_changed();
        }
        Ok(())
    }
}
