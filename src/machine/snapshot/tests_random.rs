//! State files that somebody wrote who knows about the checksum.

use proptest::prelude::*;
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::config::*;
use crate::devices::i8042::I8042;
use crate::devices::io_apic::IoApic;
use crate::devices::serial::Serial;
use crate::devices::virtio::net::tests::{self as net, Cable};
use crate::devices::virtio::testing::Guest;
use crate::devices::virtio::tests_random::{self as block, assert_recovers, descriptor, write_table};
use crate::devices::virtio::vsock::testing::{CID, Rig};
use crate::generated::{Change, change, changes, inputs, prop_oneof, properties};
use crate::memory::{MAX_IO_APIC_PINS, io_apic_pins};

const ID: Id = [7; 16];

/// What has these parts in a file. What KVM would fill in may be all zeroes.
fn of<T: serde::de::DeserializeOwned>(parts: impl Serialize) -> T {
    postcard::from_bytes(&postcard::to_allocvec(&parts).unwrap()).unwrap()
}

/// The devices that every machine has, and those of `guests`.
fn bus(guests: &[&Guest]) -> Bus {
    let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
    Bus {
        serial: Serial::new(Box::new(|| ()), event()).into(),
        i8042: I8042::new(Box::new(|| ()), event()).into(),
        io_apic: IoApic::new(io_apic_pins(guests.len()), |_| ()).into(),
        slots: guests.iter().map(|guest| guest.mmio.clone()).collect::<Vec<_>>().into(),
        boot_timer: None,
    }
}

/// A state that was saved, with a network interface or without.
fn state(bus: &Bus, vcpus: u8, network: bool) -> State {
    let config = VmConfig {
        machine: MachineConfig { vcpu_count: 1 + vcpus, mem_size_mib: 1, ..Default::default() },
        boot_source: of(Some(("/k", None::<&str>, Some("a"), None::<u8>))),
        drives: vec![block::drive(IoEngine::Sync)],
        network_interfaces: network.then(net::config).into_iter().collect(),
        vsock: of(Some((CID, "/v"))),
        serial: of(Some((Some("/s"), Some((1, 2, 3))))),
        mmds: of(network.then_some((["eth0"].as_slice(), 0, DEFAULT_MMDS_ADDRESS, false))),
        ..Default::default()
    };
    State {
        cpu: host_cpu(),
        mem_file_path: "/m".into(),
        config,
        clock: of([[0; 32]; 2]),
        vcpus: (0..vcpus).map(|_| of([[0; 32]; 2])).collect(),
        io_apic: bus.io_apic.save(),
        serial: bus.serial().save(),
        i8042: bus.i8042().save(),
        virtio: bus.virtio().iter().map(|device| device.save()).collect(),
    }
}

/// The file of `state`, changed in the configuration or after it.
fn forged(state: &State, in_config: bool, changes: &[Change]) -> Vec<u8> {
    let mut front = postcard::to_allocvec(&(state.cpu, &state.mem_file_path, &state.config)).unwrap();
    let mut back = postcard::to_allocvec(state).unwrap().split_off(front.len());
    change(if in_config { &mut front } else { &mut back }, changes);
    format::seal(ID, &[front, back].concat())
}

/// Opens the file and checks what a load would.
fn open(content: &[u8]) -> Result<(Box<State>, VmConfig), Refusal> {
    let dir = tempfile::tempdir().unwrap();
    let [snapshot_path, backend_path] = ["state", "memory"].map(|name| dir.path().join(name));
    fs::write(&snapshot_path, content).unwrap();
    memory::mark(&File::create(&backend_path).unwrap(), MIB, ID).unwrap();
    let load = SnapshotLoad { snapshot_path, backend_path, ..Default::default() };
    let Opened { id, state, .. } = Opened::open(&load.snapshot_path, Some(&load)).map_err(refuse)?;
    let config = checked(state.overridden(&load, id).map_err(refuse)?)?;
    Ok((state, config))
}

