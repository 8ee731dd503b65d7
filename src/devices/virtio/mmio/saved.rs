//! The registers in a snapshot.

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE as ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER as DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK as DRIVER_OK, VIRTIO_CONFIG_S_FAILED as FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK as FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET as NEEDS_RESET,
};

use super::Transport;
use crate::devices::virtio::state::{Registers, SavedQueue};
use crate::devices::virtio::{StateError, VirtioDevice, VirtioState};

impl Transport {
    pub(super) fn save(&self) -> VirtioState {
        let mut positions = self.device.positions().into_iter();
        VirtioState {
            kind: self.device.kind() as u32,
            registers: self.registers,
            queues: self.queues.iter().map(|q| SavedQueue::new(q, positions.next().unwrap_or_default())).collect(),
            config_generation: self.config_generation,
            interrupt: self.interrupt.status(),
            config_space: self.device.config_space().to_vec(),
        }
    }

    pub(super) fn restore(&mut self, state: &VirtioState) -> Result<(), StateError> {
        let (kind, queues) = (self.device.kind() as u32, self.device.queue_sizes().len());
        let Registers { status, driver_features, .. } = state.registers;
        let alien = driver_features & !self.offered_features();
        if state.kind != kind {
            return Err(StateError::Kind { found: state.kind, expected: kind });
        }
        if state.queues.len() != queues {
            return Err(StateError::Queues { found: state.queues.len(), expected: queues });
        }
        if status & FEATURES_OK != 0 && alien != 0 {
            return Err(StateError::Features(alien));
        }
        if status & !(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED | NEEDS_RESET) != 0
            || status & DRIVER_OK != 0 && status & FEATURES_OK == 0
        {
            return Err(StateError::Status(status));
        }
        self.registers = Registers { status: status & !DRIVER_OK, ..state.registers };
        self.config_generation = state.config_generation;
        let sizes = self.device.queue_sizes();
        self.queues = state.queues.iter().zip(sizes).map(|(queue, &size)| queue.registers(size)).collect();
        self.interrupt.restore(state.interrupt);
        if status & DRIVER_OK != 0 {
            // A device that had failed stays failed: the driver has still to reset it.
            if status & (FAILED | NEEDS_RESET) == 0 {
                self.activate();
                self.device.on_restored();
            }
            self.registers.status |= DRIVER_OK;
        }
        self.publish_all();
        if state.config_space != self.device.config_space() {
            self.config_changed();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use crate::devices::virtio::VirtioState;
    use crate::devices::virtio::testing::Guest;
    use crate::devices::virtio::tests::device;

    #[test]
    fn a_state_that_does_not_fit_is_refused_and_says_what_of_it() {
        let guest = Guest::booted(device().0);
        let state = guest.mmio.save();
        let restore = |change: &dyn Fn(&mut VirtioState)| {
            let mut other = state.clone();
            change(&mut other);
            guest.mmio.restore(&other).map_err(|error| error.to_string())
        };
        let refused = |change: &dyn Fn(&mut VirtioState)| restore(change).unwrap_err();
        assert_eq!(refused(&|state| state.kind = 1), "it is of device kind 1, not 2");
        assert_eq!(refused(&|state| state.queues.clear()), "it has 0 queues, not 1");
        let alien = "its driver uses the features 0x8000000000000000, which this device does not offer";
        assert_eq!(refused(&|state| state.registers.driver_features |= 1 << 63), alien);
        // Unknown bits, and DRIVER_OK without FEATURES_OK.
        for status in [0x1f, 0x2f, 0x10f, 0x7] {
            let says = format!("its status {status:#x} is none that a device can have");
            assert_eq!(refused(&|state| state.registers.status = status), says);
        }
        // Features that were asked for and never accepted are no matter.
        restore(&|state| (state.registers.status, state.registers.driver_features) = (0x3, 1 << 63)).unwrap();
        restore(&|_| ()).unwrap();
        assert_eq!(guest.status(), 0xf);
    }
}
