//! What a fuzzer calls: the properties that `tools/fuzz` lists, by its names for them.

use crate::devices::{self, virtio};
use crate::{api, boot, machine, mmds, snapshot};

/// A property, which panics where it does not hold for the inputs that the bytes stand for.
type Target = fn(&[u8]);

const TARGETS: [(&str, Target); 14] = [
    ("mmio", virtio::tests_random::registers_and_descriptors_at_random_break_nothing),
    ("ioapic", devices::io_apic::tests::registers_at_random_only_interrupt),
    ("block", virtio::tests_random::requests_at_random_break_nothing),
    ("layer", virtio::block::tests_random::forged_layers_show_the_drive_and_nothing_else),
    ("queue", virtio::tests_random::buffers_lie_in_guest_ram),
    ("net", virtio::net::tests::random::no_random_sequence_of_buffers_and_frames_breaks_the_network),
    ("vsock", virtio::vsock::tests_random::no_random_sequence_of_packets_and_peers_breaks_the_vsock),
    ("credit", virtio::vsock::connection::tests::no_order_of_steps_breaks_a_bound),
    ("mmds", mmds::tests::random::random_frames_break_nothing),
    ("http", api::server::tests::no_bytes_end_the_server),
    ("api", api::routes::tests_random::any_request_is_understood_or_refused_in_the_documented_shape),
    ("kernel", boot::kernel::tests::hostile_headers_never_panic),
    ("state", machine::snapshot::tests_random::forged_states_are_refused_or_go_on),
    ("workset", snapshot::working_set::tests::forged_runs_are_in_memory_and_in_order),
];

/// Runs the target of that name.
pub fn run(name: &str, bytes: &[u8]) {
    let (_, target) = TARGETS.iter().find(|(target, _)| *target == name).unwrap();
    target(bytes);
}
