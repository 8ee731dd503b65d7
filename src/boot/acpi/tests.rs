use std::process::Command;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::config::HugePages;
use crate::memory::{GuestRam, MIB};

fn ram() -> GuestRam {
    GuestRam::new(2 * MIB, HugePages::None).unwrap()
}

fn places() -> Vec<MmioDevice> {
    (0..).map_while(MmioDevice::nth).collect()
}

fn bytes_at(ram: &GuestRam, gpa: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    ram.memory().read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
    bytes
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// The table at `gpa`, as long as it says it is and with a sound checksum.
fn table(ram: &GuestRam, gpa: u64, signature: &[u8]) -> Vec<u8> {
    let length: u32 = ram.memory().read_obj(GuestAddress(gpa + 4)).unwrap();
    let bytes = bytes_at(ram, gpa, length as usize);
    assert_eq!((&bytes[..4], sum(&bytes)), (signature, 0));
    bytes
}

/// XSDT, FADT, MADT and DSDT, found as a guest finds them.
fn walk(ram: &GuestRam, rsdp: u64) -> [Vec<u8>; 4] {
    let rsdp = bytes_at(ram, rsdp, 36);
    assert_eq!((&rsdp[..8], rsdp[15], sum(&rsdp[..20]), sum(&rsdp)), (&b"RSD PTR "[..], 2, 0, 0));
    let xsdt = table(ram, u64_at(&rsdp, 24), b"XSDT");
    assert_eq!(xsdt.len(), 36 + 2 * 8);
    let fadt = table(ram, u64_at(&xsdt, 36), b"FACP");
    let madt = table(ram, u64_at(&xsdt, 44), b"APIC");
    let dsdt = table(ram, u64_at(&fadt, 140), b"DSDT");
    [xsdt, fadt, madt, dsdt]
}

#[test]
fn a_guest_finds_sound_tables_where_the_bios_has_them() {
    let ram = ram();
    let rsdp = write_tables(ram.memory(), 32, &places()).unwrap();
    assert!((0xE_0000..0x10_0000).contains(&rsdp) && rsdp.is_multiple_of(16), "ACPI 6.5 §5.2.5.1");
    let [_, fadt, madt, _] = walk(&ram, rsdp);
    assert_eq!(fadt.len(), 276);
    let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
    assert_eq!(flags, 1 << 20 | 1 << 10 | 1 << 5 | 1 << 4);
    assert_eq!((fadt[116], u64_at(&fadt, 120), fadt[128]), (1, 0x64, 0xFE), "reset: 0xFE to I/O port 0x64");
    assert_eq!(u16::from_le_bytes([fadt[109], fadt[110]]), 0b101110);

    let (local, io) = madt[44..].split_at(32 * 8);
    let ids: Vec<_> = local.chunks(8).map(|entry| (entry[0], entry[2], entry[3], entry[4])).collect();
    assert_eq!(ids, (0..32).map(|id| (0, id, id, 1)).collect::<Vec<_>>());
    assert_eq!(io, [&[1, 12, 0, 0], &0xFEC0_0000u32.to_le_bytes()[..], &[0; 4]].concat());
    assert_eq!(madt[36..40], 0xFEE0_0000u32.to_le_bytes());
}

#[test]
fn the_compiler_reads_what_was_meant() {
    let ram = ram();
    let rsdp = write_tables(ram.memory(), 2, &places()).unwrap();
    let [_, _, _, dsdt] = walk(&ram, rsdp);
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("dsdt.aml"), dsdt).unwrap();
    let Ok(iasl) = Command::new("iasl").args(["-d", "dsdt.aml"]).current_dir(&dir).output() else {
        return eprintln!("SKIPPED: iasl is not installed");
    };
    assert!(iasl.status.success(), "{}", String::from_utf8_lossy(&iasl.stderr));
    let source = std::fs::read_to_string(dir.path().join("dsdt.dsl")).unwrap();
    let words = source.split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(words.matches("\"LNRO0005\"").count(), MAX_VIRTIO_DEVICES);
    assert_eq!(
        words.matches("Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive").count(),
        MAX_VIRTIO_DEVICES + 3
    );
    for device in places() {
        assert!(words.contains(&format!("0x{:08X}, // Address Base 0x00001000, // Address Length", device.base)));
        assert!(words.contains(&format!("0x{:08X}, }}", device.irq)), "irq {}", device.irq);
    }
    assert!(words.contains("Notify (\\_SB.VGEN, 0x80)"));
    assert!(words.contains("EisaId (\"PNP0501\")") && words.contains("EisaId (\"PNP0303\")"));
}

#[test]
fn tables_that_do_not_fit_are_refused() {
    let small = GuestRam::new(0xE_0000, HugePages::None).unwrap();
    assert!(write_tables(small.memory(), 1, &[]).is_err());
}
