//! Stories of drivers and devices, and registers at random.

use std::sync::Mutex;
use std::thread;

use proptest::prelude::*;

use super::*;
use crate::generated::{prop_oneof, properties};

/// An I/O APIC, and what it has sent.
fn io_apic(pins: usize) -> (Arc<IoApic>, Arc<Mutex<Vec<Message>>>) {
    let sent = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&sent);
    (Arc::new(IoApic::new(pins, move |message| log.lock().unwrap().push(message))), sent)
}

fn taken(sent: &Mutex<Vec<Message>>) -> Vec<Message> {
    std::mem::take(&mut sent.lock().unwrap())
}

fn read(chip: &IoApic, register: u8) -> u32 {
    chip.write(SELECT, &u32::from(register).to_le_bytes());
    let mut data = [0xaa; 4];
    chip.read(WINDOW, &mut data);
    u32::from_le_bytes(data)
}

fn write(chip: &IoApic, register: u8, value: u32) {
    chip.write(SELECT, &[register]);
    chip.write(WINDOW, &value.to_le_bytes());
}

/// As Linux does it: the half with the mask comes last.
fn route(chip: &IoApic, pin: u8, destination: u32, low: u32) {
    write(chip, REGISTER_ENTRIES + 2 * pin + 1, destination << 24);
    write(chip, REGISTER_ENTRIES + 2 * pin, low);
}

#[test]
fn a_driver_finds_as_many_pins_as_there_are_and_routes_one() {
    let (chip, sent) = io_apic(8);
    assert_eq!(read(&chip, REGISTER_VERSION), 0x0007_0011);
    assert_eq!(read(&chip, REGISTER_ENTRIES + 2 * 7), 1 << 16, "masked");
    assert_eq!(read(&chip, REGISTER_ENTRIES + 2 * 8), 0, "none");
    route(&chip, 5, 3, 0x22);
    chip.pulse(5);
    assert_eq!(taken(&sent), [Message { address: 0xfee0_3000, data: 0x22 }]);
    // Logical destination, lowest priority.
    route(&chip, 5, 0xff, 0x933);
    chip.pulse(5);
    assert_eq!(taken(&sent), [Message { address: 0xfeef_f004, data: 0x133 }]);
    write(&chip, REGISTER_ID, u32::MAX);
    assert_eq!((read(&chip, REGISTER_ID), read(&chip, REGISTER_ARBITRATION)), (0xf00_0000, 0xf00_0000));
}

#[test]
fn what_only_the_chip_writes_stays_as_it_is() {
    let (chip, _) = io_apic(1);
    write(&chip, REGISTER_ENTRIES, u32::MAX);
    write(&chip, REGISTER_ENTRIES + 1, u32::MAX);
    assert_eq!(read(&chip, REGISTER_ENTRIES), 0x1_afff, "neither delivery status nor remote IRR");
    assert_eq!(read(&chip, REGISTER_ENTRIES + 1), 0xff00_0000);
    write(&chip, REGISTER_VERSION, 0);
    assert_eq!(read(&chip, REGISTER_VERSION), 0x11);
}

#[test]
fn an_edge_at_a_masked_pin_waits_until_it_is_unmasked_and_comes_once() {
    let (chip, sent) = io_apic(8);
    chip.pulse(7);
    chip.pulse(7);
    route(&chip, 7, 0, 0x1_0044);
    assert_eq!(taken(&sent), []);
    route(&chip, 7, 0, 0x44);
    assert_eq!(taken(&sent), [Message { address: 0xfee0_0000, data: 0x44 }]);
    route(&chip, 7, 0, 0x1_0044);
    route(&chip, 7, 0, 0x44);
    assert_eq!(taken(&sent), []);
}

#[test]
fn modes_that_no_device_has_and_pins_that_do_not_exist_deliver_nothing() {
    let (chip, sent) = io_apic(8);
    // SMI, reserved, INIT, start-up, ExtINT.
    for mode in [2, 3, 5, 6, 7] {
        route(&chip, 1, 0, mode << 8 | 0x44);
        chip.pulse(1);
    }
    for pin in [8, 24, 31, u32::MAX] {
        chip.pulse(pin);
    }
    assert_eq!(taken(&sent), []);
}

#[test]
fn what_was_saved_goes_on_elsewhere() {
    let (chip, _) = io_apic(8);
    route(&chip, 5, 1, 0x55);
    chip.pulse(6);
    let (clone, sent) = io_apic(8);
    clone.restore(&chip.save());
    assert_eq!(clone.save(), chip.save());
    clone.pulse(5);
    route(&clone, 6, 0, 0x66);
    let expected = [Message { address: 0xfee0_1000, data: 0x55 }, Message { address: 0xfee0_0000, data: 0x66 }];
    assert_eq!(taken(&sent), expected);
}

/// The vmm thread pulses while a vCPU masks and unmasks: no edge is lost.
#[test]
fn an_edge_meets_the_mask_and_is_not_lost() {
    const ROUNDS: usize = 2000;
    let (chip, sent) = io_apic(1);
    for _ in 0..ROUNDS {
        route(&chip, 0, 0, 0x1_0044);
        let device = thread::spawn({
            let chip = Arc::clone(&chip);
            move || chip.pulse(0)
        });
        route(&chip, 0, 0, 0x44);
        device.join().unwrap();
        assert_eq!(taken(&sent).len(), 1);
    }
}

/// What a guest or a device does.
#[derive(Debug, Clone)]
enum Step {
    Write(u64, Vec<u8>),
    Read(u64, usize),
    Set(u8, u32),
    Pulse(u32),
    GoOnElsewhere,
}

fn step() -> impl Strategy<Value = Step> {
    let offset = || prop_oneof![3 => prop::sample::select(vec![SELECT, WINDOW]), 1 => 0..0x1000u64];
    prop_oneof![
        1 => (offset(), prop::collection::vec(any::<u8>(), 0..9)).prop_map(|(offset, data)| Step::Write(offset, data)),
        1 => (offset(), 0..9usize).prop_map(|(offset, width)| Step::Read(offset, width)),
        4 => (0..0x48u8, any::<u32>()).prop_map(|(register, value)| Step::Set(register, value)),
        4 => (0..34u32).prop_map(Step::Pulse),
        1 => Just(Step::GoOnElsewhere),
    ]
}

properties! {
    /// Nothing leaves that is no interrupt for local APICs, and not more than went in.
    #[test]
    fn registers_at_random_only_interrupt(steps in prop::collection::vec(step(), 0..100)) {
        let (mut chip, mut sent) = io_apic(MAX_IO_APIC_PINS);
        let (mut pulses, mut messages) = (0, 0);
        for step in steps {
            match step {
                Step::Write(offset, data) => chip.write(offset, &data),
                Step::Read(offset, width) => chip.read(offset, &mut [0; 8][..width]),
                Step::Set(register, value) => write(&chip, register, value),
                Step::Pulse(pin) => {
                    chip.pulse(pin);
                    pulses += 1;
                }
                Step::GoOnElsewhere => {
                    let state = chip.save();
                    (chip, sent) = io_apic(state.pins());
                    chip.restore(&state);
                    prop_assert_eq!(chip.save(), state);
                }
            }
            for Message { address, data } in taken(&sent) {
                prop_assert_eq!(address & 0xfff0_0ff3, 0xfee0_0000);
                prop_assert!(data & !0x7ff == 0 && DELIVERED.contains(&u64::from(data >> 8)), "{:#x}", data);
                messages += 1;
            }
        }
        prop_assert!(messages <= pulses);
    }
}
