//! The MP table (MultiProcessor Specification 1.4), for guests without ACPI.

use vm_memory::GuestMemoryError;

use super::{EBDA, EBDA_END, put};
use crate::config::MAX_VCPUS;
use crate::memory::{GuestMemory, IO_APIC, IO_APIC_VERSION, LOCAL_APIC, MAX_IO_APIC_PINS};

const SPECIFICATION_1_4: u8 = 4;
const FLOATING_POINTER_LEN: usize = 16;
const HEADER_LEN: usize = 44;

/// Entry types (§4.3).
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC_ENTRY: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

/// Interrupt types (§4.3.4).
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;

/// Version of the integrated APICs that KVM emulates.
const LOCAL_APIC_VERSION: u8 = 0x14;
const ENABLED: u8 = 1;
const BOOT_PROCESSOR: u8 = 2;
/// CPUID leaf 1 EDX: has an FPU and a local APIC. Guests ask CPUID itself.
const CPU_FEATURES: [u8; 4] = 0x201u32.to_le_bytes();
const ALL_LOCAL_APICS: u8 = 0xFF;

/// Processors take 20 bytes, all other entries 8: a bus, an I/O APIC, its pins, two local pins.
const fn len(vcpus: usize, pins: usize) -> usize {
    FLOATING_POINTER_LEN + HEADER_LEN + 20 * vcpus + 8 * (1 + 1 + pins + 2)
}
const _: () = assert!(EBDA + len(MAX_VCPUS as usize, MAX_IO_APIC_PINS) as u64 <= EBDA_END);

/// Writes the floating pointer and the configuration table at [`EBDA`], for `vcpus` vCPUs whose
/// local APIC ids count from 0, and an I/O APIC with `pins` pins, at most [`MAX_IO_APIC_PINS`].
///
/// # Errors
/// More than [`MAX_VCPUS`], or RAM ends before the table does.
pub fn write(memory: &GuestMemory, vcpus: u8, pins: usize) -> Result<(), GuestMemoryError> {
    let table = configuration_table(vcpus, pins);
    let address = (EBDA as u32 + FLOATING_POINTER_LEN as u32).to_le_bytes();
    // Length in paragraphs, version, checksum; then the features: a configuration table is
    // there, and without an IMCR the machine starts in virtual wire mode.
    let mut pointer = [&b"_MP_"[..], &address, &[1, SPECIFICATION_1_4, 0, 0, 0, 0, 0, 0]].concat();
    set_checksum(&mut pointer, 10);
    put(memory, &[pointer, table].concat(), EBDA, EBDA_END)
}

fn configuration_table(vcpus: u8, pins: usize) -> Vec<u8> {
    // An id of its own beside the local APICs'.
    let io_apic = vcpus;
    let mut entries: Vec<Vec<u8>> = Vec::new();
    for id in 0..vcpus {
        let flags = if id == 0 { ENABLED | BOOT_PROCESSOR } else { ENABLED };
        entries.push([&[PROCESSOR, id, LOCAL_APIC_VERSION, flags, 0, 0, 0, 0], &CPU_FEATURES[..], &[0; 8]].concat());
    }
    entries.push([&[BUS, 0], &b"ISA   "[..]].concat());
    let address = (IO_APIC as u32).to_le_bytes();
    entries.push([&[IO_APIC_ENTRY, io_apic, IO_APIC_VERSION, ENABLED], &address[..]].concat());
    // Flags 0: polarity and trigger conform to the bus, which for ISA is active high and edge.
    entries.extend((0..pins as u8).map(|pin| vec![IO_INTERRUPT, INT, 0, 0, 0, pin, io_apic, pin]));
    entries.push(vec![LOCAL_INTERRUPT, EXT_INT, 0, 0, 0, 0, 0, 0]);
    entries.push(vec![LOCAL_INTERRUPT, NMI, 0, 0, 0, 0, ALL_LOCAL_APICS, 1]);

    let body = entries.concat();
    let length = (HEADER_LEN + body.len()) as u16;
    let mut table =
        [&b"PCMP"[..], &length.to_le_bytes(), &[SPECIFICATION_1_4, 0], b"VESICLE ", b"MICROVM     "].concat();
    table.extend([0; 6]); // no OEM table
    table.extend((entries.len() as u16).to_le_bytes());
    table.extend((LOCAL_APIC as u32).to_le_bytes());
    table.extend([0; 4]); // no extended table
    table.extend(body);
    set_checksum(&mut table, 7);
    table
}

/// Makes all bytes sum to zero.
fn set_checksum(table: &mut [u8], at: usize) {
    let sum = table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(checksum) = table.get_mut(at) {
        *checksum = 0u8.wrapping_sub(sum);
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::config::HugePages;
    use crate::memory::{GuestRam, MIB};

    fn table(vcpus: u8, pins: usize) -> Vec<u8> {
        let ram = GuestRam::new(MIB, HugePages::None).unwrap();
        write(ram.memory(), vcpus, pins).unwrap();
        let mut bytes = vec![0; (EBDA_END - EBDA) as usize];
        ram.memory().read_slice(&mut bytes, GuestAddress(EBDA)).unwrap();
        bytes
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn a_guest_finds_every_vcpu_and_pin() {
        for (vcpus, count) in [(1u8, 5), (2, 8), (32, MAX_IO_APIC_PINS)] {
            let bytes = table(vcpus, count);
            assert_eq!((&bytes[..4], sum(&bytes[..16])), (&b"_MP_"[..], 0));
            assert_eq!(bytes[4..8], (EBDA as u32 + 16).to_le_bytes());
            let length = usize::from(u16::from_le_bytes([bytes[20], bytes[21]]));
            let (header, mut rest) = bytes[16..16 + length].split_at(HEADER_LEN);
            assert_eq!((&header[..4], sum(&bytes[16..16 + length])), (&b"PCMP"[..], 0));
            assert_eq!(header[36..40], 0xFEE0_0000u32.to_le_bytes());
            assert_eq!(16 + length, len(vcpus.into(), count));

            let (mut kinds, mut apics, mut pins) = ([0; 5], Vec::new(), Vec::new());
            while let Some(&kind) = rest.first() {
                let entry;
                (entry, rest) = rest.split_at(if kind == PROCESSOR { 20 } else { 8 });
                kinds[usize::from(kind)] += 1;
                match kind {
                    PROCESSOR => apics.push((entry[1], entry[3])),
                    IO_INTERRUPT => pins.push((entry[5], entry[7])),
                    _ => {}
                }
            }
            assert_eq!(kinds, [usize::from(vcpus), 1, 1, count, 2]);
            assert_eq!(kinds.iter().sum::<usize>(), usize::from(u16::from_le_bytes([header[34], header[35]])));
            let boot = |id| if id == 0 { 3 } else { 1 };
            assert_eq!(apics, (0..vcpus).map(|id| (id, boot(id))).collect::<Vec<_>>());
            assert_eq!(pins, (0..count as u8).map(|pin| (pin, pin)).collect::<Vec<_>>());
        }
    }

    #[test]
    fn more_vcpus_than_fit_are_refused() {
        let ram = GuestRam::new(MIB, HugePages::None).unwrap();
        assert!(write(ram.memory(), u8::MAX, MAX_IO_APIC_PINS).is_err());
        let small = GuestRam::new(4096, HugePages::None).unwrap();
        assert!(write(small.memory(), 1, MAX_IO_APIC_PINS).is_err());
    }
}
