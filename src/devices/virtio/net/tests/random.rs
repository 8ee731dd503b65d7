//! Whatever a guest and the host send, in whatever shape and order.

use proptest::prelude::*;

use super::*;
use crate::devices::virtio::tests_random::{Descriptor, descriptor, write_table};
use crate::generated::{inputs, prop_oneof, properties};

#[derive(Debug, Clone)]
enum Step {
    /// Receive buffers that are as they should be.
    Post(usize, u32),
    /// A frame behind a header of any bytes.
    Transmit {
        header: Vec<u8>,
        length: usize,
    },
    /// A chain of these descriptors.
    Offer(usize, Vec<Descriptor>),
    AvailableIndex(usize, u16),
    HostSends(usize),
    Register(u32, u32),
    Reset(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let queue = || prop_oneof![Just(RX), Just(TX)];
    // What the offloads are about comes first in a header.
    let header =
        prop_oneof![Just(vec![0; HEADER_SIZE]), prop::collection::vec(prop_oneof![0u8..6, any::<u8>()], HEADER_SIZE),];
    prop_oneof![
        4 => (1usize..8, prop_oneof![Just(2048), 0u32..9000]).prop_map(|(count, size)| Step::Post(count, size)),
        6 => (header, 0usize..4000).prop_map(|(header, length)| Step::Transmit { header, length }),
        4 => (queue(), prop::collection::vec(descriptor(), 1..6)).prop_map(|(queue, chain)| Step::Offer(queue, chain)),
        1 => (queue(), any::<u16>()).prop_map(|(queue, index)| Step::AvailableIndex(queue, index)),
        4 => (14usize..9000).prop_map(Step::HostSends),
        1 => (0u32..0x44, any::<u32>()).prop_map(|(register, value)| Step::Register(4 * register, value)),
        1 => any::<u64>().prop_map(Step::Reset),
    ]
}

impl Cable {
    fn take(&self, step: &Step) {
        match step {
            Step::Post(count, size) => self.post(*count, *size),
            Step::Transmit { header, length } => {
                let at = slot(300);
                self.guest.put(at, &[&header[..], &frame(14 + length, 3)].concat());
                self.guest.select(TX);
                self.guest.offer(self.guest.chain(&[readable(at, (HEADER_SIZE + 14 + length) as u32)]));
            }
            Step::Offer(queue, chain) => {
                self.guest.select(*queue);
                write_table(&self.guest, self.guest.table(), chain);
                self.guest.offer(0);
            }
            Step::AvailableIndex(queue, index) => self.guest.select(*queue).set_available_index(*index),
            // The TAP's queue may be full.
            Step::HostSends(length) => _ = self.host.try_send(&frame(*length, 9)),
            Step::Register(register, value) => self.guest.write(*register, *value),
            Step::Reset(features) => self.guest.boot(self.guest.offered() & (features | VERSION_1)),
        }
        self.guest.notify();
        // Frames that fit nowhere must not keep it busy.
        assert!((0..100).any(|_| self.guest.turn(Duration::ZERO) == 0), "it spins");
        if self.needs_reset() {
            self.guest.boot(self.guest.offered());
        }
    }
}

properties! {
    #![proptest_config(inputs(60))]

    #[test]
    fn no_random_sequence_of_buffers_and_frames_breaks_the_network(steps in prop::collection::vec(step(), 1..60)) {
        let Some(cable) = Cable::new(all) else { return Ok(()) };
        for step in &steps {
            cable.take(step);
        }
        // A driver that begins anew finds an interface that works.
        cable.guest.boot(cable.guest.offered());
        prop_assert_eq!(cable.guest.status(), 0xf);
        cable.guest.select(RX).forget();
        cable.guest.select(TX).forget();
        cable.settle();
        cable.host.received();
        cable.transmit(&frame(600, 5));
        cable.guest.notify();
        cable.settle();
        prop_assert!(cable.host.received().contains(&frame(600, 5)));
        // Room for all that still waits.
        cable.post(steps.len(), 9000 + 12);
        cable.settle();
        cable.guest.select(RX).used();
        cable.post(8, 9000 + 12);
        cable.host.send(&frame(900, 6));
        cable.settle();
        let used = cable.guest.select(RX).used();
        prop_assert!(used.iter().any(|(_, length)| *length == 912), "{:?}", used);
    }
}
