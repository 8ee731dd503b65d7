//! Guests that do anything at all.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use virtio_queue::QueueState;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::block::Block;
use super::testing::*;
use super::{Buffers, Device, Interrupt, Virtqueue, Windows};
use crate::config::{CacheType, DriveConfig, IoEngine, RateLimiterConfig};
use crate::generated::{inputs, prop_oneof, properties};
use crate::metrics;

/// A few descriptors, so that chains meet often.
const SIZE: u16 = 16;

/// Addresses near every edge there is, lengths that just fit and just do not.
fn address() -> impl Strategy<Value = u64> {
    let edges = [0, DESCRIPTORS, USED, BUFFERS, LOW_RAM, HIGH_RAM_START, HIGH_RAM_START + HIGH_RAM, u64::MAX];
    prop_oneof![
        4 => BUFFERS..LOW_RAM,
        2 => (prop::sample::select(edges.to_vec()), -64i64..64).prop_map(|(edge, by)| edge.wrapping_add_signed(by)),
        1 => any::<u64>(),
    ]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![4 => 0u32..64, 2 => prop::sample::select(vec![16, 32, 512, 513, 4096]), 1 => any::<u32>()]
}

#[derive(Debug, Clone)]
pub struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

pub fn descriptor() -> impl Strategy<Value = Descriptor> {
    let flags = prop_oneof![8 => 0u16..8, 1 => any::<u16>()];
    (address(), length(), flags, 0..=SIZE).prop_map(|(address, length, flags, next)| Descriptor {
        address,
        length,
        flags,
        next,
    })
}

pub fn write_table(guest: &Guest, table: u64, descriptors: &[Descriptor]) {
    for (i, d) in descriptors.iter().enumerate() {
        guest.descriptor_at(table, i as u16, d.address, d.length, d.flags, d.next);
    }
}

pub fn drive(engine: IoEngine) -> DriveConfig {
    DriveConfig {
        drive_id: "d".to_owned(),
        is_root_device: false,
        path_on_host: "/d".into(),
        is_read_only: false,
        partuuid: None,
        cache_type: CacheType::Writeback,
        io_engine: engine,
        rate_limiter: RateLimiterConfig::default(),
        discard: true,
        overlay: None,
    }
}

pub fn guest(engine: IoEngine) -> (Guest, std::fs::File) {
    let config = drive(engine);
    // Half a sector more than the capacity: nothing may touch it.
    let file = file(64 << 10);
    file.write_all_at(&[0x77; 256], 64 << 10).unwrap();
    let make =
        |config: &DriveConfig| Block::new(config, file.try_clone().unwrap(), Arc::new(metrics::Block::default()));
    let block = make(&config.clone()).or_else(|error| {
        eprintln!("SKIPPED: {error}");
        make(&DriveConfig { io_engine: IoEngine::Sync, ..config })
    });
    let block = block.unwrap();
    let mut guest = Guest::new(Device::Block(Box::new(block)));
    guest.queue_size = SIZE;
    (guest, file)
}

#[derive(Debug, Clone)]
enum Act {
    Read(u64, usize),
    Write(u64, Vec<u8>),
    Register(u32, u32),
    Boot,
    Offer(u16),
    AvailableIndex(u16),
    Turn,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        (0u64..0x180, 0usize..10).prop_map(|(offset, width)| Act::Read(offset, width)),
        (any::<u64>(), 0usize..10).prop_map(|(offset, width)| Act::Read(offset, width)),
        (0u64..0x180, prop::collection::vec(any::<u8>(), 0..10)).prop_map(|(offset, data)| Act::Write(offset, data)),
        (0u32..0x44, prop_oneof![0u32..32, any::<u32>()])
            .prop_map(|(register, value)| Act::Register(4 * register, value)),
        Just(Act::Boot),
        (0..=SIZE).prop_map(Act::Offer),
        any::<u16>().prop_map(Act::AvailableIndex),
        Just(Act::Turn),
    ]
}

fn perform(guest: &Guest, act: Act) {
    match act {
        Act::Read(offset, width) => guest.mmio.read(offset, &mut vec![0; width]),
        Act::Write(offset, data) => guest.mmio.write(offset, &data),
        Act::Register(register, value) => guest.write(register, value),
        Act::Boot => guest.boot(guest.offered()),
        Act::Offer(head) => guest.offer(head),
        Act::AvailableIndex(index) => guest.set_available_index(index),
        Act::Turn => {
            guest.notify();
            guest.turn(Duration::ZERO);
        }
    }
}