#[test]
fn lists_are_no_longer_than_a_machine_has_use_for() {
    // What is left out of a list's entries is zero: most of a page in memory for a byte of the file.
    let can_be = |of: fn(&[u8]) -> bool, length: u16| of(&postcard::to_allocvec(&(length, [[0_u8; 30]; 10])).unwrap());
    let pins = |count: u8| postcard::from_bytes::<IoApicState>(&[&[0, 0, count][..], &[0; 32]].concat()).is_ok();
    let cpuid = |bytes: &[u8]| postcard::from_bytes::<VcpuState>(bytes).is_ok();
    assert_eq!((pins(MAX_IO_APIC_PINS as u8), pins(MAX_IO_APIC_PINS as u8 + 1)), (true, false));
    assert_eq!((can_be(cpuid, 256), can_be(cpuid, 257)), (true, false));
    let vcpus = |count| format::decode::<State>(&forged(&state(&bus(&[]), count, false), true, &[])).is_ok();
    assert_eq!((vcpus(MAX_VCPUS), vcpus(MAX_VCPUS + 1)), (true, false));
    let names = |bytes: &[u8]| postcard::from_bytes::<MmdsConfig>(bytes).is_ok();
    let most = MAX_VIRTIO_DEVICES as u16;
    assert_eq!((can_be(names, most), can_be(names, most + 1)), (true, false));
    let devices = |count: u16| {
        // They come last; one that is all zero takes eleven bytes.
        let mut body = postcard::to_allocvec(&state(&bus(&[]), 0, false)).unwrap();
        assert_eq!(body.pop(), Some(0));
        body.push(count as u8);
        body.resize(body.len() + 11 * usize::from(count), 0);
        format::decode::<State>(&format::seal([0; 16], &body)).is_ok()
    };
    assert_eq!((devices(most), devices(most + 1)), (true, false));
}

properties! {
    #![proptest_config(inputs(100))]

    /// Each is refused with a reason; or what it configures is legal, and its devices go on, and can be reset.
    #[test]
    fn forged_states_are_refused_or_go_on(
        (vcpus, network, in_config) in (prop_oneof![9 => Just(0), 1 => 1..3u8], prop::bool::weighted(0.2), any::<bool>()),
        changes in changes(),
        table in prop::collection::vec(descriptor(), 16),
    ) {
        let ((drive, disk), rig) = (block::guest(IoEngine::Sync), Rig::ready());
        drive.boot(drive.offered());
        let cable = network.then(|| Cable::new(|offered| offered)).flatten();
        let guests: Vec<_> = [Some(&drive), cable.as_ref().map(|cable| &cable.guest), Some(&rig.guest)].into_iter().flatten().collect();
        let bus = bus(&guests);
        let content = forged(&state(&bus, vcpus, cable.is_some()), in_config, &changes);
        let (state, config) = match open(&content) {
            Err(Refusal(reason)) => {
                prop_assert!(reason.len() > 9 && !changes.is_empty(), "{}", reason);
                return Ok(());
            }
            Ok(opened) => opened,
        };
        assert!(config.virtio_devices() <= MAX_VIRTIO_DEVICES && Layout::from(&config).ram_bytes == MIB);
        for NetConfig { host_device, .. } in &config.network_interfaces {
            prop_assert_eq!(host_device.to_string().parse(), Ok(host_device.clone()));
        }
        for guest in &guests {
            for queue in 0..3 {
                guest.select(queue);
                write_table(guest, guest.table(), &table);
                (0..4).for_each(|head| guest.offer(head));
            }
        }
        if let Err(error) = state.restore_devices(&bus) {
            prop_assert!(!changes.is_empty(), "{}", error);
        }
        for port in [0x60, 0x64].into_iter().chain(0x3f8..0x400) {
            bus.io_in(port, &mut [0]);
            bus.io_out(port, &[0x41]);
        }
        for guest in guests {
            // What it is in now, a device can be in.
            guest.mmio.restore(&guest.mmio.save()).unwrap();
            guest.mmio.resume();
            guest.notify();
            prop_assert!((0..100).any(|_| guest.turn(std::time::Duration::ZERO) == 0), "it spins");
            guest.reset();
            guest.boot(guest.offered());
            prop_assert_eq!(guest.status(), 0xf);
        }
        assert_recovers(&drive, &disk);
    }
}