/// After whatever happened, a driver that resets the device gets a device that works.
pub fn assert_recovers(guest: &Guest, file: &std::fs::File) {
    guest.boot(guest.offered());
    assert_eq!(guest.status(), 15);
    guest.put(BUFFERS, &[0; 16]);
    guest.offer(guest.chain(&[readable(BUFFERS, 16), writable(BUFFERS + 0x1000, 513)]));
    guest.notify();
    assert_eq!(guest.await_used(1).len(), 1);
    assert_eq!(guest.get(BUFFERS + 0x1200, 1), [0]);
    let mut beyond = [0; 256];
    file.read_exact_at(&mut beyond, 64 << 10).unwrap();
    assert_eq!(beyond, [0x77; 256]);
}

properties! {
    #![proptest_config(inputs(100))]

    /// Any sequence of register accesses and kicks, with any descriptors behind them.
    #[test]
    fn registers_and_descriptors_at_random_break_nothing(
        acts in prop::collection::vec(act(), 1..60),
        table in prop::collection::vec(descriptor(), SIZE as usize),
    ) {
        let (guest, file) = guest(IoEngine::Sync);
        write_table(&guest, DESCRIPTORS, &table);
        for act in acts {
            perform(&guest, act);
        }
        assert_recovers(&guest, &file);
    }

    /// Requests of every kind and shape, mostly well-formed, through both engines.
    #[test]
    fn requests_at_random_break_nothing(
        requests in prop::collection::vec(
            (0u32..16, 0u64..140, prop::collection::vec(descriptor(), 3), 0u32..1024, any::<bool>()),
            1..20,
        ),
        asynchronous in any::<bool>(),
    ) {
        let (guest, file) = guest(if asynchronous { IoEngine::Async } else { IoEngine::Sync });
        guest.boot(guest.offered());
        for (kind, sector, descriptors, length, tidy) in requests {
            guest.put(BUFFERS, &kind.to_le_bytes());
            guest.put(BUFFERS + 8, &sector.to_le_bytes());
            guest.put(BUFFERS + 0x1000, &[sector as u8; 64]);
            if tidy {
                let data = if kind % 2 == 0 { writable(BUFFERS + 0x1000, length) } else { readable(BUFFERS + 0x1000, length) };
                guest.offer(guest.chain(&[readable(BUFFERS, 16), data, writable(BUFFERS + 0x4000, 1)]));
            } else {
                write_table(&guest, DESCRIPTORS, &descriptors);
                guest.offer(0);
            }
            guest.notify();
            guest.turn(Duration::ZERO);
            if guest.status() & 64 != 0 {
                guest.mmio.quiesce();
                guest.mmio.resume();
                guest.boot(guest.offered());
            }
        }
        guest.mmio.quiesce();
        guest.mmio.resume();
        assert_recovers(&guest, &file);
    }

    /// What comes out of a queue lies in guest RAM, all of it, whatever the descriptors say.
    #[test]
    fn buffers_lie_in_guest_ram(
        table in prop::collection::vec(descriptor(), SIZE as usize),
        indirect in prop::collection::vec(descriptor(), SIZE as usize),
        heads in prop::collection::vec(0..=SIZE, 1..SIZE as usize),
    ) {
        let (guest, _) = guest(IoEngine::Sync);
        guest.boot(guest.offered());
        write_table(&guest, DESCRIPTORS, &table);
        write_table(&guest, BUFFERS, &indirect);
        guest.descriptor(3, BUFFERS, 16 * u32::from(SIZE), INDIRECT, 0);
        for &head in &heads {
            guest.offer(head);
        }
        let state = QueueState {
            max_size: 256,
            size: SIZE,
            ready: true,
            desc_table: DESCRIPTORS,
            avail_ring: AVAILABLE,
            used_ring: USED,
            event_idx_enabled: true,
            ..QueueState::default()
        };
        let interrupt = Arc::new(Interrupt::new(Box::new(|| ()), Windows::new(1).get(0).unwrap()));
        let mut queue = Virtqueue::new(0, &state, guest.memory.clone(), interrupt).unwrap();
        let ram: Vec<(u64, u64)> = guest.memory.iter()
            .map(|region| (region.as_volatile_slice().unwrap().ptr_guard().as_ptr() as u64, region.len()))
            .collect();
        let mut buffers = Buffers::default();
        for _ in &heads {
            let Ok(head) = queue.pop(&mut buffers) else { continue };
            prop_assert!(head.is_some_and(|head| head < SIZE));
            for vecs in [&buffers.readable, &buffers.writable] {
                prop_assert!(vecs.as_slice().len() <= 2 * usize::from(SIZE));
                prop_assert_eq!(vecs.len(), vecs.as_slice().iter().map(|vec| vec.iov_len as u64).sum::<u64>());
                for vec in vecs.as_slice() {
                    let (start, length) = (vec.iov_base as u64, vec.iov_len as u64);
                    let inside = |&(base, size): &(u64, u64)| start >= base && start + length <= base + size;
                    prop_assert!(ram.iter().any(inside), "{:#x} + {:#x}", start, length);
                }
            }
        }
        prop_assert!(queue.pop(&mut buffers).unwrap().is_none(), "nothing is offered twice");
    }
}
